"""Loader workers that may die: processes that read clips, are watched, replaced, and asked again.

PyTorch's DataLoader ends with its first dead worker. Here each unit of work is given out by the
main process and counts when its whole result has come back; what a dead worker had not delivered
is read again by its successor, so that nothing is lost and nothing comes twice.

Samples travel through anonymous memory files (memfd) that the main process owns and lends with each
task. They have no name, so nothing stays behind in /dev/shm, and they do not count against its size.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import os
import pickle
import signal
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing import connection, get_context, reduction
from typing import Any

import torch
from torch import Tensor

from ..audio import AudioError, AudioReport
from .dataset import Clip, Skip, Waveform, copy_wave

Read = Callable[[Any], Iterable[Clip | Skip]]
Items = list[Waveform | Skip]

_BLAME = 3  # times that one clip may take its worker down before it is skipped
_TASKS_AHEAD = 2  # tasks a worker holds: one in work, one waiting
_PARENT_CHECK_S = 5.0
_DTYPES = (torch.float32, torch.int16, torch.uint8)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
# what a worker is at, so that its death tells on which clip: task's number (-1: none) and place in it
_PROGRESS = struct.Struct("qq")
_PLAIN = AudioReport(clips=1)  # of most clips: not sent


class LoaderError(RuntimeError):
    """Reading cannot go on: workers keep dying."""


class AudioCrashError(AudioError):
    """Decoding a clip ends the process every time."""


@dataclasses.dataclass(slots=True)
class Result:
    """What a task gave."""

    task: int
    items: Items
    num_bytes: int
    slot: Slot | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """A memory file, lent with a task and free again when its clips are used."""

    number: int
    handle: int
    num_bytes: int = 0  # that its pages take
    used: int | None = None  # of those, what is wanted still; None while a worker writes


@dataclasses.dataclass(slots=True)
class StoredClip:
    """A clip whose samples lie in a memory file."""

    labels: tuple[int, ...]
    index: int
    report: AudioReport
    length: int
    dtype: torch.dtype
    handle: int
    offset: int
    facts: Any = None

    def copy_to(self, row: Tensor) -> None:
        """Put the samples into `row` [N], in its dtype; int16 becomes float32 by 1/32768."""
        if row.dtype == self.dtype:
            _read_into(self.handle, self.offset, row)
        else:
            wave = torch.empty(self.length, dtype=self.dtype)
            _read_into(self.handle, self.offset, wave)
            copy_wave(wave, row)


def _read_into(handle: int, offset: int, wave: Tensor) -> None:
    view = wave.numpy().data.cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            raise LoaderError(f"a worker's memory ends {len(view) - done} bytes early")
        done += count


def _write_from(handle: int, offset: int, wave: Tensor) -> int:
    view = wave.contiguous().numpy().data.cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
    return done


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    number: int
    payload: Any
    slot: Slot
    crashed: set[int] = dataclasses.field(default_factory=set)  # places of clips to skip
    deaths: dict[int, int] = dataclasses.field(default_factory=dict)  # by place


@dataclasses.dataclass(slots=True, eq=False)
class _Worker:
    process: Any
    pipe: connection.Connection
    progress: mmap.mmap
    tasks: deque[_Task]
    slots: set[int]  # numbers of the memory files it has been sent


class ProcessWorkers:
    """Forked processes that read tasks.

    Args:
        read: gives the items of a task; runs in the workers.
        count: processes.
        max_bytes: of memory files that are kept for later tasks.
        max_restarts: dead workers replaced before giving up.

    Attributes:
        restarts: workers replaced.
        peak_bytes: most that memory files have held.
    """

    def __init__(self, read: Read, count: int, max_bytes: int, max_restarts: int) -> None:
        self._read, self._max_bytes, self._max_restarts = read, max_bytes, max_restarts
        self.restarts, self.peak_bytes = 0, 0
        self._context = get_context("fork")
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._dropped: set[int] = set()
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    # ---- what the feeder calls

    def has_room(self) -> bool:
        """Whether a task given now would be taken up soon."""
        return any(len(worker.tasks) < _TASKS_AHEAD for worker in self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers alive now."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, number: int, payload: Any) -> None:
        """Give a task to the least busy worker."""
        slot = self._free.pop() if self._free else self._new_slot()
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        self._give(worker, _Task(number, payload, slot))

    def wait(self) -> list[Result]:
        """Results that have come in; blocks until there is one.

        Raises:
            LoaderError: workers died more often than allowed.
            Exception: what a task raised, other than for a bad file.
        """
        results: list[Result] = []
        while not results:
            by_pipe = {worker.pipe: worker for worker in self._workers}
            for pipe in connection.wait(list(by_pipe)):
                worker = by_pipe[pipe]  # type: ignore[index]
                while (reply := self._receive(worker)) is not None:
                    results += self._result(worker, *reply)
        return results

    def release(self, result: Result) -> None:
        """The clips of a result are used; its memory serves the next task, or is given back."""
        if result.slot is not None:
            self._recycle(result.slot)
            result.slot = None

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget tasks that are not finished: their results are thrown away when they come."""
        self._dropped.update(numbers)

    def close(self) -> None:
        """End the processes and give all memory back; may be called twice."""
        if os.getpid() != self._owner:  # a copy in a forked child: not its to end
            return
        for worker in self._workers:
            worker.process.kill()  # they hold nothing that would need saving
        for worker in self._workers:
            worker.process.join()
            self._forget(worker)
        self._workers = []
        for slot in self._slots:
            os.close(slot.handle)
        self._slots, self._free = [], []

    # ---- processes

    def _start(self) -> _Worker:
        mine, theirs = self._context.Pipe()
        progress = mmap.mmap(-1, _PROGRESS.size)
        inherited = [worker.pipe for worker in self._workers] + [mine]
        process = self._context.Process(
            target=_work,
            args=(self._read, theirs, progress, inherited, self._owner),
            name="ast_fast-loader",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process, mine, progress, deque(), set())

    @staticmethod
    def _forget(worker: _Worker) -> None:
        worker.pipe.close()
        worker.progress.close()
        worker.process.close()

    def _receive(self, worker: _Worker) -> tuple[int, bytes] | None:
        """The next reply of a worker, if there is one; a dead worker is replaced."""
        try:
            return worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError, pickle.UnpicklingError):
            self._replace(worker)
            return None

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()  # it may have closed its pipe and yet live
        worker.process.join()
        code = worker.process.exitcode
        reason = f"signal {-code}" if code and code < 0 else f"exit {code}"
        self.restarts += 1
        tasks = list(worker.tasks)
        if tasks:
            self._blame(worker, tasks[0])
        if self.restarts > self._max_restarts:
            raise LoaderError(
                f"loader workers died {self.restarts} times (the last: {reason}), more than "
                f"max_restarts={self._max_restarts}: look for too little memory or a broken decoder"
            )
        place = self._workers.index(worker)
        self._forget(worker)
        del self._workers[place]
        self._workers.insert(place, self._start())
        for task in tasks:
            self._give(self._workers[place], task)

    @staticmethod
    def _blame(worker: _Worker, task: _Task) -> None:
        """Count the death against the clip that was being read."""
        number, place = _PROGRESS.unpack(worker.progress[:])
        if number == task.number and place >= 0:
            task.deaths[place] = task.deaths.get(place, 0) + 1
            if task.deaths[place] >= _BLAME:
                task.crashed.add(place)

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.tasks.append(task)
        task.slot.used = None
        fresh = task.slot.number not in worker.slots
        worker.slots.add(task.slot.number)
        # a worker that is dead already is noticed, and replaced, when its pipe is read
        with contextlib.suppress(OSError):
            worker.pipe.send((task.number, task.payload, task.crashed, task.slot.number, fresh))
            if fresh:
                reduction.send_handle(worker.pipe, task.slot.handle, worker.process.pid)

    def _result(self, worker: _Worker, number: int, reply: bytes) -> list[Result]:
        task = worker.tasks.popleft()
        assert task.number == number, "workers answer in order"
        entries, used, error = pickle.loads(reply)
        task.slot.num_bytes, task.slot.used = max(task.slot.num_bytes, used), used
        self._trim()
        self.peak_bytes = max(self.peak_bytes, self._stored_bytes())
        if number in self._dropped:
            self._dropped.discard(number)
            self._recycle(task.slot)
            return []
        if error is not None:
            self._recycle(task.slot)
            raise error
        items = [_unpacked(entry, task.slot.handle) for entry in entries]
        return [Result(number, items, used, task.slot)]

    # ---- memory

    def _new_slot(self) -> Slot:
        slot = Slot(len(self._slots), os.memfd_create("ast_fast-clips", os.MFD_CLOEXEC))
        self._slots.append(slot)
        return slot

    def _stored_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self._slots)

    def _recycle(self, slot: Slot) -> None:
        slot.used = 0
        self._free.append(slot)
        self._trim()

    def _trim(self) -> None:
        """Give pages back that nobody wants: a file keeps those of the largest task it ever served."""
        excess = self._stored_bytes() - self._max_bytes
        # the free file given back last is the next to be used; those that hold clips keep these
        held = (slot for slot in self._slots if slot.used)
        for slot in itertools.chain(self._free, held):
            if excess <= 0:
                return
            kept = slot.used or 0
            if kept < slot.num_bytes:
                os.ftruncate(slot.handle, kept)
                excess -= slot.num_bytes - kept
                slot.num_bytes = kept


def _unpacked(entry: Any, handle: int) -> Waveform | Skip:
    if isinstance(entry, Skip):
        return entry
    labels, index, report, length, code, offset, facts = entry
    report = AudioReport(clips=1) if report is None else report
    return StoredClip(labels, index, report, length, _DTYPES[code], handle, offset, facts)


# ---- in the worker


def _work(
    read: Read,
    pipe: connection.Connection,
    progress: mmap.mmap,
    inherited: list[connection.Connection],
    parent: int,
) -> None:
    # OpenMP in a forked process hangs with more than one thread
    torch.set_num_threads(1)
    # Ctrl-C is the main process's to handle; its handlers are not for its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:  # else a worker would not see the main process go
        other.close()
    _keep_memory()
    handles: dict[int, int] = {}
    while _next_task(pipe, parent):
        try:
            number, payload, crashed, slot, fresh = pipe.recv()
            if fresh:
                handles[slot] = reduction.recv_handle(pipe)
        except (EOFError, OSError):
            return
        reply = _perform(read, number, payload, crashed, handles[slot], progress)
        _PROGRESS.pack_into(progress, 0, -1, -1)
        try:
            pipe.send((number, reply))
        except OSError:
            return


def _keep_memory() -> None:
    """Have malloc keep freed blocks: fresh pages for each clip cost more than copying it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 28)


def _next_task(pipe: connection.Connection, parent: int) -> bool:
    """Wait for a message; False when the main process is gone."""
    while not pipe.poll(_PARENT_CHECK_S):
        if os.getppid() != parent:
            return False
    return True


def _perform(
    read: Read, number: int, payload: Any, crashed: set[int], handle: int, progress: mmap.mmap
) -> bytes:
    entries: list[Any] = []
    used, place = 0, 0
    try:
        items = iter(read((payload, crashed)))
        while True:
            _PROGRESS.pack_into(progress, 0, number, place)
            item = next(items, None)
            if item is None:
                break
            if isinstance(item, Skip):
                entries.append(item)
            else:
                plain = item.report == _PLAIN
                code = _DTYPES.index(item.dtype)
                entries.append(
                    (
                        item.labels,
                        item.index,
                        None if plain else item.report,
                        item.length,
                        code,
                        used,
                        item.facts,
                    )
                )
                used += _write_from(handle, used, item.wave)
            place += 1
        return pickle.dumps((entries, used, None))
    except Exception as error:  # the main process raises it
        error.add_note(f"in a loader worker:\n{traceback.format_exc()}")
        try:
            return pickle.dumps(([], used, error))
        except (pickle.PicklingError, TypeError, AttributeError):
            return pickle.dumps(([], used, RuntimeError(traceback.format_exc())))
