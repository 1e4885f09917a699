"""Batches of samples whose rows begin at multiples of 16 samples, whatever length they have.

A GPU kernel that knows this of a batch loads 16 bytes at a time, and one sample at a time otherwise. The
tensor has its exact shape [B, N]: only its row stride says that up to 15 samples, zeros, lie behind each row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MULTIPLE = 16  # what Triton asks of an integer to take it for divisible

Allocate = Callable[[int, int, torch.dtype], Tensor]  # (rows, columns, dtype) -> [rows, columns]


def allocate_empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for samples, of PyTorch's allocator."""
    return torch.empty(rows, columns, dtype=dtype)


def sample_rows(
    rows: int, columns: int, dtype: torch.dtype, allocate: Allocate = allocate_empty
) -> Tensor:  # [rows, columns]
    """Memory for the samples of a batch, not yet written.

    >>> sample_rows(2, 100, torch.int16).stride()
    (112, 1)
    """
    whole = allocate(rows, -(-columns // MULTIPLE) * MULTIPLE, dtype)
    whole[:, columns:].zero_()
    return whole[:, :columns]


def moved(wave: Tensor, device: torch.device | str) -> Tensor:
    """Samples [B, N] on a device, their row stride kept; asynchronous from pinned memory.

    `Tensor.to` closes the gaps between rows, and on the way waits for a copy that is not pinned.
    """
    rows, columns = wave.shape
    step = wave.stride(0)
    room = wave.untyped_storage().nbytes() // wave.element_size() - wave.storage_offset()
    gaps = columns < step < columns + MULTIPLE and wave.stride(1) == 1
    if not gaps or room < rows * step:
        return wave.to(device, non_blocking=True)
    whole = wave.as_strided((rows, step), (step, 1))
    return whole.to(device, non_blocking=True)[:, :columns]
