"""Patch embedding of a spectrogram (Gong et al. 2021): overlapping patches, projection, tokens.

    y[b, P + i_f*t + i_t] = W . x[b, i_t*tstride :, i_f*fstride :] + bias + pos
    y[b, :P] = prefix + pos

An implicit GEMM: patch rows are gathered from the spectrogram while they are loaded, so the patch
matrix (2.4 times the spectrogram at stride 10) never exists, and bias, position table and prefix
tokens are added before the one store of y. Any patch and stride; the contraction runs over (time,
frequency) of a patch so that its frequency bins, which are contiguous in x, are contiguous there.

Backward: dW is split over rows into float32 partial sums that are added in a fixed order; dpos,
dprefix and dbias come from one pass over dy; dx gathers, for every bin, the patches that cover it.
Nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import DTYPE_NAMES, ceil_div, guard, last_dim_contiguous, why_not
from ._settle import settle
from .patch_embed_backward import (
    backward_aot_cases,
    input_gradient,
    token_gradients,
    weight_gradient,
)
from .patch_embed_tiles import (
    dtype_modes,
    patch_grid,
    patch_origins,
    precision,
    time_major,
    triton_precision,
)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "grid_t"])
def _forward_kernel(
    x_ptr,  # [B, S, F]
    weight_ptr,  # [C, pt * pf]
    bias_ptr,  # [C]
    pos_ptr,  # [T, C]
    prefix_ptr,  # [P, C]
    y_ptr,  # [B * T, C]
    num_rows,
    num_tokens,
    grid_t,
    width,
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
    # one axis for all tiles, columns first: the other axes of a grid end at 65535
    col_blocks = tl.cdiv(width, BLOCK_C)
    rows = (tl.program_id(0) // col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    token, is_patch, origin = patch_origins(
        rows, num_rows, num_tokens, grid_t, stride_xb, stride_xs, FSTRIDE, TSTRIDE, NUM_PREFIX
    )
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        offsets = (inner // PF).to(tl.int64) * stride_xs + inner % PF
        x_mask = is_patch[:, None] & (inner[None, :] < K)
        x = tl.load(x_ptr + origin[:, None] + offsets[None, :], mask=x_mask, other=0.0)
        w_mask = (inner[:, None] < K) & (cols[None, :] < width)
        w = tl.load(weight_ptr + cols[None, :] * K + inner[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < width)
    bias = tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    pos_ptrs = pos_ptr + token.to(tl.int64)[:, None] * width + cols[None, :]
    pos = tl.load(pos_ptrs, mask=mask, other=0.0).to(tl.float32)
    if NUM_PREFIX > 0:
        prefix_mask = (token[:, None] < NUM_PREFIX) & mask
        prefix_ptrs = prefix_ptr + token[:, None] * width + cols[None, :]
        prefix = tl.load(prefix_ptrs, mask=prefix_mask, other=0.0).to(tl.float32)
        acc += tl.where(token[:, None] < NUM_PREFIX, prefix, bias[None, :])
    else:
        acc += bias[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(y_ptrs, (acc + pos).to(y_ptr.dtype.element_ty), mask=mask)


def unsupported(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    if x.dtype != weight.dtype:
        return (
            f"Triton's patch_embed takes x and weight of one dtype, got {x.dtype}, {weight.dtype}"
        )
    dtypes = (x.dtype, bias.dtype, pos.dtype, prefix.dtype)
    return why_not(*dtypes, device=x.device)


def forward(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
    fstride: int,
    tstride: int,
    allow_tf32: bool = False,
) -> Tensor:  # [B, P + f*t, C]
    """Tokens of a batch of spectrograms, position table added."""
    width, _, pf, pt = weight.shape
    num_tokens = pos.shape[0]
    grid_t = patch_grid(x, weight, fstride, tstride)[1]
    y = torch.empty((x.shape[0], num_tokens, width), dtype=weight.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = last_dim_contiguous(x)
    capability = _tuned.capability(x.device)
    mode = precision(x.dtype, allow_tf32, capability)
    tile = _tuned.configs("patch_embed", capability)["forward"][mode]
    num_rows = x.shape[0] * num_tokens
    blocks = ceil_div(width, tile["cols"]) * ceil_div(num_rows, tile["rows"])
    with guard(x):
        _forward_kernel[(blocks,)](
            x,
            time_major(weight),
            bias.contiguous(),
            pos.contiguous(),
            prefix.contiguous(),
            y,
            num_rows,
            num_tokens,
            grid_t,
            width,
            x.stride(0),
            x.stride(1),
            PF=pf,
            PT=pt,
            FSTRIDE=fstride,
            TSTRIDE=tstride,
            NUM_PREFIX=prefix.shape[0],
            PRECISION=triton_precision(mode),
            BLOCK_R=tile["rows"],
            BLOCK_C=tile["cols"],
            BLOCK_K=tile["inner"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
    return y


def backward(
    dy: Tensor,  # [B, P + f*t, C]
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    fstride: int,
    tstride: int,
    num_prefix: int,
    needs_dx: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of weight, bias, position table, prefix tokens and (if asked) the spectrogram."""
    dy, x = last_dim_contiguous(dy), last_dim_contiguous(x)
    if dy.numel() == 0 or x.numel() == 0:
        width, num_tokens = weight.shape[0], dy.shape[1]
        return (
            weight.new_zeros(weight.shape),
            weight.new_zeros(width),
            weight.new_zeros((num_tokens, width)),
            weight.new_zeros((num_prefix, width)),
            x.new_zeros(x.shape) if needs_dx else None,
        )
    dweight = weight_gradient(dy, x, weight, fstride, tstride, num_prefix, allow_tf32)
    dbias, dpos, dprefix = token_gradients(dy, weight.dtype, num_prefix)
    dx = None
    if needs_dx:
        dx = input_gradient(dy, x, weight, fstride, tstride, num_prefix, allow_tf32)
    return dweight, dbias, dpos, dprefix, dx


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves, for the model's patches."""
    tuned = _tuned.configs("patch_embed", arch)["forward"]
    cases = []
    for dtype, mode in dtype_modes(arch):
        tile, pointer = tuned[mode], f"*{DTYPE_NAMES[dtype]}"
        signature = {
            f"{name}_ptr": pointer for name in ("x", "weight", "bias", "pos", "prefix", "y")
        }
        counts = ("num_rows", "num_tokens", "grid_t", "width", "stride_xb", "stride_xs")
        signature |= dict.fromkeys(counts, "i32")
        constexprs: dict[str, Any] = {
            "PF": 16,
            "PT": 16,
            "FSTRIDE": 10,
            "TSTRIDE": 10,
            "NUM_PREFIX": 2,
            "PRECISION": triton_precision(mode),
            "BLOCK_R": tile["rows"],
            "BLOCK_C": tile["cols"],
            "BLOCK_K": tile["inner"],
        }
        free = ("num_rows", "num_tokens", "grid_t")
        cases.append(
            AotCase(
                f"patch_embed-forward-{DTYPE_NAMES[dtype]}-{mode}",
                _forward_kernel,
                signature,
                constexprs,
                tuple(name for name in signature if name not in free),
                tile["warps"],
                tile["stages"],
                ("wgmma",) if arch == 90 and mode != "ieee" else (),
            )
        )
    return cases + backward_aot_cases(arch)


settle(globals())
