"""Fused attention over clips of different length packed into one sequence, without padding."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from . import _sdpa_varlen
from ._checks import Checks
from ._common import (
    PLAIN,
    allow_tf32,
    call,
    cast_for_autocast,
    no_second_gradient,
    register,
    require,
    statistics_dtype,
    traced,
    without_autocast,
)
from ._dispatch import dispatch, why_not_named
from .attention import Fused, direction, plan


def _load(name: str) -> Any:
    if name == "sdpa":
        return Fused
    if name == "triton":
        from ..kernels import attention_varlen as implementation
    else:
        from ..cpp import attention_varlen as implementation
    return implementation


def attention_varlen(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    deterministic: bool = True,
) -> Tensor:  # [Nq, H, D]
    """Attention within each clip of a packed batch.

    Args:
        q: [Nq, H, D], the clips' tokens one after another.
        k: [Nk, H, D].
        v: [Nk, H, D].
        cu_seqlens_q: [B + 1] int32, where each clip starts, ending with Nq.
        cu_seqlens_k: [B + 1] int32, likewise for keys.
        max_seqlen_q: longest clip in queries; an upper bound does.
        max_seqlen_k: longest clip in keys.
        scale: factor on the scores; D ** -0.5 by default.
        deterministic: as in `attention`.

    Returns:
        [Nq, H, D], contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit; on a CPU also starts that do not begin with 0, go backwards or do
            not end with the number of rows, and a clip longer than its `max_seqlen`. On a GPU nothing waits for
            the starts: such ones give NaN everywhere, in gradients too, and no other memory is touched.
    """
    require(
        q.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:],
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [Nq, H, D] and twice "
        "[Nk, H, D]",
    )
    require(
        q.dtype == k.dtype == v.dtype,
        f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype",
    )
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require(
            starts.dim() == 1 and starts.dtype == torch.int32 and starts.numel() >= 1,
            f"{name} has shape {tuple(starts.shape)} and {starts.dtype}: expected [B + 1] int32",
        )
    require(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"cu_seqlens_q has {cu_seqlens_q.numel()} entries and cu_seqlens_k {cu_seqlens_k.numel()}: "
        "expected one more than there are clips in both",
    )
    if not q.device == cu_seqlens_q.device == cu_seqlens_k.device:
        raise ValueError(
            f"q is on {q.device}, cu_seqlens_q on {cu_seqlens_q.device} and cu_seqlens_k on "
            f"{cu_seqlens_k.device}: move them to one device"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = cast_for_autocast(q, k, v)
    if not traced() and not q.is_meta and type(cu_seqlens_q) in PLAIN:
        rows = (q.shape[0], k.shape[0])
        check_starts(cu_seqlens_q, cu_seqlens_k, *rows, max_seqlen_q, max_seqlen_k)
    chosen = backend.choose("attention_varlen", _load, q, k, v, cu_seqlens_q, cu_seqlens_k)
    # the reference loops over the clips' ends, which a trace or a tensor without memory does not know:
    # there it runs as the op
    if chosen == "reference" and not torch.compiler.is_compiling() and not q.is_meta:
        rows = (q.shape[0], k.shape[0])
        check_starts(cu_seqlens_q, cu_seqlens_k, *rows, max_seqlen_q, max_seqlen_k, wait=True)
        run = reference.ops.attention_varlen
        return without_autocast(run, q, k, v, cu_seqlens_q, cu_seqlens_k, scale)[0]
    return call(
        attention_varlen_op,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        deterministic or torch.are_deterministic_algorithms_enabled(),
        allow_tf32(q.device.type),
        chosen,
    )[0]


def _check_columns(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    clips = sizes["S"] - 1
    require(clips >= 0, "cu_seqlens_q is empty: expected [B + 1], one more than there are clips")
    if "Npad" in sizes:
        wanted = reference.ops.varlen_columns(sizes["Nq"], clips)
        require(
            sizes["Npad"] == wanted,
            f"lse has {sizes['Npad']} columns: expected {wanted} for {sizes['Nq']} queries of {clips} clips",
        )


def check_starts(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_queries: int,
    num_keys: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    wait: bool = False,
) -> None:
    """Raise ValueError unless starts on a CPU bound clips among the rows, none longer than is said.

    Starts elsewhere are read only with `wait`, by what waits for them anyway.
    """
    sides = [("q", cu_seqlens_q, num_queries, max_seqlen_q)]
    keys = (cu_seqlens_k, num_keys, max_seqlen_k)
    if cu_seqlens_k is not cu_seqlens_q or keys[1:] != sides[0][2:]:
        sides.append(("k", *keys))
    for name, starts, rows, longest in sides:
        # sizes alone tell these, on any device
        clips = starts.numel() - 1
        if rows > clips * longest:
            raise ValueError(
                f"max_seqlen_{name}={longest} for {rows} rows in {clips} clips of cu_seqlens_{name}: "
                "expected the longest clip, and as many clips as hold all rows"
            )
        if starts.device.type != "cpu" and not wait:
            continue
        values = starts.tolist()
        lengths = list(map(operator.sub, values[1:], values))
        if values[0] != 0 or values[-1] != rows or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{name} is {_short(values)}: expected where each clip starts, from 0 on, "
                f"never going backwards, and then the number of rows, {rows}"
            )
        most = max(lengths, default=0)
        if most > longest:
            raise ValueError(
                f"max_seqlen_{name}={longest}: expected {most} or more, the longest clip in "
                f"cu_seqlens_{name}"
            )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"{values[:6]} ... {values[-6:]}"


def _check_values(a: dict[str, Any], _: dict[str, Any]) -> None:
    rows = (a["q"].shape[0], a["k"].shape[0])
    longest = (a["max_seqlen_q"], a["max_seqlen_k"])
    check_starts(a["cu_seqlens_q"], a["cu_seqlens_k"], *rows, *longest)


def _why_not(a: dict[str, Any]) -> str | None:
    starts = (a["cu_seqlens_q"], a["cu_seqlens_k"])
    return why_not_named(
        *("attention_varlen", a["backend"], a["q"], _load), *(a["k"], a["v"], *starts)
    )


_OPERANDS = {
    "q": "Nq H D float",
    "k": "Nk H D =q",
    "v": "Nk H D =q",
    "cu_seqlens_q": "S int32",
    "cu_seqlens_k": "S int32",
}
_OPTIONS: dict[str, Any] = {
    "finite": ("scale",),
    "at_least": {"max_seqlen_q": 0, "max_seqlen_k": 0},
    "also": _check_columns,
    "values": _check_values,
    "backend": _why_not,
}


@register("attention_varlen", Checks(_OPERANDS, **_OPTIONS))
def attention_varlen_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Registered op: o and the padded log-sum-exp."""
    clips = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "reference":
            check_starts(clips[0], clips[1], q.shape[0], k.shape[0], *clips[2:], wait=True)
            plain = reference.ops.attention_varlen
            return without_autocast(plain, q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
        if name.startswith("sdpa"):
            return _sdpa_varlen.forward(name, q, k, v, *clips, scale)
        return _load(name).forward(q, k, v, *clips, scale, allow_tf32)

    return dispatch(
        *("attention_varlen", "forward", backend, q, run),
        lambda: plan("forward", q, k, False, allow_tf32),
    )


@attention_varlen_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = reference.ops.varlen_columns(q.shape[0], cu_seqlens_q.numel() - 1)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], columns), dtype=statistics_dtype(q.dtype))


@register(
    "attention_varlen_backward",
    Checks(
        _OPERANDS | {"do": "Nq H D =q", "o": "Nq H D =q", "lse": "H Npad ~q"},
        **_OPTIONS,
    ),
)
def attention_varlen_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: gradients of packed q, k and v."""
    saved = (do, q, k, v, o, lse)
    clips = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name == "reference":
            check_starts(clips[0], clips[1], q.shape[0], k.shape[0], *clips[2:], wait=True)
            return reference_backward.attention_varlen(
                do, q, k, v, lse, cu_seqlens_q, cu_seqlens_k, scale
            )
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        if name.startswith("sdpa"):
            _sdpa_varlen.backward(name, *saved, *clips, scale, deterministic, (dq, dk, dv))
        else:
            options = (scale, deterministic, dq, dk, dv, allow_tf32)
            _load(name).backward(*saved, *clips, *options)
        return dq, dk, dv

    wanted = direction(deterministic)
    return dispatch(
        *("attention_varlen", wanted, backend, q, run),
        lambda: plan(wanted, q, k, False, allow_tf32, deterministic),
    )


@attention_varlen_backward_op.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


no_second_gradient(attention_varlen_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)


def _backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
    grads = attention_varlen_backward_op(do, *ctx.saved_tensors, *ctx.options)
    return (*grads,) + (None,) * 8


attention_varlen_op.register_autograd(_backward, setup_context=_setup)
