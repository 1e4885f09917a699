"""Memory for samples that is used again once nobody holds it.

The kernel zeroes every fresh page before it is written to. For the megabytes that shards are read into
and batches are made in, that costs more than copying the samples. What is handed out here comes back
by itself when the last array, tensor or view of it is gone, so a consumer may keep what it likes.
"""

from __future__ import annotations

import os
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

FREE_BYTES = 64 << 20  # kept for later, a process
_LEAST_BYTES = 128 << 10  # below it, malloc keeps its pages by itself
_MOST_BYTES = 32 << 20
_STEPS = 8  # sizes between a power of two and the next: at most an eighth is wasted


class Buffers:
    """Hands out memory, and takes it back when it is not held any more.

    Args:
        free_bytes: kept for later at most; more is given back to the system.

    >>> buffers = Buffers()
    >>> address = buffers.take(1 << 20).ctypes.data
    >>> buffers.take(1 << 20).ctypes.data == address  # nobody held the first
    True
    """

    def __init__(self, free_bytes: int = FREE_BYTES) -> None:
        self._most = free_bytes
        self._free: dict[int, deque[Tensor]] = {}  # by size; the one given back last is taken first

    @property
    def free_bytes(self) -> int:
        """What is kept for later."""
        return sum(size * len(owners) for size, owners in tuple(self._free.items()))

    def take(self, count: int) -> np.ndarray:  # [count] uint8
        """Memory that holds anything; its owner is the array, and whatever is made of it."""
        if not _LEAST_BYTES <= count <= _MOST_BYTES:
            return np.empty(count, np.uint8)
        size = _rounded(count)
        try:
            owner = self._free[size].pop()
        except (KeyError, IndexError):
            owner = torch.empty(size, dtype=torch.uint8)
        # views of the array hold the array: through a memoryview they do not see what lies below it
        array = np.frombuffer(owner.numpy().data, np.uint8, count)
        weakref.finalize(array, self._give, owner).atexit = False
        return array

    def tensor(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The same as a tensor [rows, columns]."""
        count = rows * columns * dtype.itemsize
        if not count:
            return torch.empty(rows, columns, dtype=dtype)
        return torch.from_numpy(self.take(count)).view(dtype).view(rows, columns)

    def clear(self) -> None:
        """Give back to the system what is kept."""
        self._free.clear()

    def _give(self, owner: Tensor) -> None:
        size = len(owner)
        # at the end, so that what is given up first is a size that nobody has asked for lately
        owners = self._free[size] = self._free.pop(size, deque())
        owners.append(owner)
        while self.free_bytes > self._most:
            oldest = next(iter(self._free))
            try:
                self._free[oldest].popleft()
            except (KeyError, IndexError):
                self._free.pop(oldest, None)


def _rounded(count: int) -> int:
    step = (1 << (count.bit_length() - 1)) // _STEPS
    return -(-count // step) * step


SAMPLES = Buffers()
os.register_at_fork(after_in_child=SAMPLES.clear)  # there it would be copied before its first use
