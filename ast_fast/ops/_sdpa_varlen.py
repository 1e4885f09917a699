"""Packed attention by PyTorch's fused kernels: see `_sdpa.py`.

A GPU takes the clips' starts; on a CPU the clips run one after another. The log-sum-exp is laid out as
`reference.ops.attention_varlen` says. Nothing waits for the starts on a GPU: where they are wrong PyTorch's
kernels get empty clips, so that they touch nothing, and every result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.ops import varlen_columns, varlen_offsets
from . import _sdpa

_aten = torch.ops.aten


class _Clips(NamedTuple):
    """Starts that no kernel can take a wrong address from."""

    starts_q: Tensor  # [B + 1] int32
    starts_k: Tensor  # [B + 1] int32
    longest: tuple[int, int]
    wrong: Tensor  # [] bool, the caller's starts bound no clips, or longer ones than was said
    nothing: Tensor  # [], what rows of clips without keys get: 0, or NaN


def _checked(
    starts: tuple[Tensor, Tensor],
    rows: tuple[int, int],
    longest: tuple[int, int],
    dtype: torch.dtype,
) -> _Clips:
    most_q, most_k = (max(1, min(most, count)) for most, count in zip(longest, rows, strict=True))
    wrong = torch.zeros((), dtype=torch.bool, device=starts[0].device)
    for each, count, most in zip(starts, rows, (most_q, most_k), strict=True):
        lengths = each.long().diff()
        wrong = wrong | (each[0] != 0) | (each[-1] != count)
        wrong = wrong | ((lengths < 0) | (lengths > most)).any()
    safe_q, safe_k = (each.masked_fill(wrong, 0) for each in starts)
    zero = torch.zeros((), dtype=dtype, device=wrong.device)
    return _Clips(safe_q, safe_k, (most_q, most_k), wrong, zero.masked_fill(wrong, math.nan))


class _Rows(NamedTuple):
    """Where each query belongs."""

    clip: Tensor  # [Nq]
    row: Tensor  # [Nq], within its clip
    column: Tensor  # [Nq], of the padded log-sum-exp
    blind: Tensor  # [Nq] bool, its clip has no keys


def _rows(num_rows: int, starts_q: Tensor, starts_k: Tensor, wrong: Tensor) -> _Rows:
    # on the device: nothing waits for the clips' lengths
    index = torch.arange(num_rows, device=starts_q.device)
    clip = torch.searchsorted(starts_q[1:].contiguous(), index, right=True)
    clip = clip.clamp(max=starts_q.numel() - 2)
    row = (index - starts_q[clip]).masked_fill(wrong, 0)
    column = varlen_offsets(starts_q)[clip] + row
    return _Rows(clip, row, column, (starts_k.diff() <= 0)[clip])


def forward(
    name: str,
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    starts_q: Tensor,  # [B + 1] int32
    starts_k: Tensor,  # [B + 1] int32
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [Nq, H, D] and padded log-sum-exp [H, Npad] float32."""
    rows, heads, width = q.shape
    columns = varlen_columns(rows, starts_q.numel() - 1)
    lse = torch.full((heads, columns), math.inf, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    if not q.is_cuda:
        return _forward_clip_by_clip(q, k, v, starts_q, starts_k, scale, lse), lse
    q, scale, _ = _sdpa.rising(q, scale)
    q, k, v = (_sdpa.operand(x) for x in (q, k, v))
    clips = _checked((starts_q, starts_k), (rows, k.shape[0]), (max_q, max_k), q.dtype)
    starts, longest = clips[:2], clips.longest
    where = _rows(rows, *starts, clips.wrong)
    if name == "sdpa-flash":
        run = _aten._flash_attention_forward
        o, found, *_ = run(q, k, v, *starts, *longest, 0.0, False, False, scale=scale)
        if found.shape != (heads, rows):
            raise RuntimeError(f"FlashAttention's log-sum-exp is {list(found.shape)}")
    else:
        run = _aten._efficient_attention_forward
        batch = (x[None] for x in (q, k, v))
        o, found, *_ = run(*batch, None, *starts, *longest, 0.0, 0, True, scale=scale)
        o, found = o[0], found[where.clip, :, where.row].T
    lse[:, where.column] = found.masked_fill(where.blind, math.inf)
    o = o[..., :width].masked_fill(where.blind[:, None, None], clips.nothing)
    return o.contiguous(), lse.masked_fill_(clips.wrong, math.nan)


def backward(
    name: str,
    do: Tensor,  # [Nq, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,  # [H, Npad] float32
    starts_q: Tensor,
    starts_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    deterministic: bool,
    grads: Sequence[Tensor],  # dq, dk, dv
) -> None:
    """Write the gradients; tokens of a clip without keys, or without queries, get exact zeros."""
    for grad in grads:
        grad.zero_()
    if not q.numel() or not k.numel():
        return
    if not q.is_cuda:
        saved = (do, q, k, v, o, lse)
        _backward_clip_by_clip(*saved, starts_q, starts_k, scale, deterministic, grads)
        return
    width, rows = q.shape[-1], q.shape[0]
    q, scale, sign = _sdpa.rising(q, scale)
    do, q, k, v, o = (_sdpa.operand(x) for x in (do, q, k, v, o))
    clips = _checked((starts_q, starts_k), (rows, k.shape[0]), (max_q, max_k), q.dtype)
    starts, longest = clips[:2], clips.longest
    where = _rows(rows, *starts, clips.wrong)
    of_rows = lse[:, where.column]
    unread = torch.empty(0, dtype=torch.int64, device=q.device)  # state of a dropout that is 0
    if name == "sdpa-flash":
        run = _aten._flash_attention_backward
        made = run(
            do, q, k, v, o, of_rows.contiguous(), *starts, *longest, 0.0, False, unread, unread,
            scale=scale,
        )  # fmt: skip
    else:
        padded = lse.new_full(
            (starts_q.numel() - 1, lse.shape[0], -(-longest[0] // 32) * 32), math.inf
        )
        padded[where.clip, :, where.row] = of_rows.T
        run = _aten._efficient_attention_backward
        first, second = (do[None], q[None], k[None], v[None], None), (o[None], *starts, *longest)
        made = run(
            *first, *second, padded, 0.0, unread, unread, 0, False, scale=scale,
            num_splits_key=1 if deterministic else None,
        )  # fmt: skip
        made = tuple(x[0] for x in made[:3])
    blind = where.blind[:, None, None]
    keyless = _rows(k.shape[0], starts[1], starts[0], clips.wrong).blind[:, None, None]
    for grad, found, empty in zip(grads, made, (blind, keyless, keyless), strict=True):
        grad.copy_(found[..., :width].masked_fill(empty, clips.nothing))
    if sign < 0:
        grads[0].neg_()


def _clips(starts_q: Tensor, starts_k: Tensor) -> list[tuple[slice, slice, int]]:
    """Rows of queries, rows of keys and first column of each clip."""
    q, k = starts_q.tolist(), starts_k.tolist()
    columns = varlen_offsets(starts_q).tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1]), columns[i]) for i in range(len(q) - 1)]


def _forward_clip_by_clip(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float, lse: Tensor
) -> Tensor:
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for rows, keys, column in _clips(starts_q, starts_k):
        made, found = _sdpa.forward("sdpa-cpu", q[None, rows], k[None, keys], v[None, keys], scale)
        o[rows] = made[0]
        length = rows.stop - rows.start
        lse[:, column : column + length] = found[0, :, :length]
    return o


def _backward_clip_by_clip(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    scale: float,
    deterministic: bool,
    grads: Sequence[Tensor],
) -> None:
    dq, dk, dv = grads
    for rows, keys, column in _clips(starts_q, starts_k):
        length = rows.stop - rows.start
        _sdpa.backward(
            "sdpa-cpu", do[None, rows], q[None, rows], k[None, keys], v[None, keys], o[None, rows],
            lse[None, :, column : column + length], scale, None, deterministic,
            (dq[None, rows], dk[None, keys], dv[None, keys]),
        )  # fmt: skip
