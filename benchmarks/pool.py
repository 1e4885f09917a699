"""Workers that survive what jobs do to them: each runs in a process that is replaced when it dies.

A worker leads a session of its own, and is ended with all that its jobs started.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from .jobs import Job, failed_row

ROOT = Path(__file__).resolve().parent.parent
_START_LIMIT_S = 240
_END_LIMIT_S = 5.0


class Died(RuntimeError):
    """The worker ended or was ended; the message says how."""


class Worker:
    """One process of worker.py."""

    def __init__(
        self,
        setup: dict[str, Any],
        extra: Mapping[str, str] | None = None,
        log: Path | None = None,
        limit_s: float = _START_LIMIT_S,
    ) -> None:
        # it lives as long as the process
        self._errors: IO[bytes] = (
            tempfile.TemporaryFile() if log is None else log.open("x+b")  # noqa: SIM115
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(os.getpid())],
            cwd=ROOT,
            env={**os.environ, **(extra or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        try:
            self._send(setup)
            self._receive(limit_s)
        except BaseException:
            self.close()
            raise

    def ask(self, job: Job, limit_s: float) -> dict[str, Any]:
        """The answer to a job.

        Raises:
            Died: the process ended, or took longer than the limit and was ended.
        """
        self._send(job)
        return self._receive(limit_s)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Died(f"the process ended: {self._tail()}") from error

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self.kill()

        timer = threading.Timer(limit_s, end)
        timer.daemon = True  # it must not hold up a run that is broken off
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        timer.join()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer | {"lost": True} if overdue.is_set() else answer
        status = self._end()
        if overdue.is_set():
            raise Died(f"took longer than {limit_s:.0f} s and was ended")
        raise Died(f"the process ended with status {status}: {self._tail()}")

    def _tail(self) -> str:
        """The last lines it wrote to standard error."""
        self._errors.seek(0)
        text = self._errors.read()[-4000:].decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())[-300:]

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        if (
            self._process.returncode is None
        ):  # its number is its own until somebody has waited for it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def dismiss(self) -> None:
        """Let the process end by itself; many do so side by side."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """End the process and all that it started."""
        assert self._process.stdout is not None
        self.dismiss()
        self._end()
        self._process.stdout.close()
        self._errors.close()

    def _end(self) -> int:
        """Wait a little for it to end by itself, end what is left of its session; its exit status."""
        end = time.monotonic() + _END_LIMIT_S
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        with contextlib.suppress(ChildProcessError):  # waited for already
            while os.waitid(os.P_PID, self._process.pid, options) is None:
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        self.kill()
        return self._process.wait()


Finished = Callable[[Job, dict[str, Any]], None]


class Pool:
    """Workers that are kept between runs: starting one takes seconds.

    Args:
        setup: the first message to each worker.
        extra: environment variables of the workers, beside ours.
        logs: folder for what workers write to standard error; none is kept by default.
        now: the clock of deadlines, in seconds.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        extra: Mapping[str, str] | None = None,
        logs: Path | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup, self._extra, self._logs, self._now = setup, extra, logs, now
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._ended = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for worker in self._busy:  # the run was broken off, by Ctrl-C perhaps
                worker.kill()
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.dismiss()
        for worker in idle:
            worker.close()

    def run(
        self,
        jobs: list[Job],
        finished: Finished,
        *,
        slots: int,
        deadline: float,
        grace_s: float = 10.0,
    ) -> list[Job]:
        """Run jobs in order on `slots` workers at a time.

        Args:
            jobs: what to do; none starts once `deadline` has passed, and none outlasts it by much.
            finished: called with each job and its answer, one at a time.
            slots: workers side by side; 1 where times are measured.
            deadline: on the pool's clock.
            grace_s: how long a job that runs at the deadline may still take; it is ended then.

        Returns:
            The jobs that did not start.
        """
        waiting = collections.deque(jobs)
        faults: queue.Queue[BaseException] = queue.Queue()

        def take() -> Job | None:
            with self._lock:
                late = self._now() >= deadline
                if not waiting or late or self._ended or not faults.empty():
                    return None
                return waiting.popleft()

        def serve() -> None:
            try:
                while (job := take()) is not None:
                    answer = self._answer(job, deadline, grace_s)
                    with self._lock:
                        if not self._ended:
                            finished(job, answer)
            except BaseException as error:
                faults.put(error)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(max(1, slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not faults.empty():
            raise faults.get()
        return list(waiting)

    def _started(self, latest: float) -> Worker:
        """A new worker, if it is there in time."""
        log = None
        if self._logs is not None:
            # one pool may follow another in the same folder
            names = (self._logs / f"worker-{number}.txt" for number in self._numbers)
            log = next(path for path in names if not path.exists())
        limit_s = min(_START_LIMIT_S, max(1.0, latest - self._now()))
        return Worker(self._setup, self._extra, log, limit_s)

    def _answer(self, job: Job, deadline: float, grace_s: float) -> dict[str, Any]:
        """The answer to a job; a worker that dies over it is replaced by the next job's."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and job.get("fresh"):
            worker.close()
            worker = None
        try:
            if worker is None:
                worker = self._started(deadline + grace_s)
            with self._lock:
                self._busy.add(worker)
                if self._ended:
                    worker.kill()
            left = max(1.0, deadline + grace_s - self._now())
            answer = worker.ask(job, min(job["limit_s"], left))
        except Died as error:
            answer = {"rows": [vars(failed_row(job, str(error)))], "lost": True}
        if worker is not None:
            with self._lock:
                self._busy.discard(worker)
                if not answer.get("lost"):
                    self._idle.append(worker)
            if answer.get("lost"):
                worker.close()
        return answer
