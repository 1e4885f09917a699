"""How quick a job is."""

from __future__ import annotations

import time


class Pace:
    """How quick a job is; `Progress` says how long it will take."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.clips, self.audio_s = 0, 0.0

    def step(self, audio_s: float, failed: int) -> dict[str, str]:
        """One clip is done; what to show."""
        self.clips += 1
        self.audio_s += audio_s
        took = max(time.monotonic() - self._started, 1e-6)
        shown = {
            "clips/s": f"{self.clips / took:.1f}",
            "audio": f"{self.audio_s / took:.0f}x",
        }
        return {**shown, "failed": str(failed)} if failed else shown
