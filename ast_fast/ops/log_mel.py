"""Kaldi-compatible log-mel filterbank energies, padded, cut and normalised in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from ..reference.mel import LOG_FLOOR, MelTables, mel_sizes, mel_tables
from ._common import call, no_second_gradient, register, require, without_autocast


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import log_mel as implementation
    else:
        from ..cpp import log_mel as implementation
    return implementation


def log_mel(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    *,
    sample_rate_hz: int = 16000,
    num_mel_bins: int = 128,
    num_frames: int | None = None,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    low_freq_hz: float = 20.0,
    high_freq_hz: float = 0.0,
    preemphasis: float = 0.97,
    remove_dc: bool = True,
    log_floor: float = LOG_FLOOR,
    mean: float = 0.0,
    std: float = 0.5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, S, F]
    """Log-mel energies as `torchaudio.compliance.kaldi.fbank` computes them for AST.

    Args:
        wave: [B, N] mono waveforms, float32 in [-1, 1] or int16 (scaled by 1/32768).
        lengths: [B] valid samples per clip; the rest of a row is ignored.
        sample_rate_hz: rate of the waveform.
        num_mel_bins: F.
        num_frames: S; shorter clips are padded with raw 0 before normalisation, longer ones cut.
            By default the whole frames of N samples.
        window_ms: frame length in milliseconds.
        hop_ms: frame shift in milliseconds.
        low_freq_hz: lower edge of the lowest filter.
        high_freq_hz: upper edge of the highest; 0 is Nyquist.
        preemphasis: coefficient of the pre-emphasis within a frame.
        remove_dc: subtract each frame's mean.
        log_floor: energies below it are raised to it; its logarithm is -15.942385.
        mean: subtracted from the energies.
        std: the result is divided by 2 std; the default of 0.5 with mean 0 leaves raw energies.
        out_dtype: dtype of the result: float32 by default (float64 for a float64 waveform). Never
            changed by autocast.

    Returns:
        [B, S, F], natural-log energies, normalised.

    Raises:
        ValueError: shapes or settings do not fit.
        TypeError: wave is neither int16 nor floating.

    >>> log_mel(torch.zeros(1, 16000)).shape
    torch.Size([1, 98, 128])
    """
    require(wave.dim() == 2, f"wave has shape {tuple(wave.shape)}: expected [B, N], mono")
    if wave.dtype != torch.int16 and not wave.is_floating_point():
        raise TypeError(f"wave is {wave.dtype}: expected float32 in [-1, 1] or int16")
    require(std > 0.0, f"std={std:g}: expected a positive value (0.5 leaves energies as they are)")
    if lengths is not None:
        require(
            lengths.shape == wave.shape[:1] and not lengths.is_floating_point(),
            f"lengths has shape {tuple(lengths.shape)} and {lengths.dtype}: expected "
            f"({wave.shape[0]},) integers, valid samples a clip",
        )
        lengths = lengths.to(device=wave.device, dtype=torch.int64).clamp(0, wave.shape[1])
    settings = (
        float(window_ms),
        float(hop_ms),
        float(low_freq_hz),
        float(high_freq_hz),
        float(preemphasis),
        bool(remove_dc),
        float(log_floor),
    )
    sizes = mel_sizes(sample_rate_hz, num_mel_bins, settings[0], settings[1])
    if num_frames is None:
        num_frames = sizes.num_frames(wave.shape[1])
    if wave.dtype in (torch.float16, torch.bfloat16):
        wave = wave.float()
    if out_dtype is None:
        out_dtype = torch.float64 if wave.dtype == torch.float64 else torch.float32
    chosen = backend.choose("log_mel", _load, wave, lengths, sizes)
    if chosen == "reference":
        tables = mel_tables(sample_rate_hz, num_mel_bins, *settings)
        arguments = (lengths, tables, num_frames, mean, std, out_dtype)
        return without_autocast(reference.ops.log_mel, wave, *arguments)
    setting = [float(sample_rate_hz), float(num_mel_bins), *map(float, settings)]
    return call(log_mel_op, wave, lengths, setting, num_frames, mean, std, out_dtype, chosen)


def _tables(setting: Sequence[float]) -> MelTables:
    rate, bins, window_ms, hop_ms, low, high, preemphasis, remove_dc, floor = setting
    return mel_tables(
        int(rate), int(bins), window_ms, hop_ms, low, high, preemphasis, bool(remove_dc), floor
    )


@register("log_mel")
def log_mel_op(
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Registered op; `setting` holds the arguments of `mel_tables` in order."""
    run = reference.ops.log_mel if backend == "reference" else _load(backend).forward
    arguments = (lengths, _tables(setting), num_frames, mean, std, out_dtype)
    return without_autocast(run, wave, *arguments)


@log_mel_op.register_fake
def _(
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return wave.new_empty((wave.shape[0], num_frames, int(setting[1])), dtype=out_dtype)


@register("log_mel_backward")
def log_mel_backward_op(
    dy: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    mean: float,
    std: float,
    backend: str,
) -> Tensor:
    """Registered op: the gradient of the waveform."""
    tables = _tables(setting)
    if backend == "reference":
        return reference_backward.log_mel(dy, wave, lengths, tables, std)
    return _load(backend).backward(dy, wave, lengths, tables, mean, std)


@log_mel_backward_op.register_fake
def _(
    dy: Tensor,
    wave: Tensor,
    lengths: Tensor | None,
    setting: Sequence[float],
    mean: float,
    std: float,
    backend: str,
) -> Tensor:
    return wave.new_empty(wave.shape)


no_second_gradient(log_mel_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    wave, lengths, ctx.setting, _, ctx.mean, ctx.std, _, ctx.backend = inputs
    ctx.save_for_backward(wave, lengths)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    wave, lengths = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 8
    dwave = log_mel_backward_op(dy, wave, lengths, ctx.setting, ctx.mean, ctx.std, ctx.backend)
    return (dwave,) + (None,) * 7


log_mel_op.register_autograd(_backward, setup_context=_setup)
