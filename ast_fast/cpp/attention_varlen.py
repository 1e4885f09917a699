"""Flash attention over packed clips by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from . import attention
from ._common import CODES, need, threads
from .attention import LSE_BLOCK, View, check_lse, dense, positive


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    return attention.unsupported(q, k, v, None)


def _view(x: Tensor) -> View:
    strides = x.stride()
    return x.data_ptr(), 0, strides[0], strides[1]


def _columns(rows: int, clips: int) -> int:
    return -(-(rows + clips * LSE_BLOCK) // LSE_BLOCK) * LSE_BLOCK


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    saved: tuple[Tensor, ...] = (),
    grads: tuple[Tensor, ...] = (),
) -> None:
    attention.check(q, k, v, saved, grads)
    if not (
        q.dim() == 3
        and starts_q.dim() == 1
        and starts_q.shape == starts_k.shape
        and starts_q.numel() >= 1
        and starts_q.dtype == starts_k.dtype == torch.int32
    ):
        need(False, "q, k, v [N, H, D] and int32 starts [B + 1] of both", q, starts_q, starts_k)


def _totals(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.to("cpu", torch.int32).contiguous()


def forward(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # [Nq, H, D], [H, Npad]
    """Return o and the log-sum-exp; each clip's columns start at a multiple of 128."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    rows, heads, width = q.shape
    clips = cu_seqlens_q.numel() - 1
    columns = _columns(rows, clips)
    o = torch.empty((rows, heads, width), dtype=q.dtype)
    lse = torch.full((heads, columns), float("inf"), dtype=torch.float32)
    if o.numel():
        q, scale, _ = positive(q, scale)
        q, k, v = dense(q), dense(k), dense(v)
        totals_q, totals_k = _totals(cu_seqlens_q), _totals(cu_seqlens_k)
        _C.attention_forward(
            _view(q),
            _view(k),
            _view(v),
            _view(o),
            lse.data_ptr(),
            columns,
            clips,
            rows,
            k.shape[0],
            heads,
            width,
            0,
            totals_q.data_ptr(),
            totals_k.data_ptr(),
            scale,
            CODES[q.dtype],
            threads(),
            0,
        )
    return o, lse


def backward(
    do: Tensor,  # [Nq, H, D]
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    o: Tensor,  # [Nq, H, D]
    lse: Tensor,  # [H, Npad]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    dq: Tensor,  # [Nq, H, D]
    dk: Tensor,  # [Nk, H, D]
    dv: Tensor,  # [Nk, H, D]
    allow_tf32: bool = False,
) -> None:
    """Write the gradients into dq, dk and dv; always deterministic."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, (do, o), (dq, dk, dv))
    check_lse(lse, (q.shape[1], _columns(q.shape[0], cu_seqlens_q.numel() - 1)))
    if not q.numel() or not k.numel():
        for grad in (dq, dk, dv):
            grad.zero_()
        return
    q, scale, factor = positive(q, scale)
    do, q, k, v, o, lse = dense(do), dense(q), dense(k), dense(v), dense(o), lse.contiguous()
    totals_q, totals_k = _totals(cu_seqlens_q), _totals(cu_seqlens_k)
    _C.attention_backward(
        _view(q),
        _view(k),
        _view(v),
        _view(o),
        lse.data_ptr(),
        lse.shape[1],
        cu_seqlens_q.numel() - 1,
        q.shape[0],
        k.shape[0],
        q.shape[1],
        q.shape[2],
        0,
        totals_q.data_ptr(),
        totals_k.data_ptr(),
        scale,
        CODES[q.dtype],
        threads(),
        _view(do),
        _view(dq),
        _view(dk),
        _view(dv),
    )
    if factor != 1.0:
        dq.mul_(factor)
