"""Residual add and LayerNorm in one pass over the rows.

    total = x + residual, rounded to residual's dtype;   y = LayerNorm(total)
    dsum = dtotal + LayerNorm backward of dy: the gradient of x and of residual alike

Statistics are those of the rounded total, as in unfused PyTorch. Forward moves 4*R*C elements where
the unfused pair moves 5; backward reads dy, dtotal and total once and writes dsum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import ceil_div, guard, last_dim_contiguous, next_power_of_2, why_not
from ._settle import settle
from .layer_norm import (
    aot_backward_cases,
    aot_combinations,
    config,
    launch_backward,
    normalise_rows,
    width_reason,
)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [R, C]
    total_ptr,  # [R, C]
    mean_ptr,  # [R] float32
    rstd_ptr,  # [R] float32
    num_rows,
    stride_xr,
    stride_residualr,
    stride_yr,
    stride_totalr,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < C)
    x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
    residual_ptrs = residual_ptr + rows[:, None] * stride_residualr + cols[None, :]
    total = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(total_ptr.dtype.element_ty)
    total_ptrs = total_ptr + rows[:, None] * stride_totalr + cols[None, :]
    tl.store(total_ptrs, rounded, mask=mask)
    normalise_rows(
        rounded.to(tl.float32),
        weight_ptr,
        bias_ptr,
        y_ptr,
        mean_ptr,
        rstd_ptr,
        rows,
        cols,
        num_rows,
        stride_yr,
        eps,
        C,
    )


def unsupported(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    out_dtype: torch.dtype,
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    return width_reason(x.shape[-1]) or why_not(
        x.dtype, residual.dtype, weight.dtype, bias.dtype, out_dtype, device=x.device
    )


def forward(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [R, C], [R, C], [R] float32, [R] float32
    """Normalised sum, the sum itself, and the means and 1/std of its rows."""
    num_rows, width = x.shape
    y = torch.empty((num_rows, width), dtype=out_dtype, device=x.device)
    total = torch.empty((num_rows, width), dtype=residual.dtype, device=x.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if num_rows == 0:
        return y, total, mean, rstd
    x, residual = last_dim_contiguous(x), last_dim_contiguous(residual)
    chosen = config("add_layer_norm", "forward", width, _tuned.capability(x.device))
    with guard(x):
        _forward_kernel[(ceil_div(num_rows, chosen["rows"]),)](
            x,
            residual,
            weight.contiguous(),
            bias.contiguous(),
            y,
            total,
            mean,
            rstd,
            num_rows,
            x.stride(0),
            residual.stride(0),
            y.stride(0),
            total.stride(0),
            eps,
            C=width,
            BLOCK_R=chosen["rows"],
            BLOCK_C=next_power_of_2(width),
            num_warps=chosen["warps"],
        )
    return y, total, mean, rstd


def backward(
    dy: Tensor,  # [R, C]
    dtotal: Tensor | None,  # [R, C]
    total: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R] float32
    rstd: Tensor,  # [R] float32
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [C] float32, [C] float32
    """Gradient of the sum (of x and residual alike), of weight and of bias."""
    return launch_backward("add_layer_norm", dy, dtotal, total, weight, mean, rstd)


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves."""
    cases = []
    for width, entry, x, parameter, y in aot_combinations("add_layer_norm", "forward", arch):
        # autocast keeps the residual stream in float32 and hands branches over in 16 bits
        residual = parameter
        signature = {
            "x_ptr": f"*{x}",
            "residual_ptr": f"*{residual}",
            "weight_ptr": f"*{parameter}",
            "bias_ptr": f"*{parameter}",
            "y_ptr": f"*{y}",
            "total_ptr": f"*{residual}",
            "mean_ptr": "*fp32",
            "rstd_ptr": "*fp32",
            "num_rows": "i32",
            "stride_xr": "i32",
            "stride_residualr": "i32",
            "stride_yr": "i32",
            "stride_totalr": "i32",
            "eps": "fp32",
        }
        constexprs = {
            "C": width,
            "BLOCK_R": entry["rows"],
            "BLOCK_C": next_power_of_2(width),
        }
        divisible = tuple(name for name in signature if name not in ("num_rows", "eps"))
        cases.append(
            AotCase(
                f"add_layer_norm-forward-{width}-{x}-{residual}-{y}",
                _forward_kernel,
                signature,
                constexprs,
                divisible,
                entry["warps"],
            )
        )
    return cases + aot_backward_cases("add_layer_norm", arch, has_dtotal=True)


settle(globals())
