"""A tuning run: within its time, compiled ahead, one configuration in force at a time, recorded as graphs."""

import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from benchmarks import harness, timing, tune
from benchmarks.case import Candidate, Case, Settings

pytest.importorskip("triton")

from benchmarks import tune_case, tune_jobs, tune_place
from benchmarks.tune_slots import Slot

ROOT = Path(__file__).resolve().parents[2]
GPU = Settings(device="cuda", backend="triton", dtypes=("bf16",))
TINY = Settings(backend="triton", tiny=True, dtypes=("f32",))
DKV = Slot("attention", ("dkv", "16bit", "64"))


class FakePool:
    """Answers at once; a measurement takes `seconds` on the clock. What it is told to refuse does not compile."""

    def __init__(self, seconds=2.0, refuse=(), never=False):
        self.now, self.seconds, self.refuse, self.never = 0.0, seconds, refuse, never
        self.measured, self.starts = [], []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def run(self, jobs, finished, *, slots, deadline):
        for job in jobs:
            if job["kind"] == "compile":
                if not self.never:
                    bad = tune_case.label(job["entries"][0]) in self.refuse
                    finished(job, {"rows": [{"status": "failed" if bad else "ok"}]})
            elif self.now < deadline:
                assert slots == 1  # times are taken one at a time
                self.starts.append(self.now)
                self.measured.append(job)
                self.now += self.seconds
                finished(job, {"rows": []})
        return []


def searched(workers, seconds, jobs):
    own = {"clock": workers.clock, "sleep": workers.sleep}
    return tune.search(jobs, workers, workers, lambda *_: None, seconds, **own)


def test_no_measurement_starts_after_the_budget():
    jobs = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90))
    workers = FakePool(seconds=2.0)
    late = searched(workers, 30.0, jobs)
    assert 14 <= len(workers.measured) <= 15 and max(workers.starts) < 30.0
    assert len(late) == len(jobs) - len(workers.measured)
    assert workers.now <= 32.0


def test_measuring_begins_although_nothing_has_been_compiled():
    jobs = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90, ops=("attention",)))
    workers = FakePool(never=True)
    searched(workers, 60.0, jobs)
    assert workers.starts[0] <= 15.0
    assert workers.measured[0] == jobs[0]  # and then the most valuable


def test_what_does_not_compile_is_not_measured():
    jobs = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90, ops=("attention",)))
    refused = tune_case.label(jobs[0]["entries"][-1])
    workers = FakePool(refuse={refused})
    searched(workers, 1e6, jobs)
    dkv = [j for j in workers.measured if j["path"] == jobs[0]["path"]]
    named = {tune_case.label(entry) for job in dkv for entry in job["entries"]}
    assert named and refused not in named


def test_a_fault_while_compiling_is_not_swallowed():
    class Broken(FakePool):
        def run(self, jobs, finished, *, slots, deadline):
            if jobs and jobs[0]["kind"] == "compile":
                raise RuntimeError("no worker starts")
            return super().run(jobs, finished, slots=slots, deadline=deadline)

    jobs = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90, ops=("attention",)))
    with pytest.raises(RuntimeError, match="no worker starts"):
        searched(Broken(), 60.0, jobs)


def test_an_entry_is_in_force_only_while_its_run_is_sampled():
    from ast_fast.kernels import _tuned, attention_problem

    entry = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1}
    original = _tuned.configs
    before = attention_problem.table_configs(90, "dkv", "16bit", 64)
    seen = []

    def run(index):
        seen.append(attention_problem.table_configs(90, "dkv", "16bit", 64))
        return ()

    placed = tune_place.Placed(run, tune_place.Placement(DKV.op, DKV.path, entry))
    clock = tune_place.SwitchingClock(timing.Clock())
    try:
        clock.sample(placed, 2, 0)
        assert [[config[:4] for config in each] for each in seen] == [[(16, 16, 4, 1)]] * 2
        seen.clear()
        clock.sample(run, 1, 0)  # a library's: the committed table is back
        assert seen == [before]
        placed(0)
    finally:
        tune_place.put(None)
    assert _tuned.configs is original
    assert attention_problem.table_configs(90, "dkv", "16bit", 64) == before


def test_every_cache_that_holds_a_configuration_is_forgotten():
    """Reads the sources: a cached function that asks the tables has to be listed."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.stem in ("_tuned", "_candidates"):
            continue
        module = importlib.import_module(f"ast_fast.kernels.{path.stem}")
        for name, value in vars(module).items():
            cached = isinstance(value, functools._lru_cache_wrapper)
            if cached and value.__module__ == module.__name__:
                reads = "_tuned." in inspect.getsource(value.__wrapped__)
                assert reads == ((path.stem, name) in tune_place.CACHES), f"{path.stem}.{name}"


def test_ours_in_another_form_is_held_to_our_budget():
    def candidate(name, error, own=False):
        return Candidate(name, lambda inputs: lambda _: (inputs[0]["x"] * (1 + error),), own=own)

    case = Case(
        suite="tune",
        name="a test",
        mode="forward",
        shape={},
        dtype="f32",
        outputs=("y",),
        make_inputs=lambda seed: {"x": torch.ones(8)},
        oracle=lambda inputs: (inputs["x"].double(),),
        candidates=(candidate("ours", 0.0), candidate("form", 1e-5, True), candidate("peer", 1e-5)),
        kinds=("product",),
    )
    rows, runs, _ = harness.check(case, Settings())
    assert rows["form"].status == "wrong" and "form" not in runs
    assert rows["peer"].status == "ok"


class FakeGraphs:
    """Records by keeping the function; the runs of some names cannot be recorded."""

    def __init__(self, broken=()):
        self.broken, self.warmed = broken, 0

    def warm_up(self, function):
        self.warmed += 1
        return function()

    def capture(self, function):
        result = function()
        if result[0] in self.broken:
            raise RuntimeError("operation not permitted while recording")
        return result, lambda: None


def recordable(prepared):
    def candidate(name):
        def prepare(inputs):
            prepared.append((name, id(inputs)))
            return lambda index: (name,)

        return Candidate(name, prepare)

    case = Case(
        suite="tune",
        name="a test",
        mode="backward",
        shape={},
        dtype="f32",
        outputs=("y",),
        make_inputs=lambda seed: {},
        oracle=lambda inputs: (),
        candidates=tuple(map(candidate, ("ours", "form", "peer"))),
        kinds=("product",),
    )
    runs = {each.name: (lambda index: ()) for each in case.candidates}
    rows = {name: harness.blank(case, name, "ok") for name in runs}
    return case, runs, rows


def test_what_cannot_be_recorded_takes_no_part_and_what_follows_is_prepared_anew():
    from benchmarks.tune_work import recorded

    prepared = []
    case, runs, rows = recordable(prepared)
    found = recorded(case, runs, [{}], rows, FakeGraphs(broken=("form",)))
    assert set(found) == {"ours", "peer"}
    assert rows["form"].status == "failed" and "while recording" in rows["form"].reason
    inputs = dict(prepared)
    assert inputs["ours"] == inputs["form"] != inputs["peer"]
    assert recorded(case, runs, [{}], rows, FakeGraphs(broken=("ours",))) is None


def test_a_forward_is_prepared_once_for_all_configurations():
    prepared = []
    case, _, _ = recordable(prepared)
    place = Slot("log_mel", ("power",))
    entry = {"frames": 1}
    rivals = tune_case.with_rivals(case, place, TINY, [entry, entry | {"warps": 1}])
    inputs = [{}]
    for each in rivals.candidates:
        each.prepare(inputs)
    assert [name for name, _ in prepared] == ["ours"]
