"""Kaldi log-mel by the compiled kernels: int16 or float samples to normalised features in one pass."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from ._common import CODES, need, threads

if TYPE_CHECKING:
    from ..reference.mel import MelTables

_WAVE_CODES = {torch.float32: _C.F32, torch.int16: _C.I16}
_tables: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _compiled(tables: MelTables) -> Any:
    """The kernel's own form of `tables`, made once and dropped with them."""
    made = _tables.get(tables)
    if made is None:
        window = tables.window.to(torch.float64).contiguous()
        filters = tables.filters.to(torch.float64).contiguous()
        made = _tables[tables] = _C.LogMelTables(
            window.data_ptr(),
            filters.data_ptr(),
            tables.window_samples,
            tables.hop_samples,
            tables.n_fft,
            tables.num_mel_bins,
            tables.preemphasis,
            tables.remove_dc,
            tables.log_floor,
            tables.magnitude,
            tables.log_offset,
        )
    return made


def _transformable(n_fft: int) -> bool:
    # the stages of csrc/fft.h: of radix 2 to 5, on half the length, which is to be even
    rest = n_fft
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1 and (n_fft % 4 == 0 or n_fft == 2)


def unsupported(wave: Tensor, lengths: Tensor | None, tables: MelTables) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if wave.dtype not in _WAVE_CODES:
        return f"the C++ log-mel takes float32 and int16 waveforms, got {wave.dtype}"
    if wave.device.type != "cpu":
        return f"the C++ log-mel takes CPU tensors, wave is on {wave.device}"
    if not _transformable(tables.n_fft):
        return f"the C++ log-mel takes n_fft of 4 times factors 2, 3 and 5, got {tables.n_fft}"
    return None


def _prepared(wave: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    clips, samples = wave.shape
    need(lengths is None or lengths.shape == (clips,), f"{clips} lengths", wave, lengths)
    if wave.stride(1) != 1 and samples > 1:
        wave = wave.contiguous()
    if lengths is None:
        return wave, torch.full((clips,), samples, dtype=torch.int64)
    return wave, lengths.to("cpu", torch.int64).clamp(max=samples).contiguous()


def forward(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    tables: MelTables,
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
) -> Tensor:  # [B, num_frames, F]
    """Return (log-mel - mean) / (2 std); frames past the end of a clip hold raw 0 before that."""
    clips, samples = wave.shape
    code = CODES.get(out_dtype, _C.F32)
    out = torch.empty(
        (clips, num_frames, tables.num_mel_bins),
        dtype=out_dtype if out_dtype in CODES else torch.float32,
    )
    if out.numel():
        wave, lengths = _prepared(wave, lengths)
        _C.log_mel_forward(
            _compiled(tables),
            wave.data_ptr(),
            _WAVE_CODES[wave.dtype],
            wave.stride(0),
            lengths.data_ptr(),
            out.data_ptr(),
            code,
            clips,
            samples,
            num_frames,
            mean,
            std,
            threads(),
        )
    return out.to(out_dtype)


def backward(
    dy: Tensor,  # [B, num_frames, F]
    wave: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    tables: MelTables,
    mean: float,
    std: float,
) -> Tensor:  # [B, N]
    """Return the gradient of the waveform in float32; the spectra are computed again."""
    clips, samples = wave.shape
    fits = dy.dim() == 3 and dy.shape[::2] == (clips, tables.num_mel_bins)
    need(fits, f"dy [{clips}, S, {tables.num_mel_bins}]", wave, dy)
    dwave = torch.zeros((clips, samples), dtype=torch.float32)
    if dy.numel() and samples:
        wave, lengths = _prepared(wave.to(torch.float32), lengths)
        dy = dy.to(torch.float32).contiguous()
        _C.log_mel_backward(
            _compiled(tables),
            dy.data_ptr(),
            wave.data_ptr(),
            wave.stride(0),
            lengths.data_ptr(),
            dwave.data_ptr(),
            clips,
            samples,
            dy.shape[1],
            mean,
            std,
            threads(),
        )
    return dwave
