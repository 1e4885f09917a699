"""`check_equivalence`, its report, and the command line that needs nothing but torch."""

import json
import math
import subprocess
import sys

import pytest
import torch

import ast_fast
from ast_fast import ops
from ast_fast.config import ModelConfig
from ast_fast.equivalence import Report, Row, cases, run_verify
from ast_fast.equivalence import run as runs
from ast_fast.testing import available_backends

CONFIG = ModelConfig(
    label_dim=5, input_tdim=64, embed_dim=64, num_heads=2, depth=1, dead_heads=False
)


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(runs, "op_cases", lambda full: [cases.layer_norm(9, 33), cases.mlp(4, 16)])
    monkeypatch.setattr(runs, "model_configs", lambda full: [("small", CONFIG)])


def test_a_user_model_is_checked_with_its_own_weights():
    torch.manual_seed(0)
    model = ast_fast.ASTModel.from_config(CONFIG).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = ast_fast.check_equivalence(model, dtype=[torch.float32, torch.bfloat16])
    assert report.ok and {row.dtype for row in report.rows} == {
        "float32",
        "autocast bfloat16",
        "bfloat16",
    }
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not model.training


def test_a_report_says_where_when_and_what(few_cases, tmp_path):
    seen = []
    report = run_verify(
        "cpu", ["float32"], json_path=tmp_path / "report.json", progress=lambda *a: seen.append(a)
    )
    assert report.ok, report.table()
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["ok"] is True and stored["torch"] == torch.__version__
    assert {"date", "commit", "device", "triton", "threads", "seconds"} <= set(stored)
    assert len(stored["rows"]) == len(report.rows)
    whats = {row.what for row in report.rows}
    assert {"layer_norm dx", "mlp dw2", "log_mel dwave", "small: logits"} <= whats
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]
    table = report.table().splitlines()
    assert len([line for line in table if line.endswith(" ok")]) >= len(report.rows)
    assert f"{len(report.rows)} of {len(report.rows)} within budget" in table[-1]


@pytest.mark.parametrize("backend", available_backends())
def test_a_named_backend_is_the_one_that_runs(few_cases, backend):
    report = run_verify("cpu", ["float32"], backend=backend)
    assert {row.backend for row in report.rows} == {backend}


def test_a_wrong_op_fails_the_report(few_cases, monkeypatch):
    real = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, w, b, eps, *a: real(x, w, b, 1e-3, *a))
    report = run_verify("cpu", ["float32"])
    assert not report.ok
    assert any(row.what == "layer_norm y" for row in report.failures)
    assert "FAILED" in report.table()
    assert runs.main(["--device", "cpu", "--dtypes", "float32"]) == 1


def test_a_report_without_rows_proves_nothing():
    assert not Report(rows=[], device="cpu").ok


def test_infinite_errors_are_json():
    pair = (math.inf, 0.0)
    row = Row(
        what="x",
        shape="",
        dtype="",
        backend="",
        error=pair,
        torch_error=pair,
        budget=pair,
        ok=False,
    )
    text = Report(rows=[row], device="cpu").to_json()
    assert json.loads(text)["rows"][0]["error"] == ["inf", 0.0]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="int8"):
        run_verify("cpu", ["int8"])


def test_the_random_state_of_the_caller_is_kept():
    before = torch.get_rng_state()
    ast_fast.check_equivalence(CONFIG, device="cpu", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_torchaudio_the_reference_stands_in_and_says_so(monkeypatch):
    from ast_fast.equivalence import plain, run_log_mel

    monkeypatch.setattr(plain, "optional_import", lambda name: None)
    case = next(iter(run_log_mel.log_mel_cases()))
    (row,) = run_log_mel.run_log_mel_case(case, torch.device("cpu"), 0.5)
    assert "torchaudio is not installed" in row.note


def test_runs_where_only_torch_is_installed():
    # everything optional is made unimportable, as on a bare GPU machine
    blocked = (
        "torchaudio timm transformers soundfile soxr lightning_fabric torchmetrics tyro rich tqdm"
    )
    code = f"""
import sys
for name in {blocked.split()!r}:
    sys.modules[name] = None
from ast_fast.equivalence import run
from ast_fast.equivalence import cases
run.op_cases = lambda full: [cases.layer_norm(5, 8)]
run.log_mel_cases = lambda cases=run.log_mel_cases: list(cases())[:1]
run.model_configs = lambda full: list(__import__('ast_fast.equivalence.run_models', fromlist=['x']).model_configs(full))[:1]
sys.exit(run.main(['--device', 'cpu', '--dtypes', 'float32']))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    assert "within budget" in done.stdout
    assert "AST-tiny" in done.stdout


@pytest.mark.slow
def test_verify_passes_on_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "ast_fast.equivalence"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.slow
def test_verify_passes_on_the_gpu():
    report = run_verify("cuda")
    assert report.ok, report.table()
