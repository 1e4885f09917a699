"""Labels of a live stream: the last seconds through the model at every hop.

The frames of a window are kept, so that none is computed twice however much windows overlap.
Dimensions: N samples of a chunk, F mel bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._optional import require_package
from ..config import MAX_RATE_HZ, MIN_RATE_HZ, LogMelConfig
from ..finite import check_results
from ..frontend import log_mel_features
from ..inference import (
    Activation,
    best_labels,
    class_names,
    class_probabilities,
    load_model,
    resolve_activation,
)
from .log_mel import StreamingLogMel, as_chunk, frame_sizes

# 0.1 s or 1/3 s as a float is not quite what was meant: the nearest fraction with a denominator up to
# this is, and its multiples do not drift
_FINEST_SECONDS = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class StreamPrediction:
    """What one window of a stream sounds like.

    Attributes:
        start_s: where the window begins, in seconds from the start of the stream.
        end_s: where it ends. `predict` gives the samples from start_s to end_s, at the model's rate, the
            same probabilities (before smoothing).
        filled: share of the window's frames that are audio: below 1 until the stream is as long as the
            window; the model sees padding in place of the rest, as it does for a short file.
        labels: (name, probability) of the most probable classes, best first.
        probabilities: [classes], on the CPU.
    """

    start_s: float
    end_s: float
    filled: float
    labels: tuple[tuple[str, float], ...]
    probabilities: Tensor


class StreamingTagger:
    """Labels of a live stream: every `hop_s` seconds, those of the last `window_s` seconds.

    A result comes with the chunk that brings its last sample, and is the same for every way of cutting
    the stream into chunks: windows run through the model one at a time.

    Args:
        model: an `ASTModel`, or what `ASTModel.from_pretrained` takes; it is put in evaluation mode.
            Features are computed on its device.
        window_s: length of a window in seconds; by default all that the model takes. The model sees
            padding after a shorter one.
        hop_s: seconds from one result to the next. Beyond window_s, audio between windows is not
            heard: the spans of the results show it.
        top_k: how many labels.
        labels: class names, if the model has none or others are wanted.
        activation: as for `predict`.
        source_rate_hz: rate of the chunks, if it is not the model's: they are resampled with soxr, as
            files are. Results then come some 40 ms later, the filter's delay; their times are right.
        smoothing: weight of the probabilities before in each result, 0 (none) to below 1.
        non_finite: NaN and Inf in a chunk are refused, or set to 0 and counted in `zeroed_samples`.

    Raises:
        ValueError: an argument does not fit the model.

    >>> from ast_fast import create_model
    >>> tagger = StreamingTagger(create_model("ast_mini_p16_s10", num_classes=3), hop_s=0.5)
    >>> [result.end_s for result in tagger.push(torch.zeros(20000))]
    [0.5, 1.0]
    """

    def __init__(
        self,
        model: Any,
        window_s: float | None = None,
        hop_s: float = 1.0,
        top_k: int = 5,
        labels: Sequence[str] | None = None,
        activation: Activation = "auto",
        source_rate_hz: int | None = None,
        smoothing: float = 0.0,
        non_finite: Literal["error", "zero"] = "error",
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: expected at least 1")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing={smoothing}: expected 0 (none) to below 1")
        if non_finite not in ("error", "zero"):
            raise ValueError(f"non_finite={non_finite!r}: expected error or zero")
        self.model = load_model(model)
        self.config: LogMelConfig = self.model.frontend_config
        self.names = class_names(self.model, labels)
        self.top_k, self.activation = top_k, resolve_activation(activation, self.model)
        self.smoothing, self.non_finite = smoothing, non_finite
        self._sizes = frame_sizes(self.config)
        self._window = self._window_frames(window_s)
        self._hop = self._hop_samples(hop_s)
        rate_hz = self.config.sample_rate_hz
        self.source_rate_hz = rate_hz if source_rate_hz is None else source_rate_hz
        if not MIN_RATE_HZ <= self.source_rate_hz <= MAX_RATE_HZ:
            raise ValueError(
                f"source_rate_hz={source_rate_hz}: expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz"
            )
        self._mel = StreamingLogMel(self.config)
        self._ring = _Ring(self._window)
        self._resampler = self._make_resampler()
        self.reset()

    def _window_frames(self, window_s: float | None) -> int:
        most = self.config.num_frames
        if most is None:
            raise ValueError("the model's frontend_config has num_frames=None: expected a number")
        if window_s is None:
            return most
        frames = self._sizes.num_frames(int(_exact(window_s, "window_s") * self._rate_hz))
        if not 1 <= frames <= most:
            least_s, most_s = (self._samples(count) / self._rate_hz for count in (1, most))
            raise ValueError(
                f"window_s={window_s:g}: expected {least_s:g} s (one frame) to {most_s:g} s (the "
                "model's input)"
            )
        return frames

    def _hop_samples(self, hop_s: float) -> Fraction:
        hop = _exact(hop_s, "hop_s") * self._rate_hz
        if hop < self._sizes.hop_samples:
            least_s = self._sizes.hop_samples / self._rate_hz
            raise ValueError(f"hop_s={hop_s:g}: expected at least {least_s:g} s, one frame")
        return hop

    def _make_resampler(self) -> Any:
        if self.source_rate_hz == self._rate_hz:
            return None
        soxr = require_package("soxr", "resampling", "audio")
        return soxr.ResampleStream(
            self.source_rate_hz, self._rate_hz, 1, dtype="float32", quality="HQ"
        )

    @property
    def _rate_hz(self) -> int:
        return self.config.sample_rate_hz

    def _samples(self, frames: int) -> int:
        return self._sizes.window_samples + (frames - 1) * self._sizes.hop_samples

    @property
    def window_s(self) -> float:
        """Seconds of audio in a full window: a whole number of frames."""
        return self._samples(self._window) / self._rate_hz

    @property
    def hop_s(self) -> float:
        """Seconds from one result to the next."""
        return float(self._hop / self._rate_hz)

    @property
    def seconds(self) -> float:
        """Seconds of audio taken, in the time of the results."""
        return self._mel.num_samples / self._rate_hz

    @property
    def num_results(self) -> int:
        """Results given so far."""
        return self._given

    def reset(self) -> None:
        """Forget everything pushed: the next chunk begins another stream."""
        self._mel.reset()
        self._ring.clear()
        if self._resampler is not None:
            self._resampler.clear()
        self._dtype: torch.dtype | None = None
        self._hops = 0  # passed; the next result is due at sample (hops + 1) hop
        self._given = 0
        self._frames_told = 0  # frames there were at the last result
        self._smoothed: Tensor | None = None
        self._ended = False
        self.zeroed_samples = 0

    def push(self, chunk: Tensor | np.ndarray) -> list[StreamPrediction]:
        """Take the next samples [N] and return the results that are due; often none.

        Args:
            chunk: float32 in [-1, 1] or int16, at `source_rate_hz`, of any length.

        Raises:
            TypeError: the dtype is another one, or not that of the stream.
            ValueError: the shape does not fit, a sample is not finite, or the stream was flushed.
        """
        if self._ended:
            raise ValueError("the stream was flushed: call reset() to begin another")
        wave = as_chunk(chunk, (1,))
        if self._dtype not in (None, wave.dtype):
            raise TypeError(
                f"chunk is {wave.dtype}: expected {self._dtype} as before; convert it, or call "
                "reset() to begin another stream"
            )
        wave = self._finite(wave)
        self._dtype = wave.dtype
        if self._resampler is not None:
            wave = self._resample(wave, last=False)
        return self._advance(wave)

    def flush(self) -> list[StreamPrediction]:
        """End the stream: return what was still due, and a last result if frames came after it.

        Samples that fill no whole frame are in no result; a stream shorter than a frame has none.
        """
        if self._ended:
            return []
        results: list[StreamPrediction] = []
        if self._resampler is not None and self._dtype is not None:
            results = self._advance(self._resample(torch.empty(0), last=True))
        self._ended = True
        if self._mel.num_frames > self._frames_told:
            results.append(self._predict())
        return results

    def _finite(self, wave: Tensor) -> Tensor:
        if not wave.is_floating_point():
            return wave
        finite = wave.isfinite()
        bad = wave.numel() - int(finite.sum())
        if bad and self.non_finite == "error":
            raise ValueError(
                f"chunk: {bad} of {wave.numel()} samples are NaN or infinite: expected finite ones; "
                "repair the source, or set non_finite='zero'"
            )
        self.zeroed_samples += bad
        return torch.where(finite, wave, torch.zeros_like(wave)) if bad else wave

    def _resample(self, wave: Tensor, last: bool) -> Tensor:
        if wave.dtype == torch.int16:
            wave = wave.float() / 32768.0
        samples = np.ascontiguousarray(wave.cpu().numpy())
        return torch.from_numpy(self._resampler.resample_chunk(samples, last=last))

    def _advance(self, wave: Tensor) -> list[StreamPrediction]:
        results = []
        wave = wave.to(next(self.model.parameters()).device)
        while wave.shape[0]:
            # an exact product each time, so that no rounding adds up
            due = math.floor((self._hops + 1) * self._hop)
            part = wave[: due - self._mel.num_samples]
            self._ring.append(self._mel.push(part))
            wave = wave[part.shape[0] :]
            if self._mel.num_samples == due:
                self._hops += 1
                if self._mel.num_frames:
                    results.append(self._predict())
        return results

    @torch.no_grad()
    def _predict(self) -> StreamPrediction:
        total = self._frames_told = self._mel.num_frames
        audio = self._ring.latest()
        # what the front end gives for no audio at all is the padding
        features = log_mel_features(audio.new_empty(1, 0), self.config)
        features[0, : audio.shape[0]] = audio
        logits = self.model(features.to(next(self.model.parameters()).dtype))
        fresh = class_probabilities(logits, self.activation)[0]
        check_results(fresh[None], "probabilities", self.model)
        if self.smoothing and self._smoothed is not None:
            fresh = torch.lerp(fresh, self._smoothed, self.smoothing)
        self._smoothed = fresh
        self._given += 1
        start = (total - audio.shape[0]) * self._sizes.hop_samples
        return StreamPrediction(
            start / self._rate_hz,
            self._mel.num_samples / self._rate_hz,
            audio.shape[0] / self._window,
            best_labels(fresh, self.names, self.top_k),
            fresh.clone(),
        )


class _Ring:
    """The last `size` frames, always in one piece; each is moved at most once more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.clear()

    def clear(self) -> None:
        self._buffer: Tensor | None = None  # [2 size, F]
        self._end = 0

    def append(self, frames: Tensor) -> None:
        frames = frames[-self._size :]
        count = frames.shape[0]
        if self._buffer is None:
            self._buffer = frames.new_empty(2 * self._size, frames.shape[1])
        if self._end + count > 2 * self._size:
            kept = self._size - count
            # source and target do not overlap: the source begins at or after `size`
            self._buffer[:kept] = self._buffer[self._end - kept : self._end]
            self._end = kept
        self._buffer[self._end : self._end + count] = frames
        self._end += count

    def latest(self) -> Tensor:  # [min(size, frames so far), F]
        if self._buffer is None:
            raise ValueError("no frame has come yet")
        return self._buffer[max(0, self._end - self._size) : self._end]


def _exact(seconds: float, name: str) -> Fraction:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name}={seconds}: expected a positive number of seconds")
    return Fraction(seconds).limit_denominator(_FINEST_SECONDS)
