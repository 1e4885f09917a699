"""FP8 linear layers in plain PyTorch: the same roundings as on the GPU, products in float32.

Tensors are scaled by the largest power of two that keeps a bound on their magnitude within the format
(448 in e4m3, 57344 in e5m2), cast, and multiplied in float32. Scaling by a power of two is exact, so
these are the bits that a GPU gets, but for the order in which products are summed. Finite values beyond
the bound saturate; infinities and NaN become NaN and do not count for the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backward, ops

ALIGNMENT = 16
FORWARD_ROOM, BACKWARD_ROOM = 1.13, 1.4
_EXPONENT_LIMIT = 100
_LONGEST = 1e18


class Operand(NamedTuple):
    """A tensor in FP8: times `inverse` it is the original, rounded."""

    rows: Tensor | None  # [R, C]
    columns: Tensor | None  # [C, R up to the next multiple of 16], zero where R ends
    inverse: Tensor  # [1] float32
    sums: Tensor | None = None  # [C] float32: column sums before rounding


def _finite(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.where(size < torch.inf, size, torch.zeros_like(size))


def _wide(x: Tensor) -> Tensor:
    # FP8 of a float64 is that of its float32
    return x.to(torch.float32)


def scale_exponent(bound: Tensor, gradient: bool) -> Tensor:
    """Exponent of the scale of a tensor with magnitudes up to `bound` (float32, one element)."""
    bits = bound.to(torch.float32).view(torch.int32)
    top = 15 if gradient else 8
    over = ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
    exponent = top + 127 - (bits >> 23) - over
    return exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to an integer exponent, as float32."""
    return ((exponent + 127) << 23).view(torch.float32)


def to_fp8(x: Tensor, scale: Tensor, gradient: bool) -> Tensor:
    """X times `scale` in e4m3, or in e5m2 for a gradient."""
    kind = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    largest = torch.finfo(kind).max
    scaled = (x * scale).clamp(-largest, largest)
    return torch.where(x.isfinite(), scaled, torch.full_like(scaled, torch.nan)).to(kind)


def _columns(rows: Tensor) -> Tensor:
    kind = rows.dtype
    turned = F.pad(rows.view(torch.uint8).t(), (0, -rows.shape[0] % ALIGNMENT))
    return turned.contiguous().view(kind)


def _operand(x: Tensor, bound: Tensor, gradient: bool, columns: bool) -> Operand:
    exponent = scale_exponent(bound, gradient)
    rows = to_fp8(x, power_of_two(exponent), gradient)
    return Operand(rows, _columns(rows) if columns else None, power_of_two(-exponent))


def facts(x: Tensor) -> Tensor:  # [R, C] to [2, 1] float32
    """Largest finite magnitude, and the length of the longest row."""
    if x.numel() == 0:
        return torch.zeros((2, 1), dtype=torch.float32, device=x.device)
    size = _finite(_wide(x))
    peak = size.amax()
    longest = torch.maximum(size.square().sum(1).sqrt().amax(), peak).clamp(max=_LONGEST)
    return torch.stack((peak, longest))[:, None]


def bound(a: Tensor, b: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """`max(a) max(b) factor`, plus the largest magnitude of `bias`: [1] float32."""
    product = a.amax() * factor * b.amax()
    if bias is not None:
        product = product + _finite(_wide(bias)).amax()
    return product.view(1)


def quantise(
    x: Tensor,  # [R, C]
    largest: Tensor,  # [partials] float32
    *,
    gradient: bool = False,
    columns: bool = False,
    sums: bool = False,
    gelu: bool = False,
) -> Operand:
    """x, or GELU of x, in FP8, with a transposed copy and column sums if asked for."""
    wide = _wide(x)
    stored = ops.gelu(wide) if gelu else wide
    made = _operand(stored, largest.amax().view(1), gradient, columns)
    return made._replace(sums=wide.sum(0)) if sums else made


def gelu_backward_quantise(
    dg: Tensor,  # [R, K]
    h: Tensor,  # [R, K]
    dh_bound: Tensor,  # [1] float32
    g_bound: Tensor,  # [1] float32
) -> tuple[Operand, Operand]:
    """Gradient of h with its column sums, and the columns of the recomputed activation."""
    dh = backward.gelu_backward(_wide(dg), _wide(h))
    made = _operand(dh, dh_bound, gradient=True, columns=True)
    g = _operand(ops.gelu(_wide(h)), g_bound, gradient=False, columns=True)
    return made._replace(sums=dh.sum(0)), g._replace(rows=None)


def norm_quantise(
    x: Tensor,  # [R, C]
    residual: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    columns: bool,
) -> tuple[Operand, Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of `total = x + residual` in e4m3, its facts, total, means and 1/std."""
    total = (x.to(torch.promote_types(x.dtype, residual.dtype)) + residual).to(residual.dtype)
    y, mean, rstd = ops.layer_norm(_wide(total), _wide(weight), _wide(bias), eps)
    reach = (_wide(weight).abs() * x.shape[1] ** 0.5 + _wide(bias).abs()).clamp(min=0.0)
    found = torch.stack((_finite(reach).amax(), facts(y)[1, 0]))[:, None]
    return _operand(y, found[0], False, columns), found, total, mean, rstd


def matmul(
    a: Tensor,  # [M, K] FP8
    b: Tensor,  # [N, K] FP8
    a_inverse: Tensor,  # [1] float32
    b_inverse: Tensor,  # [1] float32
    out_dtype: torch.dtype,
    bias: Tensor | None = None,  # [N]
    fast: bool = False,
) -> Tensor:  # [M, N]
    """`a b^T` of the originals, plus bias; summed in float32 whatever `fast` says."""
    # an operand that was transposed is padded with zeros, the other one perhaps not
    width = min(a.shape[1], b.shape[1])
    product = (a[:, :width].float() @ b[:, :width].float().t()) * (a_inverse * b_inverse)
    return (product if bias is None else product + bias.float()).to(out_dtype)
