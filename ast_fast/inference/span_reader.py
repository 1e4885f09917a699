"""What workers read of clips: a few short files, a span of a long one, or a block of a shard."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from ..audio import AudioDecodeError, AudioError, AudioReport, source_name
from ..audio_spans import read_span
from ..config import AudioConfig
from ..data.dataset import Clip, Skip
from ..data.workers import AudioCrashError
from .sources import Unit, open_shards


@dataclasses.dataclass(frozen=True, slots=True)
class Opened(Skip):
    """What a worker says of a clip before its samples; travels as a `Skip` does.

    Attributes:
        name: as messages name it; of a clip in a shard, where it lies.
        total: samples of the whole clip.
        kind: class of the error, if it cannot be read.
        reason: why not.
    """

    name: str = ""
    total: int = 0
    kind: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Rest:
    """A later span of a long file."""

    number: int
    file: tuple[str, str | None]
    start: int
    count: int


class SpanReader:
    """What workers do: of each clip of a task, what it is (`Opened`) and its first samples (`Clip`).

    Args:
        audio: how to read.
        span: samples at most of one file.
    """

    def __init__(self, audio: AudioConfig, span: int) -> None:
        self._audio, self._span = audio, span

    def __call__(self, task: tuple[Unit | Rest, frozenset[int]]) -> Iterator[Clip | Skip]:
        """Two items for each clip, whatever happens, so that a place tells which clip it was."""
        payload, crashed = task
        lost = {place // 2 for place in crashed}
        if isinstance(payload, Rest):
            yield from self._file(
                payload.number, payload.file, payload.start, payload.count, bool(lost)
            )
        elif payload.shards:
            yield from self._block(payload, lost)
        else:
            for place, (number, file) in enumerate(
                zip(payload.numbers, payload.files, strict=True)
            ):
                yield from self._file(number, file, 0, self._span, place in lost)

    def _file(
        self, number: int, file: tuple[str, str | None], start: int, count: int, lost: bool
    ) -> Iterator[Clip | Skip]:
        path, root = file
        name = source_name(path)
        try:
            if lost:
                raise _crash(name)
            _check_inside(path, root, name)
            wave, total, report = read_span(path, start, count, self._audio)
        except AudioError as error:
            yield from _refused(number, error)
            return
        yield Opened(number, report, name, total)
        yield Clip(wave, (), number, AudioReport(clips=1))

    def _block(self, unit: Unit, lost: set[int]) -> Iterator[Clip | Skip]:
        shards = open_shards(unit.shards).read_as(self._audio)
        block = shards.blocks[unit.block]
        # one that was lost is not read: what stands for it is not asked for its content
        read = {place for number, place in enumerate(unit.places) if number not in lost}
        leave_out = set(range(block.count)) - read
        numbers = dict(zip(unit.places, unit.numbers, strict=True))
        items = shards.read_block(unit.block, leave_out, _left_out)
        for place, item in enumerate(items):
            if place not in numbers:
                continue
            number, name = numbers[place], shards.name(block.first + place)
            if place in leave_out:
                yield from _refused(number, _crash(name))
            elif isinstance(item, Skip):
                kind = next(iter(item.report.skipped), "AudioError")
                reason = item.report.notes[0] if item.report.notes else "cannot be read"
                yield Opened(number, item.report, name, 0, kind, reason)
                yield Skip(number, AudioReport())
            else:
                yield Opened(number, item.report, name, item.length)
                yield dataclasses.replace(item, labels=(), report=AudioReport(clips=1))


def _left_out(_: str, index: int) -> Skip:
    return Skip(index, AudioReport())


def _crash(name: str) -> AudioCrashError:
    return AudioCrashError(
        name, "ended the loader's process each time it was read; repair or drop it"
    )


def _refused(number: int, error: AudioError) -> Iterator[Skip]:
    report = AudioReport()
    report.skip(error)
    yield Opened(number, report, error.source, 0, type(error).__name__, error.reason)
    yield Skip(number, AudioReport())


def _check_inside(path: str, root: str | None, name: str) -> None:
    """Refuse a manifest's path that leaves its root by way of a link."""
    if root is None:
        return
    real = os.path.realpath(root).rstrip(os.sep) + os.sep
    if not os.path.realpath(path).startswith(real):
        raise AudioDecodeError(
            name, f"is a link that leaves the root {root!r}; copy the file into it"
        )


def error_of(opened: Opened, name: str) -> AudioError:
    """The error that a worker met."""
    kinds: list[type[AudioError]] = [AudioError]
    for kind in kinds:
        if kind.__name__ == opened.kind:
            return kind(name, opened.reason)
        kinds += kind.__subclasses__()
    return AudioError(name, opened.reason)
