"""Checkpoints that ask for gigabytes or for ever get a named error at once, in a process whose memory is watched.

The files are made and loaded by bombs.py, in one process of its own that has loaded good models before: what its
peak of resident memory grows by is what the file took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ast_fast
from ast_fast import hub
from ast_fast.config import ModelConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# a header of safetensors is read whole, as names of Python: twenty times its bytes
MOST_MIB, MOST_TIMES_FILE = 32.0, 20.0
MOST_SECONDS = 5.0
NAMES = [
    *("deflated.pth", "deflated and denied.pth", "overlapping.pth", "exbibytes.pth"),
    *("bytearray.pth", "bytearray packed.pth", "bytearray in the old format.pth"),
    *("first of the old format's pickles.pth", "tensor of a size.pth", "storage of a size.pth"),
    *("tensor of a size in a model.pth", "doubled lists.pth", "doubled dicts.pth"),
    *("storage that is short.pth", "string.pth", "tar.pth"),
    *("shape.safetensors", "overflow.safetensors", "length.safetensors", "overlap.safetensors"),
    *("many.safetensors", "metadata.safetensors"),
    *("depth", "a depth that a machine could hold", "width", "a width that a machine could hold"),
    *("labels", "frames", "mlp", "their depth", "their width", "their labels"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    done = subprocess.run(
        [sys.executable, str(HERE / "bombs.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


def test_every_file_was_tried(found):
    assert list(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_bomb_is_refused_at_once_with_nothing_allocated(found, name):
    row = found[name]
    assert row["error"] == "CheckpointError", row
    assert name in row["message"], row
    assert row["mib"] <= MOST_MIB + MOST_TIMES_FILE * row["file_mib"], row
    assert row["seconds"] <= MOST_SECONDS, row


def test_what_was_refused_says_what_it_asked_for(found):
    for name, words in (
        ("bytearray.pth", "holds a bytearray, or asks for one"),
        ("many.safetensors", "names 200000 tensors: expected those of a model, 100000 at most"),
        ("tensor of a size in a model.pth", "makes tensors of 85902"),
        ("depth", "depth=100000000: expected 1 to 1024"),
    ):
        assert words in found[name]["message"], found[name]


def test_weights_that_spell_no_bytearray_are_read(tmp_path):
    model = ast_fast.ASTModel.from_config(
        ModelConfig(label_dim=5, input_fdim=32, input_tdim=32, embed_dim=64, depth=1, num_heads=1)
    )
    for old in (False, True):
        torch.save(model.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
        state, _ = hub.read_weights(
            tmp_path / "x.pth", input_fdim=32, input_tdim=32, fstride=10, tstride=10
        )
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
