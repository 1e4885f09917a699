"""Interleaved timing: in every round each candidate is timed once, in a new random order.

Slow drift (clocks, neighbours on a shared machine) then meets all candidates alike, and a ratio taken
within a round is far steadier than the ratio of two medians.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ast_fast.cuda_graphs import CudaGraphs, GraphMaker

Call = Callable[[int], object]

# calls that last this long are warm after the first, and may be stopped after fewer rounds
_SLOW_MS = 1000.0
_FEWEST_ROUNDS = 3
_OVERTIME = 6.0


class Clock:
    """Times `calls` calls in a row, in milliseconds a call."""

    name = "host"

    def sample(self, call: Call, calls: int, first: int) -> float:
        """Wall time by the host's clock; for work that is done when the call returns."""
        start = time.perf_counter()
        for index in range(first, first + calls):
            call(index)
        return (time.perf_counter() - start) * 1e3 / calls

    def finish(self) -> None:
        """Wait until all work asked for is done."""


class EventClock(Clock):
    """Device events around the calls: launches overlap with work, as they do in use."""

    name = "events"

    def sample(self, call: Call, calls: int, first: int) -> float:
        """Time between two events in the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for index in range(first, first + calls):
            call(index)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    def finish(self) -> None:
        """Synchronise with the device; raises if a kernel failed."""
        torch.cuda.synchronize()


def capture(call: Call) -> Call:
    """The call as a CUDA graph: replays without the cost of launching."""
    return capture_prepared(lambda: call)


def capture_prepared(prepare: Callable[[], Call], graphs: GraphMaker | None = None) -> Call:
    """What `prepare` gives as a CUDA graph, prepared on the stream that records.

    Autograd runs the backward of an op on the stream of its forward: only where that one records can the
    backward alone be recorded.

    Args:
        prepare: makes the call; runs what the call's backward is of.
        graphs: who records; CUDA graphs by default.
    """
    graphs = graphs or CudaGraphs()
    call = graphs.warm_up(prepare)
    for _ in range(3):
        graphs.warm_up(lambda: call(0))
    kept, replay = graphs.capture(lambda: call(0))

    def again(_: int, kept: object = kept) -> None:
        replay()

    return again


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return EventClock() if device == "cuda" else Clock()


class Limits:
    """How long and how often to measure."""

    def __init__(
        self,
        *,
        seconds: float = 10.0,
        min_rounds: int = 5,
        max_rounds: int = 40,
        sample_ms: float = 20.0,
        warmup_ms: float = 50.0,
        max_calls: int = 1000,
    ) -> None:
        self.seconds = seconds  # a case; the least rounds may exceed it
        self.min_rounds = min_rounds
        self.max_rounds = max_rounds
        self.sample_ms = sample_ms  # calls are repeated until a sample lasts this long
        self.warmup_ms = warmup_ms
        self.max_calls = max_calls


def warm_up(call: Call, clock: Clock, limits: Limits) -> int:
    """Run until caches, handles and compiled code are in place; returns calls a sample."""
    took = max(clock.sample(call, 1, 0), 1e-4)
    if took < _SLOW_MS:
        took = max(clock.sample(call, 1, 1), 1e-4)
    repeats = min(limits.max_calls, int(limits.warmup_ms / took))
    if repeats > 1:
        took = max(clock.sample(call, repeats, 2), 1e-4)
    return max(1, min(limits.max_calls, round(limits.sample_ms / took)))


def interleave(
    calls: Mapping[str, Call], clock: Clock, limits: Limits, seed: int = 0
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """Time every candidate in every round.

    Returns:
        Milliseconds a call per candidate and round (equal counts), calls a sample, and the reason
        why a candidate dropped out.
    """
    order = random.Random(seed)
    failed: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            repeats[name] = warm_up(call, clock, limits)
        except Exception as error:
            failed[name] = describe(error)
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    index = 0
    gc.collect()
    start = time.perf_counter()
    while samples:
        rounds = len(next(iter(samples.values())))
        spent = time.perf_counter() - start
        overtime = spent > _OVERTIME * limits.seconds and rounds >= _FEWEST_ROUNDS
        enough = rounds >= limits.min_rounds and spent > limits.seconds
        if rounds >= limits.max_rounds or enough or (overtime and limits.seconds):
            break
        names = list(samples)
        order.shuffle(names)
        for name in names:
            try:
                samples[name].append(clock.sample(calls[name], repeats[name], index))
            except Exception as error:
                failed[name] = describe(error)
                del samples[name]
            index += repeats.get(name, 1)
    return samples, repeats, failed


def describe(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]


def spread(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def peak_mib(call: Call, device: str) -> float | None:
    """Memory one call needs above what was held before it, at its peak.

    A call that keeps its memory between calls, such as a recorded one, says so in `memory_mib`.
    """
    kept: float | None = getattr(call, "memory_mib", None)
    if kept is not None:
        return kept
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _peak_rss_mib(call)


def _peak_rss_mib(call: Call) -> float | None:
    """Growth of the resident set's high-water mark; None where the kernel cannot reset it."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not (clear.exists() and status.exists()):
        return None
    gc.collect()
    # memory freed earlier but still resident would hide what the call needs
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status_kib(status, "VmRSS")
    call(0)
    return max(0.0, (_status_kib(status, "VmHWM") - before) / 1024)


def _status_kib(status: Path, key: str) -> float:
    for line in status.read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
