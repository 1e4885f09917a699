"""LayerNorm over the last dim, with statistics in float32."""

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


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import layer_norm as implementation
    else:
        from ..cpp import layer_norm as implementation
    return implementation


def check_parameters(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise unless weight and bias are [C] on the device of x [..., C]."""
    shape, device = x.shape[-1:], x.device
    if weight.shape == shape == bias.shape and weight.device == device == bias.device:
        return  # the messages below cost more than a small kernel
    require(x.dim() >= 1, "x has no dimension: expected [..., C]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(
            tensor.shape == x.shape[-1:],
            f"{name} has shape {tuple(tensor.shape)}: expected ({x.shape[-1]},), the last dim of x",
        )
        require(
            tensor.device == x.device,
            f"{name} is on {tensor.device} and x on {x.device}: move them to one device",
        )


def layer_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [..., C]
    """Normalise the last dim to mean 0 and variance 1, then scale and shift (Ba et al. 2016).

    Args:
        x: [..., C], float32, bfloat16, float16 or float64.
        weight: [C]; may be wider than x.
        bias: [C]; may be wider than x.
        eps: added to the variance. The original AST has 1e-6 in its blocks and 1e-5 in its head.
        out_dtype: dtype of the result; by default that of x, or autocast's under autocast.

    Returns:
        [..., C], contiguous.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2))
    tensor([[-1.0000,  1.0000]])
    """
    check_parameters(x, weight, bias)
    if out_dtype is None:
        out_dtype = autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
        out_dtype = out_dtype or x.dtype
    chosen = backend.choose("layer_norm", _load, x, weight, bias, out_dtype)
    if chosen == "reference":
        return reference.ops.layer_norm(x, weight, bias, eps, out_dtype)[0]
    return call(layer_norm_op, x, weight, bias, eps, out_dtype, chosen)[0]


@register(
    "layer_norm",
    Checks(
        {"x": "* C float", "weight": "C float", "bias": "C float"},
        at_least={"eps": 0.0},
        floats=("out_dtype",),
        backend=lambda a: why_not_named(
            *("layer_norm", a["backend"], a["x"], _load, a["weight"], a["bias"], a["out_dtype"])
        ),
    ),
)
def layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: y, mean and 1/std."""
    rows = x.reshape(-1, x.shape[-1])

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        plain = {"reference": reference.ops.layer_norm, "torch": _native.layer_norm}.get(name)
        return (plain or _load(name).forward)(rows, weight, bias, eps, out_dtype)

    y, mean, rstd = dispatch(
        "layer_norm", "forward", backend, x, run, lambda: Plan((f"width {x.shape[-1]}",))
    )
    # the reference's follow the strides of x
    y = y.contiguous().view(x.shape)
    return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@layer_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    stats = statistics_dtype(x.dtype)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape[:-1], dtype=stats),
        x.new_empty(x.shape[:-1], dtype=stats),
    )


@register(
    "layer_norm_backward",
    Checks(
        {"dy": "* C float", "x": "* C float", "weight": "C float", "mean": "* ~x", "rstd": "* ~x"},
        backend=lambda a: why_not_named(
            *("layer_norm", a["backend"], a["x"], _load, a["weight"], a["weight"], a["dy"].dtype)
        ),
    ),
)
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: gradients of x, weight and bias."""
    width = x.shape[-1]
    rows, dy_rows = x.reshape(-1, width), dy.reshape(-1, width)

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        plain = {
            "reference": reference_backward.layer_norm,
            "torch": _native.layer_norm_backward,
        }.get(name)
        saved = (dy_rows, rows, weight, mean.reshape(-1), rstd.reshape(-1))
        return (plain or _load(name).backward)(*saved)

    dx, dweight, dbias = dispatch(
        "layer_norm", "backward", backend, x, run, lambda: Plan((f"width {width}",))
    )
    dx = dx.contiguous().view(x.shape)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


@layer_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


no_second_gradient(layer_norm_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx, dy, dmean, drstd):  # type: ignore[no-untyped-def]
    dx, dweight, dbias = layer_norm_backward_op(dy, *ctx.saved_tensors, ctx.backend)
    return dx, dweight, dbias.to(ctx.bias_dtype), None, None, None


layer_norm_op.register_autograd(_backward, setup_context=_setup)
