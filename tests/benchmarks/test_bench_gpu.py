"""The GPU driver's control flow, exercised on a CPU; with optional packages blocked too."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks import archive, book, gpu, jobs, pool, record
from benchmarks.case import Settings


def _dry_run(root, out, *arguments, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def _unpacked(out) -> dict[str, list[dict]]:
    """Rows by suite of the archive in a folder."""
    files = [record.read(path) for path in archive.unpack(out / archive.NAME, out / "unpacked")]
    return {content["suite"]: content["rows"] for content in files}


def test_chosen_suites_run_instead_of_the_plan(root, tmp_path):
    done = _dry_run(root, tmp_path, "--suite", "smoke,tuned,attention", "--minutes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _unpacked(tmp_path)
    assert set(rows) == {"smoke", "tuned", "attention"}
    assert len(rows["smoke"]) > 10 and all(row["status"] == "ok" for row in rows["smoke"])
    attention = rows["attention"]
    assert any(row["provider"].startswith("ast_fast") and row["ms"] for row in attention)
    assert any(row["provider"] == "sdpa" and row["ratio"] for row in attention)
    assert "summary" in done.stdout


@pytest.mark.slow
def test_dry_run_of_everything(root, tmp_path):
    done = _dry_run(root, tmp_path, "--suite", "all", "--minutes", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(_unpacked(tmp_path)) == set(gpu.PHASES)


def test_a_cut_off_run_lists_what_it_did_not_measure(tmp_path):
    kept = book.Book(tmp_path, {}, shown=False)
    kept.environment = {
        "device": "cpu",
        "device_name": "x",
        "torch": "2",
        "commit": "c",
        "date": "2026-11-21T00:00:00Z",
        "threads": 1,
        "packages": {},
    }
    job = {"kind": "case", "title": "attention/attention", "group": "attention", "dtype": "bf16"}
    kept.late([job])
    (path,) = tmp_path.glob("*-attention-*.json")
    (row,) = record.read(path)["rows"]
    assert (row["status"], row["reason"], row["case"]) == ("late", "out of time", job["title"])
    assert kept.good


def test_no_job_starts_after_the_deadline():
    jobs_ = [{"kind": "device", "title": str(number), "group": "x"} for number in range(3)]
    with pool.Pool({}) as workers:
        left = workers.run(jobs_, lambda *_: None, slots=2, deadline=time.monotonic() - 1)
    assert left == jobs_


def test_chosen_suites_lead_with_16_bit_checks_and_attention(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    settings = Settings(device="cuda", backend="triton", dtypes=("bf16", "f16", "f32"))
    first, measured, later = gpu.three_lists(gpu.PHASES, settings, dry_run=False)
    assert {job["precision"] for job in first if job["kind"] == "op"} == {"bf16"}
    assert {job["precision"] for job in later if job["kind"] == "op"} == {"f16", "f32", "tf32"}
    assert measured[0]["title"].startswith("attention/attention forward B64 T1214 H12 D64 bf16")
    assert {job["group"] for job in measured} == set(gpu.PHASES) - {
        "smoke",
        "checks",
        "tuned",
        "proofs",
    }
    titles = [job["title"] for job in (*first, *measured, *later)]
    assert len(titles) == len(set(titles))
    claims = [job["name"] for job in later if job["kind"] == "proof"]
    assert claims[0] == "deterministic" and "sanitizer racecheck" in claims
    configurations = [job for job in (*first, *later) if job["kind"] == "tuned"]
    for op in (
        "attention forward",
        "attention dq",
        "attention dkv",
        "attention one_pass",
        "attention_masked forward",
        "layer_norm",
        "mlp",
        "log_mel",
    ):
        assert any(f"configuration {op}" in job["title"] for job in configurations), op


def test_every_configuration_of_every_table_can_be_put_in_place():
    pytest.importorskip("triton")
    from ast_fast.kernels import _tuned
    from benchmarks import tuned

    original = _tuned.configs
    for capability in (75, 80, 90, 120):
        found = tuned.variants(capability)
        assert len({variant.label for variant in found}) == len(found) > 20
        for variant in found:
            with tuned.in_place(variant):
                family = _tuned.configs(variant.op, capability)
                node = family
                for key in variant.path[:-1]:
                    node = node[int(key)] if isinstance(node, list) else node[key]
                if variant.op.startswith("attention"):
                    assert node == [variant.entry]
                else:
                    last = variant.path[-1]
                    assert node[int(last) if isinstance(node, list) else last] == variant.entry
            assert _tuned.configs is original


def test_one_pass_configurations_run_where_the_order_of_additions_is_free(monkeypatch):
    pytest.importorskip("triton")
    from ast_fast import ops
    from benchmarks import tuned
    from benchmarks.suites import attention

    settings = Settings(tiny=True, backend="reference")
    asked = []
    real = ops.attention

    def spied(*arguments, **options):
        asked.append(options.get("deterministic", True))
        return real(*arguments, **options)

    monkeypatch.setattr(ops, "attention", spied)
    for kernel, deterministic in (("one_pass", False), ("dkv", True)):
        variant = next(v for v in tuned.variants(90) if v.path[0] == kernel and v.op == "attention")
        case = tuned.case_for(variant, settings)
        (ours,) = (given for given in case.candidates if given.name == settings.ours)
        asked.clear()
        inputs = case.make_inputs(0)
        gradients = ours.prepare([inputs])(0)
        assert set(asked) == {deterministic}
        assert [x.shape for x in gradients] == [inputs[name].shape for name in attention.WRT]


def test_the_fastest_of_rival_configurations_is_named():
    from benchmarks import tuned

    def row(place: int, block: int, ms: float) -> dict:
        case = f"attention forward/16bit/64/{place} bf16 (block_m={block})"
        return {"case": case, "status": "ok", "ms": {"p50": ms}}

    lines = tuned.fastest([row(0, 128, 2.0), row(1, 64, 1.0)])
    assert lines == ["attention forward/16bit/64 bf16: block_m=64 at 1 ms, 2.00x the slowest"]


def test_unknown_suites_are_refused_with_the_known_ones_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--suite", "attention,speed"])
    assert "unknown speed; expected some of all, smoke, checks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes 0.0: expected more than 0"),
        (["--minutes", "nan"], "--minutes nan: expected more than 0"),
        (["--dtype", "bf16,fp4"], "unknown fp4; expected some of bf16, f16, f32"),
        (["--dtype", ","], "unknown (none given)"),
        (["--suite", ","], "unknown (none given)"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", *arguments])
    assert said in capsys.readouterr().err


def test_jobs_are_plain_text():
    import json

    settings = Settings(tiny=True, dtypes=("f32",), backend="reference")
    listed = [
        *jobs.check_jobs(settings, "f32"),
        *jobs.case_jobs(settings, "attention"),
        jobs.device_job(),
    ]
    assert json.loads(json.dumps(listed)) == listed
