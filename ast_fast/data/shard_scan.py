"""Shards of any maker: opened by their index, or scanned once for their clips.

Of a clip the scan reads what tells of labels: `.json` (labels, label, cls, class, tags, tag; `split`;
`values`, an object of numbers to predict), `.cls` (a number or a name) and `.txt` (a label a line).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..audio import SUFFIXES
from ..names import in_order, same_name
from .manifest import MAX_FIELD_CHARS, ManifestError
from .shard_index import INDEX, MAX_JSON_BYTES, Columns, ShardIndex, read_index
from .tar import BLOCK, ShardError, members

_LABEL_NAMES = ("labels", "label", "cls", "class", "tags", "tag")


def open_index(
    path: Path,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
) -> ShardIndex:
    """The index of a folder of shards, or of one shard.

    Raises:
        ManifestError: no shards, no clips, or an index that does not fit them.
        FileNotFoundError: there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected a folder of tar shards")
    if path.is_dir():
        folder = path
        entries = [entry.name for entry in os.scandir(path)]
        names = sorted(n for n in entries if n.endswith(".tar") and not n.startswith("."))
    else:
        folder, names = path.parent, [path.name]
    if not names:
        raise ManifestError(f"{str(path)!r} holds no tar shards")
    file = folder / INDEX
    index = (
        read_index(file, names, classes, aliases)
        if path.is_dir() and file.is_file()
        else _scan(folder, names, classes, aliases)
    )
    if not index.labels:
        raise ManifestError(f"{str(path)!r}: the shards hold no clips")
    return index


def _scan(
    folder: Path,
    names: list[str],
    classes: Sequence[str] | None,
    aliases: Mapping[str, int] | None,
) -> ShardIndex:
    """Find the clips of shards without an index: headers and labels are read, sound is passed over."""
    columns = Columns()
    clips: list[_Found] = []
    for number, name in enumerate(names):
        begins, ends = _scan_shard(folder / name, clips)
        columns.add(number, np.asarray(begins, np.int64), np.asarray(ends, np.int64))
    columns.splits = [clip.split for clip in clips]
    named = next((clip.values for clip in clips if clip.values), None)
    if named is not None and not any(clip.labels for clip in clips):
        return _with_values(columns, clips, list(named), folder, names)
    found = [clip.labels or clip.texts for clip in clips]
    everything = {label for clip in found for label in clip}
    places: dict[str | int, int] = {}
    if classes is None:
        # a number and the same as text are one class; in the order of every layout
        classes = in_order({str(label) for label in everything})
        numbers = {name: place for place, name in enumerate(classes)}
        places.update({label: numbers[str(label)] for label in everything})
    else:
        places.update({same_name(label): place for place, label in enumerate(classes)})
        places.update({place: place for place in range(len(classes))})
        places.update({same_name(name): place for name, place in (aliases or {}).items()})
        unknown = sorted(str(label) for label in everything if label not in places)
        if unknown:
            raise ManifestError(
                f"{str(folder)!r}: label {unknown[0]!r} is none of the {len(classes)} classes"
            )
    columns.labels = [tuple(dict.fromkeys(places[label] for label in clip)) for clip in found]
    columns.untold = [place for place, clip in enumerate(clips) if not clip.told]
    return columns.index(folder, names, classes, str(folder))


def _with_values(
    columns: Columns, clips: list[_Found], named: list[str], folder: Path, names: list[str]
) -> ShardIndex:
    """An index of numbers to predict; every clip must have them."""
    shards = np.concatenate([part[0] for part in columns.parts]).tolist()
    for number, clip in enumerate(clips):
        if set(clip.values) != set(named):
            raise ManifestError(
                f"{str(folder / names[shards[number]])!r}: clip {number}: has the values "
                f"{', '.join(clip.values) or 'none'}: expected {', '.join(named)}"
            )
        columns.values.append([clip.values[name] for name in named])
    columns.labels = [()] * len(clips)
    return columns.index(folder, names, named, str(folder))


def _scan_shard(path: Path, found: list[_Found]) -> tuple[list[int], list[int]]:
    """Where the clips of a shard begin and end; what is told of them is added to `found`."""
    with path.open("rb", buffering=0) as file:
        handle = file.fileno()
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError(f"{str(path)!r} is not a regular file")

        def read_at(offset: int, count: int) -> bytes:
            return os.pread(handle, count, offset)

        clips: list[_Found] = []
        end, key, damaged = 0, None, False
        try:
            for member in members(read_at, 0, status.st_size, repr(path.name)):
                if member.key != key:
                    key = member.key
                    clips.append(_Found(member.begin))
                clip = clips[-1]
                clip.end = end = member.end
                if member.kind in ("json", "cls", "txt") and member.size <= MAX_JSON_BYTES:
                    clip.learn(member.kind, read_at(member.start, member.size))
                clip.sound |= member.kind == "s16" or f".{member.kind}" in SUFFIXES
            # a whole archive ends with zeros; a clip that is cut off tells of it when it is read
            damaged = end <= status.st_size and read_at(end, BLOCK) != bytes(BLOCK)
        except ShardError:
            damaged = True
    if damaged:
        # what lies behind cannot be found: one clip that fails when it is read stands for it
        clips.append(_Found(end, max(end + BLOCK, status.st_size), sound=True))
    # without sound: files that belong to no clip, such as a README
    clips = [clip for clip in clips if clip.sound]
    found += clips
    return [clip.begin for clip in clips], [clip.end for clip in clips]


@dataclasses.dataclass(slots=True)
class _Found:
    """A clip met while scanning."""

    begin: int
    end: int = 0
    labels: tuple[str | int, ...] = ()
    texts: tuple[str | int, ...] = ()  # of a .txt: labels if nothing else tells of them
    split: str = ""
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    sound: bool = False
    told: bool = False  # something says what labels it has, if only that it has none

    def learn(self, kind: str, raw: bytes) -> None:
        """Take what a .json, .cls or .txt member tells."""
        if kind == "txt":
            self.texts = self.texts or _lines(raw)
            self.told |= bool(self.texts)
            return
        try:
            told = json.loads(raw)
        except (ValueError, RecursionError):
            self.labels = self.labels or (_lines(raw) if kind == "cls" else ())
            self.told |= bool(self.labels)
            return
        if isinstance(told, dict):
            split, values = told.get("split"), told.get("values")
            if isinstance(split, str) and len(split) <= MAX_FIELD_CHARS:
                self.split = split
            if isinstance(values, dict) and all(map(_is_number, values.values())):
                self.values = values
            told = next((told[name] for name in _LABEL_NAMES if name in told), None)
        given = told if isinstance(told, list) else [told]
        if all(type(value) in (str, int) for value in given):
            texts = tuple(
                same_name(value) if isinstance(value, str) else value
                for value in given
                if value != "" and len(str(value)) <= MAX_FIELD_CHARS
            )
            self.labels = self.labels or texts
            self.told = True


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _lines(raw: bytes) -> tuple[str, ...]:
    """A label a line, of text that is sane."""
    lines = raw.decode("utf-8", "replace").splitlines()
    return tuple(
        same_name(text) for line in lines if 0 < len(text := line.strip()) <= MAX_FIELD_CHARS
    )
