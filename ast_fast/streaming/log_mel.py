"""Log-mel of a stream that comes in chunks of any size: the frames of `LogMel`, each as soon as it can be.

A frame comes with the chunk that brings its last sample, and less than one frame of audio is kept.
Under the C++ backend a frame has a lane of its own from samples to logarithm, so that frames are bitwise
those of the whole waveform, whatever the chunks; Triton's have a row of their own, with the same effect.
In plain PyTorch the matrix product rounds by the number of frames it is given: there they are equal
within two roundings of float32.

Dimensions: B streams that run together, N samples of a chunk, s frames it completes, F mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import LogMelConfig
from ..frontend import log_mel_features
from ..reference.mel import MelSizes, mel_sizes
from ..sample_rows import sample_rows

_DTYPES = (torch.float32, torch.int16)


class StreamingLogMel:
    """Normalised log-mel of one stream, or of B streams in step, chunk by chunk.

    The first chunk settles shape, dtype and device until `reset`. No gradient flows through it. When
    the stream ends nothing is owed: samples after the last whole frame are in no frame of `LogMel`
    either. A NaN makes NaN of exactly the frames that hold it.

    Args:
        config: settings; AudioSet's by default. A stream has no fixed length: `num_frames` is taken as
            None.
        overrides: settings to change, by name.

    Raises:
        ValueError: `num_frames` is among the overrides, or a setting does not fit.

    >>> stream = StreamingLogMel()
    >>> [stream.push(torch.zeros(200)).shape[0] for _ in range(4)]
    [0, 1, 1, 1]
    """

    def __init__(self, config: LogMelConfig | None = None, **overrides: Any) -> None:
        if overrides.get("num_frames") is not None:
            raise ValueError(
                f"num_frames={overrides['num_frames']}: a stream has no fixed number of frames; "
                "leave it out"
            )
        self.config = (config or LogMelConfig()).replace(**{**overrides, "num_frames": None})
        self._sizes = frame_sizes(self.config)
        self.reset()

    def reset(self) -> None:
        """Forget everything pushed: the next chunk begins another stream, of any shape and dtype."""
        self._tail: Tensor | None = None  # [B, n] from the start of the next frame on
        self._one_stream = True
        self._skip = 0  # samples before the next frame, where the hop is longer than the window
        self._num_samples = 0

    @property
    def num_samples(self) -> int:
        """Samples pushed so far, of each stream."""
        return self._num_samples

    @property
    def num_frames(self) -> int:
        """Frames given so far, of each stream."""
        return self._sizes.num_frames(self._num_samples)

    @property
    def pending_samples(self) -> int:
        """Samples kept for frames to come, of each stream: always fewer than a window has."""
        return 0 if self._tail is None else self._tail.shape[1]

    @torch.no_grad()
    def push(
        self,
        chunk: Tensor | np.ndarray,  # [N] or [B, N]
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:  # [s, F] or [B, s, F]
        """Take the next samples and return the frames they complete; s may be 0.

        Args:
            chunk: float32 in [-1, 1] or int16 (scaled by 1/32768); N may be 0. It is not kept.
            out_dtype: dtype of the frames; float32 by default.

        Raises:
            TypeError: the dtype is another one, or not that of the stream.
            ValueError: the shape or device does not fit the stream.
        """
        wave = as_chunk(chunk, (1, 2))
        rows = wave if wave.dim() == 2 else wave[None]
        tail = self._tail
        if tail is not None:
            self._check_same(wave, tail)
            if tail.shape[1]:
                joined = sample_rows(
                    *(rows.shape[0], tail.shape[1] + rows.shape[1], rows.dtype),
                    lambda *shape: torch.empty(shape[:2], dtype=shape[2], device=rows.device),
                )
                rows = torch.cat((tail, rows), 1, out=joined)
        skipped = min(self._skip, rows.shape[1])
        rows = rows[:, skipped:]
        count = self._sizes.num_frames(rows.shape[1])
        if count:
            frames = log_mel_features(rows, self.config, out_dtype=out_dtype)
        else:  # most chunks of a few samples: not worth a call
            shape = (rows.shape[0], 0, self.config.num_mel_bins)
            frames = rows.new_empty(shape, dtype=out_dtype or torch.float32)
        done = count * self._sizes.hop_samples
        self._skip += max(0, done - rows.shape[1]) - skipped
        # a copy: a view would keep the whole chunk alive, and change with it
        self._tail = rows[:, done:].clone(memory_format=torch.contiguous_format)
        self._num_samples += wave.shape[-1]
        self._one_stream = wave.dim() == 1
        return frames[0] if self._one_stream else frames

    def _check_same(self, wave: Tensor, tail: Tensor) -> None:
        if wave.dtype != tail.dtype:
            raise TypeError(
                f"chunk is {wave.dtype}: expected {tail.dtype} as before; convert it, or call "
                "reset() to begin another stream"
            )
        if (wave.dim() == 1) != self._one_stream or wave.shape[:-1] not in ((), tail.shape[:1]):
            expected = "[N]" if self._one_stream else f"[{tail.shape[0]}, N]"
            raise ValueError(
                f"chunk has shape {tuple(wave.shape)}: expected {expected} as before; call reset() "
                "to begin another stream"
            )
        if wave.device != tail.device:
            raise ValueError(
                f"chunk is on {wave.device}: expected {tail.device} as before; move it there"
            )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on elsewhere or later; `torch.save` takes it."""
        return {
            "config": self.config.to_dict(),
            "tail": None if self._tail is None else self._tail.clone(),
            "one_stream": self._one_stream,
            "skip": self._skip,
            "num_samples": self._num_samples,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken.

        Raises:
            ValueError: it was taken under other settings.
        """
        theirs, ours = state["config"], self.config.to_dict()
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if other:
            raise ValueError(
                f"state has {', '.join(f'{name}={theirs.get(name)}' for name in other)}: expected "
                f"{', '.join(f'{name}={ours[name]}' for name in other)}, the settings of this stream"
            )
        self._tail = None if state["tail"] is None else state["tail"].clone()
        self._one_stream = state["one_stream"]
        self._skip, self._num_samples = state["skip"], state["num_samples"]


def frame_sizes(config: LogMelConfig) -> MelSizes:
    """Window, hop and FFT of a front end in samples.

    Raises:
        ValueError: the settings do not fit each other, the filters included, or need the whole clip.
    """
    if config.padding != "none":
        raise ValueError(
            f"padding={config.padding!r}: frames centred on hops need what comes after them; expected "
            "padding='none' for a stream"
        )
    if config.top_db is not None:
        raise ValueError(
            f"top_db={config.top_db:g}: the loudest value of a stream is known at its end only; "
            "expected top_db=None"
        )
    log_mel_features(torch.zeros(1, 0), config.replace(num_frames=None))  # checks the filters
    return mel_sizes(**config.framing)


def as_chunk(chunk: Tensor | np.ndarray, dims: tuple[int, ...]) -> Tensor:
    """A chunk as a tensor, its type, dtype and number of dimensions checked."""
    if isinstance(chunk, np.ndarray):
        # a copy: arrays over received bytes are read-only, which tensors cannot be
        wave = torch.from_numpy(chunk.copy())
    elif isinstance(chunk, Tensor):
        wave = chunk.detach()
    else:
        raise TypeError(f"chunk is {type(chunk).__name__}: expected a tensor or a NumPy array")
    if wave.dtype not in _DTYPES:
        raise TypeError(
            f"chunk is {wave.dtype}: expected float32 in [-1, 1] or int16; convert it first"
        )
    if wave.dim() not in dims:
        expected = "[N]" if dims == (1,) else "[N] or [B, N]"
        raise ValueError(f"chunk has shape {tuple(wave.shape)}: expected {expected}")
    return wave
