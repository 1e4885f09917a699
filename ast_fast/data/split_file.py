"""What a run is trained and evaluated on, written down when it begins, and found again later.

A folder changes: clips are added, renamed, replaced, moved to other classes. A split that is drawn again
then is another one, and a model is evaluated on clips that it was trained on. So a run keeps the names of
its clips with a mark of their bytes and their classes, and later finds those clips or says what became
of them.

The file is JSON lines: first what all of it is, then a list a clip: part, name, mark, classes by number
(or numbers to predict). A million clips are some 70 MB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .contents import UNREADABLE, clip_names, content_marks
from .layouts import Data
from .prepare import replace
from .shards import ShardSet

SPLIT = "split.jsonl"
_FORMAT, _VERSION = "ast_fast split", 1
_OWN = frozenset({"format", "version", "train", "evaluate", "evaluated", "classes"})
_EXAMPLES = 3


class SplitError(ValueError):
    """The clips of a run are not what they were, or the file that lists them is damaged."""


@dataclasses.dataclass(frozen=True, slots=True)
class Clips:
    """Clips as a run knew them.

    Attributes:
        names: of `clip_names`.
        marks: of `content_marks`.
        labels: class numbers, or the numbers to predict.
    """

    names: list[str]
    marks: list[str]
    labels: list[tuple[float, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: Clips) -> Clips:
        return Clips(self.names + other.names, self.marks + other.marks, self.labels + other.labels)

    @classmethod
    def of(cls, data: Data) -> Clips:
        """The clips of a set as they are now."""
        return cls(list(clip_names(data)), content_marks(data, range(len(data))), _told(data))


def _told(data: Data) -> list[tuple[float, ...]]:
    if data.values is None:
        return list(data.labels)
    # as the shortest text that gives the same float32
    return [tuple(float(str(value)) for value in row) for row in data.values.astype(np.float32)]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Both parts of a run.

    Attributes:
        classes: names, or those of the numbers to predict.
        train: clips to learn from.
        held: clips to evaluate on; None for none.
        facts: what else the file says at its head.
    """

    classes: tuple[str, ...]
    train: Clips
    held: Clips | None
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, data: Data, held: Data | None, facts: Mapping[str, Any]) -> Split:
        """Of two sets with the same classes, as they are now; reads some bytes of every clip."""
        return cls(
            tuple(data.classes), Clips.of(data), None if held is None else Clips.of(held), facts
        )

    @property
    def all(self) -> Clips:
        """Both parts together."""
        return self.train if self.held is None else self.train + self.held

    def shared(self) -> list[str]:
        """Clips to evaluate on that have the bytes of a clip to train on."""
        if self.held is None:
            return []
        known = set(self.train.marks) - {UNREADABLE}
        return [
            name
            for name, mark in zip(self.held.names, self.held.marks, strict=True)
            if mark in known
        ]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, self._lines())

    def _lines(self) -> Iterator[bytes]:
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "train": len(self.train),
            "evaluate": 0 if self.held is None else len(self.held),
            "evaluated": None if self.held is None else digest(self.held, self.classes),
            "classes": self.classes,
            **self.facts,
        }
        yield json.dumps(head, allow_nan=False).encode() + b"\n"
        parts = (("train", self.train), ("evaluate", self.held))
        for part, clips in parts:
            for row in zip(clips.names, clips.marks, clips.labels, strict=True) if clips else ():
                yield (
                    json.dumps((part, *row), separators=(",", ":"), allow_nan=False).encode()
                    + b"\n"
                )

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read the file.

        Raises:
            SplitError: it is damaged.
        """
        head = read_head(path)
        parts: dict[str, tuple[list[Any], ...]] = {
            name: ([], [], []) for name in ("train", "evaluate")
        }
        labels: dict[str, tuple[float, ...]] = {}
        try:
            with path.open("rb") as file:
                next(file)
                for raw in file:
                    part, name, mark, told = json.loads(raw)
                    names, marks, found = parts[part]
                    names.append(name)
                    marks.append(mark)
                    found.append(labels.setdefault(str(told), tuple(told)))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise SplitError(f"{path}: is damaged: {error}; put it back from a copy") from error
        train, held = (Clips(*parts[name]) for name in ("train", "evaluate"))
        if (len(train), len(held)) != (head["train"], head["evaluate"]):
            raise SplitError(
                f"{path}: lists {len(train)} clips to train on and {len(held)} to evaluate on: expected "
                f"{head['train']} and {head['evaluate']}; it is cut off: put it back from a copy"
            )
        facts = {name: value for name, value in head.items() if name not in _OWN}
        return cls(tuple(head["classes"]), train, held if len(held) else None, facts)


def read_head(path: Path) -> dict[str, Any]:
    """The first line: counts, classes, and a digest of what is evaluated on.

    Raises:
        SplitError: it is damaged, or of another version.
    """
    with path.open("rb") as file:
        raw = file.readline()
    try:
        head = json.loads(raw)
    except ValueError as error:
        raise SplitError(
            f"{path}, line 1: is not JSON: {error}; put it back from a copy"
        ) from error
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise SplitError(f"{path}: is no list of a run's clips; put it back from a copy")
    if head.get("version") != _VERSION:
        raise SplitError(f"{path}: version {head.get('version')!r}: expected {_VERSION}")
    return head


def digest(clips: Clips, classes: Sequence[str]) -> str:
    """Of the bytes and classes of clips, whatever they are called and in whatever order."""
    names = _named(clips.labels, classes)
    rows = sorted(zip(clips.marks, names, strict=True))
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


def _named(labels: Sequence[tuple[float, ...]], classes: Sequence[str]) -> list[tuple[Any, ...]]:
    """Class numbers as names, sorted; numbers to predict as they are."""
    seen: dict[tuple[float, ...], tuple[Any, ...]] = {}
    for told in set(labels):
        whole = all(isinstance(number, int) for number in told)
        seen[told] = tuple(sorted(classes[int(number)] for number in told)) if whole else told
    return [seen[told] for told in labels]


@dataclasses.dataclass(slots=True)
class Match:
    """Clips of a run in a set as it is now.

    Attributes:
        places: of each clip in the set; -1 if it is gone.
        added: names that the run does not know.
        renamed: was, is.
        gone: names.
        changed: names of clips whose bytes are others.
        relabelled: names of clips whose classes, or numbers, are others: with what was and is.
    """

    places: list[int]
    added: list[str] = dataclasses.field(default_factory=list)
    renamed: list[str] = dataclasses.field(default_factory=list)
    gone: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)
    relabelled: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """Why the clips are not those of the run, a line each; none if they are."""
        kinds = (
            (self.gone, "gone"),
            (self.changed, "with other bytes"),
            (self.relabelled, "with other labels"),
        )
        return [f"{_count(found)} {what}: {examples(found)}" for found, what in kinds if found]

    def notes(self) -> list[str]:
        """What changed and does no harm, a line each."""
        notes = []
        if self.added:
            notes.append(
                f"{_count(self.added)} added since the run began, not used: {examples(self.added)}"
            )
        if self.renamed:
            notes.append(
                f"{_count(self.renamed)} renamed since the run began, used as before: "
                f"{examples(self.renamed)}"
            )
        return notes


def _count(found: Sequence[str]) -> str:
    return f"{len(found)} clip" + ("s" if len(found) > 1 else "")


def examples(found: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(found[:_EXAMPLES]) + (", ..." if len(found) > _EXAMPLES else "")


def match(
    wanted: Clips,
    classes: Sequence[str],
    data: Data,
    *,
    also: Clips | None = None,
    parts: Sequence[str] | None = None,
    verify: bool = True,
) -> Match:
    """Find clips of a run in a set: by name, or else by their bytes.

    Args:
        wanted: the clips.
        classes: their classes.
        data: the set.
        also: clips that may be there too, and are not looked at.
        parts: those of the set that the run used; clips of others are not counted as added.
        verify: compare bytes of clips that have kept their name.
    """
    names = clip_names(data)
    told, was = _named(_told(data), data.classes), _named(wanted.labels, classes)
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    found = Match([-1] * len(wanted))
    free = np.ones(len(names), bool)
    for number, name in enumerate(wanted.names):
        here = places.get(name)
        if here:
            # a file may be listed twice, with other classes
            place = next((p for p in here if told[p] == was[number]), here[0])
            here.remove(place)
            found.places[number] = place
            free[place] = False
    for name in () if also is None else also.names:
        for place in places.get(name, ())[:1]:
            places[name].remove(place)
            free[place] = False
    kept = [number for number, place in enumerate(found.places) if place >= 0]
    lost = [number for number, place in enumerate(found.places) if place < 0]
    new = np.flatnonzero(free).tolist()
    if lost and new:
        by_mark: dict[str, list[int]] = {}
        for place, mark in zip(new, content_marks(data, new), strict=True):
            by_mark.setdefault(mark, []).append(place)
        for number in lost:
            same = by_mark.get(wanted.marks[number])
            if same and wanted.marks[number] != UNREADABLE:
                place = found.places[number] = same.pop(0)
                free[place] = False
                found.renamed.append(f"{wanted.names[number]!r} is {names[place]!r}")
    found.gone = [repr(wanted.names[n]) for n in lost if found.places[n] < 0]
    splits = data.splits
    found.added = [
        repr(names[place])
        for place in np.flatnonzero(free).tolist()
        if parts is None or splits is None or splits[place] in parts
    ]
    marks = content_marks(data, [found.places[n] for n in kept]) if verify else []
    for number, mark in zip(kept, marks, strict=False):
        if mark != wanted.marks[number] != UNREADABLE:
            found.changed.append(repr(wanted.names[number]))
    for number, place in enumerate(found.places):
        if place >= 0 and told[place] != was[number]:
            then, now = ("+".join(map(str, texts)) for texts in (was[number], told[place]))
            found.relabelled.append(f"{wanted.names[number]!r} was {then!r}, is {now!r}")
    return found


def take(data: Data, places: Sequence[int], clips: Clips, classes: Sequence[str]) -> Data:
    """The clips at some places in the order and with the classes that a run had.

    Raises:
        SplitError: shards have them in another order.
    """
    if isinstance(data, ShardSet) and list(places) != sorted(places):
        raise SplitError(
            "the shards hold the clips of the run in another order: put the shards back as they were, or "
            "begin another run"
        )
    some = data.select(places)
    if some.values is not None:
        return some
    return some.labelled(classes, [tuple(map(int, told)) for told in clips.labels])


__all__ = [
    "SPLIT",
    "Clips",
    "Match",
    "Split",
    "SplitError",
    "digest",
    "examples",
    "match",
    "read_head",
    "take",
]
