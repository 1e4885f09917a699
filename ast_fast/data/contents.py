"""What a clip is called in its set, and a short mark of its bytes that shows whether they changed.

A mark is the size and a hash: of all bytes up to 48 KiB, else of three blocks of 16 KiB, from the start,
the middle and the end. That is a few reads a clip however long it is; a change of the same size that
lies between the blocks is not seen. Nothing is decoded.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..audio import AudioError
from .layouts import Data
from .manifest import Manifest
from .shards import ShardSet

T = TypeVar("T")
UNREADABLE = "unreadable"
_BLOCK = 16 << 10
_THREADS = 16  # network disks answer many at once
_CHUNK = 256


def clip_names(data: Data) -> list[str]:
    """What each clip is called: its path below the root, shard and name in it, or row."""
    if isinstance(data, Manifest):
        return data.paths
    if isinstance(data, ShardSet):
        return [name for name, *_ in _parallel(data.place, range(len(data)))]
    return [data.row_name(index) for index in range(len(data))]


def content_marks(data: Data, indices: Sequence[int]) -> list[str]:
    """The marks of some clips: `size-hash`, or `unreadable`."""
    root = str(data.root) if isinstance(data, Manifest) else ""

    def mark(index: int) -> str:
        try:
            if isinstance(data, Manifest):
                # as text and unchecked, as a million take a minute: links that leave the root are refused
                # where sound is read
                return _of_file(f"{root}/{data.paths[index]}", 0, None)
            if isinstance(data, ShardSet):
                _, path, start, size = data.place(index)
                return _of_file(path, start, size)
            stored = data.stored(index)
            return _of_file(stored, 0, None) if isinstance(stored, str) else _of_bytes(stored)
        except (OSError, AudioError):
            return UNREADABLE

    return _parallel(mark, indices)


def _parallel(work: Callable[[int], T], indices: Sequence[int]) -> list[T]:
    def some(begin: int) -> list[T]:
        return [work(index) for index in indices[begin : begin + _CHUNK]]

    starts = range(0, len(indices), _CHUNK)
    if len(starts) < 2:
        return some(0)
    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for chunk in pool.map(some, starts) for found in chunk]


def _of_file(path: str | Path, start: int, size: int | None) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return UNREADABLE
        whole = status.st_size - start if size is None else size
        return _mark(lambda offset, count: os.pread(handle, count, start + offset), whole)
    finally:
        os.close(handle)


def _of_bytes(content: memoryview) -> str:
    return _mark(lambda offset, count: content[offset : offset + count], len(content))


def _mark(read_at: Callable[[int, int], bytes | memoryview], size: int) -> str:
    found = hashlib.blake2b(digest_size=8)
    if size <= 3 * _BLOCK:
        found.update(read_at(0, size))
    else:
        for offset in (0, (size - _BLOCK) // 2, size - _BLOCK):
            found.update(read_at(offset, _BLOCK))
    return f"{size}-{found.hexdigest()}"
