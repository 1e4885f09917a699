"""Position tables: cut and interpolate a learned table to another grid of patches.

The rule of the original AST: time first, then frequency; an axis that shrinks is cut from its
middle, an axis that grows is interpolated (Gong et al. 2021, section 2.2).
Dimensions: P prefix tokens, f patches along frequency, t along time, C width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("bilinear", "nearest", "reinitialise")


def trunc_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Fill with a normal distribution cut at +-2, by inverse CDF, as timm draws it.

    PyTorch's own function may change how it draws; this one keeps seeds comparable.
    """
    bound = math.erf(2.0 / std / math.sqrt(2.0))
    with torch.no_grad():
        tensor.uniform_(-bound, bound)
        tensor.erfinv_().mul_(std * math.sqrt(2.0))
        return tensor.clamp_(-2.0, 2.0)


def _centre(length: int, kept: int) -> slice:
    # floors as in the original: for odd sizes the cut is not symmetric
    start = length // 2 - kept // 2
    return slice(start, start + kept)


def adapt_positions(
    pos: Tensor,  # [1, P + f*t, C]
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int = 2,
    rule: str = "bilinear",
) -> Tensor:  # [1, P + f'*t', C]
    """A position table for another grid of patches.

    Args:
        pos: [1, P + f*t, C], prefix tokens first, then patches frequency-major.
        old_grid: (f, t) of `pos`.
        new_grid: (f', t') wanted.
        num_prefix_tokens: P; their rows are kept.
        rule: "bilinear" or "nearest" say how a growing axis is interpolated; "reinitialise" draws
            the whole table anew (standard deviation 0.02).

    Returns:
        A new tensor [1, P + f'*t', C] of the dtype of `pos`.

    Raises:
        ValueError: the rule is unknown or `pos` does not have the grid named.

    >>> adapt_positions(torch.zeros(1, 2 + 24 * 24, 8), (24, 24), (12, 101)).shape
    torch.Size([1, 1214, 8])
    """
    if rule not in RULES:
        raise ValueError(f"position rule {rule!r} is unknown: expected one of {', '.join(RULES)}")
    (f, t), (new_f, new_t) = old_grid, new_grid
    if pos.dim() != 3 or pos.shape[:2] != (1, num_prefix_tokens + f * t):
        raise ValueError(
            f"pos has shape {tuple(pos.shape)}: expected (1, {num_prefix_tokens + f * t}, C), "
            f"{num_prefix_tokens} prefix tokens and {f} x {t} patches"
        )
    width = pos.shape[2]
    if rule == "reinitialise":
        return trunc_normal_(pos.new_empty(1, num_prefix_tokens + new_f * new_t, width))
    table = pos[:, num_prefix_tokens:].transpose(1, 2).reshape(1, width, f, t)
    if new_t <= t:
        table = table[:, :, :, _centre(t, new_t)]
    else:
        table = F.interpolate(table, size=(f, new_t), mode=rule)
    if new_f <= f:
        table = table[:, :, _centre(f, new_f), :]
    else:
        table = F.interpolate(table, size=(new_f, new_t), mode=rule)
    patches = table.reshape(1, width, new_f * new_t).transpose(1, 2)
    return torch.cat((pos[:, :num_prefix_tokens], patches), dim=1)
