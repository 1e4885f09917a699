"""Results on their way to disk: files that only grow, in which a torn end is known for one.

A record is a checksum, a length, a line of JSON, and the bytes of its arrays. It is written by one call
and counts when all of it is there; what a killed process left half written is passed over, and its clip
is done again. Every process writes files of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._files import sync

SYNC_SECONDS = 5.0  # between flushes to the disk: what a power cut may cost
_HEAD = 26  # checksum and length, in hexadecimal


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a clip.

    Attributes:
        number: of the clip among the sources.
        meta: plain values.
        arrays: by name.
    """

    number: int
    meta: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """As it stands in a file."""
        parts = [np.ascontiguousarray(array) for array in self.arrays.values()]
        shapes = [
            [name, part.dtype.str, part.shape]
            for name, part in zip(self.arrays, parts, strict=True)
        ]
        line = json.dumps(
            [self.number, self.meta, shapes], separators=(",", ":"), allow_nan=False
        ).encode()
        content = b"".join((line, b"\n", *(part.tobytes() for part in parts)))
        return _head(zlib.crc32(content), len(content)) + content


def _head(checksum: int, length: int) -> bytes:
    return b"%08x %016x " % (checksum, length)


class RecordWriter:
    """A new file of records.

    Args:
        folder: where it is made, under a name that no other process has taken.
        rank: of this process, for its name.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        for attempt in range(10**6):
            self.path = folder / f"part-{rank:05d}-{attempt:05d}.records"
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._handle = os.open(self.path, flags, 0o644)
                break
            except FileExistsError:
                continue
        else:
            raise OSError(f"{folder}: a million parts of rank {rank}: delete the folder")
        sync(folder)
        self._synced = time.monotonic()

    def write(self, record: Record) -> None:
        """Append a record; it outlives this process from here on, and the machine a little later.

        Raises:
            OSError: the disk is full, or not to be written to.
        """
        view = memoryview(record.to_bytes())
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written: {error.strerror}; what was done before is kept: make "
                "room, and go on with --resume"
            ) from error
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have the disk hold all of it."""
        os.fsync(self._handle)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Have the disk hold all of it, and let go of the file."""
        if self._handle >= 0:
            self.sync()
            os.close(self._handle)
            self._handle = -1


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, up to the first that is not whole."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while len(head := file.read(_HEAD)) == _HEAD:
            left -= _HEAD
            try:
                checksum, length = (int(text, 16) for text in head.split())
            except ValueError:
                return
            if not 0 <= length <= left:
                return
            left -= length
            content = file.read(length)
            if zlib.crc32(content) != checksum or head != _head(checksum, length):
                return
            line, _, rest = content.partition(b"\n")
            number, meta, shapes = json.loads(line)
            arrays: dict[str, np.ndarray] = {}
            place = 0
            for name, kind, shape in shapes:
                dtype, count = np.dtype(kind), math.prod(shape)
                arrays[name] = np.frombuffer(rest, dtype, count, place).reshape(shape)
                place += count * dtype.itemsize
            yield Record(number, meta, arrays)
