"""The jobs of a GPU run: small, named, serialisable, and each able to fail alone.

A job is a dict with `kind`, `title`, `group` (the suite its rows belong to), `limit_s`, perhaps `fresh` (it
needs a process that has run nothing) and what its kind needs. Cases are named by their place in a suite, so a job is text and any process can run it.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import ceilings, environment, harness, proofs, smoke, suites, tune_work, tuned
from .case import DTYPES, Settings, Skipped
from .record import Row
from .timing import Limits, describe

Job = dict[str, Any]

_CHECK_LIMIT_S = 150
_CASE_LIMIT_S = 240
# in the message of an error after which the worker is as good as dead
LOST = "an illegal memory access was encountered"


def device_job() -> Job:
    """Where we are and what the machine can do."""
    return {"kind": "device", "title": "device and ceilings", "group": "device", "limit_s": 120}


def smoke_jobs(settings: Settings, limit_s: float) -> Iterator[Job]:
    """One job an op: a small forward and backward."""
    for name in smoke.checks(settings.backend):
        yield {
            "kind": "smoke",
            "title": f"smoke {name} {settings.dtypes[0]}",
            "group": "smoke",
            "limit_s": limit_s,
            "name": name,
            "dtype": settings.dtypes[0],
        }


def check_jobs(settings: Settings, precision: str) -> Iterator[Job]:
    """One job per op case of the equivalence checks, then the whole models."""
    for index, name in enumerate(_op_case_names(settings)):
        yield {
            "kind": "op",
            "title": f"check {name} {precision}",
            "group": "checks",
            "limit_s": _CHECK_LIMIT_S,
            "index": index,
            "precision": precision,
        }
    dtype = {"tf32": "f32"}.get(precision, precision)
    # the front end computes in float32 whatever the model does
    also = ("frontend",) if precision == settings.dtypes[0] else ()
    for suite in ("inference", "training", *also):
        titles = enumerate(_titles(suite, settings, (dtype,)))
        # a case with a compiled peer is the same check of ours again
        for index, title in [pair for pair in titles if "compile" not in pair[1]][:2]:
            yield {
                "kind": "gate",
                "title": f"check {title}" + (" tf32" if precision == "tf32" else ""),
                "group": "checks",
                "limit_s": _CHECK_LIMIT_S,
                "suite": suite,
                "index": index,
                "dtype": dtype,
                "precision": precision,
            }


def tuned_jobs(settings: Settings, capability: int) -> Iterator[Job]:
    """One job per committed kernel configuration."""
    for number, label in enumerate(tuned.labels(capability)):
        yield {
            "kind": "tuned",
            "title": f"configuration {label}",
            "group": "tuned",
            "limit_s": _CHECK_LIMIT_S,
            "index": number,
            "capability": capability,
        }


def proof_jobs(settings: Settings) -> Iterator[Job]:
    """One job a proof, in the leading dtype."""
    for name in proofs.names():
        yield {
            "kind": "proof",
            "title": f"proof {name} {settings.dtypes[0]}",
            "group": "proofs",
            "limit_s": _CASE_LIMIT_S,
            "name": name,
            "dtype": settings.dtypes[0],
            "fresh": name in proofs.FRESH,
        }


def case_jobs(settings: Settings, suite: str) -> Iterator[Job]:
    """One job per case of a suite, 16-bit first."""
    seen: set[str] = set()
    for dtype in settings.dtypes:
        for index, title in enumerate(_titles(suite, settings, (dtype,))):
            if title in seen:  # the front end's cases are the same for every dtype
                continue
            seen.add(title)
            yield {
                "kind": "case",
                "title": title,
                "group": suite,
                "limit_s": _CASE_LIMIT_S,
                "suite": suite,
                "index": index,
                "dtype": dtype,
            }


def probe_jobs() -> Iterator[Job]:
    """What must not end a run: an error, the death of a process, a lost device, a hang. For dry runs."""
    for action in ("raise", "exit", "lose", "hang"):
        title = f"probe: {action}"
        yield {"kind": "probe", "title": title, "group": "probes", "limit_s": 3, "action": action}


def _titles(suite: str, settings: Settings, dtypes: tuple[str, ...]) -> list[str]:
    narrowed = _narrow(settings, dtypes)
    return [case.title for case in suites.load(suite, narrowed)]


def _narrow(settings: Settings, dtypes: tuple[str, ...]) -> Settings:
    return dataclasses.replace(settings, dtypes=dtypes)


def _op_cases(settings: Settings) -> list[Any]:
    from ast_fast.equivalence import cases

    found = list(cases.op_cases(full=settings.cuda))
    return found[:3] if settings.tiny else found


def _op_case_names(settings: Settings) -> list[str]:
    try:
        return [f"{case.op} {case.shape}" for case in _op_cases(settings)]
    except (ImportError, AttributeError) as error:
        # the suites' own gates still stand between a wrong kernel and a reported speed
        return [f"equivalence cases ({describe(error)})"]


class Runner:
    """Runs jobs in this process; returns rows, and facts for the file's head."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits
        self.ceilings: dict[str, float] = {}

    def run(self, job: Job) -> dict[str, Any]:
        """Rows of one job as plain values; errors become failed rows."""
        kinds: dict[str, Callable[[Job], dict[str, Any]]] = {
            "device": self._device,
            "smoke": self._smoke,
            "op": self._op,
            "gate": self._gate,
            "tuned": self._tuned,
            "case": self._case,
            "probe": self._probe,
            "proof": self._proof,
            "compile": self._compile,
            "tune": self._tune,
        }
        self.ceilings = job.get("ceilings", self.ceilings)
        started = time.monotonic()
        try:
            answer = kinds[job["kind"]](job)
        except Exception as error:
            answer = {"rows": [vars(failed_row(job, describe(error)))]}
        return {**answer, "seconds": time.monotonic() - started}

    def _device(self, job: Job) -> dict[str, Any]:
        facts = environment.collect(self.settings.device)
        tops = ceilings.measure(self.settings.device, tuple(DTYPES), self.settings.tiny)
        return {"rows": [], "environment": facts, "ceilings": tops}

    def _smoke(self, job: Job) -> dict[str, Any]:
        found, digests = smoke.run(job["name"], self.settings, job["dtype"])
        rows = check_rows(found, job["dtype"], "smoke")
        changed = smoke.differences(digests, job.get("before", {}))
        for row in rows:
            if row.status == "ok" and digests and job.get("before") == {}:
                # it was late, or died
                row.reason = "finding: not compared: the first run of this op left no bits"
            if changed and row.status == "ok":
                row.reason = f"finding: other bits than {job['what']} in {', '.join(changed)}"
        return {"rows": [vars(row) for row in rows], "digests": digests}

    def _op(self, job: Job) -> dict[str, Any]:
        from ast_fast.equivalence import run_ops

        case = _op_cases(self.settings)[job["index"]]
        return {
            "rows": [vars(row) for row in op_rows(case, job["precision"], self.settings, run_ops)]
        }

    def _gate(self, job: Job) -> dict[str, Any]:
        from ast_fast.equivalence import run_ops

        with run_ops.tf32(job["precision"] == "tf32"):
            case = dataclasses.replace(self._find(job), tf32=job["precision"] == "tf32")
            # plain PyTorch, the yardstick, takes part whatever peers are asked for
            ours = dataclasses.replace(self.settings, peers=("none",))
            rows, _, _ = harness.check(case, ours, alone=True)
        for row in rows.values():
            row.suite = "checks"
            if job["precision"] == "tf32":
                row.dtype = "tf32"
        return {"rows": [vars(row) for row in rows.values()]}

    def _tuned(self, job: Job) -> dict[str, Any]:
        variant = tuned.variants(job["capability"])[job["index"]]
        rows = tuned.run(variant, self.settings, self.limits, self.ceilings)
        return {"rows": [vars(row) for row in rows]}

    def _proof(self, job: Job) -> dict[str, Any]:
        row = failed_row(job, "", "ok")
        row.provider = self.settings.ours
        try:
            proofs.run(job["name"], self.settings.device, job["dtype"])
        except Skipped as reason:
            row.status, row.reason = "skipped", str(reason)
        except proofs.Broken as reason:
            row.status, row.reason = "wrong", str(reason)
        return {"rows": [vars(row)]}

    def _compile(self, job: Job) -> dict[str, Any]:
        return tune_work.compile_answer(job)

    def _tune(self, job: Job) -> dict[str, Any]:
        return tune_work.tune_answer(job, self.settings, self.ceilings)

    def _case(self, job: Job) -> dict[str, Any]:
        from ast_fast import backend

        limits = Limits(**job["limits"]) if "limits" in job else self.limits
        name = job.get("backend", self.settings.backend)
        settings = dataclasses.replace(self.settings, backend=name)
        with backend.use_backend(name):
            case = self._find(job, settings)
            rows = harness.measure(case, settings, self.ceilings, limits, say=lambda _: None)
            failed = [f"{row['op']}: {row['failed']}" for row in backend.status() if row["failed"]]
        for row in rows:
            if failed and row.provider == settings.ours and row.status == "ok":
                row.reason = f"finding: not by our kernels alone: {'; '.join(failed)}"[:300]
        return {"rows": [vars(row) for row in rows]}

    def _find(self, job: Job, settings: Settings | None = None) -> harness.Case:
        narrowed = _narrow(settings or self.settings, (job["dtype"],))
        return list(suites.load(job["suite"], narrowed))[job["index"]]

    def _probe(self, job: Job) -> dict[str, Any]:
        if job["action"] == "raise":
            raise RuntimeError("asked to raise")
        if job["action"] == "exit":
            os._exit(7)
        if job["action"] == "lose":
            # what a worker says after an illegal address: no call works from here on
            raise RuntimeError(f"CUDA error: {LOST}")
        # in a child, as a sanitizer would
        subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)"], check=True)
        return {"rows": []}


def failed_row(job: Job, reason: str, status: str = "failed") -> Row:
    """The row of a job that gave none."""
    return Row(
        suite=job["group"],
        case=job["title"],
        mode="check" if job["group"] in ("smoke", "checks", "tuned", "proofs") else "job",
        shape={},
        dtype=job.get("dtype", job.get("precision", "")),
        # a probe's failure is what a dry run wants to see
        provider="probe" if job["kind"] == "probe" else "ast_fast",
        status=status,
        reason=reason,
    )


def op_rows(case: Any, precision: str, settings: Settings, run_ops: Any) -> list[Row]:
    """One op case of the equivalence checks as rows: a row a tensor."""
    import torch

    dtype = DTYPES["f32" if precision == "tf32" else precision]
    found = run_ops.run_op_case(
        case, torch.device(settings.device), dtype, settings.backend, precision == "tf32"
    )
    return check_rows(found, precision, "checks")


def check_rows(found: Sequence[Any], precision: str, suite: str) -> list[Row]:
    """Rows of the equivalence checks as rows of a result file."""
    rows = []
    for item in found:
        note = f"worst entry {item.error[0]:.3g} of {item.budget[0]:.3g}, rel l2 {item.error[1]:.3g} of "
        note += f"{item.budget[1]:.3g}"
        row = Row(
            suite=suite,
            case=f"{item.what} {item.shape}",
            mode="check",
            shape={},
            dtype=precision,
            provider=f"ast_fast[{item.backend}]",
            status="ok" if item.ok else "wrong",
            reason="" if item.ok else f"over budget: {note}",
            error=item.error[1],
            budget=item.budget[1],
            worst="relative l2",
        )
        rows.append(row)
    return rows
