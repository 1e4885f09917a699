"""Fused softmax attention over separate or fused q, k and v; the scores are never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..reference import backward as reference_backward
from . import _sdpa
from ._checks import Checks
from ._common import (
    allow_tf32,
    call,
    cast_for_autocast,
    int32_lengths,
    no_second_gradient,
    register,
    require,
    statistics_dtype,
    without_autocast,
)
from ._dispatch import Plan, dispatch, why_not_named

LSE_BLOCK = reference.ops.LSE_BLOCK


class Fused:
    """What `backend.choose` asks of PyTorch's fused attention."""

    @staticmethod
    def unsupported(q: Tensor, *others: object) -> str | None:
        """Why it takes none of these inputs, or None."""
        return _sdpa.why_never(q.device.type, q.dtype)


def _load(name: str) -> Any:
    if name == "sdpa":
        return Fused
    if name == "triton":
        from ..kernels import attention as implementation
    else:
        from ..cpp import attention as implementation
    return implementation


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q [B, Tq, H, D] and k, v [B, Tk, H, D] fit together."""
    require(
        q.dim() == 4 and k.dim() == 4 and k.shape == v.shape,
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [B, Tq, H, D] and "
        "twice [B, Tk, H, D]",
    )
    require(
        q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:],
        f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in clips, heads or head width",
    )
    require(
        q.dtype == k.dtype == v.dtype,
        f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype",
    )


def _check(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    check_operands(q, k, v)
    if key_lengths is not None:
        require(
            key_lengths.shape == q.shape[:1] and not key_lengths.is_floating_point(),
            f"key_lengths has shape {tuple(key_lengths.shape)} and {key_lengths.dtype}: expected "
            f"({q.shape[0]},) integers, one length a clip",
        )


def use_deterministic(deterministic: bool) -> bool:
    """What the caller asked for, or True where PyTorch is asked for it everywhere."""
    return deterministic or torch.are_deterministic_algorithms_enabled()


def attention(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B, Tq, H, D]
    """`softmax(q k^T scale) v` per head, exact, without storing the scores (Dao et al. 2022).

    Args:
        q: [B, Tq, H, D], any strides with a contiguous last dim; D is 32, 64, 96 or 128 for the
            fast backends.
        k: [B, Tk, H, D].
        v: [B, Tk, H, D].
        scale: factor on the scores; D ** -0.5 by default.
        key_lengths: [B] integers; keys from there on are ignored, even if they hold NaN. A clip
            without keys gives 0.
        deterministic: False allows faster atomics in backward;
            `torch.use_deterministic_algorithms` forces True.
        return_lse: also return the natural log-sum-exp [B, H, Tq] in float32, without a gradient.

    Returns:
        [B, Tq, H, D], contiguous (and the log-sum-exp if asked).
    """
    _check(q, k, v, key_lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = cast_for_autocast(q, k, v)
    if key_lengths is not None:
        key_lengths = int32_lengths(key_lengths.to(q.device), k.shape[1])
    chosen = backend.choose("attention", _load, q, k, v, key_lengths)
    if chosen == "reference":
        o, lse = without_autocast(reference.ops.attention, q, k, v, scale, key_lengths)
        lse = lse.detach()
    else:
        o, lse = call(
            attention_op,
            q,
            k,
            v,
            key_lengths,
            scale,
            use_deterministic(deterministic),
            allow_tf32(q.device.type),
            chosen,
        )
    return (o, lse[:, :, : q.shape[1]]) if return_lse else o


def attention_qkv(
    qkv: Tensor,  # [B, T, 3, H, D]
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:  # [B, T, H, D]
    """`attention` on the output of one fused QKV projection; its gradient is one buffer too.

    Args:
        qkv: [B, T, 3, H, D], rows q, k, v as timm's `qkv` Linear gives them.
        scale: factor on the scores; D ** -0.5 by default.
        key_lengths: [B] integers, as in `attention`.
        deterministic: as in `attention`.

    Returns:
        [B, T, H, D], contiguous.
    """
    require(
        qkv.dim() == 5 and qkv.shape[2] == 3,
        f"qkv has shape {tuple(qkv.shape)}: expected [B, T, 3, H, D]",
    )
    (qkv,) = cast_for_autocast(qkv)
    q, k, v = qkv.unbind(2)
    _check(q, k, v, key_lengths)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_lengths is not None:
        key_lengths = int32_lengths(key_lengths.to(qkv.device), qkv.shape[1])
    chosen = backend.choose("attention", _load, q, k, v, key_lengths)
    if chosen == "reference":
        return without_autocast(reference.ops.attention, q, k, v, scale, key_lengths)[0]
    tf32 = allow_tf32(qkv.device.type)
    return call(
        attention_qkv_op, qkv, key_lengths, scale, use_deterministic(deterministic), tf32, chosen
    )[0]


def direction(deterministic: bool) -> str:
    """The backward that is wanted, as the tables call it."""
    return "backward" if deterministic else "backward_any_order"


def plan(
    wanted: str, q: Tensor, k: Tensor, masked: bool, tf32: bool, deterministic: bool = True
) -> Plan:
    """What a choice depends on, for q and k [B, T, H, D] or packed [N, H, D]."""
    rows, heads, width = q.shape[-3:]
    arithmetic = "16bit" if q.dtype != torch.float32 else "tf32" if tf32 else "f32"
    pairs = heads * (q.shape[0] if q.dim() == 4 else 1)
    return Plan(
        (f"heads of {width}", *(("masked",) if masked else ())),
        (*_sdpa.candidates(q.device), "reference"),
        lambda name: _sdpa.why_not(name, wanted, q, k.shape[-3], masked, deterministic),
        (arithmetic, width, rows, pairs),
    )


def _forward(q, k, v, key_lengths, scale, tf32, backend):  # type: ignore[no-untyped-def]
    if key_lengths is not None:
        key_lengths = int32_lengths(key_lengths, k.shape[1])

    def run(name: str) -> tuple[Tensor, Tensor]:
        if name == "reference":
            o, lse = without_autocast(reference.ops.attention, q, k, v, scale, key_lengths)
            return o.contiguous(), lse
        if name.startswith("sdpa"):
            return _sdpa.forward(name, q, k, v, scale, _visible(key_lengths, k))
        return _load(name).forward(q, k, v, scale, key_lengths, tf32)

    return dispatch(
        *("attention", "forward", backend, q, run),
        lambda: plan("forward", q, k, key_lengths is not None, tf32),
    )


def _visible(key_lengths: Tensor | None, k: Tensor) -> _sdpa.Visible | None:
    return None if key_lengths is None else _sdpa.visible_keys(key_lengths, k.shape[1])


def _run_backward(do, q, k, v, o, lse, key_lengths, scale, deterministic, tf32, backend, grads):  # type: ignore[no-untyped-def]
    if key_lengths is not None:
        key_lengths = int32_lengths(key_lengths, k.shape[1])

    def run(name: str) -> None:
        if name == "reference":
            computed = reference_backward.attention(do, q, k, v, lse, scale, key_lengths)
            for out, grad in zip(grads, computed, strict=True):
                out.copy_(grad)
        elif name.startswith("sdpa"):
            visible = _visible(key_lengths, k)
            _sdpa.backward(name, do, q, k, v, o, lse, scale, visible, deterministic, grads)
        else:
            saved = (do, q, k, v, o, lse)
            _load(name).backward(*saved, scale, key_lengths, deterministic, *grads, tf32)

    wanted = direction(deterministic)
    dispatch(
        *("attention", wanted, backend, q, run),
        lambda: plan(wanted, q, k, key_lengths is not None, tf32, deterministic),
    )


def lse_shape(q: Tensor) -> tuple[int, int, int]:
    """Shape of the padded log-sum-exp of q [B, Tq, H, D]."""
    return q.shape[0], q.shape[-2], -(-q.shape[1] // LSE_BLOCK) * LSE_BLOCK


OPERANDS = {"q": "B Tq H D float", "k": "B Tk H D =q", "v": "B Tk H D =q"}
SAVED = OPERANDS | {"do": "B Tq H D =q", "o": "B Tq H D =q", "lse": "B H Tpad ~q"}


def check_lse(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Raise ValueError unless the log-sum-exp has the columns that a forward pass gives it."""
    rows, columns = sizes["Tq"], sizes["Tpad"]
    wanted = -(-rows // LSE_BLOCK) * LSE_BLOCK
    require(
        columns == wanted,
        f"lse has {columns} columns: expected {wanted}, {rows} queries padded to a multiple of {LSE_BLOCK}",
    )


def _why_not(arguments: dict[str, Any]) -> str | None:
    if "qkv" in arguments:
        operands = arguments["qkv"].unbind(2)
    else:
        operands = tuple(arguments[name] for name in "qkv")
    return why_not_named(
        *("attention", arguments["backend"], operands[0], _load), *operands[1:], None
    )


@register(
    "attention",
    Checks(OPERANDS | {"key_lengths": "B integer"}, finite=("scale",), backend=_why_not),
)
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Registered op: o and the padded log-sum-exp."""
    return _forward(q, k, v, key_lengths, scale, allow_tf32, backend)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=statistics_dtype(q.dtype))


@register(
    "attention_backward",
    Checks(
        SAVED | {"key_lengths": "B integer"}, finite=("scale",), also=check_lse, backend=_why_not
    ),
)
def attention_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered op: gradients of q, k and v."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    grads = (dq, dk, dv)
    _run_backward(
        do, q, k, v, o, lse, key_lengths, scale, deterministic, allow_tf32, backend, grads
    )
    return grads


@attention_backward_op.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


no_second_gradient(attention_backward_op)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, key_lengths, ctx.scale, ctx.deterministic, ctx.tf32, ctx.backend = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, key_lengths)


def _backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
    q, k, v, o, lse, key_lengths = ctx.saved_tensors
    options = (ctx.scale, ctx.deterministic, ctx.tf32, ctx.backend)
    grads = attention_backward_op(do, q, k, v, o, lse, key_lengths, *options)
    return (*grads, None, None, None, None, None)


attention_op.register_autograd(_backward, setup_context=_setup)


@register(
    "attention_qkv",
    Checks(
        {"qkv": "B Tq 3 H D float", "key_lengths": "B integer"}, finite=("scale",), backend=_why_not
    ),
)
def attention_qkv_op(
    qkv: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Registered op on [B, T, 3, H, D]: o and the padded log-sum-exp."""
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, key_lengths, scale, allow_tf32, backend)


@attention_qkv_op.register_fake
def _(
    qkv: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    lse = qkv.new_empty((b, h, -(-t // LSE_BLOCK) * LSE_BLOCK), dtype=statistics_dtype(qkv.dtype))
    return qkv.new_empty((b, t, h, d)), lse


@register(
    "attention_qkv_backward",
    Checks(
        {
            "qkv": "B Tq 3 H D float",
            "do": "B Tq H D =qkv",
            "o": "B Tq H D =qkv",
            "lse": "B H Tpad ~qkv",
            "key_lengths": "B integer",
        },
        finite=("scale",),
        also=check_lse,
        backend=_why_not,
    ),
)
def attention_qkv_backward_op(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    """Registered op: the gradient of the fused buffer, written in place of three."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    grads = dqkv.unbind(2)
    _run_backward(
        do, q, k, v, o, lse, key_lengths, scale, deterministic, allow_tf32, backend, grads
    )
    return dqkv


@attention_qkv_backward_op.register_fake
def _(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    deterministic: bool,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


no_second_gradient(attention_qkv_backward_op)


def _setup_qkv(ctx, inputs, output):  # type: ignore[no-untyped-def]
    qkv, key_lengths, ctx.scale, ctx.deterministic, ctx.tf32, ctx.backend = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, o, lse, key_lengths)


def _backward_qkv(ctx, do, dlse):  # type: ignore[no-untyped-def]
    qkv, o, lse, key_lengths = ctx.saved_tensors
    options = (ctx.scale, ctx.deterministic, ctx.tf32, ctx.backend)
    return (attention_qkv_backward_op(do, qkv, o, lse, key_lengths, *options),) + (None,) * 5


attention_qkv_op.register_autograd(_backward_qkv, setup_context=_setup_qkv)
