"""Operands of FP8 matrix products: one read of a wide tensor, FP8 out, transposed copy included.

A product's operands must both run along the summed dim, so a tensor that enters a weight gradient is
needed transposed too: that copy is written from the same tile. Scales follow from bounds on this very
tensor (no history, hence no state: a resumed run, a replayed graph and a recomputed block give the
same bits):

- `facts` reads a tensor for its largest magnitude and its longest row;
- rows that leave a LayerNorm are at most |weight| sqrt(C) + |bias|;
- |gelu(h)| <= |h| <= |x row| |w row| + |bias|, and its gradient at most 1.13 |dy row| |w column|.

The bounds are a few powers of two above the largest magnitude, which costs FP8 nothing but values that
far below it. Bytes an element of a tensor of b bytes: facts b, quantise b + 1 (+ 1 transposed), LayerNorm
reads x and the residual and writes the sum and 1 (+ 1), GELU b + 1, its gradient 2 b + 3. Column sums
(bias gradients) are added in float32 per tile and then over tiles, always in one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tuned
from ._launch import ceil_div, guard, last_dim_contiguous, next_power_of_2, why_not
from .fp8_kernels import (
    bound_kernel,
    facts_kernel,
    gelu_backward_kernel,
    norm_quantise_kernel,
    quantise_kernel,
)
from .fp8_tiles import PARTIALS

__all__ = [
    "Operand",
    "bound",
    "facts",
    "gelu_backward_quantise",
    "matmul",
    "norm_quantise",
    "quantise",
    "unsupported",
]

ALIGNMENT = 16  # what PyTorch's scaled product asks of the summed dim and of the columns
OLDEST = 89  # compute capability with FP8 casts and products
MAX_WIDTH = 2048  # a LayerNorm row has to fit the registers of one block
# GELU's slope is at most 1.129; roundings to FP8 move a row's length by a sixteenth or an eighth at most
FORWARD_ROOM, BACKWARD_ROOM = 1.13, 1.4


class Operand(NamedTuple):
    """A tensor in FP8: times `inverse` it is the original, rounded."""

    rows: Tensor | None  # [R, C]
    columns: Tensor | None  # [C, R up to the next multiple of 16], zero where R ends
    inverse: Tensor  # [1] float32
    sums: Tensor | None = None  # [C] float32: column sums before rounding


def unsupported(x: Tensor, *weights: Tensor) -> str | None:
    """Why this backend cannot take x [..., C] and these weights [N, C]; None when it can."""
    reason = why_not(x.dtype, *(weight.dtype for weight in weights), device=x.device)
    if reason is not None:
        return reason
    for weight in weights:
        if weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
            return (
                f"FP8 products take widths that are multiples of {ALIGNMENT}, got a weight of "
                f"{tuple(weight.shape)}"
            )
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} elements are too wide, expected at most {MAX_WIDTH}"
    capability = _tuned.capability(x.device)
    if capability < OLDEST and not _tuned.INTERPRETED:
        return f"FP8 needs compute capability 8.9 or newer, got {capability / 10:.1f}"
    return None


def padded(num_rows: int) -> int:
    """Rows of a transposed copy."""
    return ceil_div(num_rows, ALIGNMENT) * ALIGNMENT


def _fp8(shape: tuple[int, ...], device: torch.device, gradient: bool = False) -> Tensor:
    # NumPy, and so the interpreter, has no such type: the bytes are allocated as what they are
    kind = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    return torch.empty(shape, dtype=torch.uint8, device=device).view(kind)


def _configs(device: torch.device) -> dict[str, Any]:
    return _tuned.configs("fp8", max(_tuned.capability(device), OLDEST))


def facts(x: Tensor) -> Tensor:  # [R, C] to [2, partials] float32
    """Largest finite magnitude, and the longest row, as partial maxima."""
    num_rows, num_cols = x.shape
    if x.numel() == 0:
        return torch.zeros((2, 1), dtype=torch.float32, device=x.device)
    x = last_dim_contiguous(x)
    tile = _configs(x.device)["facts"]
    programs = min(
        tile["programs_per_sm"] * _tuned.sm_count(x.device),
        ceil_div(num_rows, tile["rows"]),
        PARTIALS,
    )
    found = torch.empty((2, programs), dtype=torch.float32, device=x.device)
    with guard(x):
        facts_kernel[(programs,)](
            x,
            found,
            num_rows,
            num_cols,
            x.stride(0),
            BLOCK_R=tile["rows"],
            BLOCK_C=tile["cols"],
            num_warps=tile["warps"],
        )
    return found


def bound(
    a: Tensor,  # [partials] float32
    b: Tensor,  # [partials] float32
    factor: float,
    bias: Tensor | None = None,  # [K]
) -> Tensor:  # [1] float32
    """`max(a) max(b) factor`, plus the largest magnitude of `bias`."""
    found = torch.empty(1, dtype=torch.float32, device=a.device)
    bias = None if bias is None else bias.contiguous()
    with guard(a):
        bound_kernel[(1,)](
            a,
            b,
            bias,
            found,
            a.numel(),
            b.numel(),
            0 if bias is None else bias.numel(),
            factor,
            BLOCK=1024,
            num_warps=4,
        )
    return found


def quantise(
    x: Tensor,  # [R, C]
    largest: Tensor,  # [partials] float32: maxima of the magnitudes of what is stored
    *,
    gradient: bool = False,
    columns: bool = False,
    sums: bool = False,
    gelu: bool = False,
) -> Operand:
    """X in e4m3 (e5m2 for a gradient), with a transposed copy and column sums if asked for.

    With `gelu` it is GELU of x that is stored, and bounded.
    """
    num_rows, num_cols = x.shape
    rows = _fp8((num_rows, num_cols), x.device, gradient)
    turned = _fp8((num_cols, padded(num_rows)), x.device, gradient) if columns else None
    inverse = torch.empty(1, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        zeros = torch.zeros(num_cols, dtype=torch.float32, device=x.device)
        return Operand(rows, turned, inverse.fill_(1.0), zeros if sums else None)
    x = last_dim_contiguous(x)
    tile = _configs(x.device)["gelu" if gelu else "quantise"]
    row_blocks = ceil_div(num_rows, tile["rows"])
    partial = None
    if sums:
        partial = torch.empty((row_blocks, num_cols), dtype=torch.float32, device=x.device)
    with guard(x):
        quantise_kernel[(row_blocks, ceil_div(num_cols, tile["cols"]))](
            x,
            rows,
            turned,
            largest,
            inverse,
            partial,
            num_rows,
            num_cols,
            padded(num_rows),
            largest.numel(),
            x.stride(0),
            E5M2=gradient,
            GELU=gelu,
            BLOCK_R=tile["rows"],
            BLOCK_C=tile["cols"],
            BY_HAND=_tuned.INTERPRETED,
            num_warps=tile["warps"],
        )
    return Operand(rows, turned, inverse, None if partial is None else partial.sum(0))


def gelu_backward_quantise(
    dg: Tensor,  # [R, K]
    h: Tensor,  # [R, K]
    dh_bound: Tensor,  # [1] float32
    g_bound: Tensor,  # [1] float32
) -> tuple[Operand, Operand]:
    """Gradient of h with its column sums, and the columns of the recomputed activation."""
    num_rows, num_cols = h.shape
    dh_rows = _fp8((num_rows, num_cols), h.device, True)
    dh_columns = _fp8((num_cols, padded(num_rows)), h.device, True)
    g_columns = _fp8((num_cols, padded(num_rows)), h.device)
    inverse = torch.empty(2, dtype=torch.float32, device=h.device)
    if h.numel() == 0:
        zeros = torch.zeros(num_cols, dtype=torch.float32, device=h.device)
        inverse.fill_(1.0)
        return Operand(dh_rows, dh_columns, inverse[:1], zeros), Operand(
            None, g_columns, inverse[1:]
        )
    dg, h = last_dim_contiguous(dg), last_dim_contiguous(h)
    tile = _configs(h.device)["gelu_backward"]
    row_blocks = ceil_div(num_rows, tile["rows"])
    partial = torch.empty((row_blocks, num_cols), dtype=torch.float32, device=h.device)
    with guard(h):
        gelu_backward_kernel[(row_blocks, ceil_div(num_cols, tile["cols"]))](
            dg,
            h,
            dh_rows,
            dh_columns,
            g_columns,
            dh_bound,
            g_bound,
            inverse,
            partial,
            num_rows,
            num_cols,
            padded(num_rows),
            dg.stride(0),
            h.stride(0),
            BLOCK_R=tile["rows"],
            BLOCK_C=tile["cols"],
            BY_HAND=_tuned.INTERPRETED,
            num_warps=tile["warps"],
        )
    return Operand(dh_rows, dh_columns, inverse[:1], partial.sum(0)), Operand(
        None, g_columns, inverse[1:]
    )


def _norm_config(width: int, device: torch.device) -> dict[str, int]:
    return next(entry for entry in _configs(device)["norm"] if width <= entry["max_width"])


def norm_rows(entry: dict[str, int], dtype: torch.dtype) -> int:
    """Rows of a tile: float32 inputs take twice the registers."""
    return entry["rows_of_float32" if dtype == torch.float32 else "rows"]


def norm_quantise(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    columns: bool,
) -> tuple[Operand, Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of `total = x + residual` in e4m3, its facts, total, means and 1/std."""
    num_rows, width = x.shape
    total = torch.empty((num_rows, width), dtype=residual.dtype, device=x.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows = _fp8((num_rows, width), x.device)
    turned = _fp8((width, padded(num_rows)), x.device) if columns else None
    inverse = torch.empty(1, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        nothing = torch.zeros((2, 1), dtype=torch.float32, device=x.device)
        return Operand(rows, turned, inverse.fill_(1.0)), nothing, total, mean, rstd
    x, residual = last_dim_contiguous(x), last_dim_contiguous(residual)
    chosen = _norm_config(width, x.device)
    tile_rows = norm_rows(chosen, x.dtype)
    programs = min(
        chosen["programs_per_sm"] * _tuned.sm_count(x.device),
        ceil_div(padded(num_rows), tile_rows),
        PARTIALS,
    )
    found = torch.empty((2, programs), dtype=torch.float32, device=x.device)
    with guard(x):
        norm_quantise_kernel[(programs,)](
            x,
            residual,
            weight.contiguous(),
            bias.contiguous(),
            total,
            rows,
            turned,
            mean,
            rstd,
            found,
            inverse,
            num_rows,
            padded(num_rows),
            x.stride(0),
            residual.stride(0),
            eps,
            C=width,
            BLOCK_R=tile_rows,
            BLOCK_C=next_power_of_2(width),
            BY_HAND=_tuned.INTERPRETED,
            num_warps=chosen["warps"],
        )
    return Operand(rows, turned, inverse), found, total, mean, rstd


def matmul(
    a: Tensor,  # [M, K] FP8
    b: Tensor,  # [N, K] FP8
    a_inverse: Tensor,  # [1] float32
    b_inverse: Tensor,  # [1] float32
    out_dtype: torch.dtype,
    bias: Tensor | None = None,  # [N]
    fast: bool = False,
) -> Tensor:  # [M, N]
    """`a b^T` of the originals, plus bias.

    `fast` lets the tensor cores add with fewer bits than float32, as is usual forward.
    """
    if 0 in (*a.shape, b.shape[0]):
        zeros = torch.zeros((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
        return zeros if bias is None else zeros + bias.to(out_dtype)
    if a.device.type == "cpu":  # the interpreter's
        product = (a.float() @ b.float().t()) * (a_inverse * b_inverse)
        return (product if bias is None else product + bias.float()).to(out_dtype)
    fused = bias is not None and out_dtype != torch.float32
    y = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_inverse.view(()),
        scale_b=b_inverse.view(()),
        bias=bias.to(out_dtype) if fused and bias is not None else None,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )
    return y if fused or bias is None else y + bias
