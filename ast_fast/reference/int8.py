"""Linear layers whose operands are rounded to bytes, in plain PyTorch: the twin of the products in `cpp/packed.py`.

A row q of unsigned bytes stands for (q - zero) * scale. Every token has a scale of its own, taken from its values as
they come (dynamic quantisation), and so has every output of a layer, taken once from the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantise_rows(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:  # [R, C] -> [R, C] uint8, [R]
    """Bytes of rows, and what a level of each row is worth; NaN for a row that is not finite.

    Args:
        x: [R, C].
        zero: the byte that stands for 0, 1 to 254; the rest of the range is shared out around it.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    up, down = wide.amax(1).clamp_min(0) / (255 - zero), -wide.amin(1).clamp_max(0) / zero
    scale = torch.maximum(up, down).clamp_min(1e-30)
    levels = (wide / scale[:, None]).round().nan_to_num(0.0) + zero
    finite = wide.isfinite().all(1)
    scale = torch.where(finite, scale, scale.new_full((), torch.nan))
    return levels.clamp(0, 255).to(torch.uint8), scale


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:  # [K, C] -> [K, C] int8, [K]
    """Levels from -127 to 127 of a weight, and what one is worth in each output."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scale = wide.abs().amax(1).clamp_min(1e-30) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, zero: int = 128) -> Tensor:
    """`x weight^T + bias` with both operands rounded to bytes, the sums exact, in float64.

    Args:
        x: [R, C].
        weight: [K, C].
        bias: [K], or None.
        zero: of the rows' bytes.
    """
    levels, scale = quantise_rows(x, zero)
    weights, worth = quantise_weight(weight)
    product = (levels.double() - zero) @ weights.double().t()
    made = product * scale.double()[:, None] * worth.double()
    return made if bias is None else made + bias.double()
