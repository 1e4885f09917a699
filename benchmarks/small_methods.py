"""Three ways to learn a small set: the package's default, a small CNN trained alike, and logistic regression.

All see the same training clips and say what the test clips are. The default is trained by the command that a
newcomer runs, on a folder of files; the CNN by the same loop with the settings that the default came to (length,
statistics, augmentation, epochs), and a rate of its own; the regression on means of log-mels over time, with C
chosen inside the training clips by group.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
import wave as wave_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_fast import ASTModel, LogMel
from ast_fast.config import LogMelConfig, TrainConfig
from ast_fast.data.dataset import WaveformDataset
from ast_fast.frontend import log_mel_features
from ast_fast.training import Trainer, evaluate

from .small_sets import RATE_HZ, SmallSet

CNN_LR = 4e-3  # the best of 1e-3, 2e-3 and 4e-3 on a fold of the initials, on which the default was chosen
Predicted = list[int]  # class of each test clip


def logistic(whole: SmallSet, train: list[int], test: list[int], spread: bool) -> Predicted:
    """Logistic regression on mean log-mels, and standard deviations if `spread`; C by inner folds of groups."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    raw = LogMel(num_mel_bins=64, num_frames=None, mean=0.0, std=0.5)
    rows = []
    for wave in whole.waves:
        energies = raw(wave[None])[0]
        rows.append(torch.cat([energies.mean(0)] + [energies.std(0)] * spread).numpy())
    x, y = np.stack(rows), np.array(indices_of(whole))
    groups = np.array(whole.groups)
    line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    search = GridSearchCV(
        line, {"logisticregression__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]}, cv=GroupKFold(3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inner folds may lack a class
        search.fit(x[train], y[train], groups=groups[train])
    return [int(each) for each in search.predict(x[test])]


def ours(
    whole: SmallSet, train: list[int], test: list[int], seed: int
) -> tuple[Predicted, dict[str, Any]]:
    """What `ast-fast train` makes of a folder of the training clips, with no setting but the seed.

    Returns:
        The predictions, and the settings that it came to.
    """
    from ast_fast import cli

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for i in train:
            file = place / "sounds" / whole.labels[i] / f"{i:04}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            with wave_module.open(str(file), "wb") as writer:
                writer.setparams((1, 2, RATE_HZ, 0, "NONE", "not compressed"))
                writer.writeframes(whole.waves[i].numpy().astype("<i2").tobytes())
        said = io.StringIO()
        command = ["train", "--data", f"{place}/sounds", "--run", f"{place}/run", "--holdout", "0"]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = cli.main([*command, "--set", f"train.seed={seed}"])
        if status:
            raise RuntimeError(f"training failed: {said.getvalue()[-2000:]}")
        model = ASTModel.from_pretrained(place / "run/model")
        assert model.labels == tuple(whole.classes)
        plan = json.loads((place / "run/run.json").read_text(encoding="utf-8"))
    settings = {**plan["settings"], "front": model.frontend_config.to_dict()}
    return _predicted(model, _dataset(whole, test)), settings


class SmallCNN(nn.Module):
    """Four convolutions with batch normalisation and pooling, a mean over time and frequency, and a line."""

    def __init__(self, front: LogMelConfig, num_classes: int) -> None:
        super().__init__()
        self.frontend_config = front
        layers: list[nn.Module] = []
        width = 1
        for number, wider in enumerate((16, 32, 64, 128)):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < 3 else []
            width = wider
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of spectrograms [B, S, F]."""
        return self.head(self.layers(x[:, None]).mean((2, 3)))

    def forward_waveform(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of waveforms [B, N]."""
        return self(log_mel_features(wave, self.frontend_config, lengths))

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """As checkpoints want it; nothing reads these."""
        folder.mkdir(parents=True)
        torch.save(state_dict, folder / "weights.pt")


def cnn(
    whole: SmallSet,
    train: list[int],
    test: list[int],
    seed: int,
    settings: dict[str, Any],
    lr: float = CNN_LR,
) -> Predicted:
    """The small CNN, trained as the default was."""
    front = LogMelConfig.from_dict(settings["front"])
    # its batch norms have counters and running means, which no average of weights holds
    config = TrainConfig.from_dict(settings["train"]).replace(lr=lr, seed=seed)
    config = config.replace(average=config.average.replace(ema=0.0))
    torch.manual_seed(seed)
    model = SmallCNN(front, len(whole.classes))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, _dataset(whole, train), config, folder, progress=False)
        trainer.fit()
    return _predicted(model, _dataset(whole, test))


def indices_of(whole: SmallSet) -> list[int]:
    """The class of each clip."""
    places = {name: place for place, name in enumerate(whole.classes)}
    return [places[label] for label in whole.labels]


def _dataset(whole: SmallSet, chosen: list[int]) -> WaveformDataset:
    known = indices_of(whole)
    waves, labels = [whole.waves[i] for i in chosen], [(known[i],) for i in chosen]
    return WaveformDataset(waves, labels, whole.classes, RATE_HZ)


def _predicted(model: Any, test: WaveformDataset) -> Predicted:
    scores = evaluate(model, test).metrics.scores()
    return [int(each) for each in scores.argmax(1)]
