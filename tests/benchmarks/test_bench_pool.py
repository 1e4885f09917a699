"""Workers and what their jobs start: nothing outlives its limit, its worker or the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import jobs, pool, proofs
from benchmarks.case import Settings

SETUP = {
    "settings": vars(Settings(dtypes=("f32",), backend="reference", tiny=True, peers=("none",))),
    "limits": {"seconds": 0.0},
    "threads": 1,
}
HANG = {"kind": "probe", "action": "hang", "title": "hangs", "group": "checks", "limit_s": 3}

# a run of one job that hangs, which prints the number of its worker
RUN = """
import json, sys, time
from benchmarks import pool
setup, job = json.loads(sys.argv[1])
class Announced(pool.Worker):
    def ask(self, *job):
        print(self._process.pid, flush=True)
        return super().ask(*job)
pool.Worker = Announced
with pool.Pool(setup) as workers:
    workers.run([job], lambda *_: None, slots=1, deadline=time.monotonic() + 600)
"""


def members(session: int) -> set[int]:
    """Processes of a session that still run."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state not in "ZX":
            found.add(int(process.name))
    return found


def wait_for(what, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def test_a_job_that_hangs_in_a_child_takes_the_child_with_it(monkeypatch):
    worker = pool.Worker(SETUP)
    try:
        session = worker._process.pid
        assert members(session) == {session} and os.getsid(0) != session
        most = set()

        def look():
            most.update(members(session))
            return len(most) == 2

        original = worker._receive

        def receive(limit_s):
            wait_for(look)
            return original(limit_s)

        monkeypatch.setattr(worker, "_receive", receive)
        with pytest.raises(pool.Died, match="took longer than 1 s"):
            worker.ask(HANG, 1)
        wait_for(lambda: not members(session), 5)
        assert session in most
    finally:
        worker.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_broken_off_leaves_no_process(how, root):
    job = HANG | {"limit_s": 600}
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps([SETUP, job])],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    session = int(run.stdout.readline())
    try:
        wait_for(lambda: len(members(session)) == 2)
        run.send_signal(how)
        assert run.wait(20) != 0
        wait_for(lambda: not members(session), 10)
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
        for left in members(session):
            os.kill(left, signal.SIGKILL)


class Counted:
    """A worker that only says which one it is."""

    made: list["Counted"] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, *_):
        self.number, self.closed = len(Counted.made), False
        Counted.made.append(self)

    def ask(self, job, limit_s):
        assert not self.closed
        return {"rows": [], "worker": self.number}

    def close(self):
        self.closed = True

    kill = dismiss = close


def test_a_job_that_asks_for_a_fresh_process_gets_one(monkeypatch):
    monkeypatch.setattr(pool, "Worker", Counted)
    Counted.made.clear()
    plain, fresh = ({"limit_s": 1, "fresh": fresh} for fresh in (False, True))
    took = []
    with pool.Pool({}) as workers:
        workers.run(
            [plain, plain, fresh, plain, fresh],
            lambda _, answer: took.append(answer["worker"]),
            slots=1,
            deadline=time.monotonic() + 60,
        )
        assert [worker.closed for worker in Counted.made] == [True, True, False]
    assert took == [0, 0, 1, 1, 2], "one worker at a time: a device has no room for more"
    assert all(worker.closed for worker in Counted.made)


def test_counting_compiled_forms_asks_for_a_fresh_process():
    wanted = {job["name"]: job["fresh"] for job in jobs.proof_jobs(Settings(backend="reference"))}
    assert wanted.pop("recompiled") is True and not any(wanted.values())


def test_compiled_forms_are_counted_once_a_process(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    compiled = set()

    class Kernel:
        __name__ = "attention_forward_kernel"

    def launch(form):
        if form not in compiled:  # Triton's own memory of a process
            compiled.add(form)
            jit.JITFunction._do_compile(Kernel())

    monkeypatch.setattr(jit.JITFunction, "_do_compile", lambda self: None)
    monkeypatch.setattr(proofs, "_need_cuda", lambda _: None)
    forms = {}

    def steps(device, dtype, clips, tokens):
        yield "dense", lambda: launch(forms.get(clips, "all"))

    monkeypatch.setattr(proofs, "_steps", steps)
    proofs.recompiled("cuda", None)
    with pytest.raises(proofs.Broken, match="a process that has run nothing"):
        proofs.recompiled("cuda", None)
    compiled.clear()
    forms |= {clips: f"of {clips}" for clips in (1, 2, 3)}
    with pytest.raises(proofs.Broken, match="attention_forward_kernel"):
        proofs.recompiled("cuda", None)


def test_triton_has_what_counting_stands_on():
    jit = pytest.importorskip("triton.runtime.jit")
    assert callable(jit.JITFunction._do_compile)


def test_an_answer_cut_short_is_a_worker_that_died(monkeypatch):
    """Half a line is what a process that is killed leaves."""
    code = "import sys; sys.stdin.readline(); sys.stdout.write('{\"ready\"'); sys.stdout.flush()"
    original = subprocess.Popen
    monkeypatch.setattr(
        pool.subprocess,
        "Popen",
        lambda _, **options: original([sys.executable, "-c", code], **options),
    )
    with pytest.raises(pool.Died, match="ended with status 0"):
        pool.Worker({})
