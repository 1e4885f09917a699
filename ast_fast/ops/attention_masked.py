"""Fused attention over the visible pairs of a fixed mask; work and memory fall with what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..attention_mask import AttentionMask, Rectangles, check_rectangles, dense_pairs
from ..reference import backward as reference_backward
from . import _sdpa
from ._checks import Checks
from ._common import (
    allow_tf32,
    call,
    cast_for_autocast,
    no_second_gradient,
    register,
    require,
    statistics_dtype,
    without_autocast,
)
from ._dispatch import dispatch, why_not_named
from .attention import (
    OPERANDS,
    SAVED,
    Fused,
    check_lse,
    check_operands,
    direction,
    lse_shape,
    plan,
    use_deterministic,
)


def _load(name: str) -> Any:
    if name == "sdpa":
        return Fused
    if name == "triton":
        from ..kernels import attention_masked as implementation
    else:
        from ..cpp import attention_masked as implementation
    return implementation


def attention_masked(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    mask: AttentionMask,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B, Tq, H, D]
    """`softmax(q k^T scale) v` per head over the pairs that `mask` shows, the same for every clip and head.

    Args:
        q: [B, Tq, H, D], any strides with a contiguous last dim; D is 32, 64, 96 or 128 for the
            fast backends.
        k: [B, Tk, H, D]. Keys that no query sees may hold NaN.
        v: [B, Tk, H, D].
        mask: made once and used again: `AttentionMask.factorised(12, 101)`, `.time_window(...)`,
            `.from_dense(...)`. A query that sees no key gives 0. The first call with a mask on a GPU
            copies its tiles there: make it before a CUDA graph captures.
        scale: factor on the scores; D ** -0.5 by default.
        deterministic: as in `attention`; every backend is deterministic here either way.
        return_lse: also return the natural log-sum-exp [B, H, Tq] in float32, without a gradient.

    Returns:
        [B, Tq, H, D], contiguous (and the log-sum-exp if asked).
    """
    check_operands(q, k, v)
    require(
        (q.shape[1], k.shape[1]) == (mask.queries, mask.keys),
        f"mask is for {mask.queries} queries x {mask.keys} keys, q has {q.shape[1]} tokens and k "
        f"{k.shape[1]}: make the mask for these sizes",
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = cast_for_autocast(q, k, v)
    rectangles = mask.rectangles
    chosen = backend.choose("attention_masked", _load, q, k, v, rectangles)
    if chosen == "reference" and not torch.compiler.is_compiling() and not q.is_meta:
        run = reference.ops.attention_masked
        o, lse = without_autocast(run, q, k, v, mask.dense(), scale)
        lse = lse.detach()
    else:
        always = use_deterministic(deterministic)
        tf32 = allow_tf32(q.device.type)
        o, lse = call(attention_masked_op, q, k, v, rectangles, scale, always, tf32, chosen)
    return (o, lse[:, :, : q.shape[1]]) if return_lse else o


def _pairs(rectangles: Sequence[Tensor], q: Tensor, k: Tensor) -> Tensor:
    return dense_pairs(Rectangles(*rectangles[:4]), q.shape[1], k.shape[1])


def _visible(rectangles: Sequence[Tensor], q: Tensor, k: Tensor) -> _sdpa.Visible:
    # one mask of [Tq, Tk] for all clips and heads: small beside the scores
    return _sdpa.visible_pairs(_pairs(rectangles, q, k).to(q.device))


def _check_mask(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    tensors = arguments["rectangles"]
    require(
        len(tensors) == 8, f"rectangles has {len(tensors)} tensors: expected 8 of an AttentionMask"
    )
    wanted = (torch.int32, torch.int32, torch.int64, torch.uint8) * 2
    for place, (tensor, dtype) in enumerate(zip(tensors, wanted, strict=True)):
        table = dtype == torch.int64
        require(
            tensor.dtype == dtype
            and tensor.dim() == 1 + table
            and (not table or tensor.shape[1] == 6),
            f"rectangles[{place}] is {tensor.dtype} {tuple(tensor.shape)}: expected {dtype} "
            f"{'[R, 6]' if table else '[n]'}, as AttentionMask.rectangles",
        )
        place_of_q = arguments["q"].device
        require(
            tensor.device.type == "cpu" or tensor.device == place_of_q,
            f"rectangles[{place}] is on {tensor.device} and q on {place_of_q}: expected the CPU, as "
            "AttentionMask has them",
        )
    if "Tpad" in sizes:
        check_lse(arguments, sizes)


def _check_tokens(a: dict[str, Any], _: dict[str, Any]) -> None:
    check_rectangles(a["rectangles"], a["q"].shape[1], a["k"].shape[1])


def _why_not(a: dict[str, Any]) -> str | None:
    return why_not_named(
        *("attention_masked", a["backend"], a["q"], _load), a["k"], a["v"], list(a["rectangles"])
    )


_OPTIONS: dict[str, Any] = {
    "finite": ("scale",),
    "also": _check_mask,
    "values": _check_tokens,
    "backend": _why_not,
}


@register("attention_masked", Checks(OPERANDS, **_OPTIONS))
def attention_masked_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rectangles: Sequence[Tensor],
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Registered op: o and the padded log-sum-exp; `rectangles` are `AttentionMask.rectangles`."""

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "reference":
            plain = reference.ops.attention_masked
            return without_autocast(plain, q, k, v, _pairs(rectangles, q, k), scale)
        if name.startswith("sdpa"):
            return _sdpa.forward(name, q, k, v, scale, _visible(rectangles, q, k))
        return _load(name).forward(q, k, v, list(rectangles), scale, allow_tf32)

    return dispatch(
        *("attention_masked", "forward", backend, q, run),
        lambda: plan("forward", q, k, True, allow_tf32),
    )


@attention_masked_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rectangles: Sequence[Tensor],
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=statistics_dtype(q.dtype))


@register("attention_masked_backward", Checks(SAVED, **_OPTIONS))
def attention_masked_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rectangles: Sequence[Tensor],
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: gradients of q, k and v."""
    saved = (do, q, k, v, o, lse)

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name == "reference":
            pairs = _pairs(rectangles, q, k)
            dq, dk, dv = reference_backward.attention_masked(do, q, k, v, lse, scale, pairs)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        grads = (dq, dk, dv)
        if name.startswith("sdpa"):
            visible = _visible(rectangles, q, k)
            _sdpa.backward(name, *saved, scale, visible, True, grads)
        else:
            options = (list(rectangles), scale, deterministic, *grads, allow_tf32)
            _load(name).backward(*saved, *options)
        return grads

    wanted = direction(deterministic)
    return dispatch(
        *("attention_masked", wanted, backend, q, run),
        lambda: plan(wanted, q, k, True, allow_tf32),
    )


@attention_masked_backward_op.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rectangles: Sequence[Tensor],
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


no_second_gradient(attention_masked_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, rectangles, *ctx.options = inputs
    ctx.rectangles = list(rectangles)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
    grads = attention_masked_backward_op(do, *ctx.saved_tensors, ctx.rectangles, *ctx.options)
    return (*grads, [None] * len(ctx.rectangles), None, None, None, None)


attention_masked_op.register_autograd(_backward, setup_context=_setup)
