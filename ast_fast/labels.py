"""Names of classes: read from AudioSet's table, from a plain list, and kept with the model.

AudioSet's table is `class_labels_indices.csv` with the columns index, mid and display_name; ESC-50
and Speech Commands recipes use the same form. No table is shipped: AudioSet's is at
http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/class_labels_indices.csv (CC BY 4.0).
"""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path

from .names import same_name

_HEADER = ["index", "mid", "display_name"]
_MAX_BYTES = 16 * 2**20
_MAX_FIELD = 64 * 2**10


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSet:
    """Classes in the order of a model's logits.

    Attributes:
        names: display names, for people.
        mids: identifiers, for manifests; the names again where a file has none.
    """

    names: tuple[str, ...]
    mids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, label: str) -> int:
        """Index of a class by its identifier or, failing that, by its display name.

        Raises:
            ValueError: no class has it.
        """
        for known in (self.mids, self.names):
            plain = list(map(same_name, known))
            if same_name(label) in plain:
                return plain.index(same_name(label))
        raise ValueError(
            f"label {label!r} is unknown: expected one of {len(self)} classes such as {self.mids[0]!r}"
        )


def read_labels(path: str | os.PathLike[str], num_classes: int | None = None) -> LabelSet:
    """Read class names from a table (.csv with index, mid, display_name) or a list, one a line.

    Args:
        path: the file; anything but .csv is taken for a list.
        num_classes: how many are expected.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is wrong (named by its number), or the count is.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"labels {str(path)!r} do not exist: expected class_labels_indices.csv or a list"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"labels {str(path)!r} have {path.stat().st_size} bytes: expected at most 16 MiB"
        )
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"labels {str(path)!r} are not UTF-8 ({error}): save the file as UTF-8"
        ) from error
    labels = _table(text, path) if path.suffix.lower() == ".csv" else _list(text, path)
    if num_classes is not None and len(labels) != num_classes:
        raise ValueError(
            f"labels {str(path)!r} name {len(labels)} classes: expected {num_classes}, as the model has"
        )
    return labels


def _wrong(path: Path, line: int, message: str) -> ValueError:
    return ValueError(f"labels {str(path)!r}, line {line}: {message}")


def _table(text: str, path: Path) -> LabelSet:
    if "\0" in text:
        raise ValueError(f"labels {str(path)!r} hold NUL bytes: expected a text table")
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    names: list[str] = []
    lines_of: dict[str, int] = {}
    shown: dict[str, int] = {}
    try:
        header = next(reader, [])
        if [cell.strip() for cell in header] != _HEADER:
            raise _wrong(path, 1, f"got the columns {header!r:.200}: expected {','.join(_HEADER)}")
        for row in reader:
            line = reader.line_num
            if not row:
                continue
            if len(row) != 3:
                raise _wrong(
                    path,
                    line,
                    f"got {len(row)} fields: expected {','.join(_HEADER)} (quote commas)",
                )
            index, mid, name = (cell.strip() for cell in row)
            if max(map(len, row)) > _MAX_FIELD:
                raise _wrong(path, line, "a field is longer than 64 KiB")
            if index != str(len(names)):
                raise _wrong(
                    path,
                    line,
                    f"got index {index!r:.40}: expected {len(names)}, without gaps or repeats",
                )
            if not mid or not name:
                raise _wrong(path, line, "mid or display_name is empty")
            if mid in lines_of:
                raise _wrong(path, line, f"mid {mid!r} is on line {lines_of[mid]} already")
            first = shown.setdefault(same_name(name), line)
            if first != line:
                raise _wrong(path, line, f"display_name {name!r} is on line {first} already")
            lines_of[mid] = line
            names.append(name)
    except csv.Error as error:
        raise _wrong(path, reader.line_num, f"is no CSV ({error})") from error
    if not names:
        raise ValueError(
            f"labels {str(path)!r} name no class: expected a line a class below the header"
        )
    return LabelSet(tuple(names), tuple(lines_of))


def _list(text: str, path: Path) -> LabelSet:
    names: dict[str, int] = {}
    shown: dict[str, int] = {}
    for line, raw in enumerate(text.splitlines(), 1):
        name = raw.strip()
        if not name:
            raise _wrong(path, line, "is empty: expected a class name on each line")
        if len(name) > _MAX_FIELD or "\0" in name:
            raise _wrong(path, line, "is no class name: it holds NUL or more than 64 KiB")
        first = shown.setdefault(same_name(name), line)
        if first != line:
            raise _wrong(path, line, f"{name!r:.200} is on line {first} already")
        names[name] = line
    if not names:
        raise ValueError(f"labels {str(path)!r} are empty: expected a class name on each line")
    return LabelSet(tuple(names), tuple(names))
