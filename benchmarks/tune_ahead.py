"""Candidates compiled on the CPU's other cores while earlier ones are measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from . import pool
from .tune_jobs import Job, compile_key


class _Closed(Exception):
    """Nothing more is to be compiled."""


class Ahead:
    """Runs compile jobs in the background, and says which measurements have all their candidates."""

    def __init__(
        self,
        workers: pool.Pool | None,
        jobs: Sequence[Job],
        add: Callable[[Job, dict[str, Any]], None],
        *,
        slots: int,
        deadline: float,
    ) -> None:
        self._add = add
        self._unknown = {self._key(job) for job in jobs}
        self._refused: set[tuple[str, str]] = set()
        self._fault: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(
            target=self._serve, args=(workers, list(jobs), slots, deadline), daemon=True
        )

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # what is being compiled is finished, nothing else is started
        self._closing = True
        self._thread.join()

    def known(self, job: Job) -> bool:
        """Whether every candidate of a measurement has been compiled or refused."""
        if self._fault is not None:
            raise self._fault
        return not any(compile_key(job, entry) in self._unknown for entry in job["entries"])

    def without_refused(self, job: Job) -> Job | None:
        """The measurement without candidates that spill or do not fit; None if nothing is left to compare."""
        kept = [each for each in job["entries"] if compile_key(job, each) not in self._refused]
        # the first look at a slot also says how the libraries do
        if not kept and job["tier"] == "generated":
            return None
        return job | {"entries": kept}

    @staticmethod
    def _key(job: Job) -> tuple[str, str]:
        return compile_key(job, job["entries"][0])

    def _serve(
        self, workers: pool.Pool | None, jobs: list[Job], slots: int, deadline: float
    ) -> None:
        try:
            if workers is not None:
                workers.run(jobs, self._done, slots=slots, deadline=deadline)
        except _Closed:
            return
        except BaseException as error:
            self._fault = error

    def _done(self, job: Job, answer: dict[str, Any]) -> None:
        key = self._key(job)
        if answer["rows"][0]["status"] != "ok":
            self._refused.add(key)
        self._add(job, answer)
        self._unknown.discard(key)
        if self._closing:
            raise _Closed
