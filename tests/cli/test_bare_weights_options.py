"""Every command that loads a model can be told what a file of bare weights does not say."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from ast_fast import cli, infer_command
from ast_fast.config import LogMelConfig, ModelConfig
from ast_fast.models.ast import ASTModel

CONFIG = ModelConfig(
    label_dim=2, input_fdim=64, input_tdim=100, fstride=16, tstride=10, embed_dim=64, depth=1,
    num_heads=2, dead_heads=False,
)  # fmt: skip
FRONT = LogMelConfig(num_mel_bins=64, num_frames=100, mean=-6.5, std=5.5)
FACTS = (
    *("--strides", "16", "10", "--input-frames", "100", "--mel-bins", "64", "--heads", "2"),
    *("--mean", "-6.5", "--std", "5.5"),
)
KNOWN = {
    **{"strides": (16, 10), "frames": 100, "mel_bins": 64, "heads": 2, "mean": -6.5, "std": 5.5}
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model as a directory and as bare weights, names of its classes, and two clips."""
    place = tmp_path_factory.mktemp("bare")
    torch.manual_seed(0)
    model = ASTModel.from_config(CONFIG, FRONT)
    model.save_pretrained(place / "told")
    torch.save(
        {"net." + name: value for name, value in model.state_dict().items()}, place / "bare.pth"
    )
    (place / "names.txt").write_text("high\nlow\n")
    time = np.arange(16000) / 16000
    for name, rate in (("high", 900), ("low", 200)):
        (place / "data" / name).mkdir(parents=True)
        soundfile.write(place / "data" / name / "x.wav", np.sin(2 * np.pi * rate * time) / 2, 16000)
    return place


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def results(command, place, out, model, *facts):
    data, names = place / "data", ("--labels", place / "names.txt")
    arguments = {
        "tag": (data, "--model", model, "--out", out / "x.jsonl", *names, "--all"),
        "embed": (data, "--model", model, "--out", out / "x.jsonl"),
        "eval": ("--data", data, "--model", model, "--json", out / "x.json", *names),
    }[command]
    assert run(command, *arguments, *facts) == 0
    lines = next(out.glob("x.json*")).read_text().splitlines()
    found = json.loads(lines[0]) if command != "eval" else json.loads("\n".join(lines))["figures"]
    return {
        key: value for key, value in found.items() if key not in ("seconds", "clips_per_second")
    }


@pytest.mark.parametrize("command", ["tag", "embed", "eval"])
def test_bare_weights_and_facts_give_what_the_directory_gives(place, tmp_path, command, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told = results(command, place, tmp_path / "a", place / "told")
    bare = results(command, place, tmp_path / "b", place / "bare.pth", *FACTS)
    assert str(told) == str(bare)
    assert "Guessed" not in caplog.text


@pytest.mark.parametrize("command", ["tag", "embed", "eval", "convert", "export", "listen"])
def test_what_is_missing_is_asked_for(place, tmp_path, command, capsys, monkeypatch):
    bare, data, out = place / "bare.pth", place / "data", tmp_path / "x.jsonl"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(3200))))
    arguments = {
        "tag": (data, "--model", bare),
        "embed": (data, "--model", bare, "--out", out),
        "eval": ("--data", data, "--model", bare),
        "convert": (bare, tmp_path / "out"),
        "export": (bare, tmp_path / "out"),
        "listen": ("--model", bare),
    }[command]
    assert run(command, *arguments) == 2
    assert "--strides" in capsys.readouterr().err
    # asked and answered in part: what remains is a guess that is told, or another question
    assert run(command, *arguments, "--strides", "16", "16") == 2
    assert "no layout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_convert_writes_what_was_said_and_prints_it(place, tmp_path, capsys):
    facts = ["--frames" if fact == "--input-frames" else fact for fact in FACTS]
    assert run("convert", place / "bare.pth", tmp_path / "out", *facts) == 0
    said = capsys.readouterr().out
    assert "every 16 x 10, 2 heads, log-mel of mean -6.5 and std 5.5" in said
    model = ASTModel.from_pretrained(tmp_path / "out")
    assert (model.config, model.frontend_config) == (CONFIG, FRONT)


def test_a_guess_is_printed(place, tmp_path):
    model = ASTModel.from_config(CONFIG.replace(input_fdim=128, input_tdim=128, fstride=10))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    command = [sys.executable, "-m", "ast_fast", "convert", str(tmp_path / "x.pth")]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Guessed: 1 heads (of width 64); 128 mel bins; strides 10 x 10" in done.stderr


def test_a_job_does_not_go_on_under_another_normalisation(place):
    """What a job knows its model by: the same weights heard otherwise are another model."""
    told = infer_command._weights(ASTModel.from_pretrained(place / "told"))
    again = infer_command._weights(ASTModel.from_pretrained(place / "bare.pth", **KNOWN))
    assert told == again
    for change in ({"mean": -1.0}, {"heads": 1}):
        other = ASTModel.from_pretrained(place / "bare.pth", **{**KNOWN, **change})
        assert infer_command._weights(other) != told
