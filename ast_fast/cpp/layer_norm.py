"""LayerNorm by the compiled kernels: one read of x and one write of y, statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ._common import CODES, need, row_chunks, rows_of, threads, why_not, wide


def unsupported(x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if out_dtype not in CODES:
        return f"the C++ kernels write float32 and bfloat16, out_dtype is {out_dtype}"
    return why_not(x=x, weight=weight, bias=bias)


def forward(
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [R], [R]
    """Return y, mean and 1/std."""
    return _run(x, None, weight, bias, eps, out_dtype)[:3]


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, cols = x.shape
    if not weight.shape == (cols,) == bias.shape:
        need(False, "weight and bias [C]", x, weight, bias)
    if residual is not None and residual.shape != (rows, cols):
        need(False, "a residual like x", x, residual)
    x, weight, bias = rows_of(x), wide(weight), wide(bias)
    y = torch.empty((rows, cols), dtype=out_dtype)
    mean = torch.empty(rows, dtype=torch.float32)
    rstd = torch.empty(rows, dtype=torch.float32)
    total = None
    if residual is not None:
        residual = rows_of(residual)
        total = torch.empty((rows, cols), dtype=residual.dtype)
    if rows and cols:
        _C.layer_norm_forward(
            x.data_ptr(),
            CODES[x.dtype],
            x.stride(0),
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else CODES[residual.dtype],
            0 if residual is None else residual.stride(0),
            weight.data_ptr(),
            bias.data_ptr(),
            eps,
            y.data_ptr(),
            CODES[out_dtype],
            0 if total is None else total.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            rows,
            cols,
            threads(),
        )
    return y, mean, rstd, total


def backward(
    dy: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [C], [C]
    """Return dx, and dweight and dbias in float32."""
    return _run_backward(dy, None, x, weight, mean, rstd)


def _run_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    need(
        dy.shape == x.shape
        and (dtotal is None or dtotal.shape == x.shape)
        and weight.shape == (cols,)
        and mean.shape == (rows,) == rstd.shape
        and mean.dtype == torch.float32 == rstd.dtype,
        "dy and dtotal like x, weight [C] and float32 statistics [R]",
        *(x, dy, dtotal, weight, mean, rstd),
    )
    dx = torch.empty((rows, cols), dtype=x.dtype)
    if not rows or not cols:
        return dx, torch.zeros(cols), torch.zeros(cols)
    dy, x, weight = rows_of(dy), rows_of(x), wide(weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    if dtotal is not None:
        dtotal = rows_of(dtotal)
    chunks = row_chunks(rows)
    partial = torch.empty((chunks, 2, cols), dtype=torch.float32)
    dweight = torch.empty(cols, dtype=torch.float32)
    dbias = torch.empty(cols, dtype=torch.float32)
    _C.layer_norm_backward(
        dy.data_ptr(),
        CODES[dy.dtype],
        dy.stride(0),
        0 if dtotal is None else dtotal.data_ptr(),
        0 if dtotal is None else CODES[dtotal.dtype],
        0 if dtotal is None else dtotal.stride(0),
        x.data_ptr(),
        CODES[x.dtype],
        x.stride(0),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        partial.data_ptr(),
        chunks,
        dweight.data_ptr(),
        dbias.data_ptr(),
        rows,
        cols,
        threads(),
    )
    return dx, dweight, dbias
