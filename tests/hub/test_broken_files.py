"""Broken, hostile and interrupted files: one named error, no code run, the last good state kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import time

import pytest
import torch

import ast_fast
from ast_fast import hub
from ast_fast.config import ModelConfig

CONFIG = ModelConfig(
    label_dim=5, input_fdim=32, input_tdim=32, embed_dim=64, depth=1, num_heads=1, dead_heads=False
)
SETTINGS = {"model": CONFIG.to_dict(), "frontend": None}


@pytest.fixture
def folder(tmp_path):
    ast_fast.ASTModel.from_config(CONFIG).save_pretrained(tmp_path)
    return tmp_path


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, name, old_format):
    canary = tmp_path / "canary"
    file = tmp_path / name
    payload = {"v.cls_token": torch.zeros(1), "x": Evil(canary)}
    torch.save(payload, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(hub.CheckpointError, match="was not run") as caught:
        hub.read_weights(file)
    assert str(file) in str(caught.value) and "torch.save(model.state_dict()" in str(caught.value)
    with pytest.raises(hub.CheckpointError):
        ast_fast.ASTModel.from_pretrained(tmp_path if name.endswith("bin") else file)
    assert not canary.exists()


def header_bomb(good):
    return struct.pack("<Q", 2**60) + b"{}"


def deep_header(good):
    text = b'{"a":' + b"[" * 100_000
    return struct.pack("<Q", len(text)) + text


def lying_offsets(good):
    text = json.dumps(
        {"v.cls_token": {"dtype": "F32", "shape": [9], "data_offsets": [0, 2**40]}}
    ).encode()
    return struct.pack("<Q", len(text)) + text


DAMAGES = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "header cut": lambda good: good[:20],
    "random": lambda good: bytes(torch.randint(256, (5000,)).tolist()),
    "html": lambda good: b"<!DOCTYPE html><html>404</html>" * 40,
    "header bomb": header_bomb,
    "deep header": deep_header,
    "lying offsets": lying_offsets,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_damaged_files_give_one_named_error(folder, kind, damage):
    file = folder / "model.safetensors"
    if kind == "pth":
        file = folder / "model.pth"
        torch.save(ast_fast.ASTModel.from_config(CONFIG).state_dict(), file)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(hub.CheckpointError) as caught:
        ast_fast.ASTModel.from_pretrained(file)
    assert file.name in str(caught.value)
    assert not isinstance(caught.value, RecursionError)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_no_flipped_byte_escapes_as_another_error(folder, kind):
    file = folder / "model.safetensors"
    if kind == "pth":
        file = folder / "model.pth"
        torch.save(ast_fast.ASTModel.from_config(CONFIG).state_dict(), file)
    good = file.read_bytes()
    draw = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(60):
        bad = bytearray(good)
        # headers and tables of contents sit at both ends
        for place in torch.randint(-2000, 2000, (3,), generator=draw).tolist():
            bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        try:
            hub.read_weights(file, input_fdim=32)
            outcomes.add("read")
        except hub.CheckpointError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list: expected a state dict"),
        ({}, "expected a state dict"),
        ({"v.cls_token": torch.zeros(1), "epoch": 3}, r"more than tensors \('epoch'\)"),
        ({"conv.weight": torch.zeros(1)}, "are of no known AST: expected the original's"),
        ({"v.cls_token": torch.zeros(1)}, "is not a whole AST: cannot read sizes"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(hub.CheckpointError, match=message):
        ast_fast.ASTModel.from_pretrained(tmp_path / "model.pth")


def test_a_layout_that_cannot_be_found_says_what_to_give(tmp_path):
    model = ast_fast.ASTModel.from_config(
        CONFIG.replace(input_fdim=128, input_tdim=128, fstride=11, tstride=9)
    )
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(hub.CheckpointError, match="say how it was trained: strides="):
        hub.read_weights(tmp_path / "x.pth")
    assert hub.read_weights(tmp_path / "x.pth", fstride=11, tstride=9)[1]["model"]["fstride"] == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list: expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a": "' + "x" * (16 * 2**20) + '"}', "expected settings of at most 16 MiB"),
    ],
)
def test_broken_config_json(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(hub.CheckpointError, match=message) as caught:
        ast_fast.ASTModel.from_pretrained(folder)
    assert "config.json" in str(caught.value)


def test_settings_with_unknown_or_impossible_values(folder):
    state = hub.read_weights(folder)[0]
    for model, message in (
        ({**CONFIG.to_dict(), "colour": 1}, "has no setting colour"),
        ({**CONFIG.to_dict(), "depth": -1}, "depth=-1: expected at least 1"),
        ({**CONFIG.to_dict(), "depth": "two"}, "cannot become a model"),
        ("nothing", "settings without a model"),
    ):
        hub.write_pretrained(folder, state, {"model": model, "frontend": None})
        with pytest.raises(hub.CheckpointError, match=message):
            ast_fast.ASTModel.from_pretrained(folder)


def test_an_index_may_not_point_out_of_its_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"v.cls_token": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(hub.CheckpointError, match="names no files of its own directory"):
        ast_fast.ASTModel.from_pretrained(tmp_path)


def test_settings_of_a_later_version_are_not_taken_for_ours(folder):
    state = hub.read_weights(folder)[0]
    later = {"model": CONFIG.to_dict(), "frontend": None, "version": 2, "member": "another"}
    hub.write_pretrained(folder, state, later)
    with pytest.raises(hub.CheckpointError, match=r"version 2, and this ast_fast reads version 1"):
        ast_fast.ASTModel.from_pretrained(folder)


def test_parts_that_hold_the_same_tensor_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index = {"weight_map": {"v.cls_token": "a.safetensors", "v.pos_embed": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(hub.CheckpointError, match=r"b\.safetensors' holds .*, as another part"):
        ast_fast.ASTModel.from_pretrained(folder)


def test_places_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "empty", "holds no weights: expected model.safetensors or pytorch_model.bin"),
        (tmp_path / "absent", "does not exist: expected a file, a directory or a hub id"),
        ("weights/model.pth", "does not exist: expected a file, a directory or a hub id"),
        ("../../etc/passwd", "does not exist|is no readable|cannot be read"),
    ):
        with pytest.raises(hub.CheckpointError, match=message):
            ast_fast.ASTModel.from_pretrained(source)


def test_an_unreachable_hub_says_what_to_download(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        hub.CheckpointError, match=r"no route to host.*download https://huggingface\.co/MIT/x"
    ):
        ast_fast.ASTModel.from_pretrained("MIT/x")


def in_child(work):
    """Run in a forked child; returns its process id. Nothing here starts OpenMP threads."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def numbered(step):
    # many small tensors: large ones would start OpenMP threads, which a forked child cannot
    state = {f"v.t{i}": torch.full((20_000,), float(step)) for i in range(40)}
    return {"v.cls_token": torch.full((3,), float(step)), **state}


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    hub.write_pretrained(tmp_path, numbered(0), {"model": {"step": 0}})
    seen = set()
    for kill in range(20):

        def save_forever():
            for step in range(1, 10_000):
                hub.write_pretrained(tmp_path, numbered(step), {"model": {"step": step}})

        before = (tmp_path / "config.json").stat().st_ino
        child = in_child(save_forever)
        give_up = time.monotonic() + 60
        while (tmp_path / "config.json").stat().st_ino == before and time.monotonic() < give_up:
            time.sleep(0.001)
        time.sleep(0.002 * kill)  # somewhere in a later save
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state, info = hub.read_weights(tmp_path)
        values = {float(v) for tensor in state.values() for v in (tensor.min(), tensor.max())}
        assert values == {float(info["model"]["step"])}
        seen |= values
    assert len(seen) > 1  # the kills did fall among finished saves
    # what the kills left behind is swept up by a save an hour later
    for left in tmp_path.glob(".*.partial"):
        os.utime(left, (0, 0))
    hub.write_pretrained(tmp_path, numbered(1), {"model": {"step": 1}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    hub.write_pretrained(tmp_path, numbered(0), {"model": {"step": 0}})

    def save_with_little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            hub.write_pretrained(tmp_path, numbered(1), {"model": {"step": 1}})
        except hub.CheckpointError as error:
            assert "what was there before is kept" in str(error)
            return
        raise AssertionError("the save went through")

    assert os.waitpid(in_child(save_with_little_room), 0)[1] == 0
    state, info = hub.read_weights(tmp_path)
    assert info["model"]["step"] == 0 and float(state["v.t3"].max()) == 0.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(hub.CheckpointError, match=r"cannot be written .*choose another directory"):
        hub.write_pretrained(tmp_path / "file" / "m", numbered(1), SETTINGS)


def test_views_and_shared_tensors_are_written_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"v.cls_token": base, "v.a": base.t(), "v.b": base[1], "v.c": base[::2]}
    hub.write_pretrained(tmp_path, state, {"model": {}})
    back = hub.read_weights(tmp_path)[0]
    assert all(torch.equal(back[key], state[key]) for key in state)
