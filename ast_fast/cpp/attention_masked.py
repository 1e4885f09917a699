"""Attention under a mask by the compiled kernels: only the rectangles of tokens that see one another are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from . import attention
from ._common import CODES, need, threads

Side = tuple[int, int, int, int, int, int, int, int]


def unsupported(q: Tensor, k: Tensor, v: Tensor, rectangles: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    for tensor in rectangles:
        if tensor.device.type != "cpu":
            return f"the C++ attention takes the mask on the CPU, it is on {tensor.device}"
    return attention.unsupported(q, k, v, None)


def _side(rows: Tensor, columns: Tensor, table: Tensor, seen: Tensor) -> Side:
    return (
        rows.data_ptr(),
        rows.numel(),
        columns.data_ptr(),
        columns.numel(),
        table.data_ptr(),
        table.shape[0],
        seen.data_ptr(),
        seen.numel(),
    )


def _sides(rectangles: Sequence[Tensor]) -> tuple[list[Tensor], Side, Side]:
    """The tensors as the kernels read them, to be held during the call, and where they lie."""
    dtypes = (torch.int32, torch.int32, torch.int64, torch.uint8) * 2
    need(
        len(rectangles) == 8 and all(rectangles[place].shape[1:] == (6,) for place in (2, 6)),
        "the 8 tensors of AttentionMask.rectangles",
        *rectangles,
    )
    held = [t.to(d).contiguous() for t, d in zip(rectangles, dtypes, strict=True)]
    return held, _side(*held[:4]), _side(*held[4:])


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    rectangles: Sequence[Tensor],  # [*mask.by_query, *mask.by_key]
    scale: float,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # [B, Tq, H, D], [B, H, Tpad]
    """Return o and the natural log-sum-exp, its padding +inf; 0 and +inf for a query that sees nothing."""
    attention.check(q, k, v)
    clips, tq, heads, width = q.shape
    columns = -(-tq // attention.LSE_BLOCK) * attention.LSE_BLOCK
    o = torch.empty((clips, tq, heads, width), dtype=q.dtype)
    lse = torch.empty((clips, heads, columns), dtype=torch.float32)
    lse[:, :, tq:] = float("inf")
    if o.numel():
        q, scale, _ = attention.positive(q, scale)
        q, k, v = attention.dense(q), attention.dense(k), attention.dense(v)
        held, by_query, by_key = _sides(rectangles)
        _C.attention_masked_forward(
            attention.view(q),
            attention.view(k),
            attention.view(v),
            attention.view(o),
            lse.data_ptr(),
            columns,
            clips,
            tq,
            k.shape[1],
            heads,
            width,
            by_query,
            by_key,
            scale,
            CODES[q.dtype],
            threads(),
        )
        del held
    return o, lse


def backward(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    o: Tensor,  # [B, Tq, H, D]
    lse: Tensor,  # [B, H, Tpad]
    rectangles: Sequence[Tensor],  # [*mask.by_query, *mask.by_key]
    scale: float,
    deterministic: bool,
    dq: Tensor,  # [B, Tq, H, D]
    dk: Tensor,  # [B, Tk, H, D]
    dv: Tensor,  # [B, Tk, H, D]
    allow_tf32: bool = False,
) -> None:
    """Write the gradients into dq, dk and dv; always deterministic."""
    attention.check(q, k, v, (do, o), (dq, dk, dv))
    clips, tq, heads, width = q.shape
    attention.check_lse(lse, (clips, heads, -(-tq // attention.LSE_BLOCK) * attention.LSE_BLOCK))
    if not q.numel() or not k.numel():
        for grad in (dq, dk, dv):
            grad.zero_()
        return
    q, scale, factor = attention.positive(q, scale)
    do, q, k, v, o = (attention.dense(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    held, by_query, by_key = _sides(rectangles)
    _C.attention_masked_backward(
        attention.view(q),
        attention.view(k),
        attention.view(v),
        attention.view(o),
        lse.data_ptr(),
        lse.shape[2],
        clips,
        tq,
        k.shape[1],
        heads,
        width,
        by_query,
        by_key,
        scale,
        CODES[q.dtype],
        threads(),
        attention.view(do),
        attention.view(dq),
        attention.view(dk),
        attention.view(dv),
    )
    del held
    if factor != 1.0:
        dq.mul_(factor)
