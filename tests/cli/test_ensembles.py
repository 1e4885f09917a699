"""Several models as one, on the command line."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import ASTModel, cli, create_model
from ast_fast.config import AudioConfig, LogMelConfig
from ast_fast.data import AudioDataset, read_folder
from ast_fast.training import evaluate

FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)
CLASSES = ("high", "low")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ensembles")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "data" / name).mkdir(parents=True)
        for index in range(8):
            sound = 0.1 * rng.standard_normal(4000 + 10 * index)
            sf.write(root / "data" / name / f"{index}.wav", sound, 16000)
    for seed, stride in ((0, 10), (1, 10), (2, 16)):
        torch.manual_seed(seed)
        model = create_model(
            "ast_mini_p16_s10",
            num_classes=2,
            labels=CLASSES,
            frontend_config=FRONT,
            input_fdim=32,
            input_tdim=32,
            fstride=stride,
            tstride=stride,
        )
        model.save_pretrained(root / f"m{seed}")
    return root


def test_an_ensemble_is_the_mean_of_the_predictions_whatever_the_patches(place, tmp_path, capsys):
    models = [place / f"m{seed}" for seed in (0, 1, 2)]
    file = tmp_path / "figures.json"
    assert run("ensemble", *models, "--data", place / "data", "--json", file) == 0
    data = AudioDataset(read_folder(place / "data"), AudioConfig(dtype="auto"))
    found = [evaluate(ASTModel.from_pretrained(each), data, batch_size=32) for each in models]
    mean = torch.stack([each.metrics.scores().double() for each in found]).mean(0)
    truth = torch.tensor([label for (label,) in data.labels])
    figures = json.loads(file.read_text())
    assert figures["ensemble"]["accuracy"] == pytest.approx(
        float((mean.argmax(1) == truth).double().mean())
    )
    for model, each in zip(figures["models"], found, strict=True):
        assert model["figures"] == pytest.approx(each.figures, rel=1e-4)
    assert "mean of the predictions of 3 models: accuracy" in capsys.readouterr().out


def test_the_mean_of_weights_is_that_of_every_tensor(place, tmp_path, capsys):
    assert run("average", place / "m0", place / "m1", "--out", tmp_path / "mean") == 0
    first, second = (ASTModel.from_pretrained(place / f"m{s}").state_dict() for s in (0, 1))
    found = ASTModel.from_pretrained(tmp_path / "mean")
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-8)
    assert found.labels == CLASSES
    assert run("average", place / "m0", place / "m1", "--out", tmp_path / "mean") == 2
    assert "holds something already" in capsys.readouterr().err
    assert run("average", place / "m0", place / "m2", "--out", tmp_path / "other") == 2
    assert "has another config than" in capsys.readouterr().err


def test_what_cannot_be_an_ensemble_is_refused(place, tmp_path, capsys):
    data = ("--data", place / "data")
    assert run("ensemble", place / "m0", *data) == 2
    assert "expected at least two" in capsys.readouterr().err
    torch.manual_seed(0)
    other = create_model(
        "ast_mini_p16_s10", num_classes=2, labels=("low", "high"), frontend_config=FRONT,
        input_fdim=32, input_tdim=32,
    )  # fmt: skip
    other.save_pretrained(tmp_path / "turned")
    assert run("ensemble", place / "m0", tmp_path / "turned", *data) == 2
    assert "has other classes than" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert run("average", place / "m0", tmp_path / "run", "--out", tmp_path / "x") == 2
    assert "is a run that is not finished" in capsys.readouterr().err
