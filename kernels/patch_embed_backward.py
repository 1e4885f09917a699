"""Gradients of patch_embed: weight, then position, prefix and bias together, then the input.

The weight gradient reads dy and the spectrogram (patches gathered on the way) and writes one float32
partial sum a split; the token gradients read dy once; the input gradient multiplies dy by the weight
into float32 patch columns and gathers from them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import DTYPE_NAMES, ceil_div, guard
from ._settle import settle
from .patch_embed_tiles import (
    dtype_modes,
    patch_grid,
    patch_origins,
    precision,
    time_major,
    triton_precision,
)

# Scratch of the input gradient, in bytes: clips are taken in chunks that stay under it.
_COLUMNS_BYTES = 256 * 1024 * 1024


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "grid_t"])
def _weight_gradient_kernel(
    dy_ptr,  # [B, T, C]
    x_ptr,  # [B, S, F]
    partial_ptr,  # [num_splits, C, pt * pf] float32
    num_rows,
    num_tokens,
    grid_t,
    width,
    stride_dyb,
    stride_dyt,
    stride_xb,
    stride_xs,
    PF: tl.constexpr,
    PT: tl.constexpr,
    FSTRIDE: tl.constexpr,
    TSTRIDE: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = PF * PT
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    offsets = (inner // PF).to(tl.int64) * stride_xs + inner % PF
    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for block in range(split, tl.cdiv(num_rows, BLOCK_R), tl.num_programs(2)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        token, is_patch, origin = patch_origins(
            rows, num_rows, num_tokens, grid_t, stride_xb, stride_xs, FSTRIDE, TSTRIDE, NUM_PREFIX
        )
        clip = (rows // num_tokens).to(tl.int64)
        dy_rows = clip * stride_dyb + token.to(tl.int64) * stride_dyt
        dy_mask = is_patch[:, None] & (cols[None, :] < width)
        dy = tl.load(dy_ptr + dy_rows[:, None] + cols[None, :], mask=dy_mask, other=0.0)
        x_mask = is_patch[:, None] & (inner[None, :] < K)
        x = tl.load(x_ptr + origin[:, None] + offsets[None, :], mask=x_mask, other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    plane = partial_ptr + split.to(tl.int64) * width * K
    mask = (cols[:, None] < width) & (inner[None, :] < K)
    tl.store(plane + cols[:, None] * K + inner[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["num_clips", "num_tokens"])
def _token_gradient_kernel(
    dy_ptr,  # [B, T, C]
    dpos_ptr,  # [T, C]
    dprefix_ptr,  # [P, C]
    partial_ptr,  # [num_token_blocks, C] float32
    num_clips,
    num_tokens,
    width,
    stride_dyb,
    stride_dyt,
    NUM_PREFIX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (tokens[:, None] < num_tokens) & (cols[None, :] < width)
    dy_ptrs = dy_ptr + tokens.to(tl.int64)[:, None] * stride_dyt + cols[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for _ in range(num_clips):
        total += tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy_ptrs += stride_dyb
    out = tokens.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(dpos_ptr + out, total.to(dpos_ptr.dtype.element_ty), mask=mask)
    if NUM_PREFIX > 0:
        prefix_mask = mask & (tokens[:, None] < NUM_PREFIX)
        tl.store(dprefix_ptr + out, total.to(dprefix_ptr.dtype.element_ty), mask=prefix_mask)
    patches = tl.where(tokens[:, None] >= NUM_PREFIX, total, 0.0)
    partial_ptrs = partial_ptr + block.to(tl.int64) * width + cols
    tl.store(partial_ptrs, tl.sum(patches, axis=0), mask=cols < width)


@triton.jit(do_not_specialize=["num_rows", "num_patches"])
def _columns_kernel(
    dy_ptr,  # [B, T, C], from the first clip of this chunk
    weight_ptr,  # [C, pt * pf]
    columns_ptr,  # [B * f * t, pt * pf] float32
    num_rows,
    num_patches,
    width,
    stride_dyb,
    stride_dyt,
    K: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    clip = rows // num_patches
    token = rows - clip * num_patches + NUM_PREFIX
    dy_rows = clip.to(tl.int64) * stride_dyb + token.to(tl.int64) * stride_dyt
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        dy_mask = (rows[:, None] < num_rows) & (cols[None, :] < width)
        dy = tl.load(dy_ptr + dy_rows[:, None] + cols[None, :], mask=dy_mask, other=0.0)
        w_mask = (cols[:, None] < width) & (inner[None, :] < K)
        w = tl.load(weight_ptr + cols[:, None] * K + inner[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    mask = (rows[:, None] < num_rows) & (inner[None, :] < K)
    tl.store(columns_ptr + rows.to(tl.int64)[:, None] * K + inner[None, :], acc, mask=mask)


@triton.jit
def _input_gradient_kernel(
    columns_ptr,  # [B, f, t, pt, pf] float32
    dx_ptr,  # [B, S, F]
    num_frames,
    num_bins,
    grid_f,
    grid_t,
    PF: tl.constexpr,
    PT: tl.constexpr,
    FSTRIDE: tl.constexpr,
    TSTRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = index // num_bins
    bin_ = index - frame * num_bins
    total = tl.zeros([BLOCK], tl.float32)
    # the last patch that starts at or before this point, and those before it that still reach it
    for back_t in range((PT + TSTRIDE - 1) // TSTRIDE):
        i_t = frame // TSTRIDE - back_t
        ti = frame - i_t * TSTRIDE
        for back_f in range((PF + FSTRIDE - 1) // FSTRIDE):
            i_f = bin_ // FSTRIDE - back_f
            fi = bin_ - i_f * FSTRIDE
            covers = (i_t >= 0) & (i_t < grid_t) & (ti < PT)
            covers = covers & (i_f >= 0) & (i_f < grid_f) & (fi < PF) & (frame < num_frames)
            patch = (clip * grid_f + i_f) * grid_t + i_t
            offsets = patch * (PT * PF) + ti * PF + fi
            total += tl.load(columns_ptr + offsets, mask=covers, other=0.0)
    dx_ptrs = dx_ptr + clip * num_frames * num_bins + index
    tl.store(dx_ptrs, total.to(dx_ptr.dtype.element_ty), mask=frame < num_frames)


def weight_gradient(
    dy: Tensor,  # [B, P + f*t, C]
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    fstride: int,
    tstride: int,
    num_prefix: int,
    allow_tf32: bool,
) -> Tensor:  # [C, 1, pf, pt]
    """Gradient of the projection: partial sums over splits of the rows, then their sum."""
    width, _, pf, pt = weight.shape
    num_tokens = dy.shape[1]
    num_rows = dy.shape[0] * num_tokens
    capability = _tuned.capability(x.device)
    mode = precision(x.dtype, allow_tf32, capability)
    tile = _tuned.configs("patch_embed", capability)["weight_gradient"][mode]
    tiles = ceil_div(width, tile["cols"]), ceil_div(pf * pt, tile["inner"])
    # enough splits to give every processor work, each with at least one block of rows
    splits = ceil_div(tile["programs_per_sm"] * _tuned.sm_count(x.device), tiles[0] * tiles[1])
    splits = min(splits, ceil_div(num_rows, tile["rows"]))
    partial = torch.empty((splits, width, pf * pt), dtype=torch.float32, device=x.device)
    with guard(x):
        _weight_gradient_kernel[(*tiles, splits)](
            dy,
            x,
            partial,
            num_rows,
            num_tokens,
            patch_grid(x, weight, fstride, tstride)[1],
            width,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            PF=pf,
            PT=pt,
            FSTRIDE=fstride,
            TSTRIDE=tstride,
            NUM_PREFIX=num_prefix,
            PRECISION=triton_precision(mode),
            BLOCK_R=tile["rows"],
            BLOCK_C=tile["cols"],
            BLOCK_K=tile["inner"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
    dweight = partial.sum(0).view(width, 1, pt, pf).transpose(2, 3)
    return dweight.to(weight.dtype).contiguous()


def token_gradients(
    dy: Tensor, dtype: torch.dtype, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [T, C], [P, C]
    """Gradients of bias, position table and prefix tokens from one pass over dy."""
    num_clips, num_tokens, width = dy.shape
    tile = _tuned.configs("patch_embed", _tuned.capability(dy.device))["token_gradient"]
    blocks = ceil_div(num_tokens, tile["tokens"])
    dpos = torch.empty((num_tokens, width), dtype=dtype, device=dy.device)
    dprefix = torch.empty((num_prefix, width), dtype=dtype, device=dy.device)
    partial = torch.empty((blocks, width), dtype=torch.float32, device=dy.device)
    with guard(dy):
        _token_gradient_kernel[(ceil_div(width, tile["cols"]), blocks)](
            dy,
            dpos,
            dprefix,
            partial,
            num_clips,
            num_tokens,
            width,
            dy.stride(0),
            dy.stride(1),
            NUM_PREFIX=num_prefix,
            BLOCK_T=tile["tokens"],
            BLOCK_C=tile["cols"],
            num_warps=tile["warps"],
        )
    return partial.sum(0).to(dtype), dpos, dprefix


def input_gradient(
    dy: Tensor,  # [B, P + f*t, C]
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    fstride: int,
    tstride: int,
    num_prefix: int,
    allow_tf32: bool,
) -> Tensor:  # [B, S, F]
    """Gradient of the spectrogram: every bin gathers from the patches that cover it."""
    width, _, pf, pt = weight.shape
    num_clips, frames, bins = x.shape
    grid_f, grid_t = patch_grid(x, weight, fstride, tstride)
    inner = pf * pt
    capability = _tuned.capability(x.device)
    mode = precision(x.dtype, allow_tf32, capability)
    configs = _tuned.configs("patch_embed", capability)
    tile, gather = configs["columns"][mode], configs["input_gradient"]
    # clips lie along the second axis of a grid, which ends at 65535
    chunk = min(num_clips, 65535, max(1, _COLUMNS_BYTES // (4 * grid_f * grid_t * inner)))
    columns = torch.empty(chunk * grid_f * grid_t, inner, dtype=torch.float32, device=x.device)
    dx = torch.empty((num_clips, frames, bins), dtype=x.dtype, device=x.device)
    flat = time_major(weight)
    for first in range(0, num_clips, chunk):
        clips = min(chunk, num_clips - first)
        num_rows = clips * grid_f * grid_t
        with guard(x):
            _columns_kernel[(ceil_div(num_rows, tile["rows"]), ceil_div(inner, tile["inner"]))](
                dy[first:],
                flat,
                columns,
                num_rows,
                grid_f * grid_t,
                width,
                dy.stride(0),
                dy.stride(1),
                K=inner,
                NUM_PREFIX=num_prefix,
                PRECISION=triton_precision(mode),
                BLOCK_R=tile["rows"],
                BLOCK_K=tile["inner"],
                BLOCK_C=tile["cols"],
                num_warps=tile["warps"],
                num_stages=tile["stages"],
            )
            _input_gradient_kernel[(ceil_div(frames * bins, gather["elements"]), clips)](
                columns,
                dx[first:],
                frames,
                bins,
                grid_f,
                grid_t,
                PF=pf,
                PT=pt,
                FSTRIDE=fstride,
                TSTRIDE=tstride,
                BLOCK=gather["elements"],
                num_warps=gather["warps"],
            )
    return dx


def backward_aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves, for 16x16 patches."""
    tuned = _tuned.configs("patch_embed", arch)
    geometry: dict[str, Any] = {"PF": 16, "PT": 16, "FSTRIDE": 10, "TSTRIDE": 10}
    strides_dy, strides_x = ("stride_dyb", "stride_dyt"), ("stride_xb", "stride_xs")
    cases = []

    def add(
        name: str,
        fn: Any,
        pointers: dict[str, str],
        counts: tuple[str, ...],
        constexprs: dict[str, Any],
        tile: dict[str, int],
        expect: tuple[str, ...] = (),
    ) -> None:
        signature = pointers | dict.fromkeys(counts, "i32")
        free = (
            "num_rows",
            "num_tokens",
            "num_patches",
            "num_clips",
            "num_frames",
            "grid_f",
            "grid_t",
        )
        divisible = tuple(argument for argument in signature if argument not in free)
        cases.append(
            AotCase(
                f"patch_embed-{name}",
                fn,
                signature,
                constexprs,
                divisible,
                tile["warps"],
                tile.get("stages", 3),
                expect,
            )
        )

    for dtype, mode in dtype_modes(arch):
        name = DTYPE_NAMES[dtype]
        wgmma = ("wgmma",) if arch == 90 and mode != "ieee" else ()
        tile = tuned["weight_gradient"][mode]
        blocks = {"BLOCK_R": tile["rows"], "BLOCK_C": tile["cols"], "BLOCK_K": tile["inner"]}
        dot = {"NUM_PREFIX": 2, "PRECISION": triton_precision(mode)}
        add(
            f"weight_gradient-{name}-{mode}",
            _weight_gradient_kernel,
            {"dy_ptr": f"*{name}", "x_ptr": f"*{name}", "partial_ptr": "*fp32"},
            ("num_rows", "num_tokens", "grid_t", "width", *strides_dy, *strides_x),
            geometry | dot | blocks,
            tile,
            wgmma,
        )
        tile = tuned["columns"][mode]
        blocks = {"BLOCK_R": tile["rows"], "BLOCK_C": tile["cols"], "BLOCK_K": tile["inner"]}
        add(
            f"columns-{name}-{mode}",
            _columns_kernel,
            {"dy_ptr": f"*{name}", "weight_ptr": f"*{name}", "columns_ptr": "*fp32"},
            ("num_rows", "num_patches", "width", *strides_dy),
            {"K": 256} | dot | blocks,
            tile,
            wgmma,
        )
        if mode == "tf32":
            continue
        tile = tuned["token_gradient"]
        pointers = {f"{argument}_ptr": f"*{name}" for argument in ("dy", "dpos", "dprefix")}
        add(
            f"token_gradient-{name}",
            _token_gradient_kernel,
            pointers | {"partial_ptr": "*fp32"},
            ("num_clips", "num_tokens", "width", *strides_dy),
            {"NUM_PREFIX": 2, "BLOCK_T": tile["tokens"], "BLOCK_C": tile["cols"]},
            tile,
        )
        tile = tuned["input_gradient"]
        add(
            f"input_gradient-{name}",
            _input_gradient_kernel,
            {"columns_ptr": "*fp32", "dx_ptr": f"*{name}"},
            ("num_frames", "num_bins", "grid_f", "grid_t"),
            geometry | {"BLOCK": tile["elements"]},
            tile,
        )
    return cases


settle(globals())
