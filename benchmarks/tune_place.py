"""Puts a configuration in force for every launch, and takes it out again: once a sample, not once a call.

The tables are read by every launch through `_tuned.configs`, in whatever thread it runs (a backward has one
of its own), so what is in force is a state of the process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import timing
from .case import Run

# what launchers keep of the tables between calls; a test finds those that are missing here
CACHES = (("attention_problem", "table_configs"), ("_use", "_choice"))

_current: Placement | None = None
_tables: Callable[[str, int], dict[str, Any]] | None = None  # the function that is replaced


class Placement:
    """A table with one entry in place of what its path leads to."""

    def __init__(self, op: str, path: Sequence[str], entry: dict[str, Any]) -> None:
        self.op, self.path, self.entry = op, tuple(path), entry
        self._changed: dict[int, dict[str, Any]] = {}  # by capability

    def configs(self, op: str, capability: int) -> dict[str, Any]:
        """In place of `_tuned.configs`."""
        assert _tables is not None
        if op != self.op:
            return _tables(op, capability)
        if capability not in self._changed:
            from ast_fast.kernels._candidates import with_entry

            given = _tables(op, capability)
            self._changed[capability] = with_entry(given, self.path, self.entry)
        return self._changed[capability]


def put(placement: Placement | None) -> None:
    """Put an entry in force, or the committed tables; nothing happens where it is already."""
    global _current, _tables
    if placement is _current:
        return
    from ast_fast.kernels import _tuned

    if _tables is None:
        _tables = _tuned.configs
    _tuned.configs = _tables if placement is None else placement.configs
    if placement is None:
        _tables = None
    _current = placement
    forget()


def forget() -> None:
    """Drop what launchers keep of the tables."""
    for module, name in CACHES:
        getattr(importlib.import_module(f"ast_fast.kernels.{module}"), name).cache_clear()


class Placed:
    """A run under a configuration (None: the committed one)."""

    def __init__(self, run: Run, placement: Placement | None) -> None:
        self.run, self.placement = run, placement

    def __call__(self, index: int) -> Sequence[Tensor]:
        """The run's outputs on one input set."""
        put(self.placement)
        return self.run(index)


class SwitchingClock(timing.Clock):
    """Another clock that puts a run's configuration in force before it starts to count."""

    def __init__(self, inner: timing.Clock) -> None:
        self._inner, self.name = inner, inner.name

    def sample(self, call: timing.Call, calls: int, first: int) -> float:
        """Milliseconds a call."""
        put(call.placement if isinstance(call, Placed) else None)
        return self._inner.sample(call, calls, first)

    def finish(self) -> None:
        """Wait until all work asked for is done."""
        self._inner.finish()
