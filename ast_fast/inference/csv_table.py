"""Tables of results as CSV, and files copied in part: the byte level of `writers` and `vector_files`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from ..names import safe_cell
from .records import Record

_COPIED_BYTES = 1 << 20


def copy_bytes(source: Path, begin: int, end: int | None, target: IO[bytes]) -> None:
    """Append a part of a file, to its end if that is None.

    Raises:
        OSError: it is shorter.
    """
    with source.open("rb") as file:
        file.seek(begin)
        left = (os.fstat(file.fileno()).st_size if end is None else end) - begin
        while left:
            content = file.read(min(left, _COPIED_BYTES))
            if not content:
                raise OSError(f"{source}: ends {left} bytes early")
            target.write(content)
            left -= len(content)


class CsvTable:
    """Lines under a header; texts that a spreadsheet would take for formulas are quoted."""

    def __init__(self, path: Path, header: tuple[str, ...], lines: Callable[[Record], Any]) -> None:
        # file names need not be text
        self._bytes = path.open("wb")
        self._file = io.TextIOWrapper(self._bytes, "utf-8", "backslashreplace", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow([safe_cell(cell) for cell in header])
        self._lines = lines
        self._start = self._at()

    def _at(self) -> int:
        self._file.flush()
        return self._bytes.tell()

    def position(self) -> int:
        """See `OutputWriter`: bytes behind the header."""
        return self._at() - self._start

    def copy(self, before: Path, begin: int, end: int | None) -> None:
        """See `OutputWriter`."""
        last = None if end is None else self._start + end
        self._file.flush()
        copy_bytes(before, self._start + begin, last, self._bytes)

    def add(self, record: Record) -> None:
        """The next clip."""
        for line in self._lines(record):
            self.line([safe_cell(cell) if isinstance(cell, str) else cell for cell in line])

    def line(self, cells: Sequence[Any]) -> None:
        """A line as it is."""
        self._writer.writerow(cells)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
