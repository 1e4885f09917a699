"""Clips that lie in memory, held to what files are held to: tensors, arrays, and what pipelines pass.

One entrance for whatever takes sound. Floats are in [-1, 1] and int16 is scaled by 1/32768, as in files; other
integers say nothing of their scale and are refused. NaN, other rates and clips under a window are refused, counted
or converted by the same `AudioConfig`, with the same notes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .audio import LARGEST_SAMPLE, AudioClip, Source, from_samples, load, source_name
from .audio_report import AudioEmptyError, AudioFormatError, AudioNonFiniteError
from .config import AudioConfig

AnyClip = Source | Tensor | np.ndarray | Mapping[str, Any]

EXPECTED = (
    "a path, the bytes of a file, an open file, a waveform [N] as a tensor or array, or a dict "
    '{"array" or "raw": waveform, "sampling_rate": Hz}'
)
_SAMPLES = ("array", "raw")
_KEYS = {*_SAMPLES, "sampling_rate", "path", "bytes"}
_FULL_SCALE = {
    "int32": "; divide 32-bit samples by 2**31",
    "uint8": "; (x - 128) / 128 of 8-bit samples",
    "int64": "; divide 16-bit samples by 32768, or store them as int16",
}


def is_clip(source: Any) -> bool:
    """Whether an object stands for one clip; lists, generators and arrays of paths are several."""
    if isinstance(source, np.ndarray):
        return source.dtype.kind not in "OSU"
    return isinstance(source, (str, os.PathLike, bytes, Tensor, Mapping)) or hasattr(source, "read")


def described(source: Any) -> str:
    """What was given, for messages: its kind, and shape and dtype where it has them."""
    if isinstance(source, (Tensor, np.ndarray)):
        kind = "a tensor" if isinstance(source, Tensor) else "an array"
        return f"{kind} {list(source.shape)} of {_name(source.dtype)}"
    if isinstance(source, Mapping):
        return f"a dict of {', '.join(map(repr, source)) or 'nothing'}"
    return f"{source!r:.80}, of type {type(source).__name__}"


def path_of(source: Any) -> str | None:
    """The path that a dict tells of its clip."""
    path = source.get("path") if isinstance(source, Mapping) else None
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None


def memory_name(source: Any) -> str:
    """How messages name a clip in memory."""
    if isinstance(source, (Tensor, np.ndarray, Mapping)):
        path = path_of(source)
        return "<waveform>" if path is None else source_name(path)
    return source_name(source)


def load_clip(source: AnyClip, config: AudioConfig, name: str | None = None) -> AudioClip:
    """Read one clip, wherever it lies, as mono audio at one rate.

    Args:
        source: what `load` takes; or a waveform [N], floating in [-1, 1] or int16, at `config.sample_rate_hz`; or a
            dict of samples ("array" or "raw") and their "sampling_rate", as transformers' pipelines and datasets
            have it; or one of a file ("bytes" or "path").
        config: rate, and what to do with clips that are not as expected.
        name: how messages name it.

    Raises:
        AudioError: one of its subclasses.
        TypeError: it is no clip.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, config, name)
    if isinstance(source, (Tensor, np.ndarray)):
        rate = config.sample_rate_hz
        if rate is None:
            raise TypeError(
                f"source is {described(source)} and no rate is known: pass "
                '{"array": waveform, "sampling_rate": Hz}'
            )
        return from_waveform(source, rate, name or "<waveform>", config)
    if not is_clip(source):
        raise TypeError(f"source is {described(source)}: expected {EXPECTED}")
    return load(source, config, name)


def from_waveform(samples: Any, rate_hz: int, name: str, config: AudioConfig) -> AudioClip:
    """What `load` would make of a file of these samples.

    Args:
        samples: [N], a tensor on any device or an array, floating in [-1, 1] or int16.
        rate_hz: their rate.
        name: for messages.
        config: rate, and what to do with clips that are not as expected.

    Raises:
        AudioError: one of its subclasses.
    """
    # limits are for what reading would allocate
    config = config.replace(max_seconds=math.inf, max_decoded_bytes=sys.maxsize)
    return from_samples(_mono(samples, name), rate_hz, name, config)


def check_batch(audio: Any, what: str = "audio", row: str = "sound") -> Tensor:  # [B, N]
    """Waveforms of equal length [B, N] as a tensor, held to what one clip is; nothing is copied.

    Args:
        audio: a tensor on any device, or an array.
        what: it is called in messages.
        row: what one row is called.

    Raises:
        AudioError: the shape or dtype does not fit, or samples are not finite; which row.
    """
    if isinstance(audio, np.ndarray) and audio.dtype.kind in "fiu":
        audio = torch.from_numpy(np.ascontiguousarray(audio))
    if not isinstance(audio, Tensor) or audio.dim() != 2:
        shape = tuple(audio.shape) if isinstance(audio, Tensor) else type(audio).__name__
        raise AudioFormatError(
            what, f"is {shape}: expected a tensor or array [{row}s, samples], mono"
        )
    _check_kind(audio, what)
    if not len(audio):
        raise AudioEmptyError(what, f"has no {row}s: expected [{row}s, samples] with at least one")
    if audio.is_floating_point():
        # NaN is not below anything
        bad = (audio.detach().abs() < LARGEST_SAMPLE).logical_not().sum(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise _non_finite(f"{what}, {row} {first}", int(bad[first]), audio.shape[1])
    return audio


def check_finite_clip(wave: Tensor, name: str) -> None:
    """Refuse a clip [N] whose samples are NaN, infinite or beyond what a front end computes.

    Raises:
        AudioNonFiniteError: it is so.
    """
    bad = int((wave.detach().abs() < LARGEST_SAMPLE).logical_not().sum())
    if bad:
        raise _non_finite(name, bad, wave.numel())


def _non_finite(name: str, bad: int, total: int) -> AudioNonFiniteError:
    return AudioNonFiniteError(
        name,
        f"{bad} of {total} samples are NaN, infinite or beyond {LARGEST_SAMPLE:g}: expected finite ones in "
        "[-1, 1]; repair the source, or set them to 0",
    )


def _from_mapping(source: Mapping[str, Any], config: AudioConfig, name: str | None) -> AudioClip:
    path, content = path_of(source), source.get("bytes")
    name = name or memory_name(source)
    unknown = [key for key in source if key not in _KEYS]
    held = [key for key in _SAMPLES if source.get(key) is not None]
    if unknown or len(held) > 1 or not (held or content or path):
        raise AudioFormatError(
            name,
            f'is {described(source)}: expected samples as "array" or "raw" with their "sampling_rate", or a '
            'file as "bytes" or "path"',
        )
    if not held:
        source_of: Any = path if content is None else content
        return load(source_of, config, name)
    rate = source.get("sampling_rate")
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or rate != int(rate):
        raise AudioFormatError(
            name, f"has sampling_rate={rate!r:.40}: expected the rate of its samples in whole Hz"
        )
    samples = source[held[0]]
    if isinstance(samples, (list, tuple)):
        samples = _array(samples, name)
    return from_waveform(samples, int(rate), name, config)


def _array(samples: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(samples)
    except ValueError as error:
        raise AudioFormatError(name, f"holds no plain list of samples: {error}") from error


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_kind(samples: Tensor | np.ndarray, name: str) -> None:
    """Refuse dtypes that are no samples, or whose scale is anyone's guess."""
    kind = _name(samples.dtype)
    plain = not isinstance(samples, Tensor) or (
        samples.layout == torch.strided and not samples.is_meta and not samples.is_quantized
    )
    floating = kind.startswith(("float", "bfloat")) and not kind.startswith("float8")
    if not plain or not (floating or kind == "int16"):
        raise AudioFormatError(
            name,
            f"is {described(samples)}: expected floats in [-1, 1], or int16 (which is scaled by 1/32768)"
            + _FULL_SCALE.get(kind, "; convert it first"),
        )


def _mono(samples: Any, name: str) -> np.ndarray:
    """Samples [N] as float32 or int16, on the CPU."""
    if not isinstance(samples, (Tensor, np.ndarray)):
        raise AudioFormatError(
            name, f"holds {described(samples)}: expected samples [N] as a tensor or array"
        )
    if samples.ndim != 1:
        raise AudioFormatError(
            name,
            f"is {described(samples)}: expected one mono waveform [N]; mix channels down (wave.mean(0)), and pass "
            "a batch as list(batch)",
        )
    _check_kind(samples, name)
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        samples = (samples if samples.dtype == torch.int16 else samples.float()).numpy()
    if samples.dtype == np.int16:
        return np.ascontiguousarray(samples)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused next
        return np.ascontiguousarray(samples, dtype=np.float32)
