"""What the adapters share: dtype codes, row views, fixed chunks for deterministic sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C

F32: int = _C.F32
BF16: int = _C.BF16
CODES = {torch.float32: F32, torch.bfloat16: BF16}

threads = torch.get_num_threads  # asked on every call: loader workers have another count


def why_not(**tensors: Tensor) -> str | None:
    """Why these tensors cannot go to the kernels: a foreign device or dtype, or None."""
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            return f"the C++ kernels take float32 and bfloat16, {name} is {tensor.dtype}"
        if tensor.device.type != "cpu":
            return f"the C++ kernels take CPU tensors, {name} is on {tensor.device}"
    return None


def need(fits: bool, what: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless tensors fit together: the kernels take their addresses as they are."""
    if not fits:
        got = ", ".join("None" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in tensors)
        raise ValueError(f"the C++ kernels take {what}, got {got}")


def rows_of(x: Tensor) -> Tensor:
    """`x` [R, C] itself if its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """A parameter vector as contiguous float32."""
    return x.to(torch.float32).contiguous()


def row_chunks(rows: int) -> int:
    """Chunks for sums over rows: fixed by the shape alone, so that no thread count shows."""
    return max(1, min(64, rows // 16))


def column_sum(x: Tensor) -> Tensor:  # [R, C] -> [C] float32
    """Sum over rows in float32, the same for every number of threads."""
    x = rows_of(x)
    rows, cols = x.shape
    chunks = row_chunks(rows)
    partial = torch.empty((chunks, cols), dtype=torch.float32)
    sums = torch.empty(cols, dtype=torch.float32)
    _C.column_sum(
        x.data_ptr(),
        x.stride(0),
        partial.data_ptr(),
        chunks,
        sums.data_ptr(),
        CODES[x.dtype],
        rows,
        cols,
        threads(),
    )
    return sums
