"""Clips as datasets: files of a manifest, or waveforms already in memory, and how they batch.

A file that cannot be read does not end an epoch: its place in the batch stays empty, and the batch
says which file it was and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..audio import AudioDecodeError, AudioError, AudioReport, load
from ..config import AudioConfig, LogMelConfig
from ..reference.mel import mel_sizes
from ..sample_rows import Allocate, allocate_empty, moved, sample_rows
from .manifest import Manifest, ManifestError


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One item: waveform [N], labels, its index, what reading it changed, and what a reader adds."""

    wave: Tensor
    labels: tuple[int, ...]
    index: int
    report: AudioReport
    facts: Any = None

    @property
    def length(self) -> int:
        """Samples."""
        return self.wave.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples: float32 or int16."""
        return self.wave.dtype

    def copy_to(self, row: Tensor) -> None:
        """Put the samples into `row` [N], in its dtype; int16 becomes float32 by 1/32768."""
        copy_wave(self.wave, row)


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    """An item that could not be read."""

    index: int
    report: AudioReport


class MixPlan(NamedTuple):
    """Which clips of a batch are mixed, with whom, and how much; see `WholeSetMixup`."""

    rows: list[int]  # places in the batch
    partners: list[int]  # places in the dataset
    weights: list[float]  # of the clip itself


@dataclasses.dataclass(frozen=True, slots=True)
class Mix:
    """Partners of the clips of a batch that are to be mixed, read along with it.

    Attributes:
        rows: [M] int64, which clips of the batch, each once.
        wave: [M, N] their partners, as `Batch.wave`.
        lengths: [M] int64, valid samples of the partners.
        targets: [M] or [M, classes], as `Batch.targets`.
        weights: [M] float32, of the clip itself; its partner has the rest.
        indices: [M] int64, places of the partners in the dataset, on the CPU.
    """

    rows: Tensor
    wave: Tensor
    lengths: Tensor
    targets: Tensor
    weights: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> Mix:
        """The same with its tensors on a device, but for `indices`."""
        names = ("rows", "lengths", "targets", "weights")
        there = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **there, wave=moved(self.wave, device))


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Clips padded to the longest.

    Attributes:
        wave: [B, N] float32 or int16; zeros after each clip's end; rows begin at multiples of 16 samples.
        lengths: [B] int64, valid samples.
        targets: [B] int64 class indices, or [B, classes] float32 for multi-label sets and for numbers
            to predict.
        indices: [B] int64, places in the dataset, on the CPU.
        report: what reading changed, and what was skipped.
        mix: partners from the whole set, if the feeder was asked to read them.
    """

    wave: Tensor
    lengths: Tensor
    targets: Tensor
    indices: Tensor
    report: AudioReport
    mix: Mix | None = None

    def __len__(self) -> int:
        return self.wave.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device, but for `indices`."""
        names = ("lengths", "targets")
        there = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        mix = None if self.mix is None else self.mix.to(device)
        return dataclasses.replace(self, **there, wave=moved(self.wave, device), mix=mix)


def max_samples(front: LogMelConfig) -> int | None:
    """Samples that a front end of fixed length can use: up to one hop beyond its last frame."""
    if front.num_frames is None:
        return None
    sizes = mel_sizes(**front.framing)
    return sizes.window_samples + front.num_frames * sizes.hop_samples - 1


def read_for(front: LogMelConfig, audio: AudioConfig | None = None) -> AudioConfig:
    """How clips for a front end are read: at its rate, and padded, with a note, where they fill no frame of it.

    Args:
        front: of the model.
        audio: the rest; its rate does not count.
    """
    audio = audio or AudioConfig()
    sizes, rate = mel_sizes(**front.framing), front.sample_rate_hz
    least = {"none": sizes.window_samples, "reflect": sizes.n_fft // 2 + 1, "zeros": 1}
    # half a sample more, which rounding down takes away again
    least_ms = (least[sizes.padding] + 0.5) * 1000.0 / rate
    if int(rate * audio.min_ms * 0.001) >= least[sizes.padding]:
        least_ms = audio.min_ms
    return audio.replace(sample_rate_hz=rate, min_ms=least_ms)


class ClipSet(Protocol):
    """What training and evaluation need of a dataset.

    For regression it has `values` too, [N, K] float32, and `classes` are the names of its columns.
    """

    classes: tuple[str, ...]
    labels: list[tuple[int, ...]]
    sample_rate_hz: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip | Skip: ...


class AudioDataset(Dataset[Any]):
    """The files of a manifest.

    Args:
        manifest: files and labels.
        audio: how to read them; one sample rate for all.
        cache: keep each waveform in memory after it was first read.
        strict: raise the AudioError of a bad file rather than skip and count it.
    """

    def __init__(
        self,
        manifest: Manifest,
        audio: AudioConfig | None = None,
        *,
        cache: bool = False,
        strict: bool = False,
    ) -> None:
        self.manifest = manifest
        self.audio = audio or AudioConfig()
        if self.audio.sample_rate_hz is None:
            raise ValueError("audio.sample_rate_hz is None: expected one rate for the whole set")
        self.sample_rate_hz = self.audio.sample_rate_hz
        self.classes = manifest.classes
        self.labels = manifest.labels
        self.values, self.splits = manifest.values, manifest.splits
        self.strict = strict
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.manifest)

    def name(self, index: int) -> str:
        """How messages name a clip."""
        return repr(self.manifest.paths[index])

    def __getitem__(self, index: int) -> Clip | Skip:
        labels = self.labels[index]
        if self._cache is not None and index in self._cache:
            return Clip(self._cache[index], labels, index, AudioReport(clips=1))
        try:
            clip = load(self.manifest.file(index), self.audio)
        except (AudioError, ManifestError) as error:
            if self.strict:
                raise
            if isinstance(error, ManifestError):  # a link out of the root
                error = AudioDecodeError(self.name(index), str(error))
            report = AudioReport()
            report.skip(error)
            return Skip(index, report)
        if self._cache is not None:
            self._cache[index] = clip.wave
        return Clip(clip.wave, labels, index, clip.report)


def check_one_label(dataset: ClipSet) -> None:
    """Refuse, for problems of one label a clip, a clip that has none or several.

    Raises:
        ValueError: names the first, where it is listed, and how many there are.
    """
    bad = [index for index, labels in enumerate(dataset.labels) if len(labels) != 1]
    if not bad:
        return
    first, name = bad[0], getattr(dataset, "name", None)
    where = f"clip {first}" if name is None else str(name(first))
    manifest = getattr(dataset, "manifest", None)
    if manifest is not None and manifest.lines[first]:
        where = f"{manifest.source}, line {manifest.lines[first]}: {where}"
    count = len(dataset.labels[first])
    more = f" ({len(bad)} clips have not one)" if len(bad) > 1 else ""
    raise ValueError(
        f"{where} has {count or 'no'} label{'s' if count else ''}{more}: expected one; train with "
        "loss='binary_cross_entropy' (evaluate with --multi-label) where clips may have several or none"
    )


class WaveformDataset(Dataset[Any]):
    """Clips that are in memory already.

    Args:
        waves: waveforms [N], float32 or int16, all of one dtype.
        labels: class indices of each.
        classes: class names.
        sample_rate_hz: rate of all.
        values: [N, K] float32 numbers to predict, for regression; labels are empty tuples then.
    """

    def __init__(
        self,
        waves: Sequence[Tensor],
        labels: Sequence[tuple[int, ...]],
        classes: tuple[str, ...],
        sample_rate_hz: int = 16000,
        values: np.ndarray | None = None,
    ) -> None:
        if len(waves) != len(labels):
            raise ValueError(f"labels: got {len(labels)} for {len(waves)} waves")
        if values is not None and values.shape != (len(waves), len(classes)):
            raise ValueError(f"values: got {values.shape}: expected {(len(waves), len(classes))}")
        self.values = values
        self.waves = list(waves)
        self.labels = list(labels)
        self.classes = classes
        self.sample_rate_hz = sample_rate_hz

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, index: int) -> Clip:
        return Clip(self.waves[index], self.labels[index], index, AudioReport(clips=1))


def copy_wave(wave: Tensor, row: Tensor) -> None:
    """Copy samples; into float32 an int16 wave is scaled by 1/32768."""
    row.copy_(wave)
    if wave.dtype == torch.int16 and row.is_floating_point():
        row.mul_(1.0 / 32768.0)


class Waveform(Protocol):
    """A clip as batches are made of: a `Clip`, or one that lies in a worker's memory."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Class indices."""

    @property
    def index(self) -> int:
        """Its number in the dataset."""

    @property
    def report(self) -> AudioReport:
        """What reading it changed."""

    @property
    def facts(self) -> Any:
        """What a reader adds."""

    @property
    def length(self) -> int:
        """Samples."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""

    def copy_to(self, row: Tensor) -> None:
        """Put the samples into `row` [N], in its dtype."""


class Collate:
    """Make a batch of what a dataset gave; `multi_label` picks the shape of the targets.

    Clips longer than `most_samples` are counted as cut, as the front end uses only their start. With
    `values` [N, K], those of the clips are the targets.
    """

    def __init__(
        self,
        num_classes: int,
        multi_label: bool = False,
        most_samples: int | None = None,
        values: np.ndarray | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.most_samples = most_samples
        self.values = None if values is None else torch.from_numpy(values.astype(np.float32))

    def __call__(
        self,
        items: Sequence[Waveform | Skip],
        allocate: Allocate = allocate_empty,
        plan: MixPlan | None = None,
    ) -> Batch:
        """Pad the clips to the longest; places that could not be read stay out and are counted.

        The batch is int16 if every clip is, and float32 otherwise. With a plan, the last items are the
        partners that it names, and a clip whose partner could not be read is not mixed.
        """
        count = len(items) - (0 if plan is None else len(plan.rows))
        report = AudioReport()
        for place, item in enumerate(items):
            if place < count or isinstance(item, Skip):  # a partner that is read changes no count
                report.merge(item.report)
        clips = [item for item in items[:count] if not isinstance(item, Skip)]
        pairs = [] if plan is None else _pairs(items, count, plan)
        everything = clips + [partner for _, partner, _ in pairs]
        lengths = [clip.length for clip in everything]
        if self.most_samples is not None:
            report.cut += sum(length > self.most_samples for length in lengths[: len(clips)])
        whole = bool(everything) and all(clip.dtype == torch.int16 for clip in everything)
        dtype = torch.int16 if whole else torch.float32
        wave = sample_rows(len(everything), max(lengths, default=0), dtype, allocate)
        for row, clip, length in zip(wave, everything, lengths, strict=True):
            clip.copy_to(row[:length])
            row[length:].zero_()
        targets = self._targets(everything)
        indices = torch.tensor([clip.index for clip in everything], dtype=torch.int64)
        sizes, n = torch.tensor(lengths, dtype=torch.int64), len(clips)
        mix = None
        if plan is not None:
            rows = torch.tensor([row for row, _, _ in pairs], dtype=torch.int64)
            weights = torch.tensor([weight for _, _, weight in pairs], dtype=torch.float32)
            mix = Mix(rows, wave[n:], sizes[n:], targets[n:], weights, indices[n:])
        return Batch(wave[:n], sizes[:n], targets[:n], indices[:n], report, mix)

    def _targets(self, clips: Sequence[Waveform]) -> Tensor:
        if self.values is not None:
            return self.values[[clip.index for clip in clips]]
        if self.multi_label:
            targets = torch.zeros(len(clips), self.num_classes)
            for row, clip in zip(targets, clips, strict=True):
                row[list(clip.labels)] = 1.0
            return targets
        for clip in clips:
            if len(clip.labels) != 1:
                raise ValueError(
                    f"clip {clip.index} has {len(clip.labels)} labels: expected one; train "
                    "with loss='binary_cross_entropy' for several"
                )
        return torch.tensor([clip.labels[0] for clip in clips], dtype=torch.int64)


def _pairs(
    items: Sequence[Waveform | Skip], count: int, plan: MixPlan
) -> list[tuple[int, Waveform, float]]:
    """Row in the batch, partner and weight of each clip that is mixed, if both could be read."""
    rows, reached = [], 0
    for item in items[:count]:
        rows.append(None if isinstance(item, Skip) else reached)
        reached += not isinstance(item, Skip)
    return [
        (row, partner, weight)
        for place, partner, weight in zip(plan.rows, items[count:], plan.weights, strict=True)
        if (row := rows[place]) is not None and not isinstance(partner, Skip)
    ]
