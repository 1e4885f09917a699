"""Music emotion as DEAM and MediaEval distribute it: songs, and the means of their annotations.

The tables of averages per song (`static_annotations*.csv`) have a song's number and the mean and spread
of valence and arousal on a scale of 1 to 9; the song is `<number>.mp3`, or another kind of audio,
anywhere below the root. Tables of annotations over time are not read.

MediaEval's set of 2013 has `songs_info.csv` too, whose column "Mediaeval 2013 set" divides the songs into
development and evaluation. DEAM's own tables say nothing of parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .manifest import Manifest, ManifestError, Row, collect, csv_rows, finite
from .tree import Walk

_TABLES = "static_annotations*.csv"
_FOLDERS = ("annotations", "DEAM_Annotations")
NAMES = ("valence", "arousal")
_INFO, _SET = "songs_info.csv", "mediaeval 2013 set"
_PARTS = {"development": "train", "evaluation": "test"}


def tables_of(root: Path) -> list[Path]:
    """Tables of averages per song below a folder; empty if it is not laid out as DEAM."""
    found = set(root.glob(_TABLES))
    for name in _FOLDERS:
        if (root / name).is_dir():
            found.update((root / name).rglob(_TABLES))
    return sorted(found)


def read_deam(
    root: str | os.PathLike[str],
    *,
    values: Sequence[str] = NAMES,
    leave_out_missing: bool = False,
) -> Manifest:
    """Songs with mean valence and arousal, on the scale of the tables.

    Args:
        root: folder with `annotations/` (or `DEAM_Annotations/`) and the songs.
        values: what to predict: columns of the tables, with or without "_mean" behind them or
            "mean_" before.
        leave_out_missing: leave songs out that are not there, and list them, rather than refuse.

    Raises:
        ManifestError: there is no table, a line is wrong, or a song is missing.
    """
    root = Path(root)
    tables = tables_of(root)
    if not tables:
        raise ManifestError(
            f"{str(root)!r} holds no {_TABLES} (in annotations/ or DEAM_Annotations/): expected "
            "DEAM's averages per song"
        )
    values = tuple(values) or NAMES
    parts = _parts_of(root, tables)
    songs: dict[str, str] = {}
    walk = Walk(root)
    for path in walk.sounds(root):
        name = path.rpartition("/")[2].rpartition(".")[0]
        if name.isascii() and name.isdigit() and songs.setdefault(_plain(name), path) is not path:
            raise ManifestError(
                f"{str(root)!r}: song {name} is there twice, {songs[_plain(name)]!r} and {path!r}"
            )
    rows, missing = [], []
    for table in tables:
        for row in _rows(table, values, songs):
            if parts and row.key not in parts:
                raise ManifestError(
                    f"{table}, line {row.line}: {_INFO} has no song {row.key}: expected every song of the "
                    "table in it"
                )
            row = row._replace(split=parts.get(row.key, ""))
            if row.path:
                rows.append(row)
            elif leave_out_missing:
                missing.append(row.key)
            else:
                raise ManifestError(
                    f"{table}, line {row.line}: there is no song {row.key} ({row.key}.mp3 or another "
                    f"kind) under {str(root)!r}"
                )
    if not rows:
        raise ManifestError(
            f"{str(root)!r}: none of the {len(missing)} songs of its tables is there"
        )
    listed = [row.key for row in rows]
    if len(set(listed)) < len(listed):
        again = next(key for place, key in enumerate(listed) if key in listed[:place])
        raise ManifestError(f"{', '.join(map(str, tables))}: song {again} is listed twice")
    rows = [row._replace(key="") for row in rows]
    source = tables[0] if len(tables) == 1 else tables[0].parent
    walk.tree.others.clear()  # the tables lie there too
    notes = walk.tree.notes()
    return collect(rows, source, root, value_names=values, notes=notes).with_missing(missing)


def _parts_of(root: Path, tables: Sequence[Path]) -> dict[str, str]:
    """The part of each song, by its number; empty where nothing is said of parts."""
    folders = dict.fromkeys([*(table.parent for table in tables), root])
    files = [file for folder in folders if (file := folder / _INFO).is_file()]
    parts: dict[str, str] = {}
    for line, cells in csv_rows(files[0]) if files else ():
        where = f"{files[0]}, line {line}"
        row = {name.lower(): text.strip() for name, text in cells.items()}
        for name in ("song_id", _SET):
            if name not in row:
                raise ManifestError(f"{where}: has {', '.join(row)}: expected {name!r}")
        song = _song(row["song_id"], where)
        if row[_SET].lower() not in _PARTS:
            raise ManifestError(
                f"{where}: {_SET} is {row[_SET]!r:.80}: expected {' or '.join(_PARTS)}"
            )
        if song in parts:
            raise ManifestError(f"{where}: song {song} is listed twice")
        parts[song] = _PARTS[row[_SET].lower()]
    return parts


def _song(text: str, where: str) -> str:
    """The number of a song without leading zeros."""
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ManifestError(f"{where}: song_id is {text!r:.80}: expected a number")
    return _plain(text)


def _plain(number: str) -> str:
    return number.lstrip("0") or "0"


def _rows(table: Path, values: Sequence[str], songs: dict[str, str]) -> Iterator[Row]:
    for line, cells in csv_rows(table):
        where = f"{table}, line {line}"
        row = {name.lower(): text.strip() for name, text in cells.items()}
        if "song_id" not in row:
            raise ManifestError(f"{where}: has {', '.join(row)}: expected 'song_id'")
        song = _song(row["song_id"], where)
        numbers = []
        for name in values:
            forms = (f"{name}_mean", f"mean_{name}", name)
            column = next((form for form in forms if form in row), None)
            if column is None:
                raise ManifestError(f"{where}: has {', '.join(row)}: expected '{name}_mean'")
            numbers.append(finite(row[column], column, where))
        yield Row(line, songs.get(song, ""), [], song, "", tuple(numbers))
