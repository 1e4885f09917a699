"""Windows of clips in order, read ahead by workers within a stated amount of memory.

Tasks go to the same pools that feed training: a few short files, a span of a long one, or a block of a
shard. A file's first span tells how long the file is; its other spans are then read by whoever is free,
and an hour of sound never lies in memory at once. What comes out is in the order of the clips, whoever
read what: for each clip a `Begin`, its `Window`s, and an `End`; or a `Failed`, at any point.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from ..audio import AudioError, AudioReport
from ..audio_memory import load_clip, memory_name, path_of
from ..config import AudioConfig
from ..data.dataset import Clip
from ..data.threads import InlineReader
from ..data.workers import ProcessWorkers, Result, StoredClip
from .sources import Unit
from .span_reader import Opened, Rest, SpanReader, error_of
from .windows import WindowPlan

MAX_BYTES = 256 << 20
MAX_RESTARTS = 100
SPAN_SECONDS = 60.0  # read at a time of a long file
_MAX_TASKS_AHEAD = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Begin:
    """A clip of which windows follow."""

    number: int
    name: str  # as messages name it
    path: str | None
    total: int  # samples
    starts: list[int]
    report: AudioReport


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """All windows of a clip have come."""

    number: int
    total: int  # samples; fewer than at the beginning where a file ended early
    report: AudioReport  # of what came after the first span


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """A clip cannot be read; windows that came of it are void."""

    number: int
    name: str
    path: str | None
    error: AudioError


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Samples of one window, usable until the next batch is asked for."""

    number: int
    clip: Clip | StoredClip
    lease: _Lease | None


Event = Begin | Window | End | Failed


@dataclasses.dataclass(slots=True, eq=False)
class _Lease:
    """A result whose memory windows use."""

    task: _Task
    windows: int = 0
    cut: bool = False  # no more windows will be


@dataclasses.dataclass(slots=True)
class _Parts:
    """How a clip of a unit is cut: its windows, how many lie in the first span, the other spans."""

    starts: list[int]
    first: int
    rests: list[_Task]


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    """What is given to a worker, and what has come of it."""

    payload: Unit | Rest
    starts: list[int] = dataclasses.field(default_factory=list)  # of the windows in a later span
    parts: list[_Parts] = dataclasses.field(default_factory=list)  # of the clips of a unit
    number: int = 0  # as the pool knows it; 0: not given out
    result: Result | None = None
    void: bool = False


class WindowReader:
    """Reads the windows of clips.

    Args:
        units: the clips.
        plan: how they are cut.
        audio: how they are read.
        num_workers: processes; 0 reads when a batch is asked for.
        max_bytes: samples read ahead, in all. What the next batch needs is read in any case.
        span_seconds: read at a time of a long file.

    Attributes:
        peak_bytes: most that the samples read ahead have held, once it is closed.
    """

    def __init__(
        self,
        units: Iterator[Unit],
        plan: WindowPlan,
        audio: AudioConfig,
        *,
        num_workers: int = 0,
        max_bytes: int = MAX_BYTES,
        span_seconds: float = SPAN_SECONDS,
    ) -> None:
        self._units, self._plan, self._audio = units, plan, audio
        self._num_workers, self._max_bytes = num_workers, max_bytes
        self._span = max(round(span_seconds * plan.rate_hz), plan.most or 0)
        self._pool: InlineReader | ProcessWorkers | None = None
        self._ahead: deque[_Task] = deque()  # units in order
        self._waiting: deque[_Task] = deque()  # not given out yet, the most urgent first
        self._flying: dict[int, _Task] = {}
        self._numbers = self._held = self._held_bytes = self._largest = 0
        self.peak_bytes = 0

    def batches(self, size: int) -> Generator[list[Event], None, None]:
        """Events in order, with `size` windows in each list; the last may have fewer."""
        events: list[Event] = []
        windows = 0
        try:
            for event in self._events():
                events.append(event)
                windows += isinstance(event, Window)
                if windows == size:
                    yield events
                    self._used(events)
                    events, windows = [], 0
            if events:
                yield events
                self._used(events)
        finally:
            self.close()

    def close(self) -> None:
        """End the workers."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self.peak_bytes = pool.peak_bytes
            pool.close()

    # ---- clips in order

    def _events(self) -> Iterator[Event]:
        while True:
            self._give_out()
            if not self._ahead:
                return
            task = self._ahead[0]
            unit = task.payload
            assert isinstance(unit, Unit)
            if unit.memory is not None:
                yield from self._from_memory(unit)
            else:
                self._await(task)
                yield from self._of_unit(task, unit)
            self._ahead.popleft()

    def _of_unit(self, task: _Task, unit: Unit) -> Iterator[Event]:
        items, lease = self._items(task), _Lease(task)
        for place, (number, parts) in enumerate(zip(unit.numbers, task.parts, strict=True)):
            opened, clip = items[2 * place], items[2 * place + 1]
            path = opened.name if unit.shards else unit.files[place][0]
            name = repr(path) if unit.shards else opened.name
            if opened.kind:
                yield Failed(number, name, path, error_of(opened, name))
                continue
            yield Begin(number, name, path, opened.total, parts.starts, opened.report)
            yield from self._cut(number, clip, 0, parts.starts[: parts.first], lease)
            yield from self._later(number, name, path, opened.total, parts.rests)
        self._close_lease(lease)

    def _later(
        self, number: int, name: str, path: str, total: int, rests: list[_Task]
    ) -> Iterator[Event]:
        """The windows in the later spans of a file, and its end."""
        report = AudioReport()
        for place, task in enumerate(rests):
            self._await(task)
            (opened, clip), lease = self._items(task), _Lease(task)
            if opened.kind:
                yield Failed(number, name, path, error_of(opened, name))
                self._close_lease(lease)
                self._forget(rests[place + 1 :])
                return
            assert isinstance(task.payload, Rest)
            yield from self._cut(number, clip, task.payload.start, task.starts, lease)
            self._close_lease(lease)
            report.merge(opened.report)
            total = min(total, opened.total)
        yield End(number, total, report)

    def _cut(
        self, number: int, clip: Clip | StoredClip, offset: int, starts: list[int], lease: _Lease
    ) -> Iterator[Window]:
        """Windows in a span that begins at sample `offset`; a file may have ended early."""
        for start in starts:
            begin = start - offset
            if start and begin >= clip.length:
                return
            lease.windows += 1
            part = _part(clip, begin, self._plan.end(begin, clip.length))
            yield Window(number, part, lease)

    def _from_memory(self, unit: Unit) -> Iterator[Event]:
        """A clip that no worker needs to read."""
        source, number = unit.memory, unit.numbers[0]
        name = memory_name(source)
        try:
            found = load_clip(source, self._audio, name)
        except AudioError as error:
            yield Failed(number, name, path_of(source), error)
            return
        wave, report = found.wave, found.report
        starts = self._plan.starts(len(wave))
        clip = Clip(wave, (), number, AudioReport())
        yield Begin(number, name, path_of(source), len(wave), starts, report)
        for start in starts:
            yield Window(number, _part(clip, start, self._plan.end(start, len(wave))), None)
        yield End(number, len(wave), AudioReport())

    # ---- tasks

    def _give_out(self) -> None:
        """Give tasks to workers while there is room, in memory and with them; find units as needed."""
        while True:
            while not self._waiting:
                unit = next(self._units, None)
                if unit is None:
                    return
                task = _Task(unit)
                self._ahead.append(task)
                if unit.memory is not None:
                    return  # what comes after it can wait until it is used
                self._waiting.append(task)
            if not self._fits() or not self._opened().has_room():
                return
            self._submit(self._waiting.popleft())

    def _fits(self) -> bool:
        # a task under way is reckoned at the largest seen
        expected = self._held_bytes + (len(self._flying) + 1) * self._largest
        return len(self._flying) + self._held < _MAX_TASKS_AHEAD and expected <= self._max_bytes

    def _opened(self) -> InlineReader | ProcessWorkers:
        if self._pool is None:
            read: Any = SpanReader(self._audio, self._span)
            if self._num_workers:
                self._pool = ProcessWorkers(read, self._num_workers, self._max_bytes, MAX_RESTARTS)
            else:
                self._pool = InlineReader(read)
        return self._pool

    def _submit(self, task: _Task) -> None:
        if task.void:
            return
        self._numbers += 1
        task.number = self._numbers
        self._flying[task.number] = task
        self._opened().submit(task.number, task.payload)

    def _await(self, task: _Task) -> None:
        """Have the result of a task, whatever memory it takes."""
        if not task.number:
            self._waiting.remove(task)
            self._submit(task)
        while task.result is None:
            for result in self._opened().wait():
                self._arrived(self._flying.pop(result.task), result)
            self._give_out()

    def _arrived(self, task: _Task, result: Result) -> None:
        task.result = result
        self._held += 1
        self._held_bytes += result.num_bytes
        self._largest = max(self._largest, result.num_bytes)
        unit = task.payload
        if isinstance(unit, Rest):
            return
        items: list[Any] = result.items
        for place, number in enumerate(unit.numbers):
            opened, clip = items[2 * place], items[2 * place + 1]
            task.parts.append(self._planned(number, opened, clip, unit, place))
        # before what comes after them
        later = [rest for parts in task.parts for rest in parts.rests]
        self._waiting.extendleft(reversed(later))

    def _planned(self, number: int, opened: Opened, clip: Any, unit: Unit, place: int) -> _Parts:
        """The windows of a clip, and the spans of a long file beyond the first."""
        if opened.kind:
            return _Parts([], 0, [])
        plan, total = self._plan, opened.total
        starts = plan.starts(total)
        if clip.length >= total:
            return _Parts(starts, len(starts), [])
        first = sum(plan.end(start, total) <= clip.length for start in starts)
        rests: list[_Task] = []
        begin = first
        while begin < len(starts):
            end = begin + 1
            while end < len(starts) and plan.end(starts[end], total) - starts[begin] <= self._span:
                end += 1
            count = plan.end(starts[end - 1], total) - starts[begin]
            rest = Rest(number, unit.files[place], starts[begin], count)
            rests.append(_Task(rest, starts[begin:end]))
            begin = end
        return _Parts(starts, first, rests)

    def _forget(self, tasks: list[_Task]) -> None:
        """Drop the spans of a file that has turned out bad."""
        for task in tasks:
            task.void = True
            if task.result is not None:
                self._release(task)
            elif task.number:
                self._opened().drop([task.number])
                del self._flying[task.number]

    # ---- memory

    @staticmethod
    def _items(task: _Task) -> list[Any]:
        assert task.result is not None
        return list(task.result.items)

    def _close_lease(self, lease: _Lease) -> None:
        lease.cut = True
        if not lease.windows:
            self._release(lease.task)

    def _used(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Window) and event.lease is not None:
                event.lease.windows -= 1
                if event.lease.cut and not event.lease.windows:
                    self._release(event.lease.task)

    def _release(self, task: _Task) -> None:
        assert task.result is not None
        self._held -= 1
        self._held_bytes -= task.result.num_bytes
        if self._pool is not None:
            self._pool.release(task.result)


def _part(clip: Clip | StoredClip, begin: int, end: int) -> Clip | StoredClip:
    """Samples of a clip as a clip."""
    if isinstance(clip, StoredClip):
        offset = clip.offset + begin * clip.dtype.itemsize
        return dataclasses.replace(clip, offset=offset, length=end - begin)
    return dataclasses.replace(clip, wave=clip.wave[begin:end])
