"""Attention as transformers asks for it, by `ops.attention`: masks read once, the rest left to PyTorch.

The fused kernels take keys that are hidden from all queries of a clip. Masks of other shapes and
dropout of probabilities go to PyTorch's scaled dot product attention, and that is said once.
Dimensions: B clips, T tokens, H heads, D head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._common import needs_gradient

_log = logging.getLogger("ast_fast.integrations")
_said: set[str] = set()
_HIDDEN = -1e30  # finite, so that a clip without keys stays finite, and below every score
_NEVER_SEEN = -1e4  # an additive mask this low hides a key in every dtype


class Keys(NamedTuple):
    """Which keys of a clip its queries see, for all heads and queries alike.

    Attributes:
        bias: [B, T] float32, added to the scores.
        lengths: [B] int32 where the visible keys are the first ones of each clip, else None.
    """

    bias: Tensor
    lengths: Tensor | None


def say_once(message: str) -> None:
    """A warning that is worth one line a process; none while a compiler traces."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    _log.warning("%s", message)


def key_vector(mask: Tensor) -> Tensor | None:
    """The [B, T] vector behind a mask that is the same for all queries and heads, or None.

    Args:
        mask: [B, T], or [B, H or 1, T or 1, T].
    """
    if mask.dim() == 2:
        return mask
    if mask.dim() != 4:
        return None
    for dim in (1, 2):
        if mask.shape[dim] != 1 and mask.stride(dim) != 0:
            return None
    return mask[:, 0, 0]


def read_keys(vector: Tensor, additive: bool) -> Keys | None:
    """What a vector over keys hides; None if it hides nothing. Waits for the device once.

    Args:
        vector: [B, T]; where it is not additive, nonzero entries are visible keys.
        additive: the entries are added to the scores.
    """
    if additive:
        wide = vector.float()
        hidden = wide <= _NEVER_SEEN
        biased = ((wide != 0) & ~hidden).any()
        bias = wide.masked_fill(hidden, _HIDDEN)
    else:
        hidden = vector == 0
        biased = hidden.new_zeros(())
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, _HIDDEN)
    lengths = (~hidden).sum(1, dtype=torch.int32)
    index = torch.arange(hidden.shape[1], device=hidden.device)
    scattered = (hidden != (index >= lengths[:, None])).any()
    has_bias, has_gaps, has_hidden = torch.stack((biased, scattered, hidden.any())).tolist()
    if not has_bias and not has_hidden:
        return None
    return Keys(bias, None if has_bias or has_gaps else lengths)


def keys_of(mask: Tensor) -> Keys | Tensor | None:
    """A mask as `Keys` where it hides keys alone, unchanged where it does not, None where it hides nothing.

    The layers of a model get the same tensor: what was read is kept with it.
    """
    if torch.compiler.is_compiling():
        return mask
    vector = key_vector(mask)
    if vector is None:
        return mask
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "_ast_fast_keys", None)
    if known is not None and version is not None and known[0] == version:
        kept: Keys | None = known[1]
        return kept
    additive = mask.dim() == 4 and mask.is_floating_point()
    keys = read_keys(vector, additive)
    if type(mask) is Tensor:
        mask._ast_fast_keys = (version, keys)  # type: ignore[attr-defined]
    return keys


def attend(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, D]
    mask: Tensor | Keys | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:  # [B, Tq, H, D]
    """Attention by the fused kernels where they can, else by PyTorch's own.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: None, `Keys`, or a tensor as transformers makes them: [B, T] with nonzero at visible keys, or
            [B, H or 1, Tq or 1, T] boolean (True is visible) or additive.
        scale: factor on the scores.
        dropout: probability with which a probability is dropped.
    """
    if isinstance(mask, Tensor):
        mask = keys_of(mask)
    if dropout:
        say_once(
            f"dropout of attention probabilities ({dropout:g}) is left to PyTorch's attention: the fused "
            "kernels have none; set attention_probs_dropout_prob=0 for speed"
        )
        return _plain(q, k, v, mask, scale, dropout)
    if mask is None:
        o = ops.attention(q, k, v, scale)
        assert isinstance(o, Tensor)
        return o
    if isinstance(mask, Keys):
        bias = mask.bias.expand(k.shape[0], -1)
        if mask.lengths is not None:
            o = ops.attention(q, k, v, scale, key_lengths=mask.lengths.expand(k.shape[0]))
            assert isinstance(o, Tensor)
            return o
        if not needs_gradient(q, k, v):
            return ops.attention_biased(q, k, v, bias, scale)
        say_once(
            "a mask with gaps between visible keys is left to PyTorch's attention in training: the fused "
            "kernels have no gradient for it; hide the last tokens of a clip instead"
        )
    elif not torch.compiler.is_compiling():
        say_once(
            f"an attention mask {tuple(mask.shape)} that differs between queries or heads is left to "
            "PyTorch's attention: the fused kernels hide whole keys; pass [B, tokens]"
        )
    return _plain(q, k, v, mask, scale, dropout)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Keys | None, scale: float, dropout: float
) -> Tensor:
    if isinstance(mask, Keys):
        mask = mask.bias[:, None, None]
    if isinstance(mask, Tensor):
        if mask.dim() == 2:
            mask = (mask != 0)[:, None, None]
        if mask.is_floating_point():
            # 16 bits hold no -1e30
            mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    return o.transpose(1, 2)


# arguments of transformers' attention functions that change the result and that we do not compute
_REFUSED = ("position_bias", "softcap", "sliding_window", "s_aux", "head_mask")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, Tq, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `attn_implementation="ast_fast"` runs: bidirectional attention, one key head a query head.

    Returns:
        [B, Tq, H, D] and None: probabilities are never stored.

    Raises:
        ValueError: the model asks for causal or grouped attention, or a bias that is not computed here.
    """
    name = type(module).__name__
    hint = "load the model with attn_implementation='sdpa'"
    groups = getattr(module, "num_key_value_groups", 1)
    if query.shape[1] != key.shape[1] or groups != 1:
        raise ValueError(
            f"attn_implementation='ast_fast' needs as many key heads as query heads, {name} has "
            f"{query.shape[1]} query heads and {key.shape[1]} key heads: {hint}"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal and query.shape[2] > 1:
        raise ValueError(
            f"attn_implementation='ast_fast' is bidirectional, {name} is causal: {hint}"
        )
    for argument in _REFUSED:
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"attn_implementation='ast_fast' does not compute {argument}, which {name} passes: {hint}"
            )
    if kwargs.get("output_attentions"):
        say_once(
            "attn_implementation='ast_fast' stores no attention probabilities: load the model with "
            "attn_implementation='eager' for output_attentions"
        )
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attend(q, k, v, attention_mask, scale, dropout).contiguous(), None


def mask_function(bidirectional: Any, others: Callable[..., Any]) -> Callable[..., Tensor | None]:
    """What makes masks for `attention_forward`: where only keys are hidden, a view of the [B, T] mask.

    Args:
        bidirectional: transformers' pattern that hides nothing.
        others: transformers' function for every other pattern; what it gives has the same form.
    """

    def make(*args: Any, **kwargs: Any) -> Tensor | None:
        mask: Tensor | None = kwargs.get("attention_mask")
        queries, keys = kwargs.get("q_length"), kwargs.get("kv_length")
        pattern = kwargs.get("mask_function")
        if bidirectional is None or pattern is not bidirectional or queries is None:
            made: Tensor | None = others(*args, **kwargs)
            return made
        if mask is None:
            return None
        if mask.shape[1] != keys:
            made = others(*args, **kwargs)
            return made
        return mask.bool()[:, None, None].expand(-1, 1, queries, -1)

    return make
