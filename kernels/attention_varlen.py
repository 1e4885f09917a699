"""Packed attention in Triton: clips of different lengths follow one another in one run of rows.

The kernels are those of dense attention (attention_tiles.py says how one serves both), so the compiled
specialisations are shared as well. A list made on the GPU gives the tiles of the clips with most work
first (attention_tile_list.py); nothing waits for the clips' lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention_launch
from .attention_aot import aot_cases
from .attention_launch import Config, Problem
from .attention_tiles import LSE_PAD

__all__ = ["aot_cases", "backward", "forward", "unsupported"]


def unsupported(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    cu_seqlens_q: Tensor,  # [B+1] int32
    cu_seqlens_k: Tensor,  # [B+1] int32
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            return f"{name} has {x.dim()} dimensions, expected 3: [N, H, D]"
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dim() != 1 or x.dtype != torch.int32 or x.numel() < 1:
            return f"{name} is {x.dtype} {list(x.shape)}, expected int32 [B+1]"
        if x.device != q.device:
            return f"{name} is on {x.device}, q on {q.device}"
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        return (
            f"cu_seqlens_q and cu_seqlens_k have {cu_seqlens_q.numel()} and "
            f"{cu_seqlens_k.numel()} elements, expected as many"
        )
    return attention_launch.unsupported(q, k, v)


def forward(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    cu_seqlens_q: Tensor,  # [B+1] int32
    cu_seqlens_k: Tensor,  # [B+1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Output o [Nq, H, D] and natural log-sum-exp lse [H, Npad] fp32, +inf in its padding.

    Clip b's row i of lse is at column ((cu_seqlens_q[b] + b * 128) // 128) * 128 + i. `max_seqlen_q` and
    `max_seqlen_k` are not read: the list of tiles follows from the clips' starts.
    """
    problem = _problem(q, k, cu_seqlens_q, cu_seqlens_k)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (q.shape[1], problem.lse_end)
    if o.numel():
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        attention_launch.forward(problem, q, k, v, o, lse, scale, allow_tf32, config)
    else:
        lse = torch.full(shape, float("inf"), dtype=torch.float32, device=q.device)
    return o, lse


def backward(
    do: Tensor,  # [Nq, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,  # [H, Npad] fp32
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    deterministic: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    allow_tf32: bool = False,
    dq_config: Config | None = None,
    dkv_config: Config | None = None,
    one_pass_config: Config | None = None,
) -> None:
    """Write the gradients into dq, dk, dv.

    With `deterministic` two passes give the same bits on every run. Without, GPUs whose table has an entry
    for it take one pass, which adds dq up in an fp32 copy of it (attention_one_pass.py).
    """
    problem = _problem(q, k, cu_seqlens_q, cu_seqlens_k)
    if not problem.clips or not problem.heads:
        return
    attention_launch.backward(
        problem, do, q, k, v, o, lse, scale, dq, dk, dv, allow_tf32, dq_config, dkv_config,
        deterministic, one_pass_config,
    )  # fmt: skip


def _problem(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Problem:
    clips = cu_seqlens_q.numel() - 1
    rows, heads, width = q.shape
    return Problem(
        clips=clips,
        heads=heads,
        width=width,
        queries=rows,
        keys=k.shape[0],
        q_length=0,
        k_length=0,
        lse_end=-(-(rows + clips * LSE_PAD) // LSE_PAD) * LSE_PAD,
        q_starts=cu_seqlens_q,
        k_starts=cu_seqlens_k,
    )
