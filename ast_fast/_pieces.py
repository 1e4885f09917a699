"""Bytes of a file put together anew without a copy, and what walking a file found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

ReadAt = Callable[[int, int], bytes]  # (offset, count) -> at most count bytes
Piece = bytes | tuple[int, int]  # bytes, or begin and end in the file

_WINDOW = 1 << 18


class Survey(NamedTuple):
    """What walking a file found.

    Attributes:
        missing: why it is known to be cut short; None if it is not.
        refused: why it cannot be read as one sound; None if it can.
        streams: what is to be decoded, one after the other; None: the file as it stands.
        samples: how many there are, where libsndfile only guesses and cannot be told.
        tails: of each stream of Ogg, samples in its last page, where the decoder goes to the wrong place.
        notes: what is read otherwise than the file states, or left out.
    """

    missing: str | None = None
    refused: str | None = None
    streams: tuple[tuple[Piece, ...], ...] | None = None
    notes: tuple[str, ...] = ()
    samples: int | None = None
    tails: tuple[int, ...] | None = None


class Windowed:
    """A file in large reads, for walks in small steps."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self.size = read_at, size
        self._begin, self._content = 0, b""

    def get(self, offset: int, count: int) -> bytes:
        """Bytes at an offset; fewer at the end."""
        begin = offset - self._begin
        if begin < 0 or begin + count > len(self._content):
            self._content = self._window(offset, count)
            self._begin, begin = offset, 0
        return self._content[begin : begin + count]

    def _window(self, offset: int, least: int) -> bytes:
        # of a small file no more memory is asked for than it fills
        return self._read_at(offset, min(max(least, _WINDOW), max(0, self.size - offset)))

    def from_(self, offset: int, least: int = 4) -> bytes:
        """As many bytes from an offset as are at hand, so many at least but at the end."""
        begin = offset - self._begin
        if not 0 <= begin <= len(self._content) - least:
            self._content = self._window(offset, least)
            self._begin, begin = offset, 0
        return self._content[begin:] if begin else self._content

    def is_zero(self, begin: int, end: int) -> bool:
        """Whether there is nothing but zeros."""
        while begin < end:
            content = self._read_at(begin, min(_WINDOW, end - begin))
            if not content or content.strip(b"\0"):
                return False
            begin += len(content)
        return True

    def find(self, wanted: bytes, offset: int, end: int | None = None) -> int:
        """Where some bytes come next and begin before an end; -1 if they do not."""
        end = self.size if end is None else end
        while offset < end:
            content = self.from_(offset)
            place = content.find(wanted, 0, end - offset + len(wanted) - 1)
            if place >= 0:
                return offset + place
            if offset + len(content) >= end or len(content) < len(wanted):
                return -1
            offset += len(content) - len(wanted) + 1
        return -1


class Pieces:
    """A file object of pieces, to be read only; what libsndfile asks of one."""

    def __init__(self, read_at: ReadAt, pieces: Sequence[Piece]) -> None:
        self._read_at = read_at
        self._pieces = [piece for piece in pieces if _length(piece)]
        self._begins = [0]
        for piece in self._pieces:
            self._begins.append(self._begins[-1] + _length(piece))
        self.size = self._begins[-1]
        self._at = self._place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; gives the new place."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        left = self.size - self._at if count < 0 else min(count, self.size - self._at)
        parts = []
        while left > 0:
            piece, begin = self._current()
            skip = self._at - begin
            take = min(left, _length(piece) - skip)
            if isinstance(piece, bytes):
                part = piece[skip : skip + take]
            else:
                part = self._read_at(piece[0] + skip, take)
            if not part:
                break  # the file became shorter
            parts.append(part)
            self._at += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _current(self) -> tuple[Piece, int]:
        """The piece that the place lies in, and where it begins."""
        place = self._place
        if not self._begins[place] <= self._at < self._begins[place + 1]:
            low, high = 0, len(self._pieces)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._begins[middle] <= self._at else (low, middle)
            place = self._place = low
        return self._pieces[place], self._begins[place]


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
