"""Batches read ahead by workers, within a stated amount of memory, in an order that is always the same.

Reading is cut into tasks: the files of one batch, or one block of a shard. The main process gives
tasks out in the order in which batches need them, as far ahead as the memory allows, and makes each
batch when its clips are there. Which worker read what, and how often it died, leaves no trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from ..sample_rows import Allocate
from .buffers import SAMPLES
from .dataset import Batch, ClipSet, Collate, MixPlan, check_one_label
from .mixing import WholeSetMixup
from .reading import Fetched, Reader, Reading, Step
from .sampler import BatchSampler
from .shard_sampler import ShardSampler
from .shards import ShardSet
from .threads import InlineReader, ThreadWorkers
from .transfer import Fed, on_side_stream
from .workers import ProcessWorkers

MAX_BYTES = 256 << 20
_PLANNED_STEPS = 64

Transform = Callable[[Batch], Any]


@dataclasses.dataclass(slots=True)
class FeedStats:
    """What feeding cost since the feeder was made.

    Attributes:
        batches: given out.
        clips: in them.
        wait_s: seconds in which the consumer waited for data; transforms on the CPU not counted.
        total_s: seconds between the first batch asked for and the last given, epoch by epoch.
        workers_restarted: dead workers replaced.
        peak_bytes: most that the samples of clips read ahead have held.
    """

    batches: int = 0
    clips: int = 0
    wait_s: float = 0.0
    total_s: float = 0.0
    workers_restarted: int = 0
    peak_bytes: int = 0

    @property
    def wait_share(self) -> float:
        """Part of the time that went into waiting."""
        return self.wait_s / self.total_s if self.total_s else 0.0

    def summary(self) -> str:
        """One line."""
        text = f"waited {self.wait_s:.1f} s for data ({100 * self.wait_share:.1f} %)"
        if self.workers_restarted:
            text += f", {self.workers_restarted} loader workers died and were replaced"
        return text


class Feeder:
    """Iterates over the rest of the sampler's epoch, one epoch after another with the same workers.

    The sampler is only read: call its `step` for each batch used. Close the feeder when done, or use
    it as a context manager.

    Args:
        dataset: files, waveforms or shards.
        sampler: batches; a `ShardSampler` makes shards be read block by block.
        multi_label: shape of the targets, see `Collate`.
        regression: the dataset's `values` are the targets, [B, K] float32.
        mixup: read partners from the whole set too, for `Batch.mix`; a step's number is that of its
            batch since the sampler's first epoch. From shards they are read one by one.
        device: where batches go; on CUDA they are copied and transformed on a stream of their own,
            beside the consumer's work.
        transform: makes features of a batch on its device, such as log-mel and augmentation.
        most_samples: clips longer than this are counted as cut, see `max_samples`.
        num_workers: processes (or threads) that read; 0 reads when a batch is asked for.
        workers: "processes" survive what a decoder may do; "threads" are for decoders that let
            other threads run.
        max_bytes: samples read ahead, in all. What the next batch needs is read in any case.
        max_restarts: workers replaced before a LoaderError ends the iteration.
        prefetch: batches made ready on a CUDA device ahead of the consumer.

    Attributes:
        stats: what feeding cost.
    """

    def __init__(
        self,
        dataset: ClipSet,
        sampler: BatchSampler,
        *,
        multi_label: bool = False,
        regression: bool = False,
        mixup: WholeSetMixup | None = None,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
        most_samples: int | None = None,
        num_workers: int = 0,
        workers: Literal["processes", "threads"] = "processes",
        max_bytes: int = MAX_BYTES,
        max_restarts: int = 100,
        prefetch: int = 2,
    ) -> None:
        if num_workers < 0 or max_bytes < 1 or prefetch < 1 or max_restarts < 0:
            raise ValueError(
                f"num_workers={num_workers}, max_bytes={max_bytes}, max_restarts={max_restarts}, "
                f"prefetch={prefetch}: expected 0, 1, 0 and 1 or more"
            )
        if workers not in ("processes", "threads"):
            raise ValueError(f"workers={workers!r}: expected processes or threads")
        self.dataset, self.sampler = dataset, sampler
        self.device, self.transform = torch.device(device), transform
        self.stats = FeedStats()
        values = getattr(dataset, "values", None) if regression else None
        if regression and values is None:
            raise ValueError("regression=True: the dataset holds no values to predict, but labels")
        if not multi_label and not regression:
            check_one_label(dataset)
        if mixup is not None and mixup.num_clips != len(dataset):
            raise ValueError(
                f"mixup draws from {mixup.num_clips} clips: expected the dataset's {len(dataset)}"
            )
        self._collate = Collate(len(dataset.classes), multi_label, most_samples, values)
        self._mixup = mixup
        self._blocks = isinstance(sampler, ShardSampler) and isinstance(dataset, ShardSet)
        self._read = Reader(dataset)
        self._num_workers, self._kind = num_workers, workers
        self._max_bytes, self._max_restarts, self._prefetch = max_bytes, max_restarts, prefetch
        self._pool: InlineReader | ProcessWorkers | None = None
        self._finalizer: Any = None
        self._restarts = 0
        self._numbers = 0  # tasks numbered so far
        # weak: the iteration holds the feeder, which must go when both are dropped
        self._running: weakref.ref[Generator[Fed, None, None]] | None = None

    def __len__(self) -> int:
        """Batches left in the sampler's epoch."""
        return len(self.sampler) - self.sampler.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Fed]:
        self._stop()
        running = self._epoch()
        self._running = weakref.ref(running)
        return running

    def close(self) -> None:
        """End the workers and free what was read ahead; iterating again starts anew."""
        self._stop()
        if self._pool is not None:
            self._count()
            self._restarts += self._pool.restarts
            self._finalizer.detach()
            self._pool.close()
            self._pool = None

    @property
    def worker_ids(self) -> list[int]:
        """Process ids of the workers alive now."""
        return list(self._pool.process_ids) if self._pool is not None else []

    def _stop(self) -> None:
        """End an iteration that its consumer left."""
        running = self._running() if self._running is not None else None
        self._running = None
        if running is not None:
            running.close()

    def _count(self) -> None:
        if self._pool is not None:
            self.stats.workers_restarted = self._restarts + self._pool.restarts
            self.stats.peak_bytes = max(self.stats.peak_bytes, self._pool.peak_bytes)

    def _epoch(self) -> Generator[Fed, None, None]:
        """Batches with the time that the consumer waited for each."""
        batches: Generator[Fed, None, None]
        if self.device.type == "cuda":
            batches = on_side_stream(
                self._items, self._batch, self.device, self.transform, self._prefetch
            )
        else:
            batches = self._on_cpu()
        started, before = time.perf_counter(), self.stats.total_s
        try:
            while True:
                asked = time.perf_counter()
                fed = next(batches, None)
                if self.device.type == "cuda":
                    self.stats.wait_s += time.perf_counter() - asked
                if fed is None:
                    return
                self.stats.batches += 1
                self.stats.clips += len(fed.batch)
                self.stats.total_s = before + time.perf_counter() - started
                self._count()
                yield fed
        finally:
            self.stats.total_s = before + time.perf_counter() - started
            batches.close()
            self._count()

    def _on_cpu(self) -> Generator[Fed, None, None]:
        asked = time.perf_counter()
        with contextlib.closing(self._items()) as source:
            for fetched in source:
                batch = self._batch(fetched)
                self.stats.wait_s += time.perf_counter() - asked
                yield Fed(batch, self.transform(batch) if self.transform is not None else None)
                asked = time.perf_counter()

    def _batch(self, fetched: Fetched, allocate: Allocate = SAMPLES.tensor) -> Batch:
        return self._collate(fetched.items, allocate, fetched.mix)

    # ---- reading

    def _items(self) -> Generator[Fetched, None, None]:
        """The items of each batch; they may be used until the next is asked for."""
        pool = self._open()
        state = Reading(pool, self._max_bytes)
        finished = False
        try:
            steps = self._block_steps() if self._blocks else self._batch_steps()
            yield from state.run(steps)
            finished = True
        except GeneratorExit:
            finished = True
            raise
        finally:
            if finished:
                state.abandon()
            else:  # an error: what the workers are at is not known
                self._stop_pool()

    def _open(self) -> InlineReader | ProcessWorkers:
        if self._pool is None:
            if self._num_workers == 0:
                self._pool = InlineReader(self._read)
            elif self._kind == "threads":
                self._pool = ThreadWorkers(self._read, self._num_workers)
            else:
                self._pool = ProcessWorkers(
                    self._read, self._num_workers, self._max_bytes, self._max_restarts
                )
            self._finalizer = weakref.finalize(self, self._pool.close)
        return self._pool

    def _stop_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            self.stats.workers_restarted = self._restarts = self._restarts + pool.restarts
            self._finalizer.detach()
            pool.close()

    def _first_step(self) -> int:
        """The number of the iteration's first step, counted from the sampler's first epoch."""
        return self.sampler.epoch * len(self.sampler) + self.sampler.batch

    def _batch_steps(self) -> Iterator[Step]:
        """A batch is one task, its partners among it."""
        for indices, mix in self._planned(enumerate(self.sampler, self._first_step())):
            wanted = indices if mix is None else indices + mix.partners
            number = self._numbers = self._numbers + 1
            refs = [(number, place) for place in range(len(wanted))]
            yield Step([(number, wanted)], refs, [number], mix)

    def _planned(
        self, steps: Iterable[tuple[int, list[int]]]
    ) -> Iterator[tuple[list[int], MixPlan | None]]:
        """The clips of each step, and who is mixed with them; drawn for many steps at once."""
        steps = iter(steps)
        while some := list(itertools.islice(steps, _PLANNED_STEPS)):
            plans = itertools.repeat(None) if self._mixup is None else self._mixup.plans(some)
            for (_, indices), mix in zip(some, plans, strict=False):
                yield indices, mix

    def _block_steps(self) -> Iterator[Step]:
        """A task is a block, read before the first batch that needs it and kept until the last.

        The partners of a batch are a task of their own.
        """
        assert isinstance(self.dataset, ShardSet)
        block_of, blocks = self.dataset.block_of, self.dataset.blocks
        first, batches = self._first_step(), list(self.sampler)
        last: dict[int, int] = {}
        used = [block_of[np.asarray(indices)].tolist() for indices in batches]
        for step, numbers in enumerate(used):
            last.update(dict.fromkeys(numbers, step))
        task_of: dict[int, int] = {}
        planned = self._planned(enumerate(batches, first))
        for step, ((indices, mix), numbers) in enumerate(zip(planned, used, strict=True)):
            new: list[tuple[int, Any]] = []
            for block in dict.fromkeys(numbers):
                if block not in task_of:
                    self._numbers += 1
                    task_of[block] = self._numbers
                    new.append((self._numbers, block))
            refs = [
                (task_of[block], index - blocks[block].first)
                for index, block in zip(indices, numbers, strict=True)
            ]
            done = [block for block in dict.fromkeys(numbers) if last[block] == step]
            ended = [task_of.pop(block) for block in done]
            if mix is not None and mix.partners:
                self._numbers += 1
                new.append((self._numbers, mix.partners))
                refs += [(self._numbers, place) for place in range(len(mix.partners))]
                ended.append(self._numbers)
            yield Step(new, refs, ended, mix)
