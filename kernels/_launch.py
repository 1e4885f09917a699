"""What launchers share: reasons to refuse, contiguous last dims, the device guard."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ._tuned import INTERPRETED

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Triton's names of the dtypes in compile signatures.
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def why_not(*dtypes: torch.dtype, device: torch.device) -> str | None:
    """Why kernels over these dtypes cannot run on `device`; None when they can."""
    for dtype in dtypes:
        if dtype not in FLOATS:
            return f"Triton kernels take float32, float16 and bfloat16, got {dtype}"
    if torch.bfloat16 not in dtypes:
        return None
    if INTERPRETED:
        return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 needs compute capability 8.0 or newer: use float16 or float32"
    return None


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` itself when its last dim is contiguous, else a contiguous copy."""
    if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `tensor` current: Triton launches on the current device's stream."""
    return torch.cuda.device_of(tensor)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Quotient of two non-negative integers, rounded up."""
    return -(-a // b)
