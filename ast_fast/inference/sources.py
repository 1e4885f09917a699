"""What is to be run: files, folders, lists, manifests, shards and clips in memory, as units of work.

A unit is what one task reads: a few files, or a block of a shard. Clips are numbered in the order of
the sources, so that a number means the same clip in every process and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..audio_memory import EXPECTED, AnyClip, described, is_clip
from ..data.manifest import MAX_FIELD_CHARS, ManifestError
from ..data.manifest_files import read_manifest
from ..data.shard_index import is_shards
from ..data.shards import ShardSet
from ..data.tree import Walk

_log = logging.getLogger("ast_fast.inference")

FILES_A_UNIT = 4  # files that one task reads, so that a task is worth its message
_MANIFESTS = (".csv", ".jsonl", ".json")

AnySource = AnyClip  # or what stands for several: a folder, list, manifest or shard


class OneFile(os.PathLike[str]):
    """A path that stands for a file and never for a list of others, whatever its suffix."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    def __fspath__(self) -> str:
        return self._path


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """Clips that are read together.

    Attributes:
        numbers: of the clips.
        files: path of each, and the folder it must lie in (None: anywhere).
        shards: the folder of shards, or the shard; empty for files.
        block: number of the block in it.
        places: of the clips in the block.
        memory: a clip that is in memory already.
    """

    numbers: tuple[int, ...]
    files: tuple[tuple[str, str | None], ...] = ()
    shards: str = ""
    block: int = 0
    places: tuple[int, ...] = ()
    memory: Any = None

    def without(self, done: Collection[int]) -> Unit | None:
        """The same without some clips; None if nothing is left."""
        kept = [place for place, number in enumerate(self.numbers) if number not in done]
        if len(kept) == len(self.numbers):
            return self
        if not kept:
            return None
        return dataclasses.replace(
            self,
            numbers=tuple(self.numbers[place] for place in kept),
            files=tuple(self.files[place] for place in kept if self.files),
            places=tuple(self.places[place] for place in kept if self.places),
        )


@functools.lru_cache(maxsize=64)
def open_shards(path: str) -> ShardSet:
    """Shards, opened once a process; forked workers find those that were opened before them."""
    return ShardSet(path)


def units_of(
    sources: Iterable[AnySource], root: str | os.PathLike[str] | None = None
) -> Iterator[Unit]:
    """The units of sources in order, found as they are asked for.

    A folder stands for its shards and for all audio files in it, a .csv, .jsonl or .json file for
    the clips of a manifest (labels are not needed), a .txt file for the paths on its lines, a .tar
    file for its clips; any other path is a file, whether it can be read or not.

    Args:
        sources: paths, and clips in memory: see `audio_memory.load_clip`.
        root: folder that the paths of manifests and lists start from; theirs by default.

    Raises:
        ManifestError: a manifest, list or shard index cannot be used.
        FileNotFoundError: a manifest, list or shard is not there.
        TypeError: a source is no clip, and nothing that holds some.
    """
    files: list[tuple[str, str | None]] = []
    count = 0

    def gathered() -> Unit:
        nonlocal count
        unit = Unit(tuple(range(count, count + len(files))), tuple(files))
        count += len(files)
        files.clear()
        return unit

    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            if not is_clip(source):
                raise TypeError(
                    f"source {count + len(files)} is {described(source)}: expected {EXPECTED}"
                )
            if files:
                yield gathered()
            yield Unit((count,), memory=source)
            count += 1
            continue
        one = isinstance(source, OneFile)
        for found in [(os.fspath(source), None)] if one else _pieces(Path(source), root):
            if not isinstance(found, ShardSet):
                files.append(found)
                if len(files) == FILES_A_UNIT:
                    yield gathered()
                continue
            if files:
                yield gathered()
            name = os.fspath(source)
            for number, block in enumerate(found.blocks):
                numbers = tuple(range(count, count + block.count))
                count += block.count
                yield Unit(numbers, shards=name, block=number, places=tuple(range(block.count)))
    if files:
        yield gathered()


def _pieces(
    path: Path, root: str | os.PathLike[str] | None
) -> Iterator[ShardSet | tuple[str, str | None]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        if is_shards(path):
            yield open_shards(os.fspath(path))
        walk = Walk(path, () if root is None else (root,))
        # counted where the user looks: what is not run is not in the results
        found = walk.sounds(path)
        for note in walk.tree.notes():
            _log.warning("%s: %s", path, note)
        start = os.fspath(path)
        yield from ((os.path.join(start, file), None) for file in found)  # noqa: PTH118
    elif suffix == ".tar":
        yield open_shards(os.fspath(path))
    elif suffix in _MANIFESTS:
        manifest = read_manifest(path, root=root, check_files=False, need_labels=False)
        for note in manifest.notes:
            _log.warning("%s: %s", path, note)
        inside = os.fspath(manifest.root)
        yield from ((os.path.join(inside, name), inside) for name in manifest.paths)  # noqa: PTH118
    elif suffix == ".txt":
        yield from ((line, None) for line in _lines(path, Path(root) if root else path.parent))
    else:
        yield os.fspath(path), None


def _lines(path: Path, root: Path) -> Iterator[str]:
    """Paths of a plain list, one a line; a list is the user's own, so they may lie anywhere."""
    found, start = 0, os.fspath(root)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, start=1):
            name = text.rstrip("\r\n")
            if not name.strip():
                continue
            if "\0" in name or len(name) > MAX_FIELD_CHARS:
                raise ManifestError(
                    f"{path}, line {line}: holds NUL or more than {MAX_FIELD_CHARS} characters: "
                    "expected the path of an audio file on each line"
                )
            found += 1
            yield os.path.join(start, name)  # noqa: PTH118 - a million Path objects are slow
    if not found:
        raise ManifestError(f"{path}: holds no paths: expected one on each line")


def digest_of(units: Iterable[Unit]) -> str:
    """What a list of units is known by: other clips, or another order, give another text."""
    found = hashlib.sha256()
    for unit in units:
        if unit.files:
            for path, root in unit.files:
                found.update(f"{path}\0{root}\0".encode("utf-8", "surrogateescape"))
        else:
            shards = open_shards(unit.shards)
            block = shards.blocks[unit.block]
            text = f"{unit.shards}\0{block}\0{unit.places}\0"
            found.update(text.encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:32]
