"""The GPU driver's control flow, exercised on a CPU; with optional packages blocked too."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, jobs, pool, record
from benchmarks.case import Settings

# what a bare machine with PyTorch and Triton may lack
ABSENT = [
    "soundfile",
    "soxr",
    "lightning_fabric",
    "lightning",
    "torchmetrics",
    "tyro",
    "rich",
    "tqdm",
    "safetensors",
    "transformers",
    "huggingface_hub",
    "timm",
    "torchvision",
    "torchaudio",
    "kaldi_native_fbank",
    "matplotlib",
    "sklearn",
    "scipy",
    "pybind11",
    "onnxruntime",
    "openvino",
    "hypothesis",
    "pytest",
]

BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

ABSENT = {set(ABSENT)!r}


class Finder:
    # found nowhere, exactly as a package that is not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT or name == "ast_fast._C":
            return None
        return PathFinder.find_spec(name, path, target)


# the finder of an editable install would still find the compiled module
sys.meta_path = [
    Finder() if finder is PathFinder else finder
    for finder in sys.meta_path
    if "__editable__" not in getattr(finder, "__module__", "")
]
"""


def _dry_run(root, out, *arguments, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def _rows(out, suite: str) -> list[dict]:
    (path,) = out.glob(f"*-{suite}-*.json")
    return record.read(path)["rows"]


def test_dry_run_survives_crashes_and_records_everything(root, tmp_path):
    done = _dry_run(root, tmp_path, "--suite", "checks,tuned,attention", "--minutes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    probes = {row["case"]: row for row in _rows(tmp_path, "checks") if row["provider"] == "probe"}
    assert "asked to raise" in probes["probe: raise"]["reason"]
    assert "ended with status 7" in probes["probe: exit"]["reason"]
    assert "took longer than" in probes["probe: hang"]["reason"]
    checks = [row for row in _rows(tmp_path, "checks") if row["provider"] != "probe"]
    assert len(checks) > 10 and all(row["status"] == "ok" for row in checks)
    attention = _rows(tmp_path, "attention")
    assert any(row["provider"].startswith("ast_fast") and row["ms"] for row in attention)
    assert any(row["provider"] == "sdpa" and row["ratio"] for row in attention)
    assert "summary" in done.stdout


def test_dry_run_needs_nothing_beyond_pytorch(root, tmp_path):
    blocker = tmp_path / "path"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    out = tmp_path / "out"
    suites = "checks,inference,frontend,patch_embed"
    done = _dry_run(root, out, "--suite", suites, "--minutes", "4", PYTHONPATH=str(blocker))
    assert done.returncode == 0, done.stdout + done.stderr
    # the compiled module cannot load: plain PyTorch stands in
    assert "ast_fast[reference]" in done.stdout
    for suite in suites.split(","):
        rows = [row for row in _rows(out, suite) if row["provider"].startswith("ast_fast")]
        assert rows and all(row["status"] == "ok" for row in rows), (suite, rows)


@pytest.mark.slow
def test_dry_run_of_everything(root, tmp_path):
    done = _dry_run(root, tmp_path, "--minutes", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record.read(path)["suite"] for path in tmp_path.glob("*.json")}
    assert found == set(gpu.PHASES)


def test_a_cut_off_run_lists_what_it_did_not_measure(tmp_path):
    book = gpu.Book(tmp_path, {}, shown=False)
    book.environment = {
        "device": "cpu",
        "device_name": "x",
        "torch": "2",
        "commit": "c",
        "date": "2026-11-21T00:00:00Z",
        "threads": 1,
        "packages": {},
    }
    job = {"kind": "case", "title": "attention/attention", "group": "attention", "dtype": "bf16"}
    book.late([job])
    (row,) = _rows(tmp_path, "attention")
    assert (row["status"], row["reason"], row["case"]) == ("late", "out of time", job["title"])
    assert book.good


def test_no_job_starts_after_the_deadline():
    jobs_ = [{"kind": "device", "title": str(number), "group": "x"} for number in range(3)]
    with pool.Pool({}) as workers:
        left = workers.run(jobs_, lambda *_: None, slots=2, deadline=time.monotonic() - 1)
    assert left == jobs_


def test_the_plan_for_a_gpu_leads_with_16_bit_checks_and_attention(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    settings = Settings(device="cuda", backend="triton", dtypes=("bf16", "f16", "f32"))
    first, measured, later = gpu.plan(gpu.PHASES, settings, dry_run=False)
    assert {job["precision"] for job in first if job["kind"] == "op"} == {"bf16"}
    assert {job["precision"] for job in later if job["kind"] == "op"} == {"f16", "f32", "tf32"}
    assert measured[0]["title"].startswith("attention/attention forward B64 T1214 H12 D64 bf16")
    assert {job["group"] for job in measured} == set(gpu.PHASES) - {"checks", "tuned", "proofs"}
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
    assert "unknown speed; expected some of all, checks, tuned, proofs" in capsys.readouterr().err


def test_jobs_are_plain_text():
    import json

    settings = Settings(tiny=True, dtypes=("f32",), backend="reference")
    listed = [
        *jobs.check_jobs(settings, "f32"),
        *jobs.case_jobs(settings, "attention"),
        jobs.device_job(),
    ]
    assert json.loads(json.dumps(listed)) == listed
