"""Batches to a CUDA device: pinned buffers, an asynchronous copy, and the transform on a side stream.

A thread makes batches ready while the consumer's step runs. It holds `prefetch` of them; a pinned
buffer is written again only after its copy has ended, and the device's memory only after the
consumer's stream has passed it (`record_stream`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sample_rows import Allocate
from .dataset import Batch
from .reading import Fetched

Source = Callable[[], Generator[Fetched, None, None]]
Make = Callable[[Fetched, Allocate], Batch]
_POLL_S = 0.1


class Fed(NamedTuple):
    """A batch on its device, and what the transform made of it (None without one)."""

    batch: Batch
    features: Any


def on_side_stream(
    items: Source,
    make: Make,
    device: torch.device,
    transform: Callable[[Batch], Any] | None,
    prefetch: int,
) -> Generator[Fed, None, None]:
    """Batches on the device with what the transform made of them, in order.

    Args:
        items: starts an iteration over the items of each batch; called in the thread.
        make: makes batches of them, in memory it is given.
        device: a CUDA device.
        transform: runs on the side stream.
        prefetch: batches held ready.
    """
    side = torch.cuda.Stream(device)
    pump = _Pump(items, make, device, transform, prefetch, side)
    try:
        while (made := pump.next()) is not None:
            fed, ready = made
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in _tensors(fed):
                tensor.record_stream(current)
            yield fed
    finally:
        pump.close()


def _tensors(value: Any) -> Iterator[Tensor]:
    """CUDA tensors anywhere in a value."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


class PinnedRing:
    """Page-locked buffers, each written again only after the copy out of it has ended."""

    def __init__(self, count: int) -> None:
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * count
        self._events: list[Any] = [None] * count
        self._next = 0

    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] view of the oldest buffer, grown if it is too small."""
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        size = rows * columns * dtype.itemsize
        if self._buffers[self._next].numel() < size:
            self._buffers[self._next] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._next][:size].view(dtype).view(rows, columns)

    def copied(self, event: Any) -> None:
        """The buffer given last is free once this event has passed."""
        self._events[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)


class _Pump:
    """The thread, and the queue between it and the consumer."""

    def __init__(
        self,
        items: Source,
        make: Make,
        device: torch.device,
        transform: Callable[[Batch], Any] | None,
        prefetch: int,
        side: torch.cuda.Stream,
    ) -> None:
        self._items, self._make, self._transform = items, make, transform
        self._device, self._side = device, side
        self._ring = PinnedRing(prefetch + 1)
        self._queue: queue.Queue[Any] = queue.Queue(prefetch)
        self._closed = threading.Event()
        # a backend chosen around the iteration holds in the thread too
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name="ast_fast-feeder", daemon=True
        )
        self._thread.start()

    def next(self) -> Any:
        """A batch and the event that says it is ready; None at the end; raises what was raised."""
        kind, value = self._queue.get()
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """End the thread; what it had made is dropped."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(_POLL_S)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put((kind, value), timeout=_POLL_S)
                return True
        return False

    def _run(self) -> None:
        source = self._items()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._side):
                for fetched in source:
                    if not self._put("batch", self._made(fetched)):
                        return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)
        finally:
            source.close()

    def _made(self, fetched: Fetched) -> tuple[Fed, torch.cuda.Event]:
        host = self._make(fetched, self._ring.allocate)
        batch = host.to(self._device)
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._side)
        self._ring.copied(copied)
        features = self._transform(batch) if self._transform is not None else None
        ready = torch.cuda.Event()
        ready.record(self._side)
        return Fed(batch, features), ready
