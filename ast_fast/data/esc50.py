"""ESC-50 as it is distributed: `meta/esc50.csv` and the folder `audio/`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .manifest import Manifest, ManifestError, Row, collect, csv_rows

_META = Path("meta", "esc50.csv")
_COLUMNS = ("filename", "fold", "target", "category")


def is_esc50(root: Path) -> bool:
    """Whether a folder looks like ESC-50."""
    return (root / _META).is_file()


def read_esc50(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    leave_out_missing: bool = False,
) -> Manifest:
    """ESC-50; each clip's part is the number of its fold, 1 to 5.

    Args:
        root: the unpacked folder.
        classes: class names in order; by default the categories in the order of their numbers.
        aliases: further names of classes, with their indices.
        leave_out_missing: leave clips out that are not there, and list them, rather than refuse.

    Raises:
        ManifestError: the table or the folder is missing, or a line is wrong.
    """
    root = Path(root)
    table = root / _META
    for place, what in ((table, table.is_file()), (root / "audio", (root / "audio").is_dir())):
        if not what:
            raise ManifestError(
                f"{str(place)!r} is not there: expected ESC-50 as unpacked, with meta/esc50.csv and "
                "audio/"
            )
    names: dict[int, str] = {}
    rows = list(_rows(table, names))
    if classes is None:
        gaps = sorted(set(range(len(names))) - set(names))
        if gaps:
            raise ManifestError(f"{table}: no clip has target {gaps[0]}: expected 0, 1, 2... ")
        classes = [names[number] for number in sorted(names)]
    return collect(
        rows,
        table,
        root,
        classes=classes,
        aliases=aliases,
        check_files=True,
        leave_out_missing=leave_out_missing,
    )


def _rows(table: Path, names: dict[int, str]) -> Iterator[Row]:
    """The clips; `names` gets the category of each number."""
    numbers: dict[str, int] = {}
    for line, row in csv_rows(table):
        where = f"{table}, line {line}"
        absent = [name for name in _COLUMNS if name not in row]
        if absent:
            raise ManifestError(f"{where}: has {', '.join(row)}: expected {absent[0]!r}")
        file, fold, target, category = (row[name].strip() for name in _COLUMNS)
        for name, text in (("fold", fold), ("target", target)):
            if not (text.isascii() and text.isdigit() and len(text) < 4):
                raise ManifestError(f"{where}: {name} is {text!r:.80}: expected a small number")
        if "/" in file:
            raise ManifestError(f"{where}: filename {file!r:.200}: expected a name in audio/")
        number = int(target)
        if (
            names.setdefault(number, category) != category
            or numbers.setdefault(category, number) != number
        ):
            raise ManifestError(
                f"{where}: target {number} is {category!r:.80}: another line has it as "
                f"{names[number]!r:.80} or gives {category!r:.80} another number"
            )
        yield Row(line, f"audio/{file}", [category], file, str(int(fold)))
