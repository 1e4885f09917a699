"""A process that runs jobs one at a time, so that a crash or a sticky CUDA error ends only it.

Jobs come as JSON lines on standard input, answers leave as JSON lines on what was standard output;
anything a library prints goes to standard error. Its arguments are the process that started it and, to
run this instead of jobs, a command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

STICKY = 3  # exit status: the device's context is lost


def end_with_parent(parent: int) -> None:
    """End this session once nobody is left to read the answers, be it in the middle of a job.

    Args:
        parent: process that started this one; asked here, it may be dead already and another's turn.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if os.getsid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)  # what jobs started goes with it
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(parent: int) -> int:
    """Answer jobs until standard input ends."""
    end_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    setup: dict[str, Any] = json.loads(sys.stdin.readline())

    import torch

    from .case import Settings
    from .environment import same_arithmetic
    from .jobs import Runner
    from .timing import Limits

    options = setup["settings"]
    for name in ("dtypes", "peers", "without", "only"):
        if options[name] is not None:
            options[name] = tuple(options[name])
    settings = Settings(**options)
    if setup["threads"]:
        torch.set_num_threads(setup["threads"])
    from ast_fast.backend import use_backend

    use_backend(settings.backend)
    same_arithmetic()
    runner = Runner(settings, Limits(**setup["limits"]))
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        answer = runner.run(job)
        lost = settings.cuda and not _device_answers(torch)
        # a dry run pretends: no CPU is ever lost
        lost = lost or (job["kind"] == "probe" and job["action"] == "lose")
        answer["lost"] = lost
        answers.write(json.dumps(answer) + "\n")
        if lost:
            return STICKY
    return 0


def beside(parent: int, command: Sequence[str]) -> int:
    """Run a command that ends, with all it started, once nobody is left who wants it."""
    end_with_parent(parent)
    return subprocess.call(command)


def _device_answers(torch: Any) -> bool:
    """Whether the device still works; after an illegal access no call does."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    started_by, *wanted = sys.argv[1:]
    sys.exit(beside(int(started_by), wanted) if wanted else serve(int(started_by)))
