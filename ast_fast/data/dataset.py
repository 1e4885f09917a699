"""Clips as datasets: files of a manifest, or waveforms already in memory, and how they batch.

A file that cannot be read does not end an epoch: its place in the batch stays empty, and the batch
says which file it was and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..audio import AudioError, AudioReport, load
from ..config import AudioConfig, LogMelConfig
from ..reference.mel import mel_sizes
from .manifest import Manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One item: waveform [N], labels, its index, and what reading it changed."""

    wave: Tensor
    labels: tuple[int, ...]
    index: int
    report: AudioReport

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


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Clips padded to the longest.

    Attributes:
        wave: [B, N] float32 or int16; zeros after each clip's end.
        lengths: [B] int64, valid samples.
        targets: [B] int64 class indices, or [B, classes] float32 for multi-label sets.
        indices: [B] int64, places in the dataset, on the CPU.
        report: what reading changed, and what was skipped.
    """

    wave: Tensor
    lengths: Tensor
    targets: Tensor
    indices: Tensor
    report: AudioReport

    def __len__(self) -> int:
        return self.wave.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device, but for `indices`."""
        names = ("wave", "lengths", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **moved)


def max_samples(front: LogMelConfig) -> int | None:
    """Samples that a front end of fixed length can use: up to one hop beyond its last frame."""
    if front.num_frames is None:
        return None
    sizes = mel_sizes(**front.framing)
    return sizes.window_samples + front.num_frames * sizes.hop_samples - 1


class ClipSet(Protocol):
    """What training and evaluation need of a dataset."""

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
        self.strict = strict
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Clip | Skip:
        labels = self.labels[index]
        if self._cache is not None and index in self._cache:
            return Clip(self._cache[index], labels, index, AudioReport(clips=1))
        try:
            clip = load(self.manifest.file(index), self.audio)
        except AudioError as error:
            if self.strict:
                raise
            report = AudioReport()
            report.skip(error)
            return Skip(index, report)
        if self._cache is not None:
            self._cache[index] = clip.wave
        return Clip(clip.wave, labels, index, clip.report)


class WaveformDataset(Dataset[Any]):
    """Clips that are in memory already.

    Args:
        waves: waveforms [N], float32 or int16, all of one dtype.
        labels: class indices of each.
        classes: class names.
        sample_rate_hz: rate of all.
    """

    def __init__(
        self,
        waves: Sequence[Tensor],
        labels: Sequence[tuple[int, ...]],
        classes: tuple[str, ...],
        sample_rate_hz: int = 16000,
    ) -> None:
        if len(waves) != len(labels):
            raise ValueError(f"labels: got {len(labels)} for {len(waves)} waves")
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
    def length(self) -> int:
        """Samples."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""

    def copy_to(self, row: Tensor) -> None:
        """Put the samples into `row` [N], in its dtype."""


Allocate = Callable[[int, int, torch.dtype], Tensor]  # (rows, columns, dtype) -> [rows, columns]


def _allocate(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


class Collate:
    """Make a batch of what a dataset gave; `multi_label` picks the shape of the targets.

    Clips longer than `most_samples` are counted as cut, as the front end uses only their start.
    """

    def __init__(
        self, num_classes: int, multi_label: bool = False, most_samples: int | None = None
    ) -> None:
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.most_samples = most_samples

    def __call__(self, items: Sequence[Waveform | Skip], allocate: Allocate = _allocate) -> Batch:
        """Pad the clips to the longest; places that could not be read stay out and are counted.

        The batch is int16 if every clip is, and float32 otherwise.
        """
        report = AudioReport()
        for item in items:
            report.merge(item.report)
        clips = [item for item in items if not isinstance(item, Skip)]
        lengths = [clip.length for clip in clips]
        if self.most_samples is not None:
            report.cut += sum(length > self.most_samples for length in lengths)
        whole = bool(clips) and all(clip.dtype == torch.int16 for clip in clips)
        dtype = torch.int16 if whole else torch.float32
        wave = allocate(len(clips), max(lengths, default=0), dtype)
        for row, clip, length in zip(wave, clips, lengths, strict=True):
            clip.copy_to(row[:length])
            row[length:].zero_()
        if self.multi_label:
            targets = torch.zeros(len(clips), self.num_classes)
            for row, clip in zip(targets, clips, strict=True):
                row[list(clip.labels)] = 1.0
        else:
            for clip in clips:
                if len(clip.labels) != 1:
                    raise ValueError(
                        f"clip {clip.index} has {len(clip.labels)} labels: expected one; train "
                        "with loss='binary_cross_entropy' for several"
                    )
            targets = torch.tensor([clip.labels[0] for clip in clips], dtype=torch.int64)
        return Batch(
            wave,
            torch.tensor(lengths, dtype=torch.int64),
            targets,
            torch.tensor([clip.index for clip in clips], dtype=torch.int64),
            report,
        )
