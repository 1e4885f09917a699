"""Fill Triton's disk cache for one architecture, in parallel and before anything is launched.

A launch whose case was compiled here finds its binary on disk and compiles nothing: `_aot.source` makes the
cache entry that the launch will ask for. Each worker is a compiler process of `_aot.serve`; one that
dies takes its case with it and is started anew. What is done is on disk at once, so that a warm-up
may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ._aot import WARM_ORDER, cases_of

Request = tuple[str, int, int]  # kernel file, architecture, index into its cases


def requests(arch: int, modules: Iterable[str] = ()) -> list[Request]:
    """What to compile for `arch`, most important first; without `modules` all of them."""
    found, seen = [], set()
    for module in modules or WARM_ORDER:
        for index, case in enumerate(cases_of(module, arch)):
            key = (id(case.fn), case.name)
            if not case.twin and key not in seen:
                seen.add(key)
                found.append((module, arch, index))
    return found


def warm(arch: int, jobs: int, modules: Iterable[str] = ()) -> dict[str, Any]:
    """Compile in `jobs` processes; how many cases there were, what became of them, and seconds."""
    start = time.perf_counter()
    wanted = requests(arch, modules)
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in wanted:
        waiting.put(request)
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def work() -> None:
        worker = _Worker()
        while True:
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                break
            outcome = worker.compile(request)
            with lock:
                outcomes[outcome] += 1
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(max(1, min(jobs, len(wanted))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {name: outcomes[name] for name in ("compiled", "failed", "crashed")}
    seconds = round(time.perf_counter() - start, 1)
    return {"arch": arch, "cases": len(wanted), **counts, "seconds": seconds}


class _Worker:
    """A compiler process, started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def compile(self, request: Request) -> str:
        """Compile one case: compiled, failed (the compiler said no) or crashed."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([*request, True]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self.close()
            return "crashed"
        return "failed" if json.loads(answer)["problems"] else "compiled"

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "ast_fast.kernels._aot", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()  # the version, or nothing from a process that could not start
        return process

    def close(self) -> None:
        """End the process; a dead one may be closed too."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()
