"""Which epoch becomes a run's model: the best on the clips held out, and that is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file

from ast_fast import cli
from ast_fast.run_folder import RunFolder
from ast_fast.training import loop
from ast_fast.training.recipe import list_recipes, read_config

SMALL = (
    "model=ast_mini_p16_s10",
    "frontend.num_frames=16",
    "frontend.num_mel_bins=32",
    "train.epochs=4",
    "train.batch_size=8",
    "train.lr=0.01",
    "train.keep_checkpoints=1",
)
ACCURACIES = [0.5, 0.9, 0.9, 0.4]
LOSSES = [1.0, 0.7, 0.6, 2.0]  # of equals the third is better

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sounds(tmp_path):
    rng = np.random.default_rng(0)
    for name, hz in (("low", 250), ("high", 2500)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for index in range(8):
            wave = 0.3 * np.sin(2 * np.pi * hz * (1 + 0.1 * rng.random()) * np.arange(3000) / 16000)
            sf.write(tmp_path / "sounds" / name / f"{index}.wav", wave, 16000)
    return tmp_path / "sounds"


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that come out as told, one an epoch; and the weights that each was of."""
    plain, seen = loop.evaluate, []

    def evaluate(model, *arguments, **options):
        found = plain(model, *arguments, **options)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        same = [i for i, each in enumerate(seen) if alike(each, weights)]
        place = same[0] if same else len(seen)
        if not same:
            seen.append(weights)
        found.figures.update(accuracy=ACCURACIES[place], loss=LOSSES[place])
        return found

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return seen


def alike(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items() if name in two)


def train(*arguments, sets=SMALL):
    options = [part for setting in sets for part in ("--set", setting)]
    return cli.main(["train", *map(str, arguments), *options])


def saved(run):
    return load_file(next((run / "model").glob("*.safetensors")))


def test_the_saved_model_is_the_best_epoch_and_that_is_said(sounds, scripted, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--data", sounds, "--run", run, "--holdout", "0.25") == 0
    assert alike(saved(run), scripted[2]) and not alike(saved(run), scripted[3])
    said = capsys.readouterr().out
    assert (
        "of epoch 3 of 4, the best on the clips held out (accuracy 0.9000; of the last epoch 0.4000)"
        in said
    )
    result = json.loads((run / "result.json").read_text())
    assert (result["kept"], result["epoch"]) == ("best", 3)
    assert result["figures"]["accuracy"] == 0.9 and result["figures"]["loss"] == 0.6
    # what reports and comparisons go by is the model that the run left
    folder = RunFolder.read(run)
    assert folder.final["accuracy"] == 0.9
    assert folder.model_folder("final") == folder.model_folder("best") == run / "model"


def test_keep_last_saves_the_last_epoch_and_names_the_best(sounds, scripted, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--data", sounds, "--run", run, "--holdout", "0.25", "--keep", "last") == 0
    assert alike(saved(run), scripted[3])
    said = capsys.readouterr().out
    assert "of the last epoch, 4 (the best on the clips held out was epoch 3" in said
    result = json.loads((run / "result.json").read_text())
    assert (result["kept"], result["epoch"], result["figures"]["accuracy"]) == ("last", 4, 0.4)


def test_a_resumed_run_keeps_the_best_epoch_of_before(sounds, scripted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    step = loop.Trainer._train_step

    def interrupted(trainer, *arguments):
        # in the last epoch: the best one came before
        if trainer.step == 6:
            trainer._request_stop()
        return step(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, "_train_step", interrupted)
    assert train("--data", sounds, "--run", run, "--holdout", "0.25") == 130
    assert not (run / "model").exists()
    monkeypatch.setattr(loop.Trainer, "_train_step", step)
    assert train("--run", run, "--resume", sets=()) == 0
    assert alike(saved(run), scripted[2])
    assert json.loads((run / "result.json").read_text())["epoch"] == 3


def test_of_averaged_weights_the_best_epochs_average_is_kept(sounds, scripted, tmp_path):
    run = tmp_path / "run"
    sets = (*SMALL, "train.average.ema=0.5")
    assert train("--data", sounds, "--run", run, "--holdout", "0.25", sets=sets) == 0
    assert alike(saved(run), scripted[2])
    trained = load_file(
        next((run / "checkpoints" / "step-00000006" / "model").glob("*.safetensors"))
    )
    assert not alike(saved(run), trained)


def test_without_clips_held_out_it_is_said_that_nothing_was_chosen(sounds, tmp_path, capsys):
    run = tmp_path / "run"
    sets = (*SMALL, "train.epochs=1")
    assert train("--data", sounds, "--run", run, "--holdout", "0", sets=sets) == 0
    assert "of the last epoch, 1: no clips are held out to choose by" in capsys.readouterr().out


def test_recipes_report_the_model_after_all_epochs_as_before():
    assert read_config(None).keep == "best"
    assert {name: read_config(name).keep for name in list_recipes()} == dict.fromkeys(
        list_recipes(), "last"
    )
    with pytest.raises(ValueError, match="keep='first': expected best or last"):
        read_config(None, ["keep=first"])


def test_what_is_not_a_number_is_never_the_best():
    trainer = loop.Trainer.__new__(loop.Trainer)
    trainer.best = trainer.best_loss = None
    assert trainer._is_best(0.5, 1.0)
    assert not trainer._is_best(float("nan"), 0.1) and not trainer._is_best(0.5, float("nan"))
    assert trainer.best == 0.5
