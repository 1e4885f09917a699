"""What runs beside a GPU run: the warming of Triton's cache, and a watchdog that ends the run in time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .plan import Known

ROOT = Path(__file__).resolve().parent.parent
# the first import of these reads hundreds of megabytes from a cold disk
_IMPORTS = "import transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer"
_WARMERS = 10

Command = Sequence[str]


def warming(known: Known) -> list[Command]:
    """Compile every kernel ahead of its first launch, and read slow packages into the disk's cache."""
    if known.dry_run or not known.settings.cuda:
        return [(sys.executable, "-c", "import torch")]
    warm = ("-m", "ast_fast.kernels._aot", "--warm", str(known.capability))
    patient = ("nice", "-n", "10") if shutil.which("nice") else ()
    return [
        # what is waited for goes first
        (*patient, sys.executable, *warm, "--jobs", str(_WARMERS)),
        (sys.executable, "-c", _IMPORTS),
    ]


class Background:
    """Commands that run until they end or are no longer wanted; their output goes into a folder."""

    def __init__(self, commands: Sequence[Command], folder: Path) -> None:
        self._processes = []
        for number, command in enumerate(commands):
            with (folder / f"background-{number}.txt").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        # which ends it if this process is killed
                        [sys.executable, "-m", "benchmarks.worker", str(os.getpid()), *command],
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        # a session of its own, so that its children go with it
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End what still runs, children and all."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()


class Watchdog:
    """Ends the process, whatever it waits for, if it is still there after some seconds.

    Args:
        seconds: from now.
        last: called before the end, in a thread of its own.
        end: of the process, with its exit status.
        last_s: seconds that `last` may take.
    """

    def __init__(
        self,
        seconds: float,
        last: Callable[[], None],
        end: Callable[[int], object] = os._exit,
        last_s: float = 2.0,
    ) -> None:
        self._last, self._end, self._last_s = last, end, last_s
        self._timer = threading.Timer(max(0.0, seconds), self._bite)
        self._timer.daemon = True

    def __enter__(self) -> Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _bite(self) -> None:
        # whatever the last words run into or wait for, the end comes
        final = threading.Timer(self._last_s, self._end, (1,))
        final.daemon = True
        final.start()
        try:
            self._last()
        finally:
            self._end(1)
