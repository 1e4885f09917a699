"""Residual addition and LayerNorm in one pass over the residual stream."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from . import _native
from ._checks import Checks
from ._common import autocast_dtype, call, no_second_gradient, register, require, statistics_dtype
from ._dispatch import Plan, dispatch, why_not_named
from .layer_norm import check_parameters


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import add_layer_norm as implementation
    else:
        from ..cpp import add_layer_norm as implementation
    return implementation


def add_layer_norm(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`total = x + residual`, then LayerNorm of `total`: the joint of two transformer halves.

    Args:
        x: [..., C], output of the half before (attention or MLP).
        residual: [..., C], the stream it is added to; its dtype is the stream's dtype.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        out_dtype: dtype of y; by default that of x, or autocast's under autocast.

    Returns:
        y [..., C] and total [..., C], both contiguous; statistics are of the rounded total.
    """
    require(
        x.shape == residual.shape,
        f"x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}: expected equal shapes",
    )
    check_parameters(x, weight, bias)
    if out_dtype is None:
        out_dtype = autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
        out_dtype = out_dtype or x.dtype
    chosen = backend.choose("add_layer_norm", _load, x, residual, weight, bias, out_dtype)
    if chosen == "reference":
        return reference.ops.add_layer_norm(x, residual, weight, bias, eps, out_dtype)[:2]
    y, total, _, _ = call(add_layer_norm_op, x, residual, weight, bias, eps, out_dtype, chosen)
    return y, total


@register(
    "add_layer_norm",
    Checks(
        {"x": "* C float", "residual": "* C float", "weight": "C float", "bias": "C float"},
        at_least={"eps": 0.0},
        floats=("out_dtype",),
        backend=lambda a: why_not_named(
            *("add_layer_norm", a["backend"], a["x"], _load),
            *(a["residual"], a["weight"], a["bias"], a["out_dtype"]),
        ),
    ),
)
def add_layer_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Registered op: y, total, mean and 1/std."""
    width = x.shape[-1]

    def run(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plain = {
            "reference": reference.ops.add_layer_norm,
            "torch": _native.add_layer_norm,
        }.get(name)
        terms = (x.reshape(-1, width), residual.reshape(-1, width))
        return (plain or _load(name).forward)(*terms, weight, bias, eps, out_dtype)

    y, total, mean, rstd = dispatch(
        "add_layer_norm", "forward", backend, x, run, lambda: Plan((f"width {width}",))
    )
    rows = x.shape[:-1]
    y, total = (made.contiguous().view(x.shape) for made in (y, total))
    return y, total, mean.view(rows), rstd.view(rows)


@add_layer_norm_op.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = statistics_dtype(residual.dtype)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        residual.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=stats),
        x.new_empty(x.shape[:-1], dtype=stats),
    )


@register(
    "add_layer_norm_backward",
    Checks(
        {
            "dy": "* C float",
            "dtotal": "* C float",
            "total": "* C float",
            "weight": "C float",
            "mean": "* ~total",
            "rstd": "* ~total",
        },
        backend=lambda a: why_not_named(
            *("add_layer_norm", a["backend"], a["total"], _load),
            *(a["dy"] if a["dtotal"] is None else a["dtotal"], a["weight"], a["weight"]),
            a["dy"].dtype,
        ),
    ),
)
def add_layer_norm_backward_op(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: gradient of the sum, of weight and of bias."""
    width = total.shape[-1]

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        plain = {
            "reference": reference_backward.add_layer_norm,
            "torch": _native.add_layer_norm_backward,
        }.get(name)
        return (plain or _load(name).backward)(
            dy.reshape(-1, width),
            None if dtotal is None else dtotal.reshape(-1, width),
            total.reshape(-1, width),
            weight,
            mean.reshape(-1),
            rstd.reshape(-1),
        )

    dsum, dweight, dbias = dispatch(
        "add_layer_norm", "backward", backend, total, run, lambda: Plan((f"width {width}",))
    )
    # the reference gives a sum of column-major tensors column-major
    dsum = dsum.contiguous().view(total.shape)
    return dsum, dweight.to(weight.dtype), dbias.to(weight.dtype)


@add_layer_norm_backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


no_second_gradient(add_layer_norm_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, weight, bias, _, _, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, mean, rstd)


def _backward(ctx, dy, dtotal, dmean, drstd):  # type: ignore[no-untyped-def]
    total, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used further on
        if dtotal is None:
            return (None,) * 7
        return dtotal.to(ctx.x_dtype), dtotal, None, None, None, None, None
    dsum, dweight, dbias = add_layer_norm_backward_op(
        dy, dtotal, total, weight, mean, rstd, ctx.backend
    )
    return dsum.to(ctx.x_dtype), dsum, dweight, dbias.to(ctx.bias_dtype), None, None, None


add_layer_norm_op.register_autograd(_backward, setup_context=_setup)
