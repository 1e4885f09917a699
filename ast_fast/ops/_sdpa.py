"""Attention by PyTorch's own fused kernels, in the terms of our registered ops.

FlashAttention, cuDNN and the memory-efficient kernel on a GPU, one flash kernel on a CPU; none stores the
scores. Outputs and log-sum-exp have the format of every backend of ours, so the two directions may run in
different ones. Private ops of PyTorch, at signatures that 2.11 and 2.14 share; on a GPU only the check on
one can prove that they mean what they say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import constant_when_compiled
from ..reference.ops import LSE_BLOCK

# What a call may fall back to, in this order.
ON_CUDA = ("sdpa-flash", "sdpa-efficient")
ON_CPU = ("sdpa-cpu",)
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


class Visible(NamedTuple):
    """Which keys a query sees, with 0 for what sees or is seen by nothing."""

    bias: Tensor  # [B or 1, 1, Tq or 1, Tk] bool: pairs that count; all of them where a query sees none
    unseen: Tensor  # [B or 1, Tk, 1, 1] bool: keys that may hold NaN
    blind: Tensor  # [B or 1, Tq or 1, 1, 1] bool: queries without keys


def visible_keys(key_lengths: Tensor, num_keys: int) -> Visible:
    """What [B] lengths let see; a clip without keys is blind."""
    seen = torch.arange(num_keys, device=key_lengths.device) < key_lengths[:, None]
    blind = key_lengths[:, None] <= 0
    bias = (seen | blind)[:, None, None]
    return Visible(bias, ~seen[:, :, None, None], blind[:, :, None, None])


def visible_pairs(pairs: Tensor) -> Visible:
    """What a mask [Tq, Tk], True where visible, lets see."""
    blind = ~pairs.any(1)
    unseen = ~pairs.any(0)
    bias = (pairs | blind[:, None])[None, None]
    return Visible(bias, unseen[None, :, None, None], blind[None, :, None, None])


def candidates(device: torch.device) -> tuple[str, ...]:
    """Implementations that a call on this device may fall back to, in order."""
    return ON_CUDA if device.type == "cuda" else ON_CPU


@constant_when_compiled
def why_never(device_type: str, dtype: torch.dtype) -> str | None:
    """Why none of `candidates` takes this dtype on this device; None if one does."""
    if dtype not in (torch.float32, *_SIXTEEN_BITS):
        return f"SDPA is taken for float32, float16 and bfloat16, got {dtype}"
    if device_type not in ("cpu", "cuda"):
        return f"SDPA is taken on CUDA and CPU, got {device_type}"
    if device_type == "cpu":
        return None
    if torch.version.hip is not None:
        return "SDPA's log-sum-exp has another layout on AMD GPUs"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        return "bfloat16 needs compute capability 8.0 or newer"
    return None


def why_not(
    name: str,
    direction: str,
    q: Tensor,  # [..., Tq, H, D]
    num_keys: int,
    masked: bool,
    deterministic: bool = False,
) -> str | None:
    """Why an implementation cannot take a call, or not with the promises made; None if it can."""
    reason = why_never(q.device.type, q.dtype)
    if reason is not None or q.device.type == "cpu":
        return reason
    enabled = {
        "sdpa-flash": torch.backends.cuda.flash_sdp_enabled,
        "sdpa-cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "sdpa-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    }[name]
    if not enabled():
        return "it is switched off in torch.backends.cuda"
    if q.dim() == 4 and q.shape[0] > 65535:
        return f"takes at most 65535 clips, got {q.shape[0]}"  # what a grid has in that direction
    if name == "sdpa-efficient":
        return None  # any width, masks, and one split of the keys is deterministic
    capability = torch.cuda.get_device_capability(q.device)
    if q.dtype not in _SIXTEEN_BITS or capability < (8, 0):
        return f"takes 16-bit tensors on compute capability 8.0 or newer, got {q.dtype}"
    backward = direction != "forward"
    width = -(-q.shape[-1] // 8) * 8
    if name == "sdpa-flash":
        # on GPUs with less shared memory wide heads have no backward
        limit = 256 if capability in ((8, 0), (9, 0), (10, 0)) or not backward else 192
        if masked or width > limit:
            return "takes no mask" if masked else f"takes heads up to {limit}, got {q.shape[-1]}"
        if backward and deterministic and not _deterministic_everywhere():
            return "its backward is deterministic under torch.use_deterministic_algorithms only"
        return None
    if width > 128:
        return f"takes heads up to 128, got {q.shape[-1]}"
    if backward and deterministic:
        return "its backward is not deterministic"
    # https://github.com/pytorch/pytorch/issues/196678: the gradient of q is NaN
    if masked and 64 in (q.shape[-3] % 128, num_keys % 128):
        return "its gradients are NaN with a mask where a length is 64 over a multiple of 128"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") != "0":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE gives it another layout of the log-sum-exp"
    return None


def _deterministic_everywhere() -> bool:
    # with warn_only PyTorch warns and takes the other algorithm
    asked = torch.are_deterministic_algorithms_enabled()
    return asked and not torch.is_deterministic_algorithms_warn_only_enabled()


def forward(
    name: str,
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    scale: float,
    visible: Visible | None = None,
    key_bias: Tensor | None = None,  # [B, Tk] float32
) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, H, D] and natural log-sum-exp [B, H, Tpad] float32, +inf in its padding."""
    clips, queries, heads, width = q.shape
    columns = -(-queries // LSE_BLOCK) * LSE_BLOCK
    lse = torch.full((clips, heads, columns), math.inf, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    dtype = q.dtype
    if key_bias is not None and q.is_cuda:
        # its kernel wants the bias in the dtype of q, where a 16-bit one would lose digits
        q, k, v = q.float(), k.float(), v.float()
    q, scale, _ = rising(q, scale)
    if visible is not None:
        k, v = (x.masked_fill(visible.unseen, 0.0) for x in (k, v))
        q = q.masked_fill(visible.blind, 0.0)
    bias = _bias(q, k, visible, key_bias)
    q, k, v = (operand(x) for x in (q, k, v))
    o, found = _forward(name, q, k, v, bias, scale)
    o = o[..., :width].to(dtype)
    lse[:, :, :queries] = found
    if visible is not None:
        o = o.masked_fill(visible.blind, 0.0)
        lse[:, :, :queries].masked_fill_(visible.blind[..., 0].transpose(1, 2), math.inf)
    return o.contiguous(), lse


def _forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, H, D'] and log-sum-exp [B, H, Tq]."""
    queries, keys = q.shape[1], k.shape[1]
    if not q.is_cuda:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        run = _aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = run(*heads, 0.0, False, attn_mask=bias, scale=scale)
        return o.transpose(1, 2), lse
    if name == "sdpa-flash":
        run = _aten._flash_attention_forward
        o, lse, *_ = run(
            q, k, v, None, None, queries, keys, 0.0, False, False, scale=scale
        )  # fmt: skip
        return o, lse[:, :, :queries]
    if name == "sdpa-cudnn":
        heads = (x.transpose(1, 2) for x in (q, k, v))
        run = _aten._scaled_dot_product_cudnn_attention
        o, lse, *_ = run(*heads, _repeated(bias, q, k, 1), True, 0.0, False, False, scale=scale)
        return o.transpose(1, 2), lse.reshape(*lse.shape[:2], queries)
    run = _aten._efficient_attention_forward
    bias = _repeated(bias, q, k, q.shape[2])
    o, lse, *_ = run(q, k, v, bias, None, None, None, None, 0.0, 0, True, scale=scale)
    return o, lse[:, :, :queries]


def backward(
    name: str,
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,  # [B, H, Tpad] float32
    scale: float,
    visible: Visible | None,
    deterministic: bool,
    grads: Sequence[Tensor],  # dq, dk, dv
) -> None:
    """Write the gradients; keys that nothing sees and queries that see nothing get exact zeros."""
    if not q.numel() or not k.numel():
        for grad in grads:
            grad.zero_()
        return
    width = q.shape[-1]
    q, scale, sign = rising(q, scale)
    if visible is not None:
        k, v = (x.masked_fill(visible.unseen, 0.0) for x in (k, v))
        q, do = (x.masked_fill(visible.blind, 0.0) for x in (q, do))
    bias = _bias(q, k, visible, None)
    do, q, k, v, o = (operand(x) for x in (do, q, k, v, o))
    found = _backward(name, do, q, k, v, o, lse.contiguous(), bias, scale, deterministic)
    for number, (grad, made) in enumerate(zip(grads, found, strict=True)):
        made = made[..., :width]
        if visible is not None:
            made = made.masked_fill(visible.unseen if number else visible.blind, 0.0)
        grad.copy_(made)
    if sign < 0:
        grads[0].neg_()


def _backward(
    name: str,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [B, T, H, D']; `lse` is [B, H, Tpad]."""
    queries, keys = q.shape[1], k.shape[1]
    heads = tuple(x.transpose(1, 2) for x in (do, q, k, v, o))
    if not q.is_cuda:
        run = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        # the layout in which its own forward leaves it
        rows = lse[:, :, :queries].transpose(1, 2).contiguous().transpose(1, 2)
        made = run(*heads, rows, 0.0, False, attn_mask=bias, scale=scale)
        return tuple(x.transpose(1, 2) for x in made)
    unread = torch.empty(0, dtype=torch.int64, device=q.device)  # state of a dropout that is 0
    if name == "sdpa-flash":
        run = _aten._flash_attention_backward
        dq, dk, dv = run(
            do, q, k, v, o, lse[:, :, :queries].contiguous(), None, None, queries, keys, 0.0, False,
            unread, unread, scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    if name == "sdpa-cudnn":
        run = _aten._scaled_dot_product_cudnn_attention_backward
        rows = lse[:, :, :queries].contiguous()[..., None]
        bias = _repeated(bias, q, k, 1)
        made = run(
            *heads, rows, unread, unread, bias, None, None, queries, keys, 0.0, False, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in made)
    run = _aten._efficient_attention_backward
    bias = _repeated(bias, q, k, q.shape[2])
    # with one split no two programs add to the same element
    splits = 1 if deterministic else None
    dq, dk, dv, _ = run(
        do, q, k, v, bias, o, None, None, queries, keys, lse, 0.0, unread, unread, 0, False,
        scale=scale, num_splits_key=splits,
    )  # fmt: skip
    return dq, dk, dv


def _repeated(bias: Tensor | None, q: Tensor, k: Tensor, heads: int) -> Tensor | None:
    """The bias for all clips and queries, with strides of 0 where it says the same."""
    if bias is None:
        return None
    return bias.expand(q.shape[0], heads, q.shape[1], k.shape[1])


def rising(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """An equal problem with a positive scale, as kernels that take the maximum before they scale want."""
    if scale < 0:
        return -q, -scale, -1.0
    return q, max(scale, 1e-30), 1.0  # -inf times 0 is NaN, and this makes every score 0 as surely


def operand(x: Tensor) -> Tensor:
    """`x` [..., T, H, D] with heads a multiple of 8 wide that start on 16 bytes, for a GPU; itself on a CPU."""
    if not x.is_cuda:
        return x if x.stride(-1) == 1 else x.contiguous()
    padding = -x.shape[-1] % 8
    if padding:
        return F.pad(x, (0, padding))
    step = 16 // x.element_size()
    rows = [s for s, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    # an expanded tensor has no rows of its own
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s and s % step == 0 for s in rows):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _bias(q: Tensor, k: Tensor, visible: Visible | None, key_bias: Tensor | None) -> Tensor | None:
    """What is added to the scores: [B or 1, 1, Tq or 1, Tk]."""
    if visible is None and key_bias is None:
        return None
    keys = k.shape[1]
    dtype = q.dtype if q.is_cuda else torch.float32
    if key_bias is not None:
        source = key_bias.to(dtype)[:, None, None]
    else:
        assert visible is not None
        source = torch.zeros(visible.bias.shape, dtype=dtype, device=q.device)
        source.masked_fill_(~visible.bias, -math.inf)
    if not q.is_cuda:
        return source
    return F.pad(source, (0, -keys % 16))[..., :keys]  # rows start on 16 elements
