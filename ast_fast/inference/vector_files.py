"""Vectors as the rows of one array in a file, and a table beside it that says what each row is of."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..names import safe_path
from .csv_table import CsvTable, copy_bytes
from .records import Record
from .rows import vectors_of

_HEADER_BYTES = (
    1024  # of .safetensors: blanks fill it up, so that rows can follow before their number is known
)


def index_of(out: Path) -> Path:
    """The table of files beside a .npy or .safetensors file."""
    return out.with_name(f"{out.name}.index.csv")


class NumpyRows:
    """One array [N, C] as .npy, and a table of the files that its rows are of.

    Args:
        path: to write.
        width: C.
        index: the table; it takes its name when this file is whole.
    """

    def __init__(self, path: Path, width: int, index: Path) -> None:
        self._file = path.open("wb")
        self._width, self._count = width, 0
        self._header()
        self._start = self._file.tell()
        self._index, self._partial = index, index.with_name(f".{index.name}.partial")
        self._table = CsvTable(self._partial, ("row", "file", "start_s", "end_s"), self._lines)

    def _header(self) -> None:
        # as long for any number of rows: NumPy leaves room for it to grow
        self._file.seek(0)
        shape = (self._count, self._width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _lines(self, record: Record) -> Any:
        for place, (begin, end, _) in enumerate(vectors_of(record), start=self._count):
            yield place, safe_path(record.meta["file"]), begin, end

    def add(self, record: Record) -> None:
        """The next clip."""
        self._table.add(record)
        for begin, end, vector in vectors_of(record):
            self._file.write(np.ascontiguousarray(vector, "<f4").tobytes())
            self._span(begin, end)
            self._count += 1

    def _span(self, begin: float, end: float) -> None:
        """What a row is of, where the file itself holds that."""

    def position(self) -> int:
        """See `OutputWriter`: rows."""
        return self._count

    def copy(self, before: Path, begin: int, end: int | None) -> None:
        """See `OutputWriter`; rows get other numbers in the table."""
        found = 0
        with index_of(before).open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows)
            for number, (_, *cells) in enumerate(rows):
                if number >= begin and (end is None or number < end):
                    self._table.line((self._count + found, *cells))
                    self._span(float(cells[1]), float(cells[2]))
                    found += 1
        size = 4 * self._width
        first = self._start + begin * size
        copy_bytes(before, first, first + found * size, self._file)
        self._count += found

    def close(self) -> None:
        """Finish both files; the table takes its name first."""
        self._header()
        self._file.close()
        self._table.close()
        self._partial.replace(self._index)


class SafetensorsRows(NumpyRows):
    """`embeddings` [N, C] float32 and `spans_s` [N, 2] float64 (begin and end) as .safetensors, and the table."""

    def __init__(self, path: Path, width: int, index: Path) -> None:
        self._spans = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - lives as long as this
        super().__init__(path, width, index)

    def _header(self) -> None:
        vectors, spans = 4 * self._count * self._width, 16 * self._count
        header = {
            "embeddings": {
                "dtype": "F32",
                "shape": [self._count, self._width],
                "data_offsets": [0, vectors],
            },
            "spans_s": {
                "dtype": "F64",
                "shape": [self._count, 2],
                "data_offsets": [vectors, vectors + spans],
            },
        }
        self._file.seek(0)
        self._file.write((_HEADER_BYTES - 8).to_bytes(8, "little"))
        self._file.write(json.dumps(header, allow_nan=False).encode().ljust(_HEADER_BYTES - 8))

    def _span(self, begin: float, end: float) -> None:
        self._spans.write(np.asarray((begin, end), "<f8").tobytes())

    def close(self) -> None:
        """Finish both files; the spans follow the vectors."""
        self._spans.seek(0)
        while content := self._spans.read(1 << 20):
            self._file.write(content)
        self._spans.close()
        super().close()
