"""Tuning without a GPU: what is tried and in which order, within which time, and that only right answers count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record, tune
from benchmarks.case import Settings

pytest.importorskip("triton")

from benchmarks import tune_case, tune_jobs, tune_slots, tune_space
from benchmarks.tune_slots import OPS, Slot

ROOT = Path(__file__).resolve().parents[2]
GPU = Settings(device="cuda", backend="triton", dtypes=("bf16",))
TINY = Settings(backend="triton", tiny=True, dtypes=("f32",))
DKV = Slot("attention", ("dkv", "16bit", "64"))


def test_every_table_has_a_tuner():
    tables = {path.stem for path in (ROOT / "kernels/tuned").glob("*.json")}
    assert tables - {"candidates", "attention_figures"} == set(OPS)
    assert set(tune_slots.LIBRARIES) == set(OPS) == set(tune_case._BUILDERS)


@pytest.mark.parametrize("op", OPS)
def test_every_configuration_of_the_models_widths_has_a_slot(op):
    """Walks the table by itself: a mapping of plain values with a tile is a configuration."""
    table = json.loads((ROOT / f"kernels/tuned/{op}.json").read_text())

    def count(node) -> int:
        if isinstance(node, list):
            chosen_from = op.startswith("attention")
            wide = [x for x in node if x.get("max_width", 0) <= 1024]
            return min(len(node), 1) if chosen_from else len(wide)
        if not any(isinstance(value, dict | list) for value in node.values()):
            return 1
        return sum(
            count(x) for key, x in node.items() if isinstance(x, dict | list) and key != "use"
        )

    for capability in map(int, table["architectures"]):
        family = table["families"][table["architectures"][str(capability)]]
        found = set()
        for dtype in ("bf16", "f32"):
            found |= set(tune_slots._walk(op, family, ()))
            for place in tune_slots.slots(op, capability, dtype, (32, 64, 96, 128)):
                assert tune_slots.committed(place, capability), place.label
        narrow = [p for p in found if _width(family, p) <= 1024]
        assert len(narrow) == count(family) > 0


def _width(family, place):
    node = family
    for key in place.path:
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node.get("max_width", 0) if isinstance(node, dict) else 0


def test_the_largest_models_rows_come_first_of_their_lists():
    for op in ("layer_norm", "add_layer_norm", "fp8"):
        for place in tune_slots.slots(op, 90, "bf16"):
            width = tune_slots.committed(place, 90)[0].get("max_width", 1024)
            assert (place.value < 100) == (width == 1024), place.label


@pytest.mark.parametrize("op", OPS)
def test_every_slot_has_a_case_and_candidates(op):
    dtype = "f32" if op == "log_mel" else "bf16"
    places = tune_slots.slots(op, 90, dtype)
    assert places
    for place in places:
        for variant in tune_case.variants(place):
            case = tune_case.case_for(place, 90, TINY, dtype, "large", variant)
            assert case.candidates[0].name == TINY.ours
            assert any(each.yardstick for each in case.candidates)
            assert (case.mode == "forward") == (place.direction == "forward")
        known = tune_slots.committed(place, 90)
        tried = tune_space.guesses(place, 90) + tune_space.generated(place, 90, dtype)
        assert tried, place.label
        assert not [entry for entry in tried if entry in known]
        assert len({json.dumps(entry, sort_keys=True) for entry in tried}) == len(tried)
        names = set(known[0]) | {"chunk", "maxnreg", "tma", "reduce"}
        assert all(set(entry) <= names for entry in tried), place.label


def test_every_best_guess_that_the_kernels_list_is_measured():
    from ast_fast.kernels import _candidates

    for op in _candidates.ops(90):
        for each in _candidates.candidates(op, 90):
            place = tune_slots.slot(op, each.path)
            known = tune_slots.committed(place, 90)
            assert each.entry in known or each.entry in tune_space.guesses(place, 90), each.label


def test_descriptors_are_tried_where_there_are_any():
    found = tune_space.generated(DKV, 90, "bf16")
    assert any(each.get("tma") for each in found) and not all(each.get("tma") for each in found)
    assert not any(each.get("tma") for each in tune_space.generated(DKV, 80, "bf16"))


def test_best_guesses_of_every_op_come_before_anything_generated():
    jobs = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90))
    tiers = [job["tier"] for job in jobs]
    assert sorted(tiers, key=tune_jobs.TIERS.index) == tiers
    assert [job["priority"] for job in jobs] == list(range(len(jobs)))
    guesses = [job for job in jobs if job["tier"] == "guesses"]
    # the first candidates of every slot before more of any slot
    first = [job["op"] for job in guesses[: len({(j["op"], *j["path"]) for j in guesses})]]
    assert first[0] == "attention" and {"gemm", "layer_norm", "mlp", "log_mel"} < set(first)
    assert all(job["entries"] for job in guesses), "each has something to beat the committed one"
    measured = {tune_slots.Slot(job["op"], tuple(job["path"])).label for job in jobs}
    wanted = tune_jobs.wanted_slots(tune_jobs.Wanted(90))
    assert measured == {place.label for place in wanted} and {p.op for p in wanted} == set(OPS)
    titles = [job["title"] for job in jobs]
    assert len(set(titles)) == len(titles)
    assert json.loads(json.dumps(jobs)) == jobs


def test_a_committed_list_is_measured_whole_for_both_sizes_of_grid():
    jobs = [
        job for job in tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90)) if job["op"] == "attention"
    ]
    for kernel in ("forward", "dq", "dkv", "one_pass"):
        place = Slot("attention", (kernel, "16bit", "64"))
        lead, *rest = tune_slots.committed(place, 90)
        for size in ("large", "small"):
            mine = [j for j in jobs if j["path"][0] == kernel and j["size"] == size]
            assert mine[0]["committed"] == lead
            assert all(entry in mine[0]["entries"] for entry in rest)


def test_a_plan_fits_its_seconds_and_starts_with_the_most_valuable():
    jobs = tune_jobs.plan_jobs(GPU, 90, 90.0)
    assert 20 <= len(jobs) <= 90 / tune_jobs.JOB_S
    everything = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90, listed_only=True))
    assert jobs == everything[: len(jobs)]
    # nothing that a warm cache does not hold: a step of a minute has no time to compile
    for job in jobs:
        place = Slot(job["op"], tuple(job["path"]))
        listed = tune_slots.committed(place, 90) + tune_space.guesses(place, 90)
        assert all(entry in listed for entry in job["entries"])
    assert {job["kind"] for job in jobs} == {"tune"}
    assert sum(len(job["entries"]) for job in jobs) >= 30
    assert len(tune_jobs.plan_jobs(GPU, 90, 0.0)) == 1
    assert tune_jobs.plan_jobs(Settings(backend="cpp"), 90, 90.0) == []


def test_candidates_are_compiled_once_in_the_order_of_measuring():
    measured = tune_jobs.tune_jobs(GPU, tune_jobs.Wanted(90))
    compiled = tune_jobs.compile_jobs(measured)
    keys = [tune_jobs.compile_key(job, job["entries"][0]) for job in compiled]
    wanted = [tune_jobs.compile_key(job, entry) for job in measured for entry in job["entries"]]
    assert keys == list(dict.fromkeys(wanted))


@pytest.mark.slow
def test_a_dry_run_measures_and_its_file_is_refused(tmp_path):
    ops = "attention,layer_norm,mlp,fp8"
    command = [sys.executable, "-m", "benchmarks.tune", ops, "--dry-run", "--dtype", "f32"]
    command += ["--width", "32", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-tune-*.json")
    rows = record.read(path)["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["tune"]["op"] for row in rows} == set(ops.split(","))
    roles = {row["tune"]["role"] for row in rows}
    assert roles == {"committed", "candidate", "library"}
    ours = [row for row in rows if row["tune"]["role"] == "candidate"]
    assert all(row["error"] <= row["budget"] and row["ratio"]["p50"] > 0 for row in ours)
    command = [sys.executable, "-m", "benchmarks.tune", "--from", str(path), "--write"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2 and "dry run" in refused.stderr
    state = subprocess.run(
        ["git", "status", "--porcelain", "kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert state.stdout == ""


@pytest.mark.aot
def test_a_candidate_that_cannot_run_is_refused_with_the_reason():
    from benchmarks.tune_work import compile_answer

    def row(place, entry, capability):
        job = {"op": place.op, "path": list(place.path), "entries": [entry], "dtype": "bf16"}
        job |= {"capability": capability, "size": "large", "variant": ""}
        return compile_answer(job)["rows"][0]

    forward = Slot("attention", ("forward", "16bit", "64"))
    good = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    assert row(forward, good, 80)["status"] == "ok"
    # four stages of 128 x 128 do not fit into 99 KB
    large = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 4}
    refused = row(Slot("attention", ("forward", "16bit", "128")), large, 86)
    assert refused["status"] == "failed" and "shared memory" in refused["reason"]
    place = Slot("patch_embed", ("forward", "f16"))
    wide = tune_slots.committed(place, 90)[0] | {"rows": 256}
    spilled = row(place, wide, 90)
    assert spilled["status"] == "failed" and "registers spill" in spilled["reason"]


def test_wrong_arguments_are_named(capsys):
    for arguments, message in (
        (["attention,softmax"], "unknown softmax; expected all, or some of attention, gemm"),
        (["attention", "--width", "48"], "--width '48'"),
        (["--seconds", "-3"], "--seconds -3: expected more than 0"),
        (["--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["attention", "--dry-run"], "--dry-run goes with --dtype f32"),
        (["--dry-run", "--dtype", "f32", "--from", "x"], "--from reads result files"),
    ):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert message in capsys.readouterr().err
