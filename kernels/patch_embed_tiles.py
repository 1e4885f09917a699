"""Geometry of overlapping patches, shared by the forward and backward kernels of patch_embed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def patch_origins(
    rows,
    num_rows,
    num_tokens,
    grid_t,
    stride_xb,
    stride_xs,
    FSTRIDE: tl.constexpr,
    TSTRIDE: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
):
    """Token of each row of [B * T], whether it is a patch, and where that patch starts in x."""
    clip = rows // num_tokens
    token = rows - clip * num_tokens
    patch = token - NUM_PREFIX
    i_f = patch // grid_t
    i_t = patch - i_f * grid_t
    origin = clip.to(tl.int64) * stride_xb + (i_t * TSTRIDE).to(tl.int64) * stride_xs
    return token, (patch >= 0) & (rows < num_rows), origin + i_f * FSTRIDE


def precision(dtype: torch.dtype, allow_tf32: bool, capability: int) -> str:
    """Arithmetic of the dots: key of the tuned table, and Triton's input precision."""
    if dtype != torch.float32:
        return "f16"
    return "tf32" if allow_tf32 and capability >= 80 else "ieee"


def patch_grid(x: Tensor, weight: Tensor, fstride: int, tstride: int) -> tuple[int, int]:
    """Patches along frequency and along time."""
    _, frames, bins = x.shape
    return (bins - weight.shape[2]) // fstride + 1, (frames - weight.shape[3]) // tstride + 1


def time_major(weight: Tensor) -> Tensor:  # [C, 1, pf, pt] -> [C, pt * pf]
    """Projection with time before frequency, so that its inner dim runs along x's rows."""
    return weight[:, 0].transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


def dtype_modes(arch: int) -> list[tuple[torch.dtype, str]]:
    """Dtypes an architecture serves, each with the arithmetic modes of its dots."""
    if arch < 80:
        return [(torch.float32, "ieee"), (torch.float16, "f16")]
    return [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, "f16"),
        (torch.bfloat16, "f16"),
    ]


def triton_precision(mode: str) -> str:
    """Triton's `input_precision` for a key of the tuned table; 16-bit dots ignore it."""
    return "tf32" if mode == "tf32" else "ieee"
