"""Measures one case: gate, warm-up, interleaved rounds, memory, and the row of every candidate."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import sys
from collections.abc import Callable, Mapping

import torch

from . import timing
from .case import Case, Inputs, Run, Settings, Skipped
from .gate import Verdict, allowed, allowed_to_peers, decide, expected_outputs, judge
from .record import Row

Ceilings = dict[str, float]

# enough distinct inputs that a memory-bound op finds none of them in the last-level cache
_COLD_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
_MAX_COPIES = 16


def blank(case: Case, provider: str, status: str, reason: str = "") -> Row:
    """A row without figures."""
    return Row(
        suite=case.suite,
        case=case.name,
        mode=case.mode,
        shape=dict(case.shape),
        dtype=case.dtype,
        provider=provider,
        status=status,
        reason=reason,
    )


def num_copies(case: Case, one: Inputs, device: str) -> int:
    """How many input sets to rotate among."""
    if case.bound != "copy":
        return 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    return max(1, min(_MAX_COPIES, math.ceil(_COLD_BYTES[device] / max(size, 1))))


def check(
    case: Case, settings: Settings, *, alone: bool = False
) -> tuple[dict[str, Row], dict[str, Run], list[Inputs]]:
    """Compare every candidate with the oracle.

    Args:
        case: what to compare.
        settings: who takes part.
        alone: nothing will be timed, so only what is checked is made ready.

    Returns:
        A row per candidate with its error, what may be timed of those that are right, and the inputs.
    """
    gate_inputs = (case.make_gate_inputs or case.make_inputs)(0)
    expected = expected_outputs(case, gate_inputs)
    shared = case.make_gate_inputs is None
    inputs = [gate_inputs] if shared or alone else [case.make_inputs(0)]
    copies = 1 if alone else num_copies(case, inputs[0], settings.device)
    inputs += [case.make_inputs(seed) for seed in range(1, copies)]
    verdicts: dict[str, Verdict] = {}
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    ours = case.candidates[0].name
    for candidate in case.candidates:
        name = candidate.name
        if name != ours and not settings.wants(name) and not candidate.yardstick:
            continue
        timed = candidate.timed and (name == ours or settings.wants(name))
        try:
            if candidate.prepare_gate is not None:
                probe = candidate.prepare_gate(gate_inputs)
            elif not shared:
                probe = candidate.prepare([gate_inputs])
            else:
                probe = candidate.prepare(inputs)
            if timed:
                same = alone or (shared and candidate.prepare_gate is None)
                runs[name] = probe if same else candidate.prepare(inputs)
        except Skipped as reason:
            rows[name] = blank(case, name, "skipped", str(reason))
        except Exception as error:
            rows[name] = blank(case, name, "failed", timing.describe(error))
        else:
            verdicts[name] = judge(case, probe, expected)
            del probe
    yardsticks = [verdicts[c.name] for c in case.candidates if c.yardstick and c.name in verdicts]
    limits = allowed(case, yardsticks)
    looser = allowed_to_peers(limits, yardsticks)
    held = {ours, *(candidate.name for candidate in case.candidates if candidate.own)}
    for name, verdict in verdicts.items():
        if name not in runs:
            continue
        decide(case, verdict, limits if name in held else looser)
        row = rows[name] = blank(case, name, verdict.status, verdict.reason)
        row.error = verdict.error if math.isfinite(verdict.error) else None
        row.budget, row.worst = verdict.budget or None, verdict.worst
        if verdict.status != "ok":
            runs.pop(name, None)
    return rows, {name: run for name, run in runs.items() if name in verdicts}, inputs


def measure(
    case: Case,
    settings: Settings,
    ceilings: Ceilings,
    limits: timing.Limits,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """All rows of one case; never raises for what a candidate does."""
    gc.collect()
    # the cache of compiled shapes is bounded: earlier cases must not push this one into eager
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    try:
        rows, runs, inputs = check(case, settings)
    except Exception as error:  # inputs or oracle: out of memory, say
        return [blank(case, case.candidates[0].name, "failed", timing.describe(error))]
    for row in rows.values():
        if row.status in ("wrong", "failed"):
            say(f"  {row.provider}: {row.status}, {row.reason}")
    clock = timing.clock_for(settings.device)
    result = timed(case, rows, runs, clock, limits, settings, ceilings)
    if case.graph and settings.cuda:
        result += _graphed(case, rows, runs, inputs[:1], limits, settings, ceilings)
    return result


def timed(
    case: Case,
    rows: dict[str, Row],
    runs: Mapping[str, timing.Call],
    clock: timing.Clock,
    limits: timing.Limits,
    settings: Settings,
    ceilings: Ceilings,
) -> list[Row]:
    """Fill the figures of the rows whose candidates ran."""
    samples, repeats, failed = timing.interleave(runs, clock, limits)
    for name, reason in failed.items():
        rows[name].status, rows[name].reason = "failed", reason
    ours = case.candidates[0].name
    for name, values in samples.items():
        row = rows[name]
        row.clock, row.rounds, row.calls = clock.name, len(values), repeats[name]
        row.ms = timing.spread(values)
        if name != ours and ours in samples:
            pairs = zip(values, samples[ours], strict=True)
            row.ratio = timing.spread([peer / own for peer, own in pairs])
        _rates(case, row, ceilings)
        try:
            row.peak_mib = timing.peak_mib(runs[name], settings.device)
        except Exception as error:
            row.reason = f"memory not measured: {timing.describe(error)}"
    order = [candidate.name for candidate in case.candidates]
    return sorted(rows.values(), key=lambda row: order.index(row.provider))


def _graphed(
    case: Case,
    rows: dict[str, Row],
    runs: dict[str, Run],
    inputs: list[Inputs],
    limits: timing.Limits,
    settings: Settings,
    ceilings: Ceilings,
) -> list[Row]:
    """The same as CUDA graphs, which replay the first call."""
    graphs, again = {}, {}
    prepares = {candidate.name: candidate.prepare for candidate in case.candidates}
    for name, run in runs.items():
        if rows[name].status != "ok":
            continue
        again[name] = blank(case, name, "ok")
        again[name].error, again[name].budget = rows[name].error, rows[name].budget
        again[name].worst, again[name].clock = rows[name].worst, "graph"
        try:
            if case.mode == "backward":
                # the forward of what was timed ran on another stream
                graphs[name] = timing.capture_prepared(functools.partial(prepares[name], inputs))
            else:
                graphs[name] = timing.capture(run)
        except Exception as error:
            again[name].status, again[name].reason = (
                "failed",
                f"as a graph: {timing.describe(error)}",
            )
            # where the device is lost the others say so themselves
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
    done = timed(case, again, graphs, timing.EventClock(), limits, settings, ceilings)
    for row in done:
        row.clock = "graph"
    return done


def _rates(case: Case, row: Row, ceilings: Ceilings) -> None:
    """Clips, operations and bytes a second, and the share of what this machine was seen to do."""
    if row.ms is None:
        return
    seconds = row.ms["p50"] * 1e-3
    if case.clips:
        row.clips_per_second = case.clips / seconds
    if case.flops:
        row.tflops = case.flops / seconds / 1e12
    if case.bytes:
        row.gbps = case.bytes / seconds / 1e9
    reached, key = (row.tflops, f"gemm_{case.dtype.split('-')[0]}_tflops")
    if case.bound == "copy":
        reached, key = row.gbps, "copy_gbps"
    if reached and ceilings.get(key):
        row.ceiling, row.share = case.bound, reached / ceilings[key]
