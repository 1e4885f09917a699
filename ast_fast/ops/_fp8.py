"""The steps of FP8 layers, forward and backward, in terms of either backend's primitives.

The primitives are functions of the same names in `kernels/fp8.py` and `reference/fp8.py`. Nothing
numeric here but their order: which operand in which format, and which bound gives which scale.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """A residual addition and LayerNorm in front of a layer."""

    residual: Tensor  # [R, C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float


def load(name: str) -> ModuleType:
    """The primitives of a backend."""
    if name == "triton":
        from ..kernels import fp8 as primitives
    else:
        from ..reference import fp8 as primitives
    return primitives


def _saved_operands(saved: list[Tensor]) -> list[Tensor]:
    """What forward saved, operands in FP8 again rather than as bytes."""
    return [t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for t in saved]


def _enter(f: Any, x: Tensor, norm: Norm | None, save: bool) -> tuple[Any, Tensor, list[Tensor]]:
    """The layer's input in FP8, its facts, and total, mean and rstd where a norm comes first."""
    if norm is None:
        found = f.facts(x)
        return f.quantise(x, found[0], columns=save), found, []
    operand, found, *rest = f.norm_quantise(x, *norm, save)
    return operand, found, rest


def linear_forward(
    f: Any, x: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, what the norm gives (total, mean, rstd), and what backward needs if `save`."""
    entered, _, rest = _enter(f, x, norm, save)
    w = f.quantise(weight, f.facts(weight)[0], columns=save)
    y = f.matmul(entered.rows, w.rows, entered.inverse, w.inverse, x.dtype, bias, fast=True)
    saved = [entered.columns, entered.inverse, w.columns, w.inverse] if save else []
    return y, rest, saved


def linear_backward(
    f: Any, dy: Tensor, saved: list[Tensor], weight_dtype: torch.dtype, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the (normalised) input, weight and bias."""
    x_columns, x_inverse, w_columns, w_inverse = _saved_operands(saved)
    d = f.quantise(dy, f.facts(dy)[0], gradient=True, columns=needs[1], sums=needs[2])
    dx = dw = None
    if needs[0]:
        dx = f.matmul(d.rows, w_columns, d.inverse, w_inverse, dy.dtype)
    if needs[1]:
        dw = f.matmul(d.columns, x_columns, d.inverse, x_inverse, weight_dtype)
    return dx, dw, d.sums


def mlp_forward(
    f: Any,
    x: Tensor,
    norm: Norm | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, what the norm gives, and what backward needs if `save`."""
    entered, found, rest = _enter(f, x, norm, save)
    facts1, facts2 = f.facts(w1), f.facts(w2)
    first = f.quantise(w1, facts1[0], columns=save)
    second = f.quantise(w2, facts2[0], columns=save)
    h = f.matmul(entered.rows, first.rows, entered.inverse, first.inverse, x.dtype, b1, fast=True)
    g_bound = f.bound(found[1], facts1[1], f.FORWARD_ROOM, b1)
    g = f.quantise(h, g_bound, gelu=True)
    y = f.matmul(g.rows, second.rows, g.inverse, second.inverse, x.dtype, b2, fast=True)
    if not save:
        return y, rest, []
    # a column of w2 is at most sqrt(its length) times the largest entry long
    reach = facts2[0].amax() * w2.shape[0] ** 0.5
    saved = [entered.columns, entered.inverse, h, first.columns, first.inverse]
    return y, rest, [*saved, second.columns, second.inverse, g_bound, reach.view(1)]


def mlp_backward(
    f: Any, dy: Tensor, saved: list[Tensor], weight_dtype: torch.dtype, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the (normalised) input, w1, b1, w2 and b2."""
    x_columns, x_inverse, h, columns1, inverse1, columns2, inverse2, g_bound, reach = (
        _saved_operands(saved)
    )
    found = f.facts(dy)
    d = f.quantise(dy, found[0], gradient=True, columns=needs[3], sums=needs[4])
    dx = dw1 = db1 = dw2 = None
    if any(needs[:4]):
        dg = f.matmul(d.rows, columns2, d.inverse, inverse2, h.dtype)
        dh, g = f.gelu_backward_quantise(dg, h, f.bound(found[1], reach, f.BACKWARD_ROOM), g_bound)
        db1 = dh.sums
        if needs[0]:
            dx = f.matmul(dh.rows, columns1, dh.inverse, inverse1, dy.dtype)
        if needs[1]:
            dw1 = f.matmul(dh.columns, x_columns, dh.inverse, x_inverse, weight_dtype)
        if needs[3]:
            dw2 = f.matmul(d.columns, g.columns, d.inverse, g.inverse, weight_dtype)
    return [dx, dw1, db1, dw2, d.sums]
