"""What PyTorch itself runs for an op, where a measurement found that faster: "torch" in the tables' `use`.

The same arguments and results as the Triton kernels. GELU is PyTorch's own: an infinite pre-activation gives
NaN, which the kernels of ours do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import statistics_dtype


def _one_dtype(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Operands of one dtype: their own on a GPU, whose kernels add up in float32, else the statistics'."""
    if x.is_cuda and all(other.dtype == x.dtype for other in others):
        return x, *others
    wide = statistics_dtype(x.dtype)
    return tuple(each.to(wide) for each in (x, *others))


def layer_norm(
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results y [R, C], mean [R] and 1/std [R]."""
    x, weight, bias = _one_dtype(x, weight, bias)
    y, mean, rstd = torch.native_layer_norm(x.contiguous(), [x.shape[-1]], weight, bias, eps)
    stats = statistics_dtype(x.dtype)
    return y.to(out_dtype), mean.to(stats).view(-1), rstd.to(stats).view(-1)


def layer_norm_backward(
    dy: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dtype = x.dtype
    x, dy, weight = _one_dtype(x, dy, weight)
    run = torch.ops.aten.native_layer_norm_backward
    shape = [x.shape[-1]]
    rows = (mean[:, None], rstd[:, None])
    # the bias itself is not read
    dx, dweight, dbias = run(
        dy.contiguous(), x.contiguous(), shape, *rows, weight, weight, [True] * 3
    )
    return dx.to(dtype), dweight, dbias


def add_layer_norm(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results y [R, C], total [R, C], mean [R] and 1/std [R]."""
    total = (x + residual).to(residual.dtype)
    y, mean, rstd = layer_norm(total, weight, bias, eps, out_dtype)
    return y, total, mean, rstd


def add_layer_norm_backward(
    dy: Tensor,  # [R, C]
    dtotal: Tensor | None,  # [R, C]
    total: Tensor,  # [R, C]
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the sum, of weight and of bias."""
    dsum, dweight, dbias = layer_norm_backward(dy, total, weight, mean, rstd)
    if dtotal is not None:
        dsum = (dsum + dtotal).to(total.dtype)
    return dsum, dweight, dbias


def mlp_backward(
    dy: Tensor,  # [R, C2]
    x: Tensor,  # [R, C]
    h: Tensor,  # [R, K]
    w1: Tensor,  # [K, C]
    w2: Tensor,  # [C2, K]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2."""
    dh = torch.ops.aten.gelu_backward(dy @ w2, h)
    return dh @ w1, dh.T @ x, dh.sum(0), dy.T @ F.gelu(h), dy.sum(0)
