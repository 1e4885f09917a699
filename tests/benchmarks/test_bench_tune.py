"""Tuning without a GPU: which configurations are tried, which are picked, and what becomes of the table."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.tune_space import Place, Timing, candidates, pick, table_text, with_picks

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "kernels/tuned/attention.json").read_text())
FORWARD = Place("forward", "16bit", 64)


def entry(block_m, block_n, tma=False):
    made = {"block_m": block_m, "block_n": block_n, "num_warps": 4, "num_stages": 2}
    return made | {"tma": True} if tma else made


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv", "one_pass"])
def test_candidates_hold_the_committed_ones_and_differ(kernel):
    found = candidates(Place(kernel, "16bit", 64), 90)
    for committed in TABLE["families"]["sm_90"][kernel]["16bit"]["64"]:
        assert committed in found
    assert len({json.dumps(each, sort_keys=True) for each in found}) == len(found)
    assert all(each.get("reduce", False) == (kernel == "one_pass") for each in found)


def test_candidates_use_descriptors_where_there_are_any():
    found = candidates(FORWARD, 90)
    assert any(each.get("tma") for each in found) and not all(each.get("tma") for each in found)
    assert not any(each.get("tma") for each in candidates(FORWARD, 80))


def test_the_fastest_large_tile_leads_and_a_smaller_one_must_earn_its_place():
    timings = [
        Timing(entry(128, 64, tma=True), 0.9, 1.0),
        Timing(entry(128, 128, tma=True), 1.0, 1.1),
        Timing(entry(64, 64, tma=True), 1.2, 0.8),
        Timing(entry(128, 64), 1.1, 1.0),
        Timing(entry(64, 64), 1.3, 0.99),
    ]
    assert pick(timings, "block_m") == [
        entry(128, 64, tma=True),
        entry(64, 64, tma=True),
        entry(128, 64),
    ]
    # over keys the tiles are as large as each other: nothing smaller follows
    assert pick(timings, "block_n")[:2] == [entry(128, 64, tma=True), entry(128, 64)]


def test_a_list_without_pointers_is_refused():
    with pytest.raises(ValueError, match="without descriptors"):
        pick([Timing(entry(64, 64, tma=True), 1.0, 1.0)], "block_m")


def test_picks_go_to_the_family_and_leave_everything_else():
    changed = with_picks(TABLE, 90, {FORWARD: [entry(64, 64)]}, "a test")
    assert changed["families"]["sm_90"]["forward"]["16bit"]["64"] == [entry(64, 64)]
    assert changed["measured"] == {**TABLE.get("measured", {}), "sm_90": "a test"}
    undone = copy.deepcopy(changed)
    undone["families"]["sm_90"]["forward"]["16bit"]["64"] = TABLE["families"]["sm_90"]["forward"][
        "16bit"
    ]["64"]
    undone.pop("measured")
    assert undone == {key: value for key, value in TABLE.items() if key != "measured"}


def test_a_written_table_differs_only_where_it_changed():
    assert table_text(TABLE) == (ROOT / "kernels/tuned/attention.json").read_text()


def test_a_gpu_that_shared_a_family_gets_its_own():
    assert TABLE["architectures"]["89"] == TABLE["architectures"]["86"] == "sm_86"
    changed = with_picks(TABLE, 89, {FORWARD: [entry(64, 64)]}, "a test")
    assert changed["architectures"]["89"] == "sm_89"
    assert changed["architectures"]["86"] == "sm_86"
    assert changed["families"]["sm_86"] == TABLE["families"]["sm_86"]
    assert changed["families"]["sm_89"]["dq"] == TABLE["families"]["sm_86"]["dq"]
    # the one whose name the family has keeps it; the others keep what they had
    changed = with_picks(TABLE, 86, {FORWARD: [entry(64, 64)]}, "a test")
    assert changed["architectures"]["86"] == "sm_86"
    others = changed["architectures"]["89"]
    assert changed["families"][others] == TABLE["families"]["sm_86"]


def test_an_unknown_gpu_starts_from_the_newest_older_family():
    changed = with_picks(TABLE, 103, {FORWARD: [entry(64, 64)]}, "a test")
    assert changed["architectures"]["103"] == "sm_103"
    assert changed["families"]["sm_103"]["dkv"] == TABLE["families"]["sm_100"]["dkv"]
    with pytest.raises(ValueError, match=r"compute capability 7\.0 is older"):
        with_picks(TABLE, 70, {}, "a test")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_dry_run_measures_checks_and_picks(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tune", "attention", "--dry-run", "--dtype", "f32"]
    command += ["--width", "32", "--kernels", "forward", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "forward f32 d32: " in done.stdout
    (path,) = tmp_path.glob("*-tune-*.json")
    rows = record.read(path)["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert len({row["provider"] for row in rows}) == 2
    assert all(row["error"] <= row["budget"] for row in rows)


@pytest.mark.aot
def test_a_candidate_that_cannot_run_is_refused_with_the_reason():
    from benchmarks.jobs import failed_row
    from benchmarks.tune_case import compile_row

    blank = failed_row({"group": "tune", "title": "a test", "kind": "compile"}, "")
    good = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
    assert compile_row(blank, FORWARD, good, "bf16", 80).status == "ok"
    # four stages of 128 x 128 do not fit into 99 KB
    large = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 4}
    refused = compile_row(blank, Place("forward", "16bit", 128), large, "bf16", 86)
    assert refused.status == "failed" and "shared memory" in refused.reason


def test_wrong_arguments_are_named(capsys):
    from benchmarks import tune

    for arguments, message in (
        (["attention", "--kernels", "forward,dv"], "unknown dv"),
        (["attention", "--width", "48"], "--width '48'"),
        (["attention", "--dry-run"], "--dry-run goes with --dtype f32"),
    ):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert message in capsys.readouterr().err
