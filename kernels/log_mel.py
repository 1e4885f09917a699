"""Kaldi log-mel filterbank of a batch of waveforms, and its gradient.

    spectrum = frame @ G;   e = filters . |spectrum|^2;   out = (log(max(e, floor)) - mean) / (2 std)

G holds DC removal, pre-emphasis, window and DFT (log_mel_tables.py). The first kernel takes frames
straight from the waveform, int16 or float32, and writes power; the second sums each mel filter's
short run of bins and does the rest. Clips are taken in chunks whose power stays in the L2 cache, so
device memory sees 328 KB of int16 in and 262 KB of bfloat16 out per 10 s clip.

Arithmetic. A tone leaves most bins 1e-5 below the largest, where any rounding of the operands to 22
bits, or of the running sum, shows in the logarithm: single TF32 or float16 products are off by nats,
and even a float32 sum exceeds torchaudio's error. So the frame, less its mean, is scaled by a power
of two and cut like G into a coarse piece on a grid, at most 2^7 steps, and float16 remainders. The
coarse product is a sum of integers below 2^24: float32 accumulators hold it exactly, whatever the
tensor core's order and rounding. The five other products above 2^-30 (four for int16, which needs no
third piece) are 2^7 times smaller and share a second accumulator. Without tensor cores (sm_75) the
remainders are float32. The error against float64 stays below torchaudio's own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import ceil_div, guard, why_not
from ._settle import settle
from .log_mel_backward import backward_aot_cases, wave_gradient
from .log_mel_tables import LogMelTables, frame_count, operator

# Power of a chunk of clips, in bytes: about what an L2 cache keeps between the two kernels.
_POWER_BYTES = 32 * 1024 * 1024

# Samples, and bytes, that rows of a waveform begin at multiples of.
_ALIGNED = 16

_SMALLEST_RATIO = tl.constexpr(2.0**-24)


@triton.jit
def power_of_two(exponent):
    """2^exponent of an int32 tile, -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_samples", "num_frames"])
def _spectrum_kernel(
    wave_ptr,  # [B, N] float32 or int16, rows at multiples of 16 samples: see `aligned_rows`
    lengths_ptr,  # [B] int64, or None
    operator_ptr,  # [3, K, 2 * N] float16, or [2, K, 2 * N] float32
    out_ptr,  # [B, S, N] float32: power or its root, or [B, S, 2 * N]: spectrum when KEEP_SPECTRUM
    num_samples,
    num_frames,
    stride_wb,
    unscale,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    REMOVE_DC: tl.constexpr,
    KEEP_SPECTRUM: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    IS_INT16: tl.constexpr = wave_ptr.dtype.element_ty == tl.int16
    IS_HALF: tl.constexpr = operator_ptr.dtype.element_ty == tl.float16
    PLANE: tl.constexpr = K * 2 * N
    # programs that share frames are neighbours
    pid = tl.program_id(0)
    block = pid % (N // BLOCK_N)
    # columns of the operator: a bin's real part, its imaginary part, the next bin's
    cols = block * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
    tile = pid // (N // BLOCK_N)
    tiles = tl.cdiv(num_frames, BLOCK_S)
    clip = (tile // tiles).to(tl.int64)
    first = (tile % tiles) * BLOCK_S
    frames = first + tl.arange(0, BLOCK_S)
    count = frame_count(lengths_ptr, clip, num_samples, num_frames, WIN, HOP)
    valid = frames < count
    starts = wave_ptr + clip * stride_wb + frames.to(tl.int64) * HOP
    if first < count:
        total = tl.zeros([BLOCK_S], tl.float32)
        highest = tl.full([BLOCK_S], float("-inf"), tl.float32)
        lowest = tl.full([BLOCK_S], float("inf"), tl.float32)
        for k in range(0, WIN, BLOCK_K):
            index = k + tl.arange(0, BLOCK_K)
            mask = valid[:, None] & (index[None, :] < WIN)
            x = tl.load(starts[:, None] + index[None, :], mask=mask, other=0).to(tl.float32)
            total += tl.sum(x, axis=1)
            highest = tl.maximum(highest, tl.max(tl.where(mask, x, float("-inf")), axis=1))
            lowest = tl.minimum(lowest, tl.min(tl.where(mask, x, float("inf")), axis=1))
        average = tl.zeros([BLOCK_S], tl.float32)
        if REMOVE_DC:
            average = total * (1.0 / WIN)
        peak = tl.maximum(highest - average, average - lowest)
        # a constant frame differs from its mean by rounding alone: nothing to enlarge
        peak = tl.maximum(peak, tl.maximum(highest, -lowest) * _SMALLEST_RATIO)
        # the power of two that brings the largest difference into [2^13, 2^14)
        exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.minimum(tl.maximum(exponent, -100), 100)
        scale = power_of_two(13 - exponent)
        restore = power_of_two(exponent - 13) * unscale
        if IS_INT16:
            restore *= 1.0 / 32768.0
        # G removes any constant, so a mean rounded to 12 bits will do: it leaves x - mean exact
        offset = tl.floor(average * scale * 0.5 + 0.5) * 2.0
        large = tl.zeros([BLOCK_S, 2 * BLOCK_N], tl.float32)
        small = tl.zeros([BLOCK_S, 2 * BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            index = k + tl.arange(0, BLOCK_K)
            mask = valid[:, None] & (index[None, :] < WIN)
            x = tl.load(starts[:, None] + index[None, :], mask=mask, other=0).to(tl.float32)
            x = tl.where(mask, x * scale[:, None] - offset[:, None], 0.0)
            # below 2^15, in steps of 2^8
            coarse = tl.floor(x * 0.00390625 + 0.5) * 256.0
            rest = x - coarse
            g_ptrs = operator_ptr + index[:, None] * (2 * N) + cols[None, :]
            g_coarse = tl.load(g_ptrs)
            g_fine = tl.load(g_ptrs + PLANE)
            if IS_HALF:
                coarse = coarse.to(tl.float16)
                fine = rest.to(tl.float16)
                g_finest = tl.load(g_ptrs + 2 * PLANE)
                large = tl.dot(coarse, g_coarse, large)
                small = tl.dot(coarse, g_fine, small)
                small = tl.dot(coarse, g_finest, small)
                small = tl.dot(fine, g_coarse, small)
                small = tl.dot(fine, g_fine, small)
                if not IS_INT16:
                    finest = (rest - fine.to(tl.float32)).to(tl.float16)
                    small = tl.dot(finest, g_coarse, small)
            else:
                large = tl.dot(coarse, g_coarse, large, input_precision="ieee")
                small = tl.dot(rest, g_coarse, small, input_precision="ieee")
                small = tl.dot(x, g_fine, small, input_precision="ieee")
        spectrum = (large + small) * restore[:, None]
        rows = clip * num_frames + frames
        if KEEP_SPECTRUM:
            out_ptrs = out_ptr + rows[:, None] * (2 * N) + cols[None, :]
            tl.store(out_ptrs, spectrum, mask=valid[:, None])
        else:
            pairs = tl.reshape(spectrum * spectrum, [BLOCK_S, BLOCK_N, 2])
            bins = block * BLOCK_N + tl.arange(0, BLOCK_N)
            out_ptrs = out_ptr + rows[:, None] * N + bins[None, :]
            power = tl.sum(pairs, axis=2)
            if MAGNITUDE:
                power = tl.sqrt(power)
            tl.store(out_ptrs, power, mask=valid[:, None])


@triton.jit(do_not_specialize=["num_samples", "num_frames"])
def _mel_kernel(
    power_ptr,  # [B, S, N] float32
    lengths_ptr,  # [B] int64, or None
    first_bin_ptr,  # [F] int32
    weights_ptr,  # [TAPS, F] float32
    out_ptr,  # [B, S, F]
    num_samples,
    num_frames,
    log_floor,
    log_offset,
    mean,
    inverse_2std,
    WIN: tl.constexpr,
    HOP: tl.constexpr,
    NUM_MEL: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles = tl.cdiv(num_frames, BLOCK_S)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    frames = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    mels = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    valid = frames < frame_count(lengths_ptr, clip, num_samples, num_frames, WIN, HOP)
    in_mel = mels < NUM_MEL
    rows = clip * num_frames + frames
    first = tl.load(first_bin_ptr + mels, mask=in_mel, other=0)
    power_ptrs = power_ptr + rows[:, None] * N + first[None, :]
    mask = valid[:, None] & in_mel[None, :]
    energy = tl.zeros([BLOCK_S, BLOCK_F], tl.float32) + log_offset
    for tap in range(TAPS):
        w = tl.load(weights_ptr + tap * NUM_MEL + mels, mask=in_mel, other=0.0)
        energy += tl.load(power_ptrs + tap, mask=mask, other=0.0) * w[None, :]
    # not a maximum, which would drop NaN
    value = tl.log(tl.where(energy < log_floor, log_floor, energy))
    # padding frames are 0 before normalisation
    value = (tl.where(valid[:, None], value, 0.0) - mean) * inverse_2std
    out_ptrs = out_ptr + rows[:, None] * NUM_MEL + mels[None, :]
    out_mask = (frames[:, None] < num_frames) & in_mel[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=out_mask)


def unsupported(wave: Tensor, lengths: Tensor | None, tables: LogMelTables) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    if wave.dtype not in (torch.float32, torch.int16):
        return f"Triton's log_mel takes float32 or int16 waveforms, got {wave.dtype}"
    if tables.window_samples > 2048:
        # longer sums of coarse products could leave float32's exact integers
        return f"Triton's log_mel takes windows up to 2048 samples, got {tables.window_samples}"
    return why_not(device=wave.device)


def aligned_rows(wave: Tensor) -> Tensor:  # [B, N]
    """`wave` itself where rows begin at multiples of 16 samples and of 16 bytes, else a copy that does.

    Only then does a thread load 16 bytes at a time, instead of a sample. A sample is loaded twice by each
    block of bins of each of the 2.5 frames that it is in, 20 times with blocks of 64 of 256 bins; the copy moves
    it twice more, in whole rows, 640 KB for 10 s of int16, which the L2 cache holds for the kernel that follows.
    Batches from our loaders need none (ast_fast/sample_rows.py).
    """
    clips, samples = wave.shape
    wide = ceil_div(max(samples, 1), _ALIGNED) * _ALIGNED
    dense = samples <= 1 or wave.stride(1) == 1
    if dense and wave.data_ptr() % _ALIGNED == 0:
        if clips == 1:  # the stride of a single row is anything
            return wave.as_strided((clips, samples), (wide, 1))
        if wave.stride(0) % _ALIGNED == 0:
            return wave
    return wave.new_empty((clips, wide))[:, :samples].copy_(wave)


def launch_spectrum(
    wave: Tensor,  # [B, N], of `aligned_rows`
    lengths: Tensor | None,  # [B]
    tables: LogMelTables,
    out: Tensor,  # [B, S, N] for power, [B, S, 2 * N] for the spectrum
    keep_spectrum: bool = False,
) -> None:
    """Power, or the spectrum itself, of every frame that holds signal; other rows are not written."""
    num_clips, num_frames = out.shape[:2]
    tuned = _tuned.configs("log_mel", _tuned.capability(wave.device))
    tile = tuned["spectrum" if keep_spectrum else "power"]
    op = operator(tables, wave.device)
    rows, cols = op.dense.shape[0], op.dense.shape[1] // 2
    programs = num_clips * ceil_div(num_frames, tile["frames"]) * (cols // tile["bins"])
    with guard(wave):
        _spectrum_kernel[(programs,)](
            wave,
            lengths,
            op.half_pieces if tile["pieces"] == "float16" else op.single_pieces,
            out,
            wave.shape[1],
            num_frames,
            wave.stride(0),
            op.unscale,
            WIN=tables.window_samples,
            HOP=tables.hop_samples,
            K=rows,
            N=cols,
            REMOVE_DC=tables.remove_dc,
            KEEP_SPECTRUM=keep_spectrum,
            MAGNITUDE=tables.magnitude,
            BLOCK_S=tile["frames"],
            BLOCK_K=tile["samples"],
            BLOCK_N=tile["bins"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )


def forward(
    wave: Tensor,  # [B, N] float32, or int16 scaled by 1/32768
    lengths: Tensor | None,  # [B] int64
    tables: LogMelTables,
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype,
) -> Tensor:  # [B, num_frames, F]
    """Normalised log-mel features, padded with raw zeros or cut to `num_frames`."""
    num_clips, num_mel = wave.shape[0], tables.num_mel_bins
    out = torch.empty((num_clips, num_frames, num_mel), dtype=out_dtype, device=wave.device)
    if out.numel() == 0:
        return out
    wave = aligned_rows(wave)
    op = operator(tables, wave.device)
    cols = op.dense.shape[1] // 2
    tile = _tuned.configs("log_mel", _tuned.capability(wave.device))["mel"]
    chunk = max(1, min(num_clips, _POWER_BYTES // (4 * num_frames * cols)))
    power = torch.empty((chunk, num_frames, cols), dtype=torch.float32, device=wave.device)
    for first in range(0, num_clips, chunk):
        part = slice(first, min(first + chunk, num_clips))
        clips = part.stop - part.start
        clip_lengths = None if lengths is None else lengths[part].contiguous()
        launch_spectrum(wave[part], clip_lengths, tables, power[:clips])
        grid = (clips * ceil_div(num_frames, tile["frames"]), ceil_div(num_mel, tile["mels"]))
        with guard(wave):
            _mel_kernel[grid](
                power,
                clip_lengths,
                op.first_bin,
                op.bin_weights,
                out[part],
                wave.shape[1],
                num_frames,
                tables.log_floor,
                tables.log_offset,
                mean,
                0.5 / std,
                WIN=tables.window_samples,
                HOP=tables.hop_samples,
                NUM_MEL=num_mel,
                N=cols,
                TAPS=op.bin_weights.shape[0],
                BLOCK_S=tile["frames"],
                BLOCK_F=tile["mels"],
                num_warps=tile["warps"],
            )
    return out


def backward(
    dy: Tensor,  # [B, num_frames, F]
    wave: Tensor,  # [B, N] float32
    lengths: Tensor | None,  # [B] int64
    tables: LogMelTables,
    mean: float,
    std: float,
) -> Tensor:  # [B, N] float32
    """Gradient of the waveform; zero where the energy is at the floor, and in padding."""
    return wave_gradient(dy, aligned_rows(wave), lengths, tables, std, launch_spectrum)


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves, for 16 kHz and 128 mel bins."""
    tuned = _tuned.configs("log_mel", arch)
    cases = []
    # whole clips come without lengths
    forms = [(wave, "power", ragged) for wave in ("i16", "fp32") for ragged in (True, False)]
    forms += [("fp32", "magnitude", True), ("fp32", "spectrum", True)]
    for wave, output, ragged in forms:
        tile = tuned["spectrum" if output == "spectrum" else "power"]
        half = tile["pieces"] == "float16"
        pointers = {
            "wave_ptr": f"*{wave}",
            "lengths_ptr": "*i64",
            "operator_ptr": "*fp16" if half else "*fp32",
            "out_ptr": "*fp32",
        }
        scalars = dict.fromkeys(("num_samples", "num_frames", "stride_wb"), "i32")
        constexprs: dict[str, Any] = {
            "WIN": 400,
            "HOP": 160,
            "K": 416,
            "N": 256,
            "REMOVE_DC": True,
            "KEEP_SPECTRUM": output == "spectrum",
            "MAGNITUDE": output == "magnitude",
            "BLOCK_S": tile["frames"],
            "BLOCK_K": tile["samples"],
            "BLOCK_N": tile["bins"],
        }
        if not ragged:
            constexprs["lengths_ptr"] = pointers.pop("lengths_ptr") and None
        cases.append(
            AotCase(
                f"log_mel-{output}-{wave}{'-whole' * (not ragged)}",
                _spectrum_kernel,
                pointers | scalars | {"unscale": "fp32"},
                constexprs,
                (*pointers, "stride_wb"),
                tile["warps"],
                tile["stages"],
                ("wgmma",) if arch == 90 else (),
            )
        )
    tile = tuned["mel"]
    outputs = ("fp32", "fp16", "bf16") if arch >= 80 else ("fp32", "fp16")
    for out, ragged in ((out, ragged) for out in outputs for ragged in (True, False)):
        pointers = {
            "power_ptr": "*fp32",
            "lengths_ptr": "*i64",
            "first_bin_ptr": "*i32",
            "weights_ptr": "*fp32",
            "out_ptr": f"*{out}",
        }
        scalars = dict.fromkeys(("num_samples", "num_frames"), "i32")
        scalars |= dict.fromkeys(("log_floor", "log_offset", "mean", "inverse_2std"), "fp32")
        constexprs = {"WIN": 400, "HOP": 160, "NUM_MEL": 128, "N": 256, "TAPS": 10}
        constexprs |= {"BLOCK_S": tile["frames"], "BLOCK_F": tile["mels"]}
        if not ragged:
            constexprs["lengths_ptr"] = pointers.pop("lengths_ptr") and None
        name = f"log_mel-mel-{out}{'-whole' * (not ragged)}"
        cases.append(
            AotCase(
                name, _mel_kernel, pointers | scalars, constexprs, tuple(pointers), tile["warps"]
            )
        )
    return cases + backward_aot_cases(arch)


settle(globals())
