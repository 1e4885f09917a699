"""Tar shards in webdataset's layout as a dataset: clips in big sequential reads, or any one of them.

The members of a clip share its key and follow one another: `<key>.flac` (or another suffix of
audio), or `<key>.s16`, raw 16-bit little-endian mono samples; `<key>.json` with `labels` and, for
raw samples, `sample_rate_hz`; or `<key>.cls` with a class number. Others' names are in
`shard_scan`. An index beside the shards says
where each clip begins and what it is; shards of other makers are scanned once for it.

A shard is read in blocks of a few megabytes. What is damaged costs the clips that it hits, each
counted with shard and key; their neighbours are read all the same.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ..audio import SUFFIXES, AudioError, AudioReport, from_samples, load
from ..config import AudioConfig
from .buffers import SAMPLES
from .dataset import Clip, Skip
from .shard_index import MAX_JSON_BYTES, ShardIndex
from .shard_scan import open_index
from .tar import Member, ShardError, members

Skipped = Callable[[str, int], Skip]
BLOCK_BYTES = 4 << 20  # read at a time: some 13 clips of 10 s raw, 20 of FLAC


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Clips that are read together."""

    shard: int
    begin: int  # bytes in the shard
    end: int
    first: int  # number of the first clip
    count: int


class ShardSet(Dataset[Any]):
    """The clips of a folder of shards (or of one shard), in the order they lie in.

    Args:
        path: folder with `*.tar`, or one tar file.
        audio: how to read clips; by default int16 where a clip holds nothing finer.
        classes: class names in order; by default the index's, or those found, sorted.
        aliases: further names of classes, with their indices.
        block_bytes: read at a time.
        strict: raise the AudioError of a bad clip rather than skip and count it.

    Raises:
        ManifestError: there are no shards, or the index does not fit them.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        audio: AudioConfig | None = None,
        *,
        classes: Sequence[str] | None = None,
        aliases: Mapping[str, int] | None = None,
        block_bytes: int = BLOCK_BYTES,
        strict: bool = False,
    ) -> None:
        self._block_bytes, self.strict = block_bytes, strict
        self.notes: tuple[str, ...] = ()  # what the reader has to say
        self._read_as(audio or AudioConfig(dtype="auto"))
        index = open_index(Path(path), classes, aliases)
        self.folder = index.folder
        self.places = np.arange(len(index.labels))  # of each clip among all
        self._take(index)

    def _read_as(self, audio: AudioConfig) -> None:
        if audio.sample_rate_hz is None:
            raise ValueError("audio.sample_rate_hz is None: expected one rate for the whole set")
        self.audio, self.sample_rate_hz = audio, audio.sample_rate_hz

    def _take(self, index: ShardIndex) -> None:
        self._index = index
        self.classes, self.labels = index.classes, index.labels
        self.values, self.splits, self.untold = index.values, index.splits, index.untold
        self.blocks = _blocks(index, self._block_bytes)
        # of each clip, for samplers and feeders
        self.block_of = np.repeat(
            np.arange(len(self.blocks)), [block.count for block in self.blocks]
        )

    def select(self, indices: Sequence[int]) -> ShardSet:
        """Some of the clips, in the order they lie in, with the same classes."""
        some = copy.copy(self)
        some._take(self._index.select(sorted(indices)))
        some.places = self.places[np.asarray(sorted(indices), np.int64)]
        return some

    def labelled(self, classes: Sequence[str], labels: Sequence[tuple[int, ...]]) -> ShardSet:
        """The same clips, their classes named and numbered otherwise."""
        same = copy.copy(self)
        same._take(dataclasses.replace(self._index, classes=tuple(classes), labels=list(labels)))
        return same

    def read_as(self, audio: AudioConfig) -> ShardSet:
        """The same clips, read as `audio` says."""
        same = copy.copy(self)
        same._read_as(audio)
        return same

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Clip | Skip:
        """One clip by itself; `read_block` is the quick way to many."""
        return next(self.read_clips([index]))

    def name(self, index: int) -> str:
        """Where the sound of a clip lies: path of the shard, then name in it (or byte, if damaged)."""
        name = self.place(index)[0]
        shard, _, inner = name.partition("/")
        path = self._index.folder / shard
        return f"{path}/{inner}" if inner else f"{path}, byte {self._bounds(index)[0]}"

    def place(self, index: int) -> tuple[str, Path, int, int]:
        """Shard and name of a clip's sound, the shard's path, and where in it the bytes of the sound are.

        Of a damaged clip the shard's name and byte, and all that the index gives it.
        """
        shard = self._index.shards[self._index.shard_of[index]]
        path = self._index.folder / shard
        begin, end = self._bounds(index)
        with contextlib.suppress(OSError, ShardError), path.open("rb", buffering=0) as file:

            def read_at(offset: int, count: int) -> bytes:
                return os.pread(file.fileno(), count, offset)

            for member in members(read_at, begin, end, repr(path.name)):
                if member.kind == "s16" or f".{member.kind}" in SUFFIXES:
                    return f"{shard}/{member.name}", path, member.start, member.size
        return f"{shard}, byte {begin}", path, begin, end - begin

    def _bounds(self, index: int) -> tuple[int, int]:
        """The bytes of a clip in its shard."""
        return int(self._index.begins[index]), int(self._index.ends[index])

    def read_block(
        self, number: int, leave_out: Collection[int] = (), skip: Skipped | None = None
    ) -> Iterator[Clip | Skip]:
        """The clips of a block, in order.

        Args:
            number: of the block.
            leave_out: places in it that are not read; `skip` is called with name and number then.
            skip: makes what stands for a clip left out.
        """
        return self._read(self.blocks[number], leave_out, skip)

    def read_clips(self, indices: Sequence[int]) -> Iterator[Clip | Skip]:
        """Clips from anywhere, in the order given; read in that in which they lie, a few megabytes at a time."""
        pieces = [self._alone(range(len(self))[index]) for index in indices]
        while pieces:
            count, size = 1, pieces[0].end - pieces[0].begin
            while count < len(pieces) and size < self._block_bytes:
                size += pieces[count].end - pieces[count].begin
                count += 1
            group, pieces = pieces[:count], pieces[count:]
            for block, found in zip(group, self._gather(group), strict=True):
                yield from self._clips(block, *found)

    def _alone(self, index: int) -> Block:
        begin, end = self._bounds(index)
        return Block(int(self._index.shard_of[index]), begin, end, index, 1)

    def _gather(self, blocks: Sequence[Block]) -> list[tuple[np.ndarray, str | None]]:
        """The bytes of each block, or why they cannot be read; a shard is opened once."""
        found: dict[int, tuple[np.ndarray, str | None]] = {}
        order = sorted(
            range(len(blocks)), key=lambda place: (blocks[place].shard, blocks[place].begin)
        )
        for shard, group in itertools.groupby(order, key=lambda place: blocks[place].shard):
            places = list(group)
            path = self._index.folder / self._index.shards[shard]
            try:
                bounds = [(blocks[place].begin, blocks[place].end) for place in places]
                contents = _read_ranges(path, bounds)
                found.update(zip(places, ((content, None) for content in contents), strict=True))
            except OSError as error:
                problem = f"cannot be read: {error}"
                found.update((place, (np.empty(0, np.uint8), problem)) for place in places)
        return [found[place] for place in range(len(blocks))]

    def _read(
        self, block: Block, leave_out: Collection[int] = (), skip: Skipped | None = None
    ) -> Iterator[Clip | Skip]:
        ((content, problem),) = self._gather([block])
        return self._clips(block, content, problem, leave_out, skip)

    def _clips(
        self,
        block: Block,
        content: np.ndarray,
        problem: str | None,
        leave_out: Collection[int] = (),
        skip: Skipped | None = None,
    ) -> Iterator[Clip | Skip]:
        name = self._index.shards[block.shard]
        for index in range(block.first, block.first + block.count):
            if skip is not None and index - block.first in leave_out:
                yield skip(f"{name!r}: clip {index}", index)
                continue
            try:
                if problem is not None:
                    raise ShardError(f"{name!r}: clip {index}", problem)
                yield self._clip(index, content, block, name)
            except AudioError as error:
                if self.strict:
                    raise
                report = AudioReport()
                report.skip(error)
                yield Skip(index, report)

    def _clip(self, index: int, content: np.ndarray, block: Block, shard: str) -> Clip:
        view = content.data

        def read_at(offset: int, count: int) -> bytes:
            offset -= block.begin
            return view[offset : offset + count].tobytes()

        sound: Member | None = None
        told: Any = {}
        begin, end = self._bounds(index)
        for member in members(read_at, begin, end, f"{shard!r}: clip {index}"):
            name = f"{shard!r}: {member.key!r}"
            if member.start + member.size > block.begin + len(content):
                missing = member.start + member.size - block.begin - len(content)
                raise ShardError(
                    name, f"is cut off: the shard ends {missing} bytes early; copy it again"
                )
            if member.kind == "json":
                told = _json(read_at(member.start, min(member.size, MAX_JSON_BYTES + 1)), name)
            elif member.kind == "s16" or f".{member.kind}" in SUFFIXES:
                if sound is not None:
                    raise ShardError(name, f"has two sounds, .{sound.kind} and .{member.kind}")
                sound = member
        if sound is None:
            raise ShardError(f"{shard!r}: clip {index}", "has no audio: expected .s16, .flac, ...")
        name = f"{shard!r}: {sound.key!r}"
        start = sound.start - block.begin
        if sound.kind == "s16":
            wave, report = self._raw(content[start : start + sound.size], told, name)
        else:
            clip = load(view[start : start + sound.size].tobytes(), self.audio, name)
            wave, report = clip.wave, clip.report
        return Clip(wave, self.labels[index], index, report)

    def _raw(self, content: np.ndarray, told: Any, name: str) -> tuple[Tensor, AudioReport]:
        rate_hz = told.get("sample_rate_hz")
        if not isinstance(rate_hz, int) or content.size % 2:
            raise ShardError(
                name,
                f"has {content.size} bytes of raw samples at {rate_hz!r} Hz: expected an even number "
                "and sample_rate_hz, a whole number, in its JSON",
            )
        clip = from_samples(content.view("<i2"), rate_hz, name, self.audio)
        return clip.wave, clip.report


def _read_ranges(path: Path, bounds: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Bytes of a regular file from begin to end, as many as there are, for each range."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name!r} is not a regular file")
        if len(bounds) > 1:  # a disk serves them in the order that suits it
            for begin, end in bounds:
                os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
        sizes = [max(0, min(end, status.st_size) - begin) for begin, end in bounds]
        return [
            _read_range(handle, begin, size) for (begin, _), size in zip(bounds, sizes, strict=True)
        ]
    finally:
        os.close(handle)


def _read_range(handle: int, begin: int, size: int) -> np.ndarray:
    content = SAMPLES.take(size)
    view, filled = content.data, 0
    while filled < size:
        count = os.preadv(handle, [view[filled:]], begin + filled)
        if not count:
            break
        filled += count
    return content[:filled]


def _json(raw: bytes, name: str) -> dict[str, Any]:
    try:
        told = json.loads(raw) if len(raw) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise ShardError(name, f"has JSON of {len(raw)} bytes that is no object with names")
    return told


def _blocks(index: ShardIndex, block_bytes: int) -> list[Block]:
    blocks: list[Block] = []
    first, count = 0, len(index.labels)
    while first < count:
        shard, begin = index.shard_of[first], index.begins[first]
        last = first + 1
        while last < count and index.shard_of[last] == shard:
            # a gap: clips that were not selected are not read
            if index.begins[last] != index.ends[last - 1] or index.ends[last] - begin > block_bytes:
                break
            last += 1
        blocks.append(Block(int(shard), int(begin), int(index.ends[last - 1]), first, last - first))
        first = last
    return blocks
