"""Timing, the gate and the rows: a wrong result has no speed, and a broken peer harms nobody."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks import gate, harness, record, timing
from benchmarks.case import Candidate, Case, Settings, Skipped, candidate, forward_run, oracle

SETTINGS = Settings(device="cpu", backend="reference", dtypes=("f32",))
LIMITS = timing.Limits(seconds=0.05, min_rounds=3, max_rounds=4, sample_ms=0.1, warmup_ms=0.1)


def _double(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x + x,)


def _case(*candidates: Candidate, **options: object) -> Case:
    values = {
        "suite": "test",
        "name": "double",
        "mode": "forward",
        "shape": {"N": 64},
        "dtype": "f32",
        "outputs": ("y",),
        "make_inputs": lambda seed: {
            "x": torch.randn(64, generator=torch.Generator().manual_seed(seed))
        },
        "oracle": oracle(_double, "forward"),
        "kinds": ("elementwise",),
        "clips": 4,
        "flops": 64.0,
    } | options
    return Case(candidates=candidates, **values)


def _ours(function=_double) -> Candidate:
    return candidate(SETTINGS.ours, function, "forward")


def _measure(case: Case, settings: Settings = SETTINGS) -> dict[str, record.Row]:
    rows = harness.measure(case, settings, {"gemm_f32_tflops": 1.0}, LIMITS, say=lambda _: None)
    return {row.provider: row for row in rows}


def test_right_results_get_times_ratios_and_rates():
    rows = _measure(_case(_ours(), candidate("torch", _double, "forward", yardstick=True)))
    ours, peer = rows[SETTINGS.ours], rows["torch"]
    assert ours.status == peer.status == "ok"
    assert ours.ratio is None and peer.ratio is not None
    assert ours.rounds == peer.rounds >= 3
    assert ours.error == 0.0 and ours.budget == 1e-6
    assert ours.clips_per_second == pytest.approx(4 / (ours.ms["p50"] * 1e-3))
    assert ours.share == pytest.approx(ours.tflops)


@pytest.mark.parametrize("bad", [1e-3, math.nan, math.inf])
def test_a_wrong_result_of_ours_gets_no_speed_and_peers_no_ratio(bad):
    def off(x: torch.Tensor) -> tuple[torch.Tensor]:
        y = x + x
        y[5] += bad
        return (y,)

    rows = _measure(_case(_ours(off), candidate("torch", _double, "forward")))
    assert rows[SETTINGS.ours].status == "wrong"
    assert "budget" in rows[SETTINGS.ours].reason
    assert rows[SETTINGS.ours].ms is None
    assert rows["torch"].status == "ok" and rows["torch"].ratio is None


def test_a_result_of_another_shape_is_wrong():
    rows = _measure(_case(_ours(lambda x: (x[:1] * 2,))))
    assert rows[SETTINGS.ours].status == "wrong"


def test_a_poor_yardstick_widens_the_budget_only_twofold():
    def scaled(factor: float):
        return lambda x: ((x + x) * (1 + factor),)

    def status(ours: float, plain: float) -> str:
        peer = candidate("torch", scaled(plain), "forward", yardstick=True)
        return _measure(_case(_ours(scaled(ours)), peer))[SETTINGS.ours].status

    assert status(3.8e-6, 2e-6) == "ok"
    assert status(4.2e-6, 2e-6) == "wrong"
    # where plain PyTorch is poor, ours must not be; it is still measured itself
    assert status(7.5e-6, 1e-3) == "ok"
    assert status(8.5e-6, 1e-3) == "wrong"
    peer = candidate("torch", scaled(1e-3), "forward", yardstick=True)
    other = candidate("other", scaled(2e-3), "forward")
    rows = _measure(_case(_ours(), peer, other))
    assert (rows["torch"].status, rows["other"].status) == ("ok", "wrong")


def test_every_output_has_a_budget_of_its_own():
    def both(x):
        return x + x, x.square()

    def off(x):
        return x + x, x.square() * (1 + 1.5e-6)

    def run(*kinds):
        case = _case(_ours(off), outputs=("y", "s"), kinds=kinds, oracle=oracle(both, "forward"))
        return _measure(case)[SETTINGS.ours]

    assert run("elementwise", "row sum").status == "ok"
    row = run("row sum", "elementwise")
    assert row.status == "wrong"
    assert row.worst == "s rel_l2" and row.budget == pytest.approx(1e-6)


def test_absent_and_broken_peers_are_named_and_the_rest_is_measured():
    def absent(_inputs):
        raise Skipped("no such package")

    def broken(_inputs):
        raise RuntimeError("out\nof order")

    rows = _measure(_case(_ours(), Candidate("absent", absent), Candidate("broken", broken)))
    assert (rows["absent"].status, rows["absent"].reason) == ("skipped", "no such package")
    assert (rows["broken"].status, rows["broken"].reason) == (
        "failed",
        "RuntimeError: out of order",
    )
    assert rows[SETTINGS.ours].ms is not None


def test_a_candidate_that_fails_while_timed_drops_out_alone():
    calls = []

    def brittle(inputs):
        def run(index: int):
            calls.append(index)
            if len(calls) > 6:
                raise RuntimeError("worn out")
            return _double(inputs[0]["x"])

        return run

    rows = _measure(_case(_ours(), Candidate("brittle", brittle)))
    assert rows["brittle"].status == "failed" and "worn out" in rows["brittle"].reason
    assert rows[SETTINGS.ours].rounds >= 3


def test_peers_outside_the_choice_take_no_part_unless_they_set_the_budget():
    chosen = Settings(device="cpu", backend="reference", peers=("sdpa*",))
    plain = candidate("torch", _double, "forward", yardstick=True)
    rows = _measure(_case(_ours(), plain, candidate("sdpa-math", _double, "forward")), chosen)
    assert set(rows) == {SETTINGS.ours, "sdpa-math"}


def test_memory_bound_cases_rotate_among_inputs_that_exceed_the_cache():
    one = {"x": torch.empty(2**20)}
    case = _case(_ours(), bound="copy")
    assert harness.num_copies(case, one, "cpu") == 16  # 4 MiB each, at most 16
    assert harness.num_copies(case, {"x": torch.empty(2**24)}, "cpu") == 2
    assert harness.num_copies(_case(_ours()), one, "cpu") == 1


def test_the_inputs_are_never_zeros():
    from benchmarks import suites

    settings = Settings(tiny=True, dtypes=("f32",), backend="reference")
    for name in suites.SUITES:
        for case in suites.load(name, settings):
            for label, tensor in case.make_inputs(0).items():
                filled = int(torch.count_nonzero(tensor)) if tensor.is_floating_point() else 1
                assert filled > 0, f"{case.title}: {label}"


def test_interleaved_rounds_are_fair_to_drift():
    """Both cost alike while the machine grows slower: the ratio within rounds stays near 1."""
    machine = _SlowingMachine()
    limits = timing.Limits(seconds=5, min_rounds=9, max_rounds=9, sample_ms=0.1, warmup_ms=0.0)
    calls = {"a": machine.work, "b": machine.work}
    samples, _, failed = timing.interleave(calls, machine, limits)
    assert not failed
    assert samples["a"][-1] > 1.3 * samples["a"][0]
    ratio = timing.spread([b / a for a, b in zip(samples["a"], samples["b"], strict=True)])
    assert 0.95 < ratio["p50"] < 1.05


class _SlowingMachine(timing.Clock):
    """A clock of a machine where each call takes 2 % longer than the one before it."""

    def __init__(self) -> None:
        self._now_ms, self._next_ms = 0.0, 1.0

    def work(self, _index: int) -> None:
        self._now_ms += self._next_ms
        self._next_ms *= 1.02

    def sample(self, call: timing.Call, calls: int, first: int) -> float:
        start = self._now_ms
        for index in range(first, first + calls):
            call(index)
        return (self._now_ms - start) / calls


def test_spread_interpolates_between_samples():
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"p20": 1.8, "p50": 3.0, "p80": 4.2}
    assert timing.spread([2.0]) == {"p20": 2.0, "p50": 2.0, "p80": 2.0}


def test_peak_memory_on_a_cpu_sees_a_large_allocation():
    kept = []
    peak = timing.peak_mib(lambda _: kept.append(torch.ones(32 * 2**20 // 4)), "cpu")
    if peak is None:
        pytest.skip("the kernel does not let a process reset its high-water mark")
    assert 28 < peak < 80


def test_error_measures():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gate.error_of(torch.tensor([3.0, 4.5]), expected, "rel_l2") == pytest.approx(0.1)
    assert gate.error_of(torch.tensor([3.0, 4.5]), expected, "max_abs") == pytest.approx(0.5)
    # an oracle of the first clips checks those alone
    assert gate.error_of(torch.tensor([3.0, 9.0]), expected[:1], "max_abs") == 0.0
    assert gate.error_of(torch.tensor([3.0, math.nan]), expected, "max_abs") == math.inf


def test_forward_runs_build_no_graph():
    x = torch.randn(3, requires_grad=True)
    (y,) = forward_run(_double, [{"x": x}])(0)
    assert not y.requires_grad


class OneStream:
    """Records by running on a stream of its own, and no op whose forward ran on another one."""

    stream = "caller's"

    def warm_up(self, function):
        OneStream.stream = "recording"
        try:
            return function()
        finally:
            OneStream.stream = "caller's"

    def capture(self, function):
        return self.warm_up(function), lambda: function()


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.stream = OneStream.stream
        return 2.0 * x

    @staticmethod
    def backward(ctx, dy):
        if OneStream.stream != "caller's" and ctx.stream != OneStream.stream:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        return 2.0 * dy


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_backward_is_recorded_on_the_stream_of_its_forward(mode, monkeypatch):
    def scale(x):
        return (_Scale.apply(x),)

    prepared = []

    def make(name, function):
        made = candidate(name, function, mode, ("x",), ("dy",), yardstick=name == "torch")

        def prepare(inputs):
            prepared.append((OneStream.stream, len(inputs)))
            return made.prepare(inputs)

        return dataclasses.replace(made, prepare=prepare)

    def inputs(seed):
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(8, generator=draw) for name in ("x", "dy")}

    case = _case(
        make(SETTINGS.ours, scale),
        make("torch", scale),
        mode=mode,
        make_inputs=inputs,
        oracle=oracle(_double, mode, ("x",), ("dy",)),
        graph=True,
    )
    rows, runs, sets = harness.check(case, SETTINGS)
    assert prepared == [("caller's", 1)] * 2
    monkeypatch.setattr(timing, "CudaGraphs", OneStream)
    monkeypatch.setattr(timing, "EventClock", timing.Clock)
    found = harness._graphed(case, rows, runs, sets[:1], LIMITS, SETTINGS, {})
    assert [(row.status, row.clock, row.reason) for row in found] == [("ok", "graph", "")] * 2
    # a forward needs no second model
    assert prepared[2:] == ([("recording", 1)] * 2 if mode == "backward" else [])


def test_what_cannot_be_recorded_is_a_failed_row_beside_the_others(monkeypatch):
    class Refuses(OneStream):
        def capture(self, function):
            if function()[0][0].item() > 0:  # ours waits for the device
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(function)

    case = _case(
        _ours(lambda x: (x.abs() + 1.0,)), candidate("torch", lambda x: (-x.abs(),), "forward")
    )
    runs = {each.name: each.prepare([case.make_inputs(0)]) for each in case.candidates}
    rows = {name: harness.blank(case, name, "ok") for name in runs}
    monkeypatch.setattr(timing, "CudaGraphs", Refuses)
    monkeypatch.setattr(timing, "EventClock", timing.Clock)

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    found = harness._graphed(case, rows, runs, [case.make_inputs(0)], LIMITS, SETTINGS, {})
    assert [row.status for row in found] == ["failed", "ok"]
    assert "as a graph" in found[0].reason and "not permitted" in found[0].reason
