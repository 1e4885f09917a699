"""Attention with a bias a key by the compiled kernels; forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention


def unsupported(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if key_bias.dtype != torch.float32 or key_bias.device != q.device:
        return f"the C++ attention takes a float32 key_bias on {q.device}, got {key_bias.dtype}"
    return attention.unsupported(q, k, v, None)


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_bias: Tensor,  # [B, Tk] float32
    scale: float,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # [B, Tq, H, D], [B, H, Tpad]
    """Return o and the natural log-sum-exp, its padding +inf."""
    return attention.forward(q, k, v, scale, None, allow_tf32, key_bias)
