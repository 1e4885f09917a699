"""The feed-forward block with FP8 products; GELU and its gradient go straight to FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import _fp8
from ._checks import Checks
from ._common import (
    call,
    cast_for_autocast,
    needs_gradient,
    no_second_gradient,
    no_transform,
    register,
    require,
)
from ._dispatch import dispatch, why_not_named
from .linear_fp8 import (
    NORMED,
    _check,
    _check_norm,
    _fake_norm,
    _load,
    _norm,
    _norm_outputs,
    check_norm_arguments,
    check_operand,
    check_saved,
    fake_operand,
    kept,
    leading_rows,
    norm_gradients,
    plan,
    setup,
)


def mlp_fp8(
    x: Tensor,  # [..., C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
) -> Tensor:  # [..., C2]
    """`gelu(x w1^T + b1) w2^T + b2` with FP8 operands, forward and backward.

    Args:
        x: [..., C].
        w1: [K, C].
        b1: [K].
        w2: [C2, K]; C, K and C2 are multiples of 16 for FP8 hardware to be used.
        b2: [C2].

    Returns:
        [..., C2], in the dtype of x, or autocast's under autocast.
    """
    _check(x, w1, b1, "w1")
    _check(w1.new_empty(0, w1.shape[0]), w2, b2, "w2")
    no_transform("mlp_fp8")
    (x,) = cast_for_autocast(x)
    chosen = backend.choose("mlp_fp8", _load, x, w1, w2)
    save = needs_gradient(x, w1, b1, w2, b2)
    return call(mlp_fp8_op, x, None, None, None, 0.0, w1, b1, w2, b2, save, chosen)[0]


def add_norm_mlp_fp8(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    eps: float,
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
) -> tuple[Tensor, Tensor]:  # [..., C2], [..., C]
    """`total = x + residual`, LayerNorm of it, and `mlp_fp8` of that; returns y and total."""
    _check_norm(x, residual, norm_weight, norm_bias)
    _check(x, w1, b1, "w1")
    _check(w1.new_empty(0, w1.shape[0]), w2, b2, "w2")
    no_transform("add_norm_mlp_fp8")
    (x,) = cast_for_autocast(x)
    chosen = backend.choose("mlp_fp8", _load, x, w1, w2)
    save = needs_gradient(x, residual, norm_weight, norm_bias, w1, b1, w2, b2)
    norm = (residual, norm_weight, norm_bias, eps)
    y, total, *_ = call(mlp_fp8_op, x, *norm, w1, b1, w2, b2, save, chosen)
    return y, total


_Saved = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]


def _check_saved(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    require(len(arguments["needs"]) == 5, "needs: expected 5 entries, for x, w1, b1, w2 and b2")
    saved, rows = arguments["saved"], leading_rows(arguments)
    require(
        len(saved) == 9 and all(each.device == arguments["dy"].device for each in saved),
        f"saved has {len(saved)} tensors: expected the last 9 results of mlp_fp8, on one device with dy",
    )
    x, x_inverse, h, first, first_inverse, second, second_inverse, *bounds = saved
    check_operand("saved[0]", x, x_inverse, sizes["C"], rows)
    check_operand("saved[3]", first, first_inverse, sizes["C"], sizes["K"])
    check_operand("saved[5]", second, second_inverse, sizes["K"], sizes["C2"])
    require(
        h.shape == (rows, sizes["K"]) and h.is_floating_point(),
        f"saved[2] is {h.dtype} {tuple(h.shape)}: expected floating ({rows}, {sizes['K']})",
    )
    require(
        all(each.shape == (1,) and each.dtype == torch.float32 for each in bounds),
        "saved[7] and saved[8]: expected one float32 each",
    )


@register(
    "mlp_fp8",
    Checks(
        NORMED | {"w1": "K C float", "b1": "K float", "w2": "C2 K float", "b2": "C2 float"},
        at_least={"eps": 0.0},
        also=check_norm_arguments,
        backend=lambda a: why_not_named("mlp_fp8", a["backend"], a["x"], _load, a["w1"], a["w2"]),
    ),
)
def mlp_fp8_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    save: bool,
    backend: str,
) -> _Saved:
    """Registered op: y, total, mean, 1/std, and what backward needs."""
    rows = x.reshape(-1, x.shape[-1])
    norm = _norm(residual, norm_weight, norm_bias, eps)

    def run(name: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return _fp8.mlp_forward(_fp8.load(name), rows, norm, w1, b1, w2, b2, save)

    y, rest, saved = dispatch("mlp_fp8", "forward", backend, x, run, lambda: plan(w1))
    operand = (torch.uint8, torch.float32)
    saved = kept(x, saved, (*operand, x.dtype, *operand * 2, torch.float32, torch.float32))
    y = y.view(*x.shape[:-1], w2.shape[0])
    made: _Saved = (y, *_norm_outputs(x, rest), *saved)  # type: ignore[assignment]
    return made


@mlp_fp8_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    save: bool,
    backend: str,
) -> _Saved:
    rows, (hidden, width) = x.numel() // x.shape[-1], w1.shape
    one = 1 if save else 0
    return (
        x.new_empty((*x.shape[:-1], w2.shape[0])),
        *_fake_norm(x, residual),
        *fake_operand(x, rows, width, save),
        x.new_empty((rows, hidden) if save else (0,)),
        *fake_operand(x, hidden, width, save),
        *fake_operand(x, w2.shape[0], hidden, save),
        x.new_empty(one, dtype=torch.float32),
        x.new_empty(one, dtype=torch.float32),
    )


@register(
    "mlp_fp8_backward",
    Checks(
        {"w1": "K C float", "w2": "C2 K float", "dy": "* C2 float"},
        also=_check_saved,
        backend=lambda a: why_not_named("mlp_fp8", a["backend"], a["dy"], _load, a["w1"], a["w2"]),
    ),
)
def mlp_fp8_backward_op(
    dy: Tensor,
    saved: list[Tensor],
    w1: Tensor,
    w2: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Registered op: gradients of the (normalised) input, w1, b1, w2, b2; empty where not needed."""
    rows = dy.reshape(-1, dy.shape[-1])

    def run(name: str) -> list[Tensor | None]:
        return _fp8.mlp_backward(_fp8.load(name), rows, saved, w1.dtype, needs)

    found = dispatch("mlp_fp8", "backward", backend, dy, run, lambda: plan(w1))
    shapes = _shapes(dy, w1, w2)
    likes = (dy, w1, w1, w2, w2)
    return [
        like.new_empty(0) if grad is None or not need else grad.view(shape).to(like.dtype)
        for grad, like, shape, need in zip(found, likes, shapes, needs, strict=True)
    ]


def _shapes(dy: Tensor, w1: Tensor, w2: Tensor) -> tuple[tuple[int, ...], ...]:
    entered = (*dy.shape[:-1], w1.shape[1])
    return entered, tuple(w1.shape), tuple(w1.shape[:1]), tuple(w2.shape), tuple(w2.shape[:1])


@mlp_fp8_backward_op.register_fake
def _(
    dy: Tensor,
    saved: list[Tensor],
    w1: Tensor,
    w2: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    likes = (dy, w1, w1, w2, w2)
    return [
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip(likes, _shapes(dy, w1, w2), needs, strict=True)
    ]


no_second_gradient(mlp_fp8_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    norm, saved = setup(ctx, inputs, output)
    _, _, _, _, _, w1, b1, w2, b2, _, _ = inputs
    ctx.bias_dtypes = b1.dtype, b2.dtype
    ctx.num_saved = len(saved)
    ctx.save_for_backward(w1, w2, *saved, *norm)


def _backward(ctx, dy, dtotal, *_):  # type: ignore[no-untyped-def]
    check_saved(ctx, "mlp_fp8")
    w1, w2, *rest = ctx.saved_tensors
    saved, norm = rest[: ctx.num_saved], rest[ctx.num_saved :]
    wanted = ctx.needs_input_grad
    grads = [None] * 5
    if dy is not None:
        needs = [any(wanted[:4]), *wanted[5:9]]
        found = mlp_fp8_backward_op(dy, saved, w1, w2, needs, ctx.backend)
        grads = [g if need else None for g, need in zip(found, needs, strict=True)]
    dx, dw1, db1, dw2, db2 = grads
    db1, db2 = (
        None if g is None else g.to(dtype)
        for g, dtype in zip((db1, db2), ctx.bias_dtypes, strict=True)
    )
    return (*norm_gradients(ctx, dx, dtotal, norm), None, dw1, db1, dw2, db2, None, None)


mlp_fp8_op.register_autograd(_backward, setup_context=_setup)
