"""Every block of docs/inference.md and docs/reports.md runs, in the order of the page."""

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import cli, create_model
from ast_fast.config import LogMelConfig
from ast_fast.data.syllables import read_syllables

PAGES = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(page):
    return re.findall(r"^```(\w+)\n(.*?)^```", (PAGES / page).read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}
    model = create_model(
        "ast_mini_p16_s10",
        num_classes=3,
        labels=("cat", "dog", "rain"),
        frontend_config=LogMelConfig(num_mel_bins=32, num_frames=32),
        **sizes,
    )
    model.save_pretrained(folder / "model")
    found = read_syllables()
    (folder / "clips").mkdir()
    for index in range(6):
        sf.write(folder / "clips" / f"{index:02}.wav", found.waves[index].numpy(), 16000)
    long = np.concatenate([wave.numpy() for wave in found.waves[:20]])
    sf.write(folder / "long.wav", long, 16000)
    for index, (wave, tone) in enumerate(zip(found.waves[:48], found.tones, strict=False)):
        (folder / "tones" / str(tone)).mkdir(parents=True, exist_ok=True)
        sf.write(folder / "tones" / str(tone) / f"{index}.wav", wave.numpy(), 16000)
    return folder


def run_shell(line):
    """A line of a shell block: the command in this process, torchrun as it is."""
    words = shlex.split(line)
    if words[0] == "ast-fast":
        assert cli.main(words[1:]) == 0, line
        return
    assert words[0] == "torchrun", line
    with socket.socket() as port:
        port.bind(("localhost", 0))
        words[1:1] = ["--master-port", str(port.getsockname()[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGES.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["inference.md", "reports.md"])
def test_every_block_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    names: dict = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for kind, text in blocks_of(page):
            if kind == "python":
                exec(compile(text, page, "exec"), names)
            else:
                assert kind == "sh"
                for line in text.splitlines():
                    if not line.startswith("torchrun"):  # tens of seconds: below
                        run_shell(line)
    if page == "inference.md":
        assert len(names["times"]) == len(names["curves"]) > 20
        assert names["vectors"]["clips/00.wav"].shape == (32,)
        assert np.load("vectors.npy").shape == (7, 32)
        assert len(Path("night.jsonl").read_text().splitlines()) == 7
        assert not list(place.glob("*.parts"))
    else:
        assert (place / "runs" / "one" / "report.html").is_file()
        assert "settings that differ" in said.getvalue() and Path("compare.html").is_file()


@pytest.mark.slow
def test_the_line_with_torchrun_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for _, text in blocks_of("inference.md") for line in text.splitlines()]
    (line,) = [line for line in lines if line.startswith("torchrun")]
    run_shell(line)
    assert np.load("shared.npy").shape == (6, 32)
