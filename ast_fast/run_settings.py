"""Settings of a run that follow from its clips: the model's length, statistics, and the recipe where none is named."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .audio import AudioReport
from .config import AudioConfig, LogMelConfig
from .data import Collate, Data, dataset_of
from .data.dataset import max_samples, read_for
from .data.examine import Moments
from .data.prepare import CLIPS
from .data.prepared_figures import prepared_moments
from .frontend import log_mel_features
from .reference.mel import mel_sizes
from .training import RunConfig
from .training.default_recipe import PATCH, STRIDE, default_recipe, frames_for, stride_for
from .training.logs import say
from .training.recipe import read_config

_SAMPLED = 500  # clips: enough for mean and std to the second digit
_BINS = 64  # of the default model
_SHARE = 0.95  # of the clips, which fit into the model's length


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Some training clips: how long they are, and the moments of their energies.

    Attributes:
        seconds: of each that could be read.
        of: which they are, for people.
        mean: of the log-mel energies, padding left out.
        std: likewise.
    """

    seconds: tuple[float, ...]
    of: str
    mean: float
    std: float


def sample_clips(front: LogMelConfig, data: Data, audio: AudioConfig, seed: int) -> Sample:
    """Read up to 500 training clips.

    Args:
        front: the front end, whose length, mean and std do not count.
        data: the training clips.
        audio: how files are read.
        seed: of the draw.

    Raises:
        ValueError: none of them can be read.
    """
    dataset = dataset_of(data, audio)
    chosen = random.Random(seed).sample(range(len(dataset)), min(_SAMPLED, len(dataset)))
    raw = front.replace(num_frames=None, mean=0.0, std=0.5)
    report, count, total, squares = AudioReport(), 0, 0.0, 0.0
    seconds = []
    for index in chosen:
        batch = Collate(len(dataset.classes), multi_label=True)([dataset[index]])
        report.merge(batch.report)
        if len(batch):
            seconds.append(int(batch.lengths[0]) / front.sample_rate_hz)
            energies = log_mel_features(batch.wave, raw).double()
            count += energies.numel()
            total += float(energies.sum())
            squares += float(energies.square().sum())
    if not count:
        raise ValueError(f"no clip could be read to measure statistics: {report.summary()}")
    mean = total / count
    std = max(squares / count - mean * mean, 1e-8) ** 0.5
    return Sample(tuple(seconds), f"{report.clips} of {len(dataset)} training clips", mean, std)


def measured(
    front: LogMelConfig, data: Data, audio: AudioConfig, seed: int, path: Path
) -> dict[str, Any]:
    """Mean and std of the energies of training clips, padding left out, and of which clips they are."""
    exact = prepared_moments(path, data, front)
    if isinstance(exact, Moments):
        of = f"all {len(data)} training clips, from {path / CLIPS}"
        return {"mean": exact.mean, "std": exact.std(), "of": of}
    found = sample_clips(front, data, audio, seed)
    of = found.of + (f" ({exact})" if exact else "")
    return {"mean": found.mean, "std": found.std, "of": of}


def settle(
    settings: RunConfig, data: Data, seed: int, overrides: Sequence[str] | None
) -> RunConfig:
    """The settings of a run that begins, with what its clips decide.

    The length is that of the clips where a model named by its architecture starts from random weights and
    no length is said. All else comes from `default_recipe` where no recipe and no model is named.

    Args:
        settings: as they were read.
        data: the clips to train on.
        seed: of the draw of the clips whose length is measured.
        overrides: single settings, where no recipe is named; None where one is.
    """
    said = settings.front_changes
    if not settings.is_architecture or settings.weights != "random":
        return settings
    named = any(text.partition("=")[0].strip() == "model" for text in overrides or ())
    sample, wanted = None, said.get("num_frames")
    if wanted is None:
        # what the length is made of, before the model is there
        front = LogMelConfig(num_mel_bins=_BINS).replace(**said)
        audio = read_for(front, settings.audio)
        sample = sample_clips(front, data, audio, seed)
        samples = round(float(np.quantile(sample.seconds, _SHARE)) * front.sample_rate_hz)
        wanted = mel_sizes(**front.framing).num_frames(samples)
    found = settings
    if overrides is not None and not named:
        found = _default(settings, data, wanted, overrides)
    if sample is not None:
        sizes = found.sizes or {}
        frames = frames_for(wanted, sizes.get("patch_tdim", PATCH), sizes.get("tstride", STRIDE))
        found = found.replace(frontend={**found.front_changes, "num_frames": frames})
        heard = (max_samples(front.replace(num_frames=frames)) or 0) / front.sample_rate_hz
        most = "" if frames >= wanted else ", no more without being told"
        say(
            f"length: the model hears {frames} frames, {heard:.2f} s{most}: of {sample.of} {_SHARE:.0%} last at "
            f"most {np.quantile(sample.seconds, _SHARE):.2f} s, the longest {max(sample.seconds):.2f} s; "
            "--set frontend.num_frames=... sets it"
        )
    return found


def _default(settings: RunConfig, data: Data, wanted: int, overrides: Sequence[str]) -> RunConfig:
    """The recipe that follows from the clips, under what is said."""
    frames = wanted
    if "num_frames" not in settings.front_changes:
        frames = frames_for(wanted, PATCH, stride_for(wanted))
    values = default_recipe(
        *(len(data), len(data.classes), frames),
        num_mel_bins=settings.front_changes.get("num_mel_bins", _BINS),
        loss=settings.train.loss,
    )
    found = read_config(None, overrides, under=values)
    # one of several runs has a seed of its own
    train = found.train.replace(seed=settings.train.seed)
    say(
        f"default recipe for {len(data)} clips of {len(data.classes)} classes: {train.epochs} epochs of batches of "
        f"{train.batch_size}, lr {train.lr:g}, {found.model} with {_in_words(found.sizes)}; run.json has all of it"
    )
    return found.replace(train=train)


def _in_words(sizes: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (sizes or {}).items()) or "its own sizes"
