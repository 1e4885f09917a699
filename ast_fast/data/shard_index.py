"""Where each clip of a set of shards begins, and its labels: read from the index, or found by scanning."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..audio import SUFFIXES
from .manifest import MAX_FIELD_CHARS, MAX_MANIFEST_BYTES, ManifestError
from .tar import BLOCK, ShardError, members

INDEX = "index.json"
FORMAT = "ast_fast shards"
VERSION = 1
MAX_JSON_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ShardIndex:
    """Columns over all clips, in the order they lie in.

    Attributes:
        folder: of the shards.
        shards: file names.
        classes: class names.
        labels: class indices of each clip.
        shard_of: [N] int32, number of the shard.
        begins: [N] int64, first byte of a clip's first header.
        ends: [N] int64, first byte after it.
    """

    folder: Path
    shards: tuple[str, ...]
    classes: tuple[str, ...]
    labels: list[tuple[int, ...]]
    shard_of: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def select(self, clips: Sequence[int]) -> ShardIndex:
        """Some of the clips, with the same classes."""
        return dataclasses.replace(
            self,
            labels=[self.labels[clip] for clip in clips],
            shard_of=self.shard_of[clips],
            begins=self.begins[clips],
            ends=self.ends[clips],
        )


def is_shards(path: Path) -> bool:
    """Whether a path is a folder of shards, or a shard."""
    if path.is_dir():
        return any(entry.name.endswith(".tar") for entry in os.scandir(path))
    return path.suffix.lower() == ".tar"


def open_index(path: Path, classes: Sequence[str] | None = None) -> ShardIndex:
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
        _read(file, names, classes)
        if path.is_dir() and file.is_file()
        else _scan(folder, names, classes)
    )
    if not index.labels:
        raise ManifestError(f"{str(path)!r}: the shards hold no clips")
    return index


def _read(file: Path, names: list[str], classes: Sequence[str] | None) -> ShardIndex:
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{file}: expected at most {MAX_MANIFEST_BYTES} bytes")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ManifestError(f"{file}: is no index of shards; move it away to have them scanned")
    if content.get("version") != VERSION:
        raise ManifestError(f"{file}: version {content.get('version')!r}: expected {VERSION}")
    own = content.get("classes")
    if not isinstance(own, list) or not _texts(own):
        raise ManifestError(f"{file}: classes: expected a list of texts")
    if classes is not None and tuple(classes) != tuple(own):
        raise ManifestError(
            f"{file}: lists {len(own)} classes, {list(own[:3])}...: expected the {len(classes)} given"
        )
    shards = content.get("shards")
    if not isinstance(shards, list):
        raise ManifestError(f"{file}: shards: expected a list")
    columns = _Columns()
    for number, shard in enumerate(shards):
        _read_shard(shard, number, len(own), columns, file)
    listed = [shard["name"] for shard in shards]
    if sorted(listed) != names:
        odd = sorted(set(listed) ^ set(names))[:3]
        raise ManifestError(
            f"{file}: does not list the shards that are there ({', '.join(map(repr, odd))}); write "
            "them again, or move the index away to have all of them scanned"
        )
    return columns.index(file.parent, listed, own)


def _read_shard(shard: Any, number: int, num_classes: int, columns: _Columns, file: Path) -> None:
    where = f"{file}: shards[{number}]"
    name = shard.get("name") if isinstance(shard, dict) else None
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".tar"):
        raise ManifestError(f"{where}: name {name!r}: expected a file name that ends in .tar")
    size, offsets, labels = (shard.get(key) for key in ("bytes", "offsets", "labels"))
    if not isinstance(offsets, list) or not isinstance(labels, list) or not isinstance(size, int):
        raise ManifestError(f"{where}: expected bytes, and offsets and labels as lists")
    if len(labels) != len(offsets):
        raise ManifestError(f"{where}: {len(offsets)} offsets and {len(labels)} labels")
    if not all(type(offset) is int for offset in offsets):
        raise ManifestError(f"{where}: offsets: expected whole numbers")
    begins = np.asarray([*offsets, size], dtype=np.int64)
    if (np.diff(begins) < BLOCK).any() or (begins[:-1] % BLOCK).any() or (begins < 0).any():
        raise ManifestError(f"{where}: offsets: expected rising multiples of {BLOCK} within {size}")
    for clip in labels:
        if not isinstance(clip, list) or not all(
            type(label) is int and 0 <= label < num_classes for label in clip
        ):
            raise ManifestError(f"{where}: labels {clip!r}: expected numbers below {num_classes}")
    columns.labels += map(tuple, labels)
    columns.add(number, begins[:-1], begins[1:])


def _texts(values: list[Any]) -> bool:
    return all(isinstance(text, str) and len(text) <= MAX_FIELD_CHARS for text in values)


class _Columns:
    """Gathers the columns of an index shard by shard."""

    def __init__(self) -> None:
        self.labels: list[tuple[int, ...]] = []
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, shard: int, begins: np.ndarray, ends: np.ndarray) -> None:
        """Clips of one shard."""
        self.parts.append((np.full(len(begins), shard, np.int32), begins, ends))

    def index(self, folder: Path, shards: Sequence[str], classes: Sequence[str]) -> ShardIndex:
        """All of it."""
        shard_of, begins, ends = (
            (np.concatenate(column) for column in zip(*self.parts, strict=True))
            if self.parts
            else (np.empty(0, np.int64) for _ in range(3))
        )
        return ShardIndex(
            folder, tuple(shards), tuple(classes), self.labels, shard_of, begins, ends
        )


def _scan(folder: Path, names: list[str], classes: Sequence[str] | None) -> ShardIndex:
    """Find the clips of shards without an index: headers and labels are read, sound is passed over."""
    columns = _Columns()
    found: list[tuple[str | int, ...]] = []
    for number, name in enumerate(names):
        begins, ends = _scan_shard(folder / name, found)
        columns.add(number, np.asarray(begins, np.int64), np.asarray(ends, np.int64))
    everything = {label for clip in found for label in clip}
    if classes is None:
        numbers = sorted(label for label in everything if isinstance(label, int))
        texts = sorted(label for label in everything if isinstance(label, str))
        places = {label: place for place, label in enumerate([*numbers, *texts])}
        classes = [str(label) for label in places]
    else:
        places = {label: place for place, label in enumerate(classes)}
        places |= {place: place for place in range(len(classes))}
        unknown = sorted(str(label) for label in everything if label not in places)
        if unknown:
            raise ManifestError(
                f"{str(folder)!r}: label {unknown[0]!r} is none of the {len(classes)} classes"
            )
    columns.labels = [tuple(places[label] for label in clip) for clip in found]
    return columns.index(folder, names, classes)


def _scan_shard(path: Path, found: list[tuple[str | int, ...]]) -> tuple[list[int], list[int]]:
    """Where the clips of a shard begin and end; their labels are added to `found`."""
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
                if member.kind in ("json", "cls") and member.size <= MAX_JSON_BYTES:
                    clip.labels = clip.labels or _labels(read_at(member.start, member.size))
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
    found += [clip.labels for clip in clips]
    return [clip.begin for clip in clips], [clip.end for clip in clips]


@dataclasses.dataclass(slots=True)
class _Found:
    """A clip met while scanning."""

    begin: int
    end: int = 0
    labels: tuple[str | int, ...] = ()
    sound: bool = False


def _labels(raw: bytes) -> tuple[str | int, ...]:
    """Labels of a .cls or .json member; nothing if it has none."""
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        return ()
    if isinstance(told, dict):
        told = next((told[name] for name in ("labels", "label", "cls") if name in told), None)
    values = told if isinstance(told, list) else [told]
    if all(type(value) in (str, int) for value in values):
        return tuple(value for value in values if len(str(value)) <= MAX_FIELD_CHARS)
    return ()
