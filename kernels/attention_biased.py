"""Attention with a bias a key in Triton: o = softmax(scale * q k^T + key_bias) v per clip and head.

The kernel is attention_forward.py's with one more argument; forward only. Traffic on top of dense
attention: four bytes a key and query tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _tuned, attention_aot, attention_launch
from ._aot import AotCase
from .attention import dense_problem
from .attention import unsupported as dense_unsupported
from .attention_launch import Config
from .attention_problem import OP, table_configs

__all__ = ["aot_cases", "forward", "unsupported"]


def unsupported(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_bias: Tensor,  # [B, Tk] fp32
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    if key_bias.dtype != torch.float32 or key_bias.shape != k.shape[:2]:
        return (
            f"key_bias is {key_bias.dtype} {list(key_bias.shape)}, expected float32 "
            f"{list(k.shape[:2])}"
        )
    if key_bias.device != q.device:
        return f"key_bias is on {key_bias.device}, q on {q.device}"
    return dense_unsupported(q, k, v, None)


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_bias: Tensor,  # [B, Tk] fp32
    scale: float,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Output o [B, Tq, H, D] and natural log-sum-exp lse [B, H, Tpad] fp32, +inf in its padding."""
    problem = dense_problem(q, k, None)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (q.shape[0], q.shape[2], problem.lse_end)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if o.numel():
        bias = key_bias.contiguous()
        attention_launch.forward(problem, q, k, v, o, lse, scale, allow_tf32, config, bias)
    return o, lse


def aot_cases(arch: int) -> list[AotCase]:
    """Every specialisation that a launch on `arch` can ask for."""
    return [
        attention_aot.config_case("forward", dtype, kind, int(width), config, arch, biased=True)
        for kind, widths in _tuned.configs(OP, arch).get("forward", {}).items()
        for width in widths
        for config in table_configs(arch, "forward", kind, int(width))
        for dtype in attention_aot.dtypes(kind, arch)
    ]
