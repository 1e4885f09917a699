"""Tasks for workers, given out ahead of their use within an amount of memory, and used in order.

Both the feeder of training and the preparation of data read through here: which worker read what, and
how often it died, leaves no trace in what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from ..audio import AudioReport
from .dataset import Clip, ClipSet, MixPlan, Skip
from .shards import ShardSet
from .threads import InlineReader
from .workers import AudioCrashError, Items, ProcessWorkers, Result

_MAX_TASKS_AHEAD = 256


class Step(NamedTuple):
    """A batch: tasks to be given out for it, its clips, and tasks that no later batch needs."""

    new: list[tuple[int, Any]]  # number and payload
    refs: list[tuple[int, int]]  # number and place
    done: list[int]
    mix: MixPlan | None = None  # partners are the last clips


class Fetched(NamedTuple):
    """The clips of a batch, read."""

    items: Items
    mix: MixPlan | None = None


class Reading:
    """Tasks of one iteration: given out, in hand, used up."""

    def __init__(self, pool: InlineReader | ProcessWorkers, max_bytes: int) -> None:
        self._pool, self._max_bytes = pool, max_bytes
        self._held: dict[int, Result] = {}
        self._flying: set[int] = set()
        self._waiting: deque[tuple[int, Any]] = deque()
        self._held_bytes, self._largest = 0, 0

    def run(self, steps: Iterator[Step]) -> Generator[Fetched, None, None]:
        """The items of each step, in order; they may be used until the next is asked for."""
        ahead: deque[Step] = deque()
        while True:
            self._give_out(steps, ahead)
            if not ahead:
                return
            needed = {number for number, _ in ahead[0].refs}
            while self._waiting and self._waiting[0][0] in needed:
                self._submit()
            while not needed <= self._held.keys():
                self._take()
                self._give_out(steps, ahead)
            step = ahead.popleft()
            items = [self._held[number].items[place] for number, place in step.refs]
            yield Fetched(items, step.mix)
            for number in step.done:
                self._release(number)

    def abandon(self) -> None:
        """Give back what is held and forget what is under way."""
        self._pool.drop(self._flying)
        for number in list(self._held):
            self._release(number)

    def _give_out(self, steps: Iterator[Step], ahead: deque[Step]) -> None:
        """Submit tasks while memory and workers have room for them; look as far ahead as needed."""
        while True:
            while not self._waiting:
                step = next(steps, None)
                if step is None:
                    return
                ahead.append(step)
                self._waiting.extend(step.new)
            if not self._fits() or not self._pool.has_room():
                return
            self._submit()

    def _fits(self) -> bool:
        tasks = len(self._held) + len(self._flying)
        # a task under way is reckoned at the largest seen
        expected = self._held_bytes + (len(self._flying) + 1) * self._largest
        return tasks < _MAX_TASKS_AHEAD and expected <= self._max_bytes

    def _submit(self) -> None:
        number, payload = self._waiting.popleft()
        self._flying.add(number)
        self._pool.submit(number, payload)

    def _take(self) -> None:
        for result in self._pool.wait():
            self._flying.discard(result.task)
            self._held[result.task] = result
            self._held_bytes += result.num_bytes
            self._largest = max(self._largest, result.num_bytes)

    def _release(self, number: int) -> None:
        result = self._held.pop(number)
        self._held_bytes -= result.num_bytes
        self._pool.release(result)


class Reader:
    """What workers do: the items of a task, but for clips that have ended workers before.

    A task is the number of a block of shards, or a list of clips.
    """

    def __init__(self, dataset: ClipSet) -> None:
        self._dataset = dataset

    def __call__(self, task: tuple[Any, frozenset[int]]) -> Iterator[Clip | Skip]:
        """The clips of a task, and places in it that are left out."""
        payload, crashed = task
        if isinstance(payload, int):
            assert isinstance(self._dataset, ShardSet)
            yield from self._dataset.read_block(payload, crashed, _crash)
            return
        wanted = [index for place, index in enumerate(payload) if place not in crashed]
        items = (
            self._dataset.read_clips(wanted)
            if isinstance(self._dataset, ShardSet)
            else map(self._dataset.__getitem__, wanted)
        )
        for place, index in enumerate(payload):
            if place in crashed:
                yield _crash(clip_name(self._dataset, index), index)
            else:
                yield next(items)


def clip_name(dataset: ClipSet, index: int) -> str:
    """How messages name a clip."""
    name = getattr(dataset, "name", None)
    return f"clip {index}" if name is None else str(name(index))


def _crash(name: str, index: int) -> Skip:
    report = AudioReport()
    report.skip(
        AudioCrashError(name, "ended the loader's process each time it was read; repair or drop it")
    )
    return Skip(index, report)
