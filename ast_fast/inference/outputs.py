"""What comes of a clip, put together from its windows as they come."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..audio import AudioError, AudioReport
from ..config import ModelConfig
from .reader import Begin, End
from .windows import WindowPlan

Pooling = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A clip that could not be read, or that the model gives NaN for, and why.

    Attributes:
        source: the clip, as messages name it.
        path: its path, if it is a file or lies in a shard.
        error: what was wrong.
        number: of the clip among the sources.
    """

    source: str
    path: str | None
    error: AudioError
    number: int = 0


class NonFiniteOutputError(AudioError):
    """What the model gives for a clip is NaN or infinite, though its weights and the clip's samples are not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be kept of each clip."""

    scores: bool = False  # pooled over windows
    embedding: bool = False  # mean over windows
    windows: bool = False  # of each window, too
    frames: bool = False  # scores over time


@dataclasses.dataclass(slots=True)
class ClipOutput:
    """What came of a clip; tensors are float32 on the CPU, and None unless wanted.

    Attributes:
        number: of the clip among the sources.
        source: the clip, as messages name it.
        path: its path, if it is a file or lies in a shard.
        seconds: length of the clip.
        spans_s: begin and end of each window, in seconds.
        report: what reading changed.
        scores: [classes], pooled over the windows.
        window_scores: [W, classes].
        embedding: [C], the mean over the windows.
        window_embeddings: [W, C].
        frame_times_s: [T] float64, centre of each point of the curves.
        frame_scores: [T, classes].
    """

    number: int
    source: str
    path: str | None
    seconds: float
    spans_s: list[tuple[float, float]]
    report: AudioReport
    scores: Tensor | None = None
    window_scores: Tensor | None = None
    embedding: Tensor | None = None
    window_embeddings: Tensor | None = None
    frame_times_s: Tensor | None = None
    frame_scores: Tensor | None = None


class Gathered:
    """A clip whose windows are coming. Holds sums rather than windows, unless each is wanted."""

    def __init__(self, begin: Begin, wanted: Wanted, pooling: Pooling) -> None:
        self.begin, self._wanted, self._pooling = begin, wanted, pooling
        self.count = self.not_finite = 0  # windows, and those whose numbers are NaN or infinite
        self._scores: Tensor | None = None
        self._embedding: Tensor | None = None
        self._each_scores: list[Tensor] = []
        self._each_embedding: list[Tensor] = []
        self._times: list[Tensor] = []
        self._curves: list[Tensor] = []

    def add(
        self,
        scores: Tensor | None,  # [classes]
        embedding: Tensor | None,  # [C]
        curve: tuple[Tensor, Tensor] | None,  # [T] and [T, classes]
    ) -> None:
        """The next window."""
        self.count += 1
        if scores is not None:
            if self._scores is None:
                self._scores = scores.clone()
            elif self._pooling == "mean":
                self._scores += scores
            else:
                torch.maximum(self._scores, scores, out=self._scores)
            if self._wanted.windows:
                self._each_scores.append(scores.clone())
        if embedding is not None:
            if self._embedding is None:
                self._embedding = embedding.clone()
            else:
                self._embedding += embedding
            if self._wanted.windows:
                self._each_embedding.append(embedding.clone())
        if curve is not None:
            self._times.append(curve[0])
            self._curves.append(curve[1].clone())

    def output(self, end: End, plan: WindowPlan) -> ClipOutput:
        """All of it."""
        begin, rate_hz = self.begin, plan.rate_hz
        begin.report.merge(end.report)
        spans = [
            (s / rate_hz, plan.end(s, end.total) / rate_hz) for s in begin.starts[: self.count]
        ]
        scores, embedding = self._scores, self._embedding
        if scores is not None and self._pooling == "mean":
            scores = scores / self.count
        return ClipOutput(
            begin.number,
            begin.name,
            begin.path,
            end.total / rate_hz,
            spans,
            _once(begin.report),
            scores,
            _stacked(self._each_scores),
            None if embedding is None else embedding / self.count,
            _stacked(self._each_embedding),
            torch.cat(self._times) if self._times else None,
            torch.cat(self._curves) if self._curves else None,
        )


def _stacked(rows: list[Tensor]) -> Tensor | None:
    return torch.stack(rows) if rows else None


def _once(report: AudioReport) -> AudioReport:
    """Findings of the spans of one clip count once."""
    for field in dataclasses.fields(report):
        if field.name not in ("skipped", "notes", "zeroed_samples"):
            setattr(report, field.name, min(1, getattr(report, field.name)))
    return report


class FrameGrid:
    """When the columns of patches of a window are, and which window a moment of a clip is taken from.

    Where windows overlap, each moment is taken from the window whose middle is nearest: it has heard
    most of what lies around.
    """

    def __init__(self, plan: WindowPlan, config: ModelConfig) -> None:
        self._plan = plan
        sizes, columns = plan.sizes, config.grid[1]
        first = torch.arange(columns, dtype=torch.float64) * config.tstride
        centre = (first + (config.patch_tdim - 1) / 2) * sizes.hop_samples
        if sizes.padding == "none":
            centre += sizes.window_samples / 2
        self._first, self._centre = first, centre

    def kept(self, starts: list[int], index: int, length: int) -> tuple[Tensor, Tensor]:
        """Columns of a window that belong to the clip's curve, and their times in seconds.

        Args:
            starts: first sample of each window of the clip.
            index: of the window.
            length: samples of the window; columns in the padding after them are left out.
        """
        plan, start = self._plan, starts[index]
        keep = self._first < max(1, plan.sizes.num_frames(length))
        samples = self._centre + start
        if index:
            keep &= samples >= (starts[index - 1] + start + plan.full) / 2
        if index + 1 < len(starts):
            keep &= samples < (start + starts[index + 1] + plan.full) / 2
        columns = keep.nonzero()[:, 0]
        return columns, samples[columns] / plan.rate_hz
