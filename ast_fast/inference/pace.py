"""How quick a job is, and how long it will take."""

from __future__ import annotations

import time


class Pace:
    """How quick a job is, and how long it will take.

    Args:
        count: clips to come.
    """

    def __init__(self, count: int) -> None:
        self._count, self._started = count, time.monotonic()
        self.clips, self.audio_s = 0, 0.0

    def step(self, audio_s: float, failed: int) -> dict[str, str]:
        """One clip is done; what to show."""
        self.clips += 1
        self.audio_s += audio_s
        took = max(time.monotonic() - self._started, 1e-6)
        left = round(took / self.clips * (self._count - self.clips))
        shown = {
            "clips/s": f"{self.clips / took:.1f}",
            "audio": f"{self.audio_s / took:.0f}x",
            "left": f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
        }
        return {**shown, "failed": str(failed)} if failed else shown
