"""A linear layer's matrix products, by whichever library of PyTorch's uses the whole CPU.

No kernel of ours: on every device but some CPUs this is `torch.nn.functional.linear` itself, and so it is
whenever anybody compiles, traces, transforms or watches (see `cpp/_gemm.py` for where it is not).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from ._common import autocast_dtype, watched


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`: what `torch.nn.functional.linear` computes, in float32's own precision.

    Args:
        x: [..., C].
        weight: [K, C].
        bias: [K], or None.

    Returns:
        [..., K].
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or autocast_dtype("cpu") is not None
        or watched(x, weight, *(() if bias is None else (bias,)))
        or backend.requested() not in ("auto", "cpp")
        or backend.why_not("cpp", "cpu", x.dtype) is not None
    ):
        return F.linear(x, weight, bias)
    from ..cpp import _gemm

    if not _gemm.takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _gemm.linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from ..cpp import _gemm

        ctx.save_for_backward(x, weight)
        return _gemm.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from ..cpp import _common, _gemm

        x, weight = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _gemm.matmul(dy_rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = _gemm.matmul(dy_rows.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            db = _common.column_sum(dy_rows)
        return dx, dw, db
