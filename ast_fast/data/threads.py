"""Reading without processes: in threads, or in the caller's own when a result is waited for."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Iterable
from typing import Any

from .dataset import Clip
from .workers import Read, Result


def _finished(read: Read, number: int, payload: Any) -> Result:
    items = list(read((payload, frozenset())))
    size = sum(item.wave.nbytes for item in items if isinstance(item, Clip))
    return Result(number, [*items], size)


class InlineReader:
    """Reads a task when its result is asked for."""

    restarts = 0
    process_ids: tuple[int, ...] = ()

    def __init__(self, read: Read) -> None:
        self._read = read
        self._tasks: deque[tuple[int, Any]] = deque()
        self._held_bytes = self.peak_bytes = 0

    def has_room(self) -> bool:
        """Reading ahead would gain nothing."""
        return False

    def submit(self, number: int, payload: Any) -> None:
        """Remember a task."""
        self._tasks.append((number, payload))

    def wait(self) -> list[Result]:
        """Read the oldest task."""
        return self._handed_out([_finished(self._read, *self._tasks.popleft())])

    def _handed_out(self, results: list[Result]) -> list[Result]:
        self._held_bytes += sum(result.num_bytes for result in results)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return results

    def release(self, result: Result) -> None:
        """The clips are freed with the result."""
        self._held_bytes -= result.num_bytes
        result.items.clear()

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget tasks."""
        gone = set(numbers)
        self._tasks = deque(task for task in self._tasks if task[0] not in gone)

    def close(self) -> None:
        """Forget all tasks."""
        self._tasks.clear()


class ThreadWorkers(InlineReader):
    """Reads tasks in threads: libsndfile decodes beside Python, and nothing is copied between."""

    def __init__(self, read: Read, count: int) -> None:
        super().__init__(read)
        self._count = count
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "ast_fast-loader")
        self._futures: dict[concurrent.futures.Future[Result], int] = {}

    def has_room(self) -> bool:
        """Whether a task given now would be taken up soon."""
        return sum(not future.done() for future in self._futures) < 2 * self._count

    def submit(self, number: int, payload: Any) -> None:
        """Give a task to the threads."""
        future = self._pool.submit(_finished, self._read, number, payload)
        self._futures[future] = number

    def wait(self) -> list[Result]:
        """Results that have come in; blocks until there is one, and raises what a task raised."""
        done, _ = concurrent.futures.wait(
            self._futures, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
            del self._futures[future]
        return self._handed_out([future.result() for future in done])

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget tasks: those that run end unseen."""
        gone = set(numbers)
        for future in [future for future, number in self._futures.items() if number in gone]:
            future.cancel()
            del self._futures[future]

    def close(self) -> None:
        """End the threads when their tasks have ended."""
        self.drop(list(self._futures.values()))
        self._pool.shutdown(wait=True, cancel_futures=True)
