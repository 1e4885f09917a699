"""Whether a run has gone wrong without a single loss that is not finite."""

from __future__ import annotations

from collections import deque
from typing import Any

WINDOW = 100


class Divergence:
    """Compares the mean loss of the last 100 steps with that of the first 100.

    Args:
        factor: so many times as large is diverged; 0: never.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> str | None:
        """Note a step's loss; why the run has diverged, or None."""
        if not self._factor:
            return None
        if len(self._first) < WINDOW:
            self._first.append(loss)
            return None
        self._recent.append(loss)
        if len(self._recent) < WINDOW:
            return None
        begun, now = sum(self._first) / WINDOW, sum(self._recent) / WINDOW
        if now <= self._factor * begun:
            return None
        return (
            f"the mean loss of the last {WINDOW} steps is {now:.4g}, that of the first {WINDOW} was "
            f"{begun:.4g}: more than divergence={self._factor:g} times"
        )

    def state(self) -> dict[str, Any]:
        """Plain values to save."""
        return {"first": self._first, "recent": list(self._recent)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from saved values."""
        self._first = list(state["first"])
        self._recent = deque(state["recent"], maxlen=WINDOW)
