"""Gradient of the log-mel filterbank with respect to the waveform: the exact adjoint, step by step.

    d e = dy / (2 std) / e  where e > floor and the frame holds signal, else 0
    d re, d im = 2 (re, im) * (filters^T d e);   d frame = d re @ G_re^T + d im @ G_im^T
    d wave[n] = sum over the frames that cover sample n

The spectrum is computed again and kept for a chunk of clips; each step is one kernel, and samples
gather from the frames that cover them (no atomics). Rarely used (adversarial inputs, saliency,
training a front end): built for exactness in float32, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import ceil_div, guard, last_dim_contiguous
from ._settle import settle
from .log_mel_tables import LogMelTables, Operator, frame_count, operator

# Scratch in bytes: clips are taken in chunks that stay under it.
_SCRATCH_BYTES = 256 * 1024 * 1024


@triton.jit
def _energy_gradient_kernel(
    dy_ptr,  # [B, S, F]
    spectrum_ptr,  # [B, S, 2 * N] float32
    lengths_ptr,  # [B] int64, or None
    first_bin_ptr,  # [F] int32
    weights_ptr,  # [TAPS, F] float32
    denergy_ptr,  # [B, S, F] float32
    num_samples,
    num_frames,
    stride_dyb,
    stride_dys,
    log_floor,
    log_offset,
    inverse_2std,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    NUM_MEL: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles = tl.cdiv(num_frames, BLOCK_S)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    frames = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    mels = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    valid = frames < frame_count(lengths_ptr, clip, num_samples, num_frames, WIN, HOP)
    in_mel = mels < NUM_MEL
    mask = valid[:, None] & in_mel[None, :]
    rows = clip * num_frames + frames
    first = tl.load(first_bin_ptr + mels, mask=in_mel, other=0)
    re_ptrs = spectrum_ptr + rows[:, None] * (2 * N) + 2 * first[None, :]
    energy = tl.zeros([BLOCK_S, BLOCK_F], tl.float32) + log_offset
    for tap in range(TAPS):
        w = tl.load(weights_ptr + tap * NUM_MEL + mels, mask=in_mel, other=0.0)
        re = tl.load(re_ptrs + 2 * tap, mask=mask, other=0.0)
        im = tl.load(re_ptrs + 2 * tap + 1, mask=mask, other=0.0)
        power = re * re + im * im
        if MAGNITUDE:
            power = tl.sqrt(power)
        energy += power * w[None, :]
    dy_rows = clip * stride_dyb + frames.to(tl.int64) * stride_dys
    dy = tl.load(dy_ptr + dy_rows[:, None] + mels[None, :], mask=mask, other=0.0).to(tl.float32)
    above = energy > log_floor
    denergy = tl.where(above, dy * inverse_2std / tl.where(above, energy, 1.0), 0.0)
    out_mask = (frames[:, None] < num_frames) & in_mel[None, :]
    tl.store(denergy_ptr + rows[:, None] * NUM_MEL + mels[None, :], denergy, mask=out_mask)


@triton.jit
def _spectrum_gradient_kernel(
    denergy_ptr,  # [B, S, F] float32
    spectrum_ptr,  # [B, S, 2 * N] float32, replaced by its gradient
    lengths_ptr,  # [B] int64, or None
    first_mel_ptr,  # [N] int32
    weights_ptr,  # [TAPS, N] float32
    num_samples,
    num_frames,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    NUM_MEL: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(num_frames, BLOCK_S)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    frames = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    bins = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = frames < frame_count(lengths_ptr, clip, num_samples, num_frames, WIN, HOP)
    rows = clip * num_frames + frames
    first = tl.load(first_mel_ptr + bins)
    denergy_ptrs = denergy_ptr + rows[:, None] * NUM_MEL + first[None, :]
    dpower = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        w = tl.load(weights_ptr + tap * N + bins)
        dpower += tl.load(denergy_ptrs + tap, mask=valid[:, None], other=0.0) * w[None, :]
    re_ptrs = spectrum_ptr + rows[:, None] * (2 * N) + 2 * bins[None, :]
    re = tl.load(re_ptrs, mask=valid[:, None], other=0.0)
    im = tl.load(re_ptrs + 1, mask=valid[:, None], other=0.0)
    if MAGNITUDE:
        power = re * re + im * im
        empty = power <= 0.0
        dpower = tl.where(empty, 0.0, 0.5 * dpower / tl.sqrt(tl.where(empty, 1.0, power)))
    # frames without signal become zero: the next kernel multiplies whole tiles
    in_rows = frames[:, None] < num_frames
    tl.store(re_ptrs, 2.0 * re * dpower, mask=in_rows)
    tl.store(re_ptrs + 1, 2.0 * im * dpower, mask=in_rows)


@triton.jit
def _frame_gradient_kernel(
    dspectrum_ptr,  # [R, 2 * N] float32
    operator_ptr,  # [K, 2 * N] float32
    dframes_ptr,  # [R, K] float32
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    samples = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_offsets = rows.to(tl.int64) * (2 * N)
    acc = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, 2 * N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        d_ptrs = dspectrum_ptr + row_offsets[:, None] + cols[None, :]
        d = tl.load(d_ptrs, mask=rows[:, None] < num_rows, other=0.0)
        g_ptrs = operator_ptr + samples[None, :] * (2 * N) + cols[:, None]
        g = tl.load(g_ptrs, mask=samples[None, :] < K, other=0.0)
        acc = tl.dot(d, g, acc, input_precision="ieee")
    mask = (rows[:, None] < num_rows) & (samples[None, :] < K)
    tl.store(dframes_ptr + rows.to(tl.int64)[:, None] * K + samples[None, :], acc, mask=mask)


@triton.jit
def _overlap_add_kernel(
    dframes_ptr,  # [B, S, K] float32
    lengths_ptr,  # [B] int64, or None
    dwave_ptr,  # [B, N] float32
    num_samples,
    num_frames,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(num_samples, BLOCK)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    sample = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    count = frame_count(lengths_ptr, clip, num_samples, num_frames, WIN, HOP)
    total = tl.zeros([BLOCK], tl.float32)
    # the last frame that starts at or before this sample, and those before it that still cover it
    for back in range((WIN + HOP - 1) // HOP):
        frame = sample // HOP - back
        inside = sample - frame * HOP
        covers = (frame >= 0) & (frame < count) & (inside < WIN)
        offsets = (clip * num_frames + frame) * K + inside
        total += tl.load(dframes_ptr + offsets, mask=covers, other=0.0)
    tl.store(dwave_ptr + clip * num_samples + sample, total, mask=sample < num_samples)


def wave_gradient(
    dy: Tensor,  # [B, num_frames, F]
    wave: Tensor,  # [B, N] float32
    lengths: Tensor | None,  # [B] int64
    tables: LogMelTables,
    std: float,
    launch_spectrum: Callable[..., None],
) -> Tensor:  # [B, N] float32
    """Gradient of the waveform; `launch_spectrum` computes the spectrum again."""
    dwave = torch.empty(wave.shape, dtype=torch.float32, device=wave.device)
    # frames past the end of the buffer hold no signal: they need no scratch
    whole = 1 + (wave.shape[1] - tables.window_samples) // tables.hop_samples
    num_frames = min(dy.shape[1], whole)
    if wave.numel() == 0 or num_frames <= 0:
        return dwave.zero_()
    dy = last_dim_contiguous(dy)
    num_clips, num_mel = wave.shape[0], dy.shape[2]
    op = operator(tables, wave.device)
    rows, cols = op.dense.shape[0], op.dense.shape[1] // 2
    per_clip = 4 * num_frames * (2 * cols + rows + num_mel)
    chunk = max(1, min(num_clips, _SCRATCH_BYTES // per_clip))
    new = {"dtype": torch.float32, "device": wave.device}
    spectrum = torch.empty((chunk, num_frames, 2 * cols), **new)
    denergy = torch.empty((chunk, num_frames, num_mel), **new)
    dframes = torch.empty((chunk, num_frames, rows), **new)
    for first in range(0, num_clips, chunk):
        part = slice(first, min(first + chunk, num_clips))
        clips = part.stop - part.start
        clip_lengths = None if lengths is None else lengths[part].contiguous()
        launch_spectrum(wave[part], clip_lengths, tables, spectrum[:clips], keep_spectrum=True)
        _launch_adjoint(
            dy[part],
            clip_lengths,
            tables,
            op,
            std,
            spectrum[:clips],
            denergy[:clips],
            dframes[:clips],
            dwave[part],
        )
    return dwave


def _launch_adjoint(
    dy: Tensor,  # [B, >= S, F]
    lengths: Tensor | None,  # [B]
    tables: LogMelTables,
    op: Operator,
    std: float,
    spectrum: Tensor,  # [B, S, 2 * N]
    denergy: Tensor,  # [B, S, F]
    dframes: Tensor,  # [B, S, K]
    dwave: Tensor,  # [B, samples]
) -> None:
    """The adjoint of one chunk of clips, from its spectrum."""
    num_clips, num_frames, num_mel = denergy.shape
    num_samples = dwave.shape[1]
    tuned = _tuned.configs("log_mel", _tuned.capability(dwave.device))
    rows, cols = dframes.shape[2], spectrum.shape[2] // 2
    setting = {"WIN": tables.window_samples, "HOP": tables.hop_samples}
    with guard(dwave):
        tile = tuned["mel"]
        tiles = num_clips * ceil_div(num_frames, tile["frames"])
        _energy_gradient_kernel[(tiles, ceil_div(num_mel, tile["mels"]))](
            dy,
            spectrum,
            lengths,
            op.first_bin,
            op.bin_weights,
            denergy,
            num_samples,
            num_frames,
            dy.stride(0),
            dy.stride(1),
            tables.log_floor,
            tables.log_offset,
            0.5 / std,
            NUM_MEL=num_mel,
            N=cols,
            TAPS=op.bin_weights.shape[0],
            MAGNITUDE=tables.magnitude,
            BLOCK_S=tile["frames"],
            BLOCK_F=tile["mels"],
            num_warps=tile["warps"],
            **setting,
        )
        # bins are padded to a multiple of 64, which every tile of them divides
        _spectrum_gradient_kernel[(tiles, cols // tile["mels"])](
            denergy,
            spectrum,
            lengths,
            op.first_mel,
            op.mel_weights,
            num_samples,
            num_frames,
            NUM_MEL=num_mel,
            N=cols,
            TAPS=op.mel_weights.shape[0],
            MAGNITUDE=tables.magnitude,
            BLOCK_S=tile["frames"],
            BLOCK_N=tile["mels"],
            num_warps=tile["warps"],
            **setting,
        )
        tile = tuned["frame_gradient"]
        tiles = ceil_div(num_clips * num_frames, tile["frames"])
        _frame_gradient_kernel[(tiles, ceil_div(rows, tile["samples"]))](
            spectrum,
            op.dense,
            dframes,
            num_clips * num_frames,
            K=rows,
            N=cols,
            BLOCK_S=tile["frames"],
            BLOCK_K=tile["samples"],
            BLOCK_N=tile["bins"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
        tile = tuned["overlap_add"]
        _overlap_add_kernel[(num_clips * ceil_div(num_samples, tile["elements"]),)](
            dframes,
            lengths,
            dwave,
            num_samples,
            num_frames,
            K=rows,
            BLOCK=tile["elements"],
            num_warps=tile["warps"],
            **setting,
        )


def backward_aot_cases(arch: int) -> list[AotCase]:
    """Every configuration of the gradient kernels tuned for `arch`, for 16 kHz and 128 mel bins."""
    tuned = _tuned.configs("log_mel", arch)
    cases = []

    def add(
        name: str, fn: Any, pointers: dict[str, str], scalars: dict[str, str], **rest: Any
    ) -> None:
        tile, blocks = rest.pop("tile"), rest
        stages = tile.get("stages", 3)
        case = (pointers | scalars, blocks, tuple(pointers), tile["warps"], stages)
        cases.append(AotCase(f"log_mel-{name}", fn, *case))

    counts = dict.fromkeys(("num_samples", "num_frames"), "i32")
    tile = tuned["mel"]
    mel: dict[str, Any] = {
        "tile": tile,
        "WIN": 400,
        "HOP": 160,
        "NUM_MEL": 128,
        "N": 256,
        "BLOCK_S": tile["frames"],
    }
    gradients = [("fp32", False), ("fp32", True), ("fp16", False), ("bf16", False)]
    for dy, magnitude in gradients if arch >= 80 else gradients[:3]:
        pointers = {
            "dy_ptr": f"*{dy}",
            "spectrum_ptr": "*fp32",
            "lengths_ptr": "*i64",
            "first_bin_ptr": "*i32",
            "weights_ptr": "*fp32",
            "denergy_ptr": "*fp32",
        }
        scalars = counts | dict.fromkeys(("stride_dyb", "stride_dys"), "i32")
        scalars |= dict.fromkeys(("log_floor", "log_offset", "inverse_2std"), "fp32")
        kernel, name = _energy_gradient_kernel, f"energy_gradient-{dy}" + "-magnitude" * magnitude
        sizes = {"TAPS": 10, "BLOCK_F": tile["mels"], "MAGNITUDE": magnitude}
        add(name, kernel, pointers, scalars, **sizes, **mel)
    pointers = {
        "denergy_ptr": "*fp32",
        "spectrum_ptr": "*fp32",
        "lengths_ptr": "*i64",
        "first_mel_ptr": "*i32",
        "weights_ptr": "*fp32",
    }
    for magnitude in (False, True):
        kernel, name = _spectrum_gradient_kernel, "spectrum_gradient" + "-magnitude" * magnitude
        sizes = {"TAPS": 2, "BLOCK_N": tile["mels"], "MAGNITUDE": magnitude}
        add(name, kernel, pointers, counts, **sizes, **mel)
    tile = tuned["frame_gradient"]
    add(
        "frame_gradient",
        _frame_gradient_kernel,
        dict.fromkeys(("dspectrum_ptr", "operator_ptr", "dframes_ptr"), "*fp32"),
        {"num_rows": "i32"},
        tile=tile,
        K=416,
        N=256,
        BLOCK_S=tile["frames"],
        BLOCK_K=tile["samples"],
        BLOCK_N=tile["bins"],
    )
    tile = tuned["overlap_add"]
    add(
        "overlap_add",
        _overlap_add_kernel,
        {"dframes_ptr": "*fp32", "lengths_ptr": "*i64", "dwave_ptr": "*fp32"},
        counts,
        tile=tile,
        WIN=400,
        HOP=160,
        K=416,
        BLOCK=tile["elements"],
    )
    return cases


settle(globals())
