"""Linear layers and the feed-forward block with FP8 products: e4m3 forward, e5m2 for gradients.

Weights and activations stay what they are outside; operands are rounded to FP8 on their way into each
product, with one scale a tensor. With `residual`, `norm_weight` and `norm_bias` the residual addition
and LayerNorm in front of the layer are part of it, and the normalised rows exist in FP8 only.
"""

from __future__ import annotations

import math
from types import ModuleType
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
from ._dispatch import Plan, dispatch, why_not_named
from .add_layer_norm import add_layer_norm_backward_op


class _Emulated:
    """Stands for the C++ backend, which has no FP8: says so."""

    @staticmethod
    def unsupported(*inputs: object) -> str:
        """Why not."""
        return "a CPU has no FP8 products: they are emulated, with the same roundings"


def _load(name: str) -> ModuleType:
    return _fp8.load(name) if name == "triton" else _Emulated  # type: ignore[return-value]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, what: str = "weight") -> None:
    require(
        weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1]),
        f"x {tuple(x.shape)}, {what} {tuple(weight.shape)}, bias "
        f"{None if bias is None else tuple(bias.shape)} do not fit: expected [..., C], [K, C], [K]",
    )


def _check_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    require(
        x.shape == residual.shape and weight.shape == bias.shape == x.shape[-1:],
        f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, norm_weight {tuple(weight.shape)}, "
        f"norm_bias {tuple(bias.shape)} do not fit: expected [..., C] twice and [C] twice",
    )


def linear_fp8(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K]
) -> Tensor:  # [..., K]
    """`x weight^T + bias` with FP8 operands, forward and backward.

    Args:
        x: [..., C].
        weight: [K, C]; C and K are multiples of 16 for FP8 hardware to be used.
        bias: [K], or None.

    Returns:
        [..., K], in the dtype of x, or autocast's under autocast.
    """
    _check(x, weight, bias)
    no_transform("linear_fp8")
    (x,) = cast_for_autocast(x)
    chosen = backend.choose("linear_fp8", _load, x, weight)
    save = needs_gradient(x, weight, *(() if bias is None else (bias,)))
    return call(linear_fp8_op, x, None, None, None, 0.0, weight, bias, save, chosen)[0]


def add_norm_linear_fp8(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    eps: float,
    weight: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K]
) -> tuple[Tensor, Tensor]:  # [..., K], [..., C]
    """`total = x + residual`, LayerNorm of it, and `linear_fp8` of that; returns y and total."""
    _check_norm(x, residual, norm_weight, norm_bias)
    _check(x, weight, bias)
    no_transform("add_norm_linear_fp8")
    (x,) = cast_for_autocast(x)
    chosen = backend.choose("linear_fp8", _load, x, weight)
    inputs = (x, residual, norm_weight, norm_bias, weight, *(() if bias is None else (bias,)))
    save = needs_gradient(*inputs)
    norm = (residual, norm_weight, norm_bias, eps)
    y, total, *_ = call(linear_fp8_op, x, *norm, weight, bias, save, chosen)
    return y, total


def _norm(
    residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> _fp8.Norm | None:
    if residual is None:
        return None
    assert weight is not None and bias is not None
    return _fp8.Norm(residual.reshape(-1, residual.shape[-1]), weight, bias, eps)


def _no_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nothing = x.new_empty(0, dtype=torch.float32)
    return x.new_empty(0), nothing, torch.empty_like(nothing)


def _norm_outputs(x: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Total, mean and rstd of a norm; empty where there is none."""
    if not rest:
        return _no_norm(x)
    total, mean, rstd = rest
    # the sum of two column-major tensors is column-major
    return total.contiguous().view(x.shape), mean, rstd


def _fake_norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if residual is None:
        return _no_norm(x)
    rows, stats = x.numel() // x.shape[-1], torch.float32
    return (
        residual.new_empty(x.shape),
        x.new_empty(rows, dtype=stats),
        x.new_empty(rows, dtype=stats),
    )


def fake_operand(like: Tensor, num_rows: int, num_cols: int, save: bool) -> tuple[Tensor, Tensor]:
    """Shapes of a saved transposed operand and its inverse scale."""
    if not save:
        return like.new_empty(0, dtype=torch.uint8), like.new_empty(0, dtype=torch.float32)
    padded = (num_rows + 15) // 16 * 16
    return (
        like.new_empty((num_cols, padded), dtype=torch.uint8),
        like.new_empty(1, dtype=torch.float32),
    )


def kept(x: Tensor, saved: list[Tensor], kinds: tuple[torch.dtype, ...]) -> list[Tensor]:
    """What backward needs; empty tensors of the same dtypes where there is no backward.

    FP8 leaves an op as bytes, which more of PyTorch can handle.
    """
    if not saved:
        return [x.new_empty(0, dtype=kind) for kind in kinds]
    return [
        t.view(kind) if kind == torch.uint8 else t for t, kind in zip(saved, kinds, strict=True)
    ]


_SAVED = (torch.uint8, torch.float32) * 2


def plan(weight: Tensor) -> Plan:
    """What the form of a layer with this weight depends on."""
    return Plan((f"{weight.shape[1]} to {weight.shape[0]}",))


NORMED = {
    "x": "* C float",
    "residual": "* C float",
    "norm_weight": "C float",
    "norm_bias": "C float",
}


def check_norm_arguments(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Raise ValueError unless a norm is there as a whole or not at all."""
    absent = [arguments[name] is None for name in ("residual", "norm_weight", "norm_bias")]
    require(
        all(absent) or not any(absent),
        "residual, norm_weight, norm_bias: expected all three or none of them",
    )


def check_operand(name: str, operand: Tensor, inverse: Tensor, cols: int, rows: int) -> None:
    """Raise ValueError unless a saved operand [cols, rows up to 16] and its scale are what forward gives."""
    wanted = (cols, (rows + 15) // 16 * 16)
    require(
        operand.dtype == torch.uint8
        and operand.shape == wanted
        and inverse.dtype == torch.float32
        and inverse.shape == (1,),
        f"{name} is {operand.dtype} {tuple(operand.shape)} with {inverse.dtype} {tuple(inverse.shape)}: "
        f"expected uint8 {wanted} with one float32, as forward saves them with save=True",
    )


def leading_rows(arguments: dict[str, Any]) -> int:
    """Rows of dy [..., C]."""
    shape = arguments["dy"].shape
    return math.prod(shape[:-1])


def _check_saved(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    require(len(arguments["needs"]) == 3, "needs: expected 3 entries, for x, weight and bias")
    rows = leading_rows(arguments)
    a = arguments
    check_operand("a", a["a"], a["a_inverse"], sizes["C"], rows)
    check_operand("b", a["b"], a["b_inverse"], sizes["C"], sizes["K"])


@register(
    "linear_fp8",
    Checks(
        NORMED | {"weight": "K C float", "bias": "K float"},
        at_least={"eps": 0.0},
        also=check_norm_arguments,
        backend=lambda a: why_not_named("linear_fp8", a["backend"], a["x"], _load, a["weight"]),
    ),
)
def linear_fp8_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Registered op: y, total, mean, 1/std, and both operands transposed for backward."""
    rows = x.reshape(-1, x.shape[-1])
    norm = _norm(residual, norm_weight, norm_bias, eps)

    def run(name: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return _fp8.linear_forward(_fp8.load(name), rows, norm, weight, bias, save)

    y, rest, saved = dispatch("linear_fp8", "forward", backend, x, run, lambda: plan(weight))
    a, a_inverse, b, b_inverse = kept(x, saved, _SAVED)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y, *_norm_outputs(x, rest), a, a_inverse, b, b_inverse


@linear_fp8_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, (width_out, width_in) = x.numel() // x.shape[-1], weight.shape
    return (
        x.new_empty((*x.shape[:-1], width_out)),
        *_fake_norm(x, residual),
        *fake_operand(x, rows, width_in, save),
        *fake_operand(x, width_out, width_in, save),
    )


@register(
    "linear_fp8_backward",
    Checks(
        {
            "weight": "K C float",
            "dy": "* K float",
            "a": "CA RA uint8",
            "a_inverse": "NA float32",
            "b": "CB RB uint8",
            "b_inverse": "NB float32",
        },
        also=_check_saved,
        backend=lambda a: why_not_named("linear_fp8", a["backend"], a["dy"], _load, a["weight"]),
    ),
)
def linear_fp8_backward_op(
    dy: Tensor,
    a: Tensor,
    a_inverse: Tensor,
    b: Tensor,
    b_inverse: Tensor,
    weight: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Registered op: gradients of input, weight and bias; empty where none is needed."""
    rows = dy.reshape(-1, dy.shape[-1])

    def run(name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        saved = [a, a_inverse, b, b_inverse]
        return _fp8.linear_backward(_fp8.load(name), rows, saved, weight.dtype, needs)

    dx, dw, db = dispatch("linear_fp8", "backward", backend, dy, run, lambda: plan(weight))
    return [
        dy.new_empty(0) if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db.to(weight.dtype),
    ]


@linear_fp8_backward_op.register_fake
def _(
    dy: Tensor,
    a: Tensor,
    a_inverse: Tensor,
    b: Tensor,
    b_inverse: Tensor,
    weight: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    shapes = ((*dy.shape[:-1], weight.shape[1]), weight.shape, weight.shape[:1])
    likes = (dy, weight, weight)
    return [
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip(likes, shapes, needs, strict=True)
    ]


no_second_gradient(linear_fp8_backward_op)


def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    """What both layers keep of a norm in front of them."""
    x, residual, norm_weight, norm_bias = inputs[:4]
    _, total, mean, rstd, *saved = output
    ctx.normed, ctx.backend, ctx.saved = residual is not None, inputs[-1], inputs[-2]
    ctx.x_dtype = x.dtype
    ctx.norm_bias_dtype = norm_bias.dtype if ctx.normed else None
    ctx.mark_non_differentiable(mean, rstd, *saved, *(() if ctx.normed else (total,)))
    ctx.set_materialize_grads(False)
    return ([total, norm_weight, mean, rstd] if ctx.normed else []), saved


def norm_gradients(ctx, dx, dtotal, norm):  # type: ignore[no-untyped-def]
    """Gradients of x, residual, norm_weight and norm_bias, from that of the layer's input."""
    if not ctx.normed:
        return dx, None, None, None
    if dx is None:
        return (None,) * 4 if dtotal is None else (dtotal.to(ctx.x_dtype), dtotal, None, None)
    total, weight, mean, rstd = norm
    rows = total.shape[:-1]
    saved = (total, weight, mean.view(rows), rstd.view(rows))
    dsum, dweight, dbias = add_layer_norm_backward_op(dx, dtotal, *saved, ctx.backend)
    return dsum.to(ctx.x_dtype), dsum, dweight, dbias.to(ctx.norm_bias_dtype)


def check_saved(ctx, name):  # type: ignore[no-untyped-def]
    """Backward needs what `save` keeps."""
    if not ctx.saved:
        raise RuntimeError(
            f"ast_fast::{name} ran with save=False and cannot run backward: pass save=True"
        )


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    norm, saved = setup(ctx, inputs, output)
    weight, bias = inputs[5], inputs[6]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, *saved, *norm)


def _backward(ctx, dy, dtotal, *_):  # type: ignore[no-untyped-def]
    check_saved(ctx, "linear_fp8")
    weight, a, a_inverse, b, b_inverse, *norm = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = dw = db = None
    if dy is not None:
        needs = [any(wanted[:4]), wanted[5], wanted[6]]
        found = linear_fp8_backward_op(dy, a, a_inverse, b, b_inverse, weight, needs, ctx.backend)
        dx, dw, db = (g if need else None for g, need in zip(found, needs, strict=True))
    db = None if db is None else db.to(ctx.bias_dtype)
    return (*norm_gradients(ctx, dx, dtotal, norm), None, dw, db, None, None)


linear_fp8_op.register_autograd(_backward, setup_context=_setup)
