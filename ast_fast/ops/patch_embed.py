"""Overlapping patches, projection, prefix tokens and positions, written straight to tokens."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from ._checks import Checks
from ._common import allow_tf32, call, cast_for_autocast, no_second_gradient, register, require
from ._dispatch import Plan, dispatch, why_not_named


def _load(name: str) -> ModuleType:
    if name == "triton":
        from ..kernels import patch_embed as implementation
    else:
        from ..cpp import patch_embed as implementation
    return implementation


def patch_grid(
    num_mel_bins: int, num_frames: int, patch: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Patches along frequency and time; what does not fill a patch at the end is ignored.

    Args:
        num_mel_bins: F.
        num_frames: S.
        patch: patch height in mel bins and width in frames.
        stride: steps in mel bins and in frames.

    Raises:
        ValueError: the input is smaller than one patch.

    >>> patch_grid(128, 1024, (16, 16), (10, 10))
    (12, 101)
    """
    f = (num_mel_bins - patch[0]) // stride[0] + 1
    t = (num_frames - patch[1]) // stride[1] + 1
    if num_mel_bins < patch[0] or num_frames < patch[1]:
        raise ValueError(
            f"an input of {num_mel_bins} mel bins and {num_frames} frames is smaller than a patch of "
            f"{patch[0]} x {patch[1]}: pad the input or use smaller patches"
        )
    return f, t


def patch_embed(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
    fstride: int,
    tstride: int,
) -> Tensor:  # [B, P + f*t, C]
    """Split a spectrogram into overlapping patches and make the token sequence of AST.

    Args:
        x: [B, S, F] spectrogram, frames first.
        weight: [C, 1, pf, pt] as the original's Conv2d: frequency before time.
        bias: [C].
        pos: [P + f*t, C] position table, the prefix tokens' rows first.
        prefix: [P, C] class and distillation tokens (P is 0, 1 or 2).
        fstride: step between patches in mel bins.
        tstride: step between patches in frames.

    Returns:
        [B, P + f*t, C] in the dtype of weight (autocast's under autocast); patch (i, j) along
        frequency and time is token P + i*t + j.

    Raises:
        ValueError: shapes do not fit each other.
    """
    require(
        x.dim() == 3, f"x has shape {tuple(x.shape)}: expected [B, S, F], frames before mel bins"
    )
    require(
        weight.dim() == 4 and weight.shape[1] == 1,
        f"weight has shape {tuple(weight.shape)}: expected [C, 1, pf, pt]",
    )
    require(
        fstride >= 1 and tstride >= 1,
        f"fstride={fstride}, tstride={tstride}: expected at least 1",
    )
    patch = (weight.shape[2], weight.shape[3])
    f, t = patch_grid(x.shape[2], x.shape[1], patch, (fstride, tstride))
    expected = (prefix.shape[0] + f * t, weight.shape[0])
    require(
        pos.shape == expected,
        f"pos has shape {tuple(pos.shape)}: expected {expected}, {prefix.shape[0]} prefix tokens and "
        f"{f} x {t} patches; build the model for {x.shape[1]} frames or adapt its positions",
    )
    require(
        prefix.dim() == 2
        and prefix.shape[1:] == weight.shape[:1]
        and bias.shape == weight.shape[:1],
        f"prefix {tuple(prefix.shape)}, bias {tuple(bias.shape)}: expected [P, {weight.shape[0]}] "
        f"and [{weight.shape[0]}]",
    )
    x, weight, bias, pos, prefix = cast_for_autocast(x, weight, bias, pos, prefix)
    require(
        x.dtype == weight.dtype,
        f"x is {x.dtype} and weight {weight.dtype}: cast the input with x.to({weight.dtype})",
    )
    chosen = backend.choose("patch_embed", _load, x, weight, bias, pos, prefix)
    if chosen == "reference":
        return reference.ops.patch_embed(x, weight, bias, pos, prefix, fstride, tstride)
    tf32 = allow_tf32(x.device.type)
    return call(patch_embed_op, x, weight, bias, pos, prefix, fstride, tstride, tf32, chosen)


def _plan(weight: Tensor) -> Plan:
    return Plan((f"patches of {weight.shape[2]} x {weight.shape[3]} to {weight.shape[0]}",))


def _check_grid(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    strides = (arguments["fstride"], arguments["tstride"])
    patch = (sizes["pf"], sizes["pt"])
    require(
        min(patch) >= 1, f"weight has patches of {patch[0]} x {patch[1]}: expected at least 1 x 1"
    )
    f, t = patch_grid(sizes["F"], sizes["S"], patch, strides)
    prefix = sizes["P"] if "P" in sizes else arguments["num_prefix"]
    require(
        sizes["T"] == prefix + f * t,
        f"{'pos' if 'P' in sizes else 'dy'} has {sizes['T']} tokens: expected {prefix + f * t}, {prefix} "
        f"prefix tokens and {f} x {t} patches",
    )


@register(
    "patch_embed",
    Checks(
        {
            "weight": "C 1 pf pt float",
            "x": "B S F =weight",
            "bias": "C float",
            "prefix": "P C float",
            "pos": "T C float",
        },
        at_least={"fstride": 1, "tstride": 1},
        also=_check_grid,
        backend=lambda a: why_not_named(
            *("patch_embed", a["backend"], a["x"], _load),
            *(a["weight"], a["bias"], a["pos"], a["prefix"]),
        ),
    ),
)
def patch_embed_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    prefix: Tensor,
    fstride: int,
    tstride: int,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    """Registered op."""
    args = (x, weight, bias, pos, prefix, fstride, tstride)

    def run(name: str) -> Tensor:
        if name == "reference":
            return reference.ops.patch_embed(*args).to(weight.dtype)
        made: Tensor = _load(name).forward(*args, allow_tf32)
        return made

    return dispatch("patch_embed", "forward", backend, x, run, lambda: _plan(weight))


@patch_embed_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    prefix: Tensor,
    fstride: int,
    tstride: int,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    return weight.new_empty((x.shape[0], pos.shape[0], weight.shape[0]))


@register(
    "patch_embed_backward",
    Checks(
        {"weight": "C 1 pf pt float", "x": "B S F =weight", "dy": "B T C =weight"},
        at_least={"fstride": 1, "tstride": 1, "num_prefix": 0},
        also=_check_grid,
        backend=lambda a: why_not_named(
            *("patch_embed", a["backend"], a["x"], _load), *(a["weight"],) * 4
        ),
    ),
)
def patch_embed_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    fstride: int,
    tstride: int,
    num_prefix: int,
    needs_dx: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Registered op: gradients of weight, bias, pos, prefix and x (empty if not needed)."""
    args = (dy, x, weight, fstride, tstride, num_prefix, needs_dx)

    def run(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        if name == "reference":
            return reference_backward.patch_embed(*args)
        made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] = _load(name).backward(
            *args, allow_tf32
        )
        return made

    *grads, dx = dispatch("patch_embed", "backward", backend, x, run, lambda: _plan(weight))
    dweight, dbias, dpos, dprefix = grads
    return dweight, dbias, dpos, dprefix, x.new_empty(0) if dx is None else dx


@patch_embed_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    fstride: int,
    tstride: int,
    num_prefix: int,
    needs_dx: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = weight.shape[0]
    return (
        weight.new_empty(weight.shape),
        weight.new_empty((width,)),
        weight.new_empty((dy.shape[1], width)),
        weight.new_empty((num_prefix, width)),
        x.new_empty(x.shape if needs_dx else (0,)),
    )


no_second_gradient(patch_embed_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _, _, prefix, ctx.fstride, ctx.tstride, ctx.tf32, ctx.backend = inputs
    ctx.num_prefix = prefix.shape[0]
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    strides = (ctx.fstride, ctx.tstride)
    dweight, dbias, dpos, dprefix, dx = patch_embed_backward_op(
        dy, x, weight, *strides, ctx.num_prefix, needs_dx, ctx.tf32, ctx.backend
    )
    return (dx if needs_dx else None, dweight, dbias, dpos, dprefix) + (None,) * 4


patch_embed_op.register_autograd(_backward, setup_context=_setup)
