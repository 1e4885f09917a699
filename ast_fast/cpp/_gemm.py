"""Matrix products in float32: PyTorch's, by whichever of its two libraries uses the whole CPU.

PyTorch multiplies float32 with MKL, which takes its AVX2 code on AMD processors; oneDNN, which PyTorch
brings too, takes AVX-512 there and is about twice as fast (benchmarks/README.md, suite `decisions`). Its
door is `torch.ops.mkldnn._linear_pointwise`, which PyTorch's own compiler uses and does not promise to
keep: where it is absent the products are plain PyTorch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C

# multiply-adds below which setting up oneDNN's product costs more than it saves
_LEAST_WORK = 1 << 21


@functools.cache
def _onednn_is_faster() -> bool:
    """AVX-512 on a processor for which MKL does not use it, and an operator to call."""
    if not (_C.is_amd() and str(_C.isa()).startswith("avx512")):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    x = torch.arange(6.0).view(2, 3)
    try:
        made = torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(made, x @ x.t())


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these goes to oneDNN: x [..., C], weight [K, C]."""
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _LEAST_WORK
        and _onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias` for x [..., C], weight [K, C] of any strides, without gradients."""
    if takes_onednn(x, weight):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a b` for a [M, K], b [K, N] of any strides, without gradients."""
    return linear(a, b.t())
