"""Softmax attention with a bias a key, for inference: a key that stands for n tokens gets log n.

That is what makes attention over merged tokens proportional (Bolya et al. 2023). The fast backends
compute the forward pass only; where a gradient is wanted, plain PyTorch computes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import backend, reference
from . import _sdpa
from ._checks import Checks
from ._common import (
    allow_tf32,
    call,
    cast_for_autocast,
    needs_gradient,
    register,
    require,
    statistics_dtype,
    without_autocast,
)
from ._dispatch import dispatch, why_not_named
from .attention import OPERANDS, Fused, check_operands, plan


def _load(name: str) -> Any:
    if name == "sdpa":
        return Fused
    if name == "triton":
        from ..kernels import attention_biased as implementation
    else:
        from ..cpp import attention_biased as implementation
    return implementation


def attention_biased(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_bias: Tensor,  # [B, Tk]
    scale: float | None = None,
) -> Tensor:  # [B, Tq, H, D]
    """`softmax(q k^T scale + key_bias) v` per head, exact, without storing the scores.

    Args:
        q: [B, Tq, H, D], any strides with a contiguous last dim; D is 32, 64, 96 or 128 for the
            fast backends.
        k: [B, Tk, H, D].
        v: [B, Tk, H, D].
        key_bias: [B, Tk] finite, in natural units, the same for all heads and queries; never cast
            to 16 bits.
        scale: factor on the products; D ** -0.5 by default.

    Returns:
        [B, Tq, H, D], contiguous.
    """
    check_operands(q, k, v)
    require(
        key_bias.shape == k.shape[:2] and key_bias.is_floating_point(),
        f"key_bias has shape {tuple(key_bias.shape)} and {key_bias.dtype}: expected "
        f"{tuple(k.shape[:2])} floating, one number a clip and key",
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = cast_for_autocast(q, k, v)
    key_bias = key_bias.to(device=q.device, dtype=statistics_dtype(q.dtype))
    chosen = "reference"
    if not needs_gradient(q, k, v, key_bias):
        chosen = backend.choose("attention_biased", _load, q, k, v, key_bias)
    if chosen == "reference":
        return without_autocast(reference.ops.attention, q, k, v, scale, None, key_bias)[0]
    tf32 = allow_tf32(q.device.type)
    o: Tensor = call(attention_biased_op, q, k, v, key_bias, scale, tf32, chosen)
    return o


@register(
    "attention_biased",
    Checks(
        OPERANDS | {"key_bias": "B Tk ~q"},
        finite=("scale",),
        backend=lambda a: why_not_named(
            *("attention_biased", a["backend"], a["q"], _load), a["k"], a["v"], a["key_bias"]
        ),
    ),
)
def attention_biased_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    scale: float,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    """Registered op, without a gradient: the wrapper does not call it where one is wanted."""

    def run(name: str) -> Tensor:
        o: Tensor
        if name == "reference":
            o = without_autocast(reference.ops.attention, q, k, v, scale, None, key_bias)[0]
            return o.contiguous()
        if name.startswith("sdpa"):
            return _sdpa.forward(name, q, k, v, scale, key_bias=key_bias)[0]
        o = _load(name).forward(q, k, v, key_bias, scale, allow_tf32)[0]
        return o

    return dispatch(
        *("attention_biased", "forward", backend, q, run),
        lambda: plan("forward", q, k, True, allow_tf32),
    )


@attention_biased_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    scale: float,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape)
