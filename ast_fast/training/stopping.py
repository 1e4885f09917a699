"""SIGINT and SIGTERM end a run after its current step, with the state saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_log = logging.getLogger("ast_fast.training")


class stop_signals:
    """SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once."""

    def __init__(self, request: Callable[[], None]) -> None:
        self._request = request
        self._previous: dict[int, Any] = {}
        self._asked = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        _log.warning("stopping after this step and saving the state; Ctrl-C again stops at once")
        self._request()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
