"""The soak tells what grows: a short one stays flat, a leak planted in it does not, and the long one's result is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import record, soak
from benchmarks.soak import Held


def held(resident, files=(), bad_losses=0):
    """Samples of a soak of so many steps."""
    found = Held(bad_losses=bad_losses)
    for index, value in enumerate(resident):
        found.steps.append(10 * (index + 1))
        found.resident_mib.append(value)
        found.device_mib.append(0.0)
        found.files.append(files[index] if files else 9)
        found.threads.append(1)
    return found


def test_growth_leaves_out_what_fills_up_at_first_and_single_peaks():
    warm = [100.0, 200.0, 300.0, *[400.0] * 27]
    assert held(warm).growth("resident_mib") == 0.0
    peak = [400.0] * 30
    peak[-1] = 900.0
    assert held(peak).growth("resident_mib") == 0.0
    assert held([400.0 + index for index in range(30)]).growth("resident_mib") == pytest.approx(
        24.0, abs=1
    )
    with pytest.raises(ValueError, match="5 samples: expected 20"):
        held([1.0] * 5).growth("resident_mib")


def test_what_grows_or_is_not_finite_is_wrong():
    flat = [400.0] * 30
    kept = list(soak.rows_of("step", held(flat), "cpu"))
    assert [row.status for row in kept] == ["ok"] * 4
    for found, index in (
        (held([400.0 + index for index in range(30)]), 0),
        (held(flat, files=[9] * 20 + [10] * 10), 1),
        (held(flat, bad_losses=1), 3),
    ):
        rows = list(soak.rows_of("step", found, "cpu"))
        assert [row.status for row in rows] == ["wrong" if i == index else "ok" for i in range(4)]
        assert "allowed" in rows[index].reason


SHORT = """
import json, os, torch
from benchmarks import soak
torch.set_num_threads(1)
kept, open_files = [], []
def leak(values):
    kept.append(bytearray(os.urandom(1)) * 100_000)
    open_files.append(os.open(os.devnull, os.O_RDONLY))
for after in (lambda values: None, leak):
    rows = soak.rows_of("step", soak.soak_step(300, after=after), "cpu")
    print(json.dumps([[row.status, row.error] for row in rows]))
"""


def test_a_short_soak_is_flat_and_a_planted_leak_is_seen(root):
    done = subprocess.run(
        [sys.executable, "-c", SHORT],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    clean, leaky = (json.loads(line) for line in done.stdout.splitlines())
    assert [status for status, _ in clean] == ["ok"] * 4, clean
    # 100 kB and a file a step, over 240 steps between the medians
    assert [status for status, _ in leaky] == ["wrong", "wrong", "ok", "ok"], leaky
    assert leaky[0][1] > 20 and leaky[1][1] > 200


@pytest.mark.slow
def test_the_command_soaks_the_trainer_too(root, tmp_path):
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--steps", "300", "--json", str(result)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = record.read(result)["rows"]
    assert {row["case"] for row in rows} == {"soak, step", "soak, run"}
    assert min(row["shape"]["steps"] for row in rows) >= 300


def test_ten_thousand_steps_were_flat_on_the_machine_that_says_so():
    found = [record.read(path) for path in sorted(record.RESULTS.glob("*-soak-*.json"))]
    assert found
    for content in found:
        assert {row["case"] for row in content["rows"]} >= {"soak, step"}
        for row in content["rows"]:
            assert row["status"] == "ok" and row["error"] <= row["budget"], row
            assert row["shape"]["steps"] >= soak.STEPS and row["shape"]["samples"] >= 100
