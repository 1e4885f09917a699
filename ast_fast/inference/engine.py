"""Windows through a model: batches of one size across clips, and what comes of each clip.

A batch may hold windows of several clips, and a long clip lies in many batches; results come in the
order of the clips. On a CUDA device features are made on a stream of their own, the model's forward is
replayed from a recording, and a batch is launched before the one before it is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AudioConfig, LogMelConfig
from ..data.dataset import read_for
from ..data.transfer import on_side_stream
from ..finite import NotFiniteError, finite_row, weights_not_finite
from ..frontend import log_mel_features
from ..graphs import GraphedForward
from ..sample_rows import Allocate, allocate_empty, moved, sample_rows
from .loading import Activation, activate
from .outputs import (
    ClipOutput,
    Failure,
    FrameGrid,
    Gathered,
    NonFiniteOutputError,
    Pooling,
    Wanted,
)
from .reader import MAX_BYTES, SPAN_SECONDS, Begin, End, Event, Failed, Window, WindowReader
from .sources import Unit
from .windows import WindowPlan

Mark = Begin | End | Failed | int  # a number: samples of a window, the next row
_PREFETCH = 2


@dataclasses.dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows as one tensor, and what happened around them.

    Attributes:
        wave: [B, N] float32 or int16, zeros after each window's end.
        lengths: [B] int64.
        marks: in order; a number stands for a window, and is its length.
    """

    wave: Tensor
    lengths: Tensor
    marks: list[Mark]

    def __len__(self) -> int:
        return self.wave.shape[0]

    def to(self, device: torch.device | str) -> WindowBatch:
        """The same with its tensors on a device."""
        lengths = self.lengths.to(device, non_blocking=True)
        return WindowBatch(moved(self.wave, device), lengths, self.marks)


def collate_windows(events: list[Event], allocate: Allocate = allocate_empty) -> WindowBatch:
    """A batch of the windows among events: int16 if all are, float32 otherwise."""
    clips = [event.clip for event in events if isinstance(event, Window)]
    whole = bool(clips) and all(clip.dtype == torch.int16 for clip in clips)
    dtype = torch.int16 if whole else torch.float32
    longest = max((clip.length for clip in clips), default=0)
    wave = sample_rows(len(clips), longest, dtype, allocate)
    for row, clip in zip(wave, clips, strict=True):
        clip.copy_to(row[: clip.length])
        row[clip.length :].zero_()
    lengths = torch.tensor([clip.length for clip in clips], dtype=torch.int64)
    marks = [event.clip.length if isinstance(event, Window) else event for event in events]
    return WindowBatch(wave, lengths, marks)


class Heads(nn.Module):
    """A model as one function of features [B, S, F]: its outputs side by side, [B, K] in float32.

    Probabilities, then those over time, then the embedding: the mean of the prefix tokens after the
    final norm, which is what the head reads.
    """

    def __init__(self, model: Any, activation: Activation, wanted: Wanted) -> None:
        super().__init__()
        self.model, self.activation, self.wanted = model, activation, wanted

    def forward(self, x: Tensor) -> Tensor:
        """[B, K]."""
        model, wanted = self.model, self.wanted
        if not wanted.frames and not wanted.embedding:
            return activate(model(x), self.activation)
        prefix = model.config.num_prefix_tokens
        tokens = model.forward_features(x) if wanted.frames else model.v(x, prefix_only=True)
        embedding = tokens[:, :prefix].mean(1)
        parts = []
        if wanted.scores:
            parts.append(activate(model.mlp_head(embedding), self.activation))
        if wanted.frames:
            patches = tokens[:, prefix:].unflatten(1, model.config.grid).mean(1)
            parts.append(activate(model.mlp_head(patches), self.activation).flatten(1))
        if wanted.embedding:
            parts.append(embedding.float())
        return torch.cat(parts, dim=1)


class Engine:
    """Runs a model over clips of any length.

    Args:
        model: an `ASTModel` in evaluation mode, on the device to use.
        activation: "softmax" or "sigmoid".
        wanted: what is kept.
        hop_s: seconds from window to window; None: one after the other.
        pooling: how scores of windows become the clip's.
        audio: how files are read; the rate is the model's.
        batch_size: windows a batch.
        num_workers: processes that read; 0 reads between batches.
        max_bytes: samples read ahead.
        span_seconds: read at a time of a long file.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        activation: Activation,
        wanted: Wanted,
        *,
        hop_s: float | None = None,
        pooling: Pooling = "mean",
        audio: AudioConfig | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        max_bytes: int = MAX_BYTES,
        span_seconds: float = SPAN_SECONDS,
    ) -> None:
        if pooling not in ("mean", "max"):
            raise ValueError(f"pooling={pooling!r}: expected mean or max")
        if batch_size < 1 or num_workers < 0 or max_bytes < 1:
            raise ValueError(
                f"batch_size={batch_size}, num_workers={num_workers}, max_bytes={max_bytes}: "
                "expected at least 1, 0 and 1"
            )
        self.model, self._wanted = model, wanted
        self.front: LogMelConfig = model.frontend_config
        self.plan = WindowPlan.of(self.front, hop_s)
        self._pooling: Pooling = pooling
        audio = read_for(self.front, audio)
        # half the memory where a file holds 16 bits, and the same features to the bit
        self._audio = audio.replace(dtype="auto") if audio.dtype == "float32" else audio
        self._batch_size, self._num_workers = batch_size, num_workers
        self._max_bytes, self._span_seconds = max_bytes, span_seconds
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._heads = Heads(model, activation, wanted).eval()
        graphed = self._device.type == "cuda"
        # on a GPU one batch computes while the results of the one before are taken apart
        self._depth = int(graphed)
        self._call: Callable[[Tensor], Tensor] = (
            GraphedForward(self._heads) if graphed else self._heads
        )
        self._grid = FrameGrid(self.plan, model.config) if wanted.frames else None

    def run(self, units: Iterator[Unit]) -> Generator[ClipOutput | Failure, None, None]:
        """The outputs of clips in order; a clip that cannot be read is a `Failure` at its place.

        Raises:
            NotFiniteError: the model's weights are NaN or infinite.
        """
        reader = WindowReader(
            units,
            self.plan,
            self._audio,
            num_workers=self._num_workers,
            max_bytes=self._max_bytes,
            span_seconds=self._span_seconds,
        )
        launched: deque[tuple[list[Mark], Tensor | None, Any]] = deque()
        clips: list[Gathered] = []  # the one whose windows are coming, if any
        with contextlib.closing(self._batches(reader)) as batches:
            for batch, features in batches:
                launched.append((batch.marks, *self._launch(features)))
                while len(launched) > self._depth:
                    yield from self._finish(clips, *launched.popleft())
            while launched:
                yield from self._finish(clips, *launched.popleft())

    def _batches(self, reader: WindowReader) -> Generator[tuple[WindowBatch, Tensor], None, None]:
        if self._device.type == "cuda":
            # what feeds training, with windows for clips
            feed: Any = on_side_stream
            source = functools.partial(reader.batches, self._batch_size)
            yield from feed(source, collate_windows, self._device, self._features, _PREFETCH)
            return
        with contextlib.closing(reader.batches(self._batch_size)) as batches:
            for events in batches:
                batch = collate_windows(events).to(self._device)
                yield batch, self._features(batch)

    @torch.no_grad()
    def _features(self, batch: WindowBatch) -> Tensor:
        return log_mel_features(batch.wave, self.front, batch.lengths).to(self._dtype)

    @torch.no_grad()
    def _launch(self, features: Tensor) -> tuple[Tensor | None, Any]:
        """Outputs [B, K] on their way to the CPU, and the event that says that they have come."""
        if not len(features):
            return None, None
        try:
            outputs = self._call(features)
            if not outputs.is_cuda:
                return outputs, None
            # PyTorch keeps freed pinned memory: nothing is allocated after the first batches
            host = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True)
            host.copy_(outputs, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            return host, arrived
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"batch_size={self._batch_size}: a batch does not fit into the device's memory; "
                "lower it"
            ) from error

    def _finish(
        self, clips: list[Gathered], marks: list[Mark], outputs: Tensor | None, arrived: Any
    ) -> Iterator[ClipOutput | Failure]:
        """Take a batch apart: rows to their clips, and the clips that end in it."""
        if arrived is not None:
            arrived.synchronize()
        scores, curves, embeddings = self._parts(outputs)
        finite = None if outputs is None else finite_row(outputs).tolist()
        row = 0
        for mark in marks:
            if isinstance(mark, Begin):
                clips.append(Gathered(mark, self._wanted, self._pooling))
            elif isinstance(mark, Failed):
                clips.clear()
                yield Failure(mark.name, mark.path, mark.error, mark.number)
            elif isinstance(mark, End):
                clip = clips.pop()
                yield self._spoiled(clip) if clip.not_finite else clip.output(mark, self.plan)
            else:
                clip = clips[-1]
                assert finite is not None
                clip.not_finite += not finite[row]
                clip.add(
                    None if scores is None else scores[row],
                    None if embeddings is None else embeddings[row],
                    None if curves is None else self._curve(clip, curves[row], mark),
                )
                row += 1

    def _spoiled(self, clip: Gathered) -> Failure:
        """A clip for which the model gives NaN: its own failure, unless every clip's would be."""
        begin = clip.begin
        found = weights_not_finite(self.model)
        if found is not None:
            raise NotFiniteError(
                f"{begin.name}: the model gives NaN or infinite values, because its weights are: {found}; "
                "take a checkpoint from before they became so"
            )
        reason = (
            f"the model gives NaN or infinite values for {clip.not_finite} of {clip.count} windows; run it "
            "in float32, or look at the clip"
        )
        error = NonFiniteOutputError(begin.name, reason)
        return Failure(begin.name, begin.path, error, begin.number)

    def _parts(self, outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Probabilities [B, classes], over time [B, t, classes], and embeddings [B, C]."""
        if outputs is None:
            return None, None, None
        wanted, config = self._wanted, self.model.config
        sizes = [
            config.label_dim if wanted.scores else 0,
            config.grid[1] * config.label_dim if wanted.frames else 0,
            config.embed_dim if wanted.embedding else 0,
        ]
        scores, curves, embeddings = outputs.split(sizes, dim=1)
        return (
            scores if wanted.scores else None,
            curves.unflatten(1, (config.grid[1], -1)) if wanted.frames else None,
            embeddings if wanted.embedding else None,
        )

    def _curve(self, clip: Gathered, curve: Tensor, length: int) -> tuple[Tensor, Tensor]:
        assert self._grid is not None
        columns, times = self._grid.kept(clip.begin.starts, clip.count, length)
        return times, curve[columns]
