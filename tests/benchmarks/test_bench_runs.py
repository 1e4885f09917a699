"""Runs as processes: what is compared, what is killed, and rows that can fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import record, run_process, runs, tables
from benchmarks.run_process import Run, differing, sample_set, worst_apart


def finished(folder, weight=1.0, loss=0.5, names=("w",)):
    """What a run leaves behind, as far as it is compared."""
    place = folder / "checkpoints" / "step-00000002"
    (place / "model").mkdir(parents=True)
    save_file({n: torch.tensor([weight]) for n in names}, place / "model" / "model.safetensors")
    save_file({"moment": torch.tensor([1.0])}, place / "state.safetensors")
    (folder / "checkpoints" / "latest").write_text("step-00000002\n")
    rows = [
        {"kind": "step", "step": 1, "epoch": 0, "loss": 9.0, "clips_per_second": 1.0, "wait_share": 0.9},
        # the same step again, after a kill: the later row counts
        {"kind": "step", "step": 1, "epoch": 0, "loss": loss, "clips_per_second": 4.0, "wait_share": 0.5},
        {"kind": "step", "step": 2, "epoch": 1, "loss": 0.25, "clips_per_second": 8.0, "wait_share": 0.1},
        {"kind": "eval", "step": 2, "epoch": 1, "loss": 0.3, "map": 0.5, "auc": 0.6},
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder, folder, ("train.batch_size=4",), 1)


def test_what_differs_is_counted(tmp_path):
    same = finished(tmp_path / "a"), finished(tmp_path / "b")
    assert differing(*same) == 0
    assert differing(same[0], finished(tmp_path / "c", weight=1.0000001)) == 1
    assert differing(same[0], finished(tmp_path / "d", loss=0.4)) == 1
    assert differing(same[0], finished(tmp_path / "e", names=("w", "more"))) == 1
    assert same[0].losses() == [0.5, 0.25] and same[0].figures() == [0.3, 0.5, 0.6]
    assert same[0].wait_share() == 0.1 and same[0].epoch_rates() == [4.0, 8.0]
    assert same[0].seconds_per_step() == 0.5
    assert (same[0].last_step(), same[0].last_checkpoint()) == (2, 2)


def test_series_are_compared_by_their_worst_pair():
    assert worst_apart([1.0, 2.0], [1.0, 2.5]) == 0.25
    assert math.isinf(worst_apart([1.0], [1.0, 2.0])) and math.isinf(worst_apart([], []))


def test_a_broken_promise_is_wrong_and_has_no_speed(tmp_path, monkeypatch, capsys):
    def part(folder, kills):
        assert folder.is_dir() and kills == 2
        more = {"ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "clock": "host"}
        yield runs._row("kept", {"kills": kills}, 1.0, 1.0, "things", **more)
        yield runs._row("broken", {"kills": kills}, 1.5, 1.0, "things", **more)

    monkeypatch.setattr(runs, "PARTS", {"resume": part})
    path = tmp_path / "runs.json"
    assert runs.main(["--kills", "2", "--json", str(path)]) == 1
    kept, broken = record.read(path)["rows"]
    assert (kept["status"], broken["status"]) == ("ok", "wrong") and broken["ms"] is None
    assert "1.5" in broken["reason"] and "allowed 1" in broken["reason"]
    text = tables.table("cpu-runs", tables.load(tmp_path))
    assert "| kept | kills=2 | f32 | things | 1 | 1 | 2 ms (1 ms - 3 ms) |" in text
    assert "broken [kills=2] things: 1.5 wrong" in capsys.readouterr().out


def test_a_kill_reaches_processes_in_sessions_of_their_own(tmp_path):
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True); print(child.pid, flush=True); time.sleep(60)"
    )
    run = Run(tmp_path, tmp_path, ("train.batch_size=4",), 1)
    run._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child = int(run._process.stdout.readline())
    assert run_process._command_line(child)
    assert run.kill()
    assert not run_process._command_line(child)
    assert not run.kill()  # there was nothing left
    run._process.stdout.close()


@pytest.mark.slow
def test_a_run_killed_from_outside_resumes_to_the_same_bits(tmp_path):
    rows = list(runs.resume(tmp_path, 1))
    assert [row.status for row in rows] == ["ok"] * 4
    assert all(row.shape["kills"] == 1 and row.ms["p50"] > 0 for row in rows)


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path):
    data = sample_set(tmp_path / "data", clips=8, seconds=1.0)
    run = Run(tmp_path / "run", data, ("train.lr=-1",), 1)
    with pytest.raises(RuntimeError, match=r"exit status 2: .*lr=-1"):
        run.finish(120.0)
