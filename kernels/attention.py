"""Dense attention in Triton: o = softmax(scale * q k^T) v per clip and head, and its gradients.

Kernels: attention_forward.py, attention_backward.py. Any strides are taken as they are as long as the
last dimension is contiguous and rows start on 16-element boundaries (views of one fused [B, T, 3, H, D]
buffer do); other inputs are copied. Traffic of forward: q, k, v, o once and k, v again from L2.
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
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_lengths: Tensor | None,  # [B] int32
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, expected 4: [B, T, H, D]"
    if q.shape[0] != k.shape[0]:
        return f"q has {q.shape[0]} clips, k has {k.shape[0]}"
    if key_lengths is not None:
        if key_lengths.shape != q.shape[:1] or key_lengths.dtype != torch.int32:
            return (
                f"key_lengths is {key_lengths.dtype} {list(key_lengths.shape)}, "
                f"expected int32 [{q.shape[0]}]"
            )
        if key_lengths.device != q.device:
            return f"key_lengths is on {key_lengths.device}, q on {q.device}"
    return attention_launch.unsupported(q, k, v)


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    scale: float,
    key_lengths: Tensor | None,  # [B] int32
    allow_tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Output o [B, Tq, H, D] and natural log-sum-exp lse [B, H, Tpad] fp32, +inf in its padding."""
    problem = dense_problem(q, k, key_lengths)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (q.shape[0], q.shape[2], problem.lse_end)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if o.numel():
        attention_launch.forward(problem, q, k, v, o, lse, scale, allow_tf32, config)
    return o, lse


def backward(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,  # [B, H, Tpad] fp32
    scale: float,
    key_lengths: Tensor | None,
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
    problem = dense_problem(q, k, key_lengths)
    if not problem.clips or not problem.heads:
        return
    attention_launch.backward(
        problem, do, q, k, v, o, lse, scale, dq, dk, dv, allow_tf32, dq_config, dkv_config,
        deterministic, one_pass_config,
    )  # fmt: skip


def dense_problem(q: Tensor, k: Tensor, key_lengths: Tensor | None) -> Problem:
    """How the rows of dense q and k belong to clips."""
    clips, queries, heads, width = q.shape
    keys = k.shape[1]
    return Problem(
        clips=clips,
        heads=heads,
        width=width,
        queries=queries,
        keys=keys,
        q_length=queries,
        k_length=keys,
        lse_end=-(-queries // LSE_PAD) * LSE_PAD,
        k_lengths=key_lengths,
    )
