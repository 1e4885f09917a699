"""Where each clip of a set of shards begins, and its labels: read from the index, or found by scanning."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..names import check_names, part_name, same_name
from .manifest import MAX_FIELD_CHARS, MAX_MANIFEST_BYTES, ManifestError
from .tar import BLOCK

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
        values: [N, K] float32, numbers to predict, named by `classes`; None for classes.
        splits: the part of the set that each clip belongs to; None where there are no parts.
        untold: clips of which nothing says what labels they have; others without one are of no class.
    """

    folder: Path
    shards: tuple[str, ...]
    classes: tuple[str, ...]
    labels: list[tuple[int, ...]]
    shard_of: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    values: np.ndarray | None = None
    splits: list[str] | None = None
    untold: frozenset[int] = frozenset()

    def select(self, clips: Sequence[int]) -> ShardIndex:
        """Some of the clips, with the same classes."""
        return dataclasses.replace(
            self,
            labels=[self.labels[clip] for clip in clips],
            shard_of=self.shard_of[clips],
            begins=self.begins[clips],
            ends=self.ends[clips],
            values=None if self.values is None else self.values[clips],
            splits=None if self.splits is None else [self.splits[clip] for clip in clips],
            untold=frozenset(place for place, clip in enumerate(clips) if clip in self.untold),
        )


def is_shards(path: Path) -> bool:
    """Whether a path is a folder of shards, or a shard."""
    if path.is_dir():
        return any(entry.name.endswith(".tar") for entry in os.scandir(path))
    return path.suffix.lower() == ".tar"


def read_index(
    file: Path,
    names: list[str],
    classes: Sequence[str] | None,
    aliases: Mapping[str, int] | None,
) -> ShardIndex:
    """What an index says of shards of these names.

    Raises:
        ManifestError: it is no index, does not fit the shards, or has classes that are not known.
    """
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
    try:
        check_names(own, f"{file}: classes")
    except ValueError as error:
        raise ManifestError(str(error)) from error
    shards = content.get("shards")
    if not isinstance(shards, list):
        raise ManifestError(f"{file}: shards: expected a list")
    columns = Columns()
    for number, shard in enumerate(shards):
        _read_shard(shard, number, len(own), columns, file)
    listed = [shard["name"] for shard in shards]
    if sorted(listed) != names:
        odd = sorted(set(listed) ^ set(names))[:3]
        raise ManifestError(
            f"{file}: does not list the shards that are there ({', '.join(map(repr, odd))}); write "
            "them again, or move the index away to have all of them scanned"
        )
    if classes is not None and tuple(classes) != tuple(own) and not columns.values:
        columns.labels = _renumbered(columns.labels, own, classes, aliases, file)
        own = list(classes)
    return columns.index(file.parent, listed, own, str(file))


def _renumbered(
    labels: list[tuple[int, ...]],
    own: list[str],
    classes: Sequence[str],
    aliases: Mapping[str, int] | None,
    file: Path,
) -> list[tuple[int, ...]]:
    """Labels as numbers of the classes given, not of the index's own."""
    known = {same_name(name): number for number, name in enumerate(classes)}
    known |= {same_name(name): number for name, number in (aliases or {}).items()}
    own = [same_name(name) for name in own]
    used = {label for clip in labels for label in clip}
    unknown = [name for number, name in enumerate(own) if number in used and name not in known]
    if unknown:
        raise ManifestError(
            f"{file}: class {unknown[0]!r} is not among the {len(classes)} classes given"
        )
    return [tuple(dict.fromkeys(known[own[label]] for label in clip)) for clip in labels]


def _read_shard(shard: Any, number: int, num_classes: int, columns: Columns, file: Path) -> None:
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
    values, splits = shard.get("values"), shard.get("splits")
    if values is not None:
        good = isinstance(values, list) and len(values) == len(labels)
        if not good or not all(_numbers(clip, num_classes) for clip in values):
            raise ManifestError(
                f"{where}: values: expected {len(labels)} lists of {num_classes} finite numbers"
            )
        columns.values += values
    if splits is not None:
        if not isinstance(splits, list) or len(splits) != len(labels) or not _texts(splits):
            raise ManifestError(f"{where}: splits: expected a text for each of {len(labels)} clips")
        columns.splits += splits


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def _texts(values: list[Any]) -> bool:
    return all(isinstance(text, str) and len(text) <= MAX_FIELD_CHARS for text in values)


class Columns:
    """Gathers the columns of an index shard by shard."""

    def __init__(self) -> None:
        self.labels: list[tuple[int, ...]] = []
        self.values: list[Sequence[float]] = []
        self.splits: list[str] = []
        self.untold: list[int] = []
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, shard: int, begins: np.ndarray, ends: np.ndarray) -> None:
        """Clips of one shard."""
        self.parts.append((np.full(len(begins), shard, np.int32), begins, ends))

    def index(
        self, folder: Path, shards: Sequence[str], classes: Sequence[str], where: str
    ) -> ShardIndex:
        """All of it.

        Raises:
            ManifestError: some shards have values or parts, and others none.
        """
        for name, column in (("values", self.values), ("splits", self.splits)):
            if column and len(column) != len(self.labels):
                raise ManifestError(
                    f"{where}: {name}: {len(column)} of {len(self.labels)} clips have them: expected "
                    "all or none"
                )
        shard_of, begins, ends = (
            (np.concatenate(column) for column in zip(*self.parts, strict=True))
            if self.parts
            else (np.empty(0, np.int64) for _ in range(3))
        )
        return ShardIndex(
            folder,
            tuple(shards),
            tuple(classes),
            self.labels,
            shard_of,
            begins,
            ends,
            np.asarray(self.values, np.float32) if self.values else None,
            [part_name(split) for split in self.splits] if any(self.splits) else None,
            frozenset(self.untold),
        )
