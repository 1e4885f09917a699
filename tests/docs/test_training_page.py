"""Every block of docs/training.md runs, on sets laid out as the page names them."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch

from ast_fast import ASTModel, cli, sample_sets
from ast_fast.training.recipe import list_recipes, read_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what a test can wait for: the page's commands on a small model and few steps
QUICK = (
    *("--set", "model=ast_mini_p16_s10", "--set", "weights=random"),
    *("--set", "frontend.num_mel_bins=32", "--set", "frontend.num_frames=48"),
    *("--set", "train.epochs=1", "--set", "train.batch_size=8", "--set", "train.num_workers=0"),
    *("--set", "train.augment.freq_mask_bins=4", "--set", "train.augment.time_mask_frames=4"),
    *("--set", "train.average.first_epoch=0", "--set", "train.average.last_epoch=0"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(kind):
    blocks = [text for name, text in BLOCK.findall(PAGE.read_text()) if name == kind]
    return [line for text in blocks for line in text.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    sample_sets.make_esc50(folder / "ESC-50-master", clips=1)
    sample_sets.make_speech_commands(folder / "speech_commands_v0.02")
    sample_sets.make_audioset(folder / "audioset", seconds=0.5)
    sample_sets.make_deam(folder / "DEAM", seconds=0.5)
    (toml,) = [text for name, text in BLOCK.findall(PAGE.read_text()) if name == "toml"]
    (folder / "own.toml").write_text(toml)
    return folder


def test_every_command_runs(place, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(place)
    commands = [line for line in lines_of("sh") if line.startswith("ast-fast")]
    assert len(commands) == 13
    for line in commands:
        _, *arguments = shlex.split(line)
        small = QUICK if arguments[0] == "train" and "--resume" not in arguments else ()
        assert cli.main([*arguments, *small]) == 0, f"{line}\n{capsys.readouterr().err}"
    summary = json.loads(Path("runs/folds/summary.json").read_text())
    assert list(summary["runs"]) == ["fold-1", "fold-2"]
    assert "ci95" in summary["together"]["accuracy"]
    kept = ASTModel.from_pretrained("runs/seeds/seed-1/model").labels
    assert ASTModel.from_pretrained("runs/mean").labels == kept
    assert list(Path("runs/own/tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "run"), [(0, "runs/two"), (1, "runs/sharded")])
def test_the_lines_with_torchrun_run(number, run, place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for line in lines_of("sh") if line.startswith("torchrun")]
    assert len(lines) == 2
    line = lines[number]
    words = shlex.split(line)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0", *words[1:]]
    command[3:5] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, *QUICK, "--set", "train.accelerator=cpu"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (Path(run) / "model/model.safetensors").is_file()


def test_the_file_on_the_page_is_a_recipe_and_the_table_has_them_all(place):
    settings = tomllib.loads((place / "own.toml").read_text())
    config = read_config(str(place / "own.toml"))
    assert config.train.accumulate == settings["train"]["accumulate"] == 2
    for name in list_recipes():
        (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}`")]
        train = read_config(name).train
        rate, epochs, batch = re.search(r"([\d.e-]+), (\d+), (\d+)", row).groups()
        assert (float(rate), int(epochs), int(batch)) == (train.lr, train.epochs, train.batch_size)
        masks = f"{train.augment.freq_mask_bins} / {train.augment.time_mask_frames}"
        assert masks in row
        assert (f", {train.augment.mixup}" in row) == bool(train.augment.mixup)
    switches = re.findall(r'train\.reproduce=\'(\[".*?"\])\'', PAGE.read_text())
    assert len(switches) == 2
    for switch in switches:
        assert read_config("esc50", [f"train.reproduce={switch}"]).train.reproduce


def test_where_weights_cannot_be_had_the_error_says_what_to_do(
    place, tmp_path, monkeypatch, capsys
):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.chdir(place)
    monkeypatch.setenv("AST_FAST_HOME", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "none"))
    data = ("--data", "ESC-50-master", "--fold", "1", "--run", str(tmp_path / "run"))
    assert cli.main(["train", "esc50", *data, "--set", "weights=imagenet"]) == 2
    said = capsys.readouterr().err
    assert "deit_base_distilled_patch16_384" in said and "AST_FAST_HOME" in said
