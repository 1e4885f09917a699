"""Residual addition and LayerNorm in one pass over memory, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import CODES, why_not
from .layer_norm import _run, _run_backward


def unsupported(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if out_dtype not in CODES:
        return f"the C++ kernels write float32 and bfloat16, out_dtype is {out_dtype}"
    return why_not(x=x, residual=residual, weight=weight, bias=bias)


def forward(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [R, C], [R, C], [R], [R]
    """Return y, the sum x + residual in the residual's dtype, mean and 1/std of the rounded sum."""
    y, mean, rstd, total = _run(x, residual, weight, bias, eps, out_dtype)
    assert total is not None
    return y, total, mean, rstd


def backward(
    dy: Tensor,  # [R, C]
    dtotal: Tensor | None,  # [R, C]
    total: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [C], [C]
    """Return the gradient of the sum (of both its terms alike), dweight and dbias in float32."""
    return _run_backward(dy, dtotal, total, weight, mean, rstd)
