"""Linear, exact GELU, linear, with the activation recomputed in backward."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from . import _native
from ._checks import Checks
from ._common import call, cast_for_autocast, needs_gradient, no_second_gradient, register, require
from ._dispatch import Plan, dispatch, why_not_named


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import mlp as implementation
    else:
        from ..cpp import mlp as implementation
    return implementation


def mlp(
    x: Tensor,  # [..., C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
) -> Tensor:  # [..., C2]
    """`gelu(x w1^T + b1) w2^T + b2` with exact (erf) GELU: the feed-forward half of a block.

    Args:
        x: [..., C].
        w1: [K, C], as `nn.Linear` stores it; K is 4 C in AST.
        b1: [K].
        w2: [C2, K].
        b2: [C2].

    Returns:
        [..., C2], in the dtype of x, or autocast's under autocast.
    """
    require(
        w1.dim() == 2
        and w2.dim() == 2
        and x.shape[-1:] == w1.shape[1:]
        and b1.shape == w1.shape[:1],
        f"x {tuple(x.shape)}, w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)} do not fit: "
        "expected [..., C], [K, C], [K]",
    )
    require(
        w2.shape[1:] == w1.shape[:1] and b2.shape == w2.shape[:1],
        f"w2 {tuple(w2.shape)}, b2 {tuple(b2.shape)} do not fit w1 {tuple(w1.shape)}: "
        "expected [C2, K], [C2]",
    )
    x, w1, b1, w2, b2 = cast_for_autocast(x, w1, b1, w2, b2)
    chosen = backend.choose("mlp", _load, x, w1, b1, w2, b2)
    if chosen == "reference":
        return reference.ops.mlp(x, w1, b1, w2, b2)
    return call(mlp_op, x, w1, b1, w2, b2, needs_gradient(x, w1, b1, w2, b2), chosen)[0]


def _plan(w1: Tensor) -> Plan:
    return Plan((f"{w1.shape[1]} to {w1.shape[0]}",))


@register(
    "mlp",
    Checks(
        {"x": "* C float", "w1": "K C =x", "b1": "K =x", "w2": "C2 K =x", "b2": "C2 =x"},
        backend=lambda a: why_not_named(
            *("mlp", a["backend"], a["x"], _load, a["w1"], a["b1"], a["w2"], a["b2"])
        ),
    ),
)
def mlp_op(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Registered op: y, and the pre-activation if it is to be saved (else an empty tensor)."""
    rows = x.reshape(-1, x.shape[-1])

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        if name in ("reference", "torch"):
            h = F.linear(rows, w1, b1)
            gelu = reference.ops.gelu if name == "reference" else F.gelu
            return F.linear(gelu(h), w2, b2), h
        made: tuple[Tensor, Tensor | None] = _load(name).forward(rows, w1, b1, w2, b2, save)
        return made

    y, h = dispatch("mlp", "forward", backend, x, run, lambda: _plan(w1))
    saved = x.new_empty((0, w1.shape[0])) if h is None or not save else h
    return y.view(*x.shape[:-1], w2.shape[0]), saved


@mlp_op.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if save else 0
    return x.new_empty((*x.shape[:-1], w2.shape[0])), x.new_empty((rows, w1.shape[0]))


def _check_needs(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    require(
        len(arguments["needs"]) == 5,
        f"needs has {len(arguments['needs'])} entries: expected 5, for x, w1, b1, w2, b2",
    )
    rows = math.prod(arguments["x"].shape[:-1])
    require(sizes["R"] == rows, f"h has {sizes['R']} rows: expected {rows}, those of x")


@register(
    "mlp_backward",
    Checks(
        {"dy": "* C2 float", "x": "* C =dy", "h": "R K =dy", "w1": "K C =dy", "w2": "C2 K =dy"},
        also=_check_needs,
        backend=lambda a: why_not_named(
            *("mlp", a["backend"], a["x"], _load, a["w1"], a["w1"], a["w2"], a["w2"])
        ),
    ),
)
def mlp_backward_op(
    dy: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    """Registered op: gradients of x, w1, b1, w2, b2; an empty tensor where none is needed."""
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])

    def run(name: str) -> tuple[Tensor, ...]:
        if name in ("reference", "torch"):
            plain = reference_backward.mlp if name == "reference" else _native.mlp_backward
            return plain(dy_rows, rows, h, w1, w2)
        made: tuple[Tensor, ...] = _load(name).backward(dy_rows, rows, h, w1, w2, tuple(needs))
        return made

    computed = dispatch("mlp", "backward", backend, x, run, lambda: _plan(w1))
    grads = [grad if need else x.new_empty(0) for grad, need in zip(computed, needs, strict=True)]
    if needs[0]:
        grads[0] = grads[0].view(x.shape)
    return grads


@mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


no_second_gradient(mlp_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, w1, _, w2, _, ctx.saved, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], w1, w2)


def _backward(ctx, dy, dh):  # type: ignore[no-untyped-def]
    x, h, w1, w2 = ctx.saved_tensors
    if not ctx.saved:
        raise RuntimeError(
            "ast_fast::mlp ran with save=False and cannot run backward: pass save=True"
        )
    needs = list(ctx.needs_input_grad[:5])
    grads = mlp_backward_op(dy, x, h, w1, w2, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


mlp_op.register_autograd(_backward, setup_context=_setup)
