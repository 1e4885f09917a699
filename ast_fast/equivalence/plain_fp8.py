"""FP8 linear layers as a PyTorch user would write them: the yardstick of the FP8 budgets.

Each operand is divided by its largest magnitude over the format's largest number, cast by PyTorch and
multiplied in float32; gradients in e5m2 alike. No power of two, no bound, no fusion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """X as FP8 holds it, in float32."""
    wide = x.float()
    scale = torch.finfo(kind).max / wide.abs().amax().clamp(min=1e-30)
    return (wide * scale).to(kind).float() / scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        narrow = _rounded(x, torch.float8_e4m3fn), _rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*narrow)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        return F.linear(*narrow, bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        narrow = _rounded(dy, torch.float8_e5m2).flatten(0, -2)
        dx = (narrow @ weight).view(x.shape)
        dw = narrow.t() @ x.flatten(0, -2)
        db = dy.float().flatten(0, -2).sum(0)
        dtypes = ctx.dtypes
        return dx.to(dtypes[0]), dw.to(dtypes[1]), db.to(dtypes[2])


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x weight^T + bias` with operands rounded to FP8, in autocast's dtype under autocast."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)
    return made


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Linear, exact GELU, linear."""
    return linear(F.gelu(linear(x, w1, b1)), w2, b2)
