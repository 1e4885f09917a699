"""The two kinds of jobs of a tuning run, in the worker: compile a configuration, or measure some against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import harness, timing, tune_place
from .case import Run, Settings
from .compile_only import compile_only, problems
from .record import Row
from .tune_case import TWO_PASSES, case_for, facts, label, with_rivals
from .tune_slots import Entry, Slot

Job = dict[str, Any]


def compile_answer(job: Job, settings: Settings) -> dict[str, Any]:
    """Compile what a measurement of the job's entry will launch; the row says what became of it."""
    place, (entry,) = Slot(job["op"], tuple(job["path"])), job["entries"]
    row = Row(
        suite="tune",
        case=place.label,
        mode="job",
        shape={},
        dtype=job["dtype"],
        provider=label(entry),
        status="ok",
        tune=facts(place, job, "compiled", entry),
    )
    kernels: list[Any] = []
    try:
        tune_place.put(tune_place.Placement(place.op, place.path, entry))
        for size in ("large", "small"):
            case = case_for(place, job["capability"], settings, job["dtype"], size, job["variant"])
            with compile_only() as found:
                case.candidates[0].prepare([case.make_inputs(0)])(0)
            kernels += found
        wrong = problems(kernels, job["capability"])
    except Exception as error:
        wrong = [timing.describe(error)]
    finally:
        tune_place.put(None)
    if wrong:
        row.status, row.reason = "failed", "; ".join(wrong)[:300]
    return {"rows": [vars(row)]}


def tune_answer(job: Job, settings: Settings, ceilings: harness.Ceilings) -> dict[str, Any]:
    """Measure the job's entries, the committed one and the libraries in the same rounds."""
    place = Slot(job["op"], tuple(job["path"]))
    settings = dataclasses.replace(settings, peers=None)
    limits = timing.Limits(**job["limits"])
    try:
        case = case_for(
            place, job["capability"], settings, job["dtype"], job["size"], job["variant"]
        )
        case = with_rivals(case, place, settings, job["entries"])
        rows, runs, _inputs = harness.check(case, settings)
        calls, clock = _calls(case.mode, runs, settings, rows)
        done = harness.timed(case, rows, calls, clock, limits, settings, ceilings)
    finally:
        tune_place.put(None)
    entries = {label(entry): entry for entry in job["entries"]}
    for row in done:
        row.case = f"{place.label} {job['variant']}".strip()
        role = "candidate" if row.provider in entries else "library"
        role = {settings.ours: "committed", TWO_PASSES: "two passes"}.get(row.provider, role)
        entry: Entry | None = entries.get(row.provider)
        if role == "committed":
            entry = job["committed"]
        row.tune = facts(place, job, role, entry)
    return {"rows": [vars(row) for row in done]}


def _calls(
    mode: str, runs: dict[str, Run], settings: Settings, rows: dict[str, Row]
) -> tuple[dict[str, timing.Call], timing.Clock]:
    """What is timed: forwards as recorded graphs, where a launch may cost more than the kernel."""
    clock = tune_place.SwitchingClock(timing.clock_for(settings.device))
    if not settings.cuda or mode != "forward" or settings.ours not in runs:
        return dict(runs), clock
    graphs: dict[str, timing.Call] = {}
    # ours first: what cannot be recorded is then timed call by call, all of it
    for name in sorted(runs, key=lambda name: name != settings.ours):
        try:
            graphs[name] = timing.capture(runs[name])
        except Exception as error:
            torch.cuda.synchronize()
            if name == settings.ours:
                return dict(runs), clock
            rows[name].status = "failed"
            rows[name].reason = f"as a graph: {timing.describe(error)}"
    clock.name = "graph"
    return graphs, clock
