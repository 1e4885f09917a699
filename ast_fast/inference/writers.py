"""The files that results end in: JSON lines, CSV, Parquet, and for vectors .npy and .safetensors, by suffix.

Each takes records one by one, in the order of the clips, and holds no more than a few thousand rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._optional import require_package
from ..names import safe_path
from .csv_table import CsvTable, copy_bytes
from .records import Record
from .rows import TagRows, embedding_row, short, vectors_of
from .vector_files import NumpyRows, SafetensorsRows, index_of

_ROWS_A_GROUP = 2048  # of Parquet


def tag_writer(out: Path, rows: TagRows) -> Callable[[Path], Any]:
    """What makes the writer of labels for a file of this suffix.

    Raises:
        ValueError: the suffix is none of .jsonl, .csv and .parquet.
        MissingPackageError: Parquet is asked for and pyarrow is not there.
    """
    suffix = _known(out, (".jsonl", ".csv", ".parquet"))
    if suffix == ".jsonl":
        return lambda path: JsonLines(path, rows.row)
    if suffix == ".csv":
        header = ("file", "kind", "start_s", "end_s", "label", "score")
        return lambda path: CsvTable(path, header, rows.lines)
    arrow = _pyarrow()
    return lambda path: Parquet(path, _tag_schema(arrow), lambda record: [_tag_row(rows, record)])


def embedding_writer(out: Path, width: int) -> Callable[[Path], Any]:
    """What makes the writer of vectors [width] for a file of this suffix.

    Raises:
        ValueError: the suffix is none of .jsonl, .csv, .parquet, .npy and .safetensors.
        MissingPackageError: Parquet is asked for and pyarrow is not there.
    """
    suffix = _known(out, (".jsonl", ".csv", ".parquet", ".npy", ".safetensors"))
    if suffix == ".jsonl":
        return lambda path: JsonLines(path, embedding_row)
    if suffix == ".csv":
        header = ("file", "start_s", "end_s", *(f"e{index}" for index in range(width)))
        return lambda path: CsvTable(path, header, _embedding_lines)
    if suffix in (".npy", ".safetensors"):
        rows = NumpyRows if suffix == ".npy" else SafetensorsRows
        return lambda path: rows(path, width, index_of(out))
    arrow = _pyarrow()
    return lambda path: Parquet(path, _embedding_schema(arrow, width), _embedding_rows)


def _known(out: Path, suffixes: tuple[str, ...]) -> str:
    suffix = out.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"out {str(out)!r} ends in {suffix!r}: expected one of {', '.join(suffixes)}"
        )
    return suffix


def _pyarrow() -> Any:
    require_package("pyarrow.parquet", "writing Parquet", "parquet")
    return require_package("pyarrow", "writing Parquet", "parquet")


class JsonLines:
    """One object a line."""

    def __init__(self, path: Path, row: Callable[[Record], dict[str, Any]]) -> None:
        self._file = path.open("wb")
        self._row = row

    def add(self, record: Record) -> None:
        """The next clip."""
        self._file.write(json.dumps(self._row(record), allow_nan=False).encode() + b"\n")

    def position(self) -> int:
        """See `OutputWriter`: bytes."""
        return self._file.tell()

    def copy(self, before: Path, begin: int, end: int | None) -> None:
        """See `OutputWriter`."""
        copy_bytes(before, begin, end, self._file)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class Parquet:
    """Row groups of a few thousand clips."""

    def __init__(
        self, path: Path, schema: Any, rows: Callable[[Record], list[dict[str, Any]]]
    ) -> None:
        parquet = require_package("pyarrow.parquet", "writing Parquet", "parquet")
        self._arrow = _pyarrow()
        self._schema, self._rows = schema, rows
        self._writer = parquet.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []
        self._rows_written = 0

    def position(self) -> int:
        """See `OutputWriter`: rows."""
        return self._rows_written + len(self._waiting)

    def copy(self, before: Path, begin: int, end: int | None) -> None:
        """See `OutputWriter`."""
        parquet = require_package("pyarrow.parquet", "writing Parquet", "parquet")
        self._flush()
        at = 0
        with parquet.ParquetFile(before) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                first, last = max(begin - at, 0), count if end is None else min(end - at, count)
                if first < last:
                    table = file.read_row_group(group).slice(first, last - first)
                    self._writer.write_table(table.cast(self._schema))
                    self._rows_written += len(table)
                at += count

    def add(self, record: Record) -> None:
        """The next clip."""
        for row in self._rows(record):
            # Parquet holds text, which a file name need not be
            name = row["file"].encode("utf-8", "backslashreplace").decode()
            self._waiting.append({**row, "file": name})
        if len(self._waiting) >= _ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.Table.from_pylist(self._waiting, self._schema))
            self._rows_written += len(self._waiting)
            self._waiting = []

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()


def _tag_schema(arrow: Any) -> Any:
    labels = [("labels", arrow.list_(arrow.string())), ("scores", arrow.list_(arrow.float32()))]
    times = [("start_s", arrow.float64()), ("end_s", arrow.float64())]
    frames = [
        ("times_s", arrow.list_(arrow.float64())),
        ("labels", arrow.list_(arrow.string())),
        ("scores", arrow.list_(arrow.list_(arrow.float32()))),
    ]
    return arrow.schema(
        [
            ("file", arrow.string()),
            ("seconds", arrow.float64()),
            ("windows", arrow.int32()),
            ("notes", arrow.list_(arrow.string())),
            *labels,
            ("parts", arrow.list_(arrow.struct([*times, *labels]))),
            ("frames", arrow.struct(frames)),
        ]
    )


def _columns(labels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "labels": [found["label"] for found in labels],
        "scores": [found["score"] for found in labels],
    }


def _tag_row(rows: TagRows, record: Record) -> dict[str, Any]:
    row = rows.row(record)
    row.update(_columns(row["labels"]))
    for part in row.get("parts", ()):
        part.update(_columns(part["labels"]))
    return row


def _embedding_lines(record: Record) -> Any:
    for begin, end, vector in vectors_of(record):
        yield (safe_path(record.meta["file"]), begin, end, *short(vector))


def _embedding_schema(arrow: Any, width: int) -> Any:
    return arrow.schema(
        [
            ("file", arrow.string()),
            ("start_s", arrow.float64()),
            ("end_s", arrow.float64()),
            ("embedding", arrow.list_(arrow.float32(), width)),
        ]
    )


def _embedding_rows(record: Record) -> list[dict[str, Any]]:
    return [
        {"file": record.meta["file"], "start_s": begin, "end_s": end, "embedding": vector}
        for begin, end, vector in vectors_of(record)
    ]


__all__ = ["CsvTable", "JsonLines", "Parquet", "embedding_writer", "index_of", "tag_writer"]
