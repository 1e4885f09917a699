"""The two kinds of jobs of a tuning run, in the worker: compile a configuration, or measure some against each other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from ast_fast.cuda_graphs import CudaGraphs, GraphMaker

from . import harness, timing, tune_place
from .case import Case, Inputs, Run, Settings
from .record import Row
from .tune_case import TWO_PASSES, case_for, facts, label, with_rivals
from .tune_slots import Entry, Slot

Job = dict[str, Any]

# the file that lists the compile cases of an op, where it is not the op's own
_CASES = {"attention": "attention_aot", "fp8": "fp8_aot"}


def compile_answer(job: Job) -> dict[str, Any]:
    """Compile what launches with the job's entry will ask for beyond the tables; no GPU is touched.

    The entries of Triton's cache on disk are those that the launches look for (`_aot.source`). The row
    says whether the kernels spill, do not fit or lack what the entry promises.
    """
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
    found = problems(place, entry, job["dtype"], job["capability"])
    if found:
        row.status, row.reason = "failed", "; ".join(found)[:300]
    return {"rows": [vars(row)]}


def problems(place: Slot, entry: Entry, dtype: str, capability: int) -> list[str]:
    """Why an entry must not be used on a GPU of this capability (90 for 9.0); empty when it may be."""
    from ast_fast.kernels import _aot

    cases = new_cases(place, entry, dtype, capability)
    # limits are stated for the architectures that we compile for; a GPU between two has the older one's
    arch = max(known for known in _aot.ARCHITECTURES if known <= capability)
    found = []
    for case in cases:
        try:
            report = _aot.compile_case(case, capability)
        # the compiler fails in as many ways as it has passes
        except Exception as error:
            found.append(f"{case.name}: {timing.describe(error)}")
        else:
            wrong = _aot.problems(case, report._replace(arch=arch))
            found += [f"{case.name}: {text}" for text in wrong]
    return found


def new_cases(place: Slot, entry: Entry, dtype: str, capability: int) -> list[Any]:
    """The compile cases of an op that this entry adds to those of the table, in one dtype."""
    module = importlib.import_module(f"ast_fast.kernels.{_CASES.get(place.op, place.op)}")
    tune_place.put(None)
    known = {_key(case) for case in module.aot_cases(capability)}
    try:
        tune_place.put(tune_place.Placement(place.op, place.path, entry))
        cases = module.aot_cases(capability)
    finally:
        tune_place.put(None)
    other = "fp16" if dtype == "bf16" else "bf16"
    return [
        case
        for case in cases
        if _key(case) not in known and not any(other in kind for kind in case.signature.values())
    ]


def _key(case: Any) -> tuple[str, ...]:
    """What decides what is compiled."""
    options = (case.num_warps, case.num_stages, case.maxnreg)
    return (
        case.fn.__name__,
        str(sorted(case.signature.items())),
        str(sorted(case.constexprs.items())),
        str((case.divisible, options)),
    )


def tune_answer(job: Job, settings: Settings, ceilings: harness.Ceilings) -> dict[str, Any]:
    """Measure the job's entries, the committed one and the libraries in the same rounds."""
    place = Slot(job["op"], tuple(job["path"]))
    settings = dataclasses.replace(settings, peers=None, without=())
    limits = timing.Limits(**job["limits"])
    try:
        case = case_for(
            place, job["capability"], settings, job["dtype"], job["size"], job["variant"]
        )
        case = with_rivals(case, place, settings, job["entries"])
        rows, runs, inputs = harness.check(case, settings)
        calls, clock = _calls(case, runs, inputs, rows, settings)
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


def recorded(
    case: Case,
    runs: Mapping[str, Run],
    inputs: list[Inputs],
    rows: Mapping[str, Row],
    graphs: GraphMaker,
) -> dict[str, timing.Call] | None:
    """The runs as recorded graphs: where a launch takes longer than its kernel all would look alike.

    None where ours cannot be recorded: then nothing is. Another one that cannot be takes no part.
    """
    first = inputs[:1]
    found: dict[str, timing.Call] = {}
    ours, *others = (each for each in case.candidates if each.name in runs)
    for candidate in (ours, *others):
        try:
            # the forward runs where the backward will be recorded
            prepare = functools.partial(candidate.prepare, first)
            found[candidate.name] = timing.capture_prepared(prepare, graphs)
        except Exception as error:
            if candidate is ours:
                return None
            first = list(first)  # the next one records on a stream of its own: all is prepared anew
            row = rows[candidate.name]
            row.status, row.reason = "failed", f"as a graph: {timing.describe(error)}"
    return found


def _calls(
    case: Case,
    runs: dict[str, Run],
    inputs: list[Inputs],
    rows: dict[str, Row],
    settings: Settings,
) -> tuple[Mapping[str, timing.Call], timing.Clock]:
    """What is timed, and by which clock."""
    clock = tune_place.SwitchingClock(timing.clock_for(settings.device))
    if settings.cuda and case.candidates[0].name in runs:
        graphs = recorded(case, runs, inputs, rows, CudaGraphs())
        with contextlib.suppress(Exception):  # where the device is lost the worker says so
            torch.cuda.synchronize()
        if graphs is not None:
            clock.name = "graph"
            return graphs, clock
    return runs, clock
