"""Which backend runs, what a fallback says, and that importing the package costs and changes nothing."""

import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import ast_fast
from ast_fast import backend, ops
from ast_fast.testing import available_backends, measure, random_tensor

ROOT = Path(__file__).resolve().parents[2]
needs_cpp = pytest.mark.skipif(
    "cpp" not in available_backends(), reason="the C++ extension is not built"
)


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


# every op once, twice over, with its warnings counted and its numbers compared with the reference
FALLBACK = """
import logging, sys, torch
{setup}
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("ast_fast.backend").addHandler(Keep(logging.WARNING))
import ast_fast
from ast_fast import ops
torch.manual_seed(0)
x = torch.randn(6, 32, dtype={dtype})
w = torch.randn(32, dtype={dtype})
qkv = torch.randn(2, 9, 3, 2, {head_dim}, dtype={dtype})
def run():
    return [ops.layer_norm(x, w, w), ops.add_layer_norm(x, x, w, w)[0], ops.attention_qkv(qkv)]
first, second = run(), run()
with ast_fast.use_backend("reference"):
    want = run()
assert all(torch.equal(a, b) for a, b in zip(first[:2], want)), "other numbers than the reference"
assert torch.allclose(first[2], want[2], rtol=0, atol={atol}), "attention gives other numbers"
assert all(torch.equal(a, b) for a, b in zip(first, second))
table = ast_fast.backend.explain()
print(len(records), *records, sep="\\n")
print("TABLE", table, sep="\\n")
"""


def fallback(setup, dtype="torch.float32", head_dim=32, **environment):
    atol = {"torch.float16": 2e-3, "torch.float64": 0.0}.get(dtype, 1e-5)
    code = FALLBACK.format(setup=setup, dtype=dtype, head_dim=head_dim, atol=atol)
    out = run(code, **environment).stdout
    said, table = out.split("TABLE\n")
    count, *messages = said.strip().splitlines()
    assert int(count) == len(messages)
    return messages, table


def test_without_the_extension_everything_runs_in_pytorch_and_one_warning_says_so():
    messages, table = fallback("sys.modules['ast_fast._C'] = None")
    assert len(messages) == 1 and "the C++ extension is not" in messages[0]
    assert "in plain PyTorch, attention in its fused SDPA" in messages[0]
    assert "reference" in table and "the C++ extension is not" in table


def test_a_broken_extension_is_a_missing_one():
    setup = """
import importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ast_fast._C":
            raise ImportError("undefined symbol: something")
sys.meta_path.insert(0, Broken())
"""
    messages, table = fallback(setup)
    assert len(messages) == 1 and "undefined symbol" in messages[0]
    assert "undefined symbol" in table


@needs_cpp
def test_float16_on_a_cpu_runs_in_pytorch_and_one_warning_says_so():
    messages, _ = fallback("", dtype="torch.float16")
    assert len(messages) == 1 and "float16" in messages[0]


def test_float64_runs_in_the_reference_without_a_warning():
    assert fallback("", dtype="torch.float64")[0] == []


@needs_cpp
def test_a_head_width_no_kernel_has_falls_back_for_attention_alone():
    messages, _ = fallback(
        "import ast_fast.cpp.layer_norm as l, ast_fast.cpp.add_layer_norm as a\n"
        "l.unsupported = a.unsupported = lambda *args: 'switched off here'",
        head_dim=48,
    )
    assert len(messages) == 3
    (said,) = [m for m in messages if "attention" in m]
    assert "48" in said and "PyTorch's fused attention (SDPA)" in said
    assert sum("plain PyTorch" in m for m in messages) == 2


def test_a_missing_triton_is_named():
    code = """
    import sys
    sys.modules["triton"] = None
    import torch
    from ast_fast import backend
    print(backend.why_not("triton", "cuda", torch.float32))
    """
    assert "pip install triton" in run(code).stdout


def test_a_triton_that_breaks_on_import_is_named(tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('driver too old')")
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT))))
    code = """
    from ast_fast import backend
    import torch
    print(backend.why_not("triton", "cuda", torch.float32))
    """
    assert "driver too old" in run(code, PYTHONPATH=path).stdout


def test_an_amd_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    # their capability numbers mean other things: without this they would take a table of NVIDIA's
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = backend.why_not("triton", "cuda", torch.float32)
    assert reason is not None and "NVIDIA GPUs only" in reason


def test_an_old_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 0))
    assert "7.0" in backend.why_not("triton", "cuda", torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    (
        ("cpp", torch.float16, "float32 and bfloat16"),
        ("cpp", torch.float64, "float32 and bfloat16"),
        ("triton", torch.float32, "CUDA tensors"),
    ),
)
def test_a_backend_asked_for_by_name_that_cannot_run_raises(name, dtype, said):
    x = torch.ones(2, 8, dtype=dtype)
    with (
        ast_fast.use_backend(name),
        pytest.raises(backend.BackendUnavailableError, match=said) as info,
    ):
        ops.layer_norm(x, x[0], x[0])
    assert "use_backend('auto')" in str(info.value) and "layer_norm" in str(info.value)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="cudnn"):
        ast_fast.use_backend("cudnn")
    assert backend.requested() == "auto"


def test_as_a_context_manager_the_choice_ends_with_the_block():
    with ast_fast.use_backend("reference"):
        assert backend.requested() == "reference"
        with ast_fast.use_backend("cpp"):
            assert backend.requested() == "cpp"
        assert backend.requested() == "reference"
    assert backend.requested() == "auto"
    with pytest.raises(KeyError), ast_fast.use_backend("reference"):
        raise KeyError
    assert backend.requested() == "auto"


def test_as_a_call_the_choice_holds_for_every_thread():
    seen = []
    ast_fast.use_backend("reference")
    try:
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    finally:
        ast_fast.use_backend("auto")
    assert seen == ["reference"]


def test_a_block_does_not_reach_other_threads():
    seen = []
    with ast_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@needs_cpp
def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    from ast_fast.cpp import layer_norm as cpp

    calls = []
    real = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(3, 16, requires_grad=True)
    with ast_fast.use_backend("cpp"):
        y = ops.layer_norm(x, torch.ones(16), torch.zeros(16))
    with ast_fast.use_backend("reference"):
        y.sum().backward()
    assert calls == [1]


def test_eight_threads_that_call_first_at_once_agree():
    code = """
    import threading, torch, ast_fast
    torch.manual_seed(0)
    x, w, wave = torch.randn(64, 96), torch.randn(96), torch.randn(1, 1600)
    gate, results, errors = threading.Barrier(8), [], []
    def work():
        try:
            gate.wait()
            y = ast_fast.ops.layer_norm(x, w, w)
            q = x.view(1, 64, 3, 1, 32)
            results.append((y, ast_fast.ops.attention_qkv(q), ast_fast.ops.log_mel(wave)))
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors, errors
    assert len(results) == 8
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0]))
    """
    run(code)


def test_importing_is_cheap_and_touches_nothing():
    code = """
    import sys, time, torch
    before = set(sys.modules)
    started = time.process_time()
    import ast_fast
    from ast_fast import ops
    spent = time.process_time() - started
    loaded = set(sys.modules) - before
    heavy = {"triton", "torchaudio", "timm", "transformers", "torch._dynamo", "soundfile"} & set(sys.modules)
    assert not heavy, heavy
    assert spent < 0.3, spent
    assert not torch.cuda.is_initialized()
    assert "ast_fast._C" not in loaded
    """
    run(code)


def test_importing_writes_no_file(tmp_path):
    code = """
    import sys
    sys.dont_write_bytecode = True
    import torch
    written = []
    def hook(event, args):
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+"):
            written.append(args[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "socket.connect", "subprocess.Popen"):
            written.append((event, args))
    sys.addaudithook(hook)
    import ast_fast
    from ast_fast import ops, backend
    backend.explain()
    assert not written, written
    """
    run(code)


def test_denormals_survive_the_import_and_a_call():
    code = """
    import torch, ast_fast
    ast_fast.ops.layer_norm(torch.randn(4, 32), torch.ones(32), torch.zeros(32))
    ast_fast.ops.log_mel(torch.randn(1, 1600))
    tiny = torch.full((64,), 1e-40)
    assert (tiny * 0.5 > 0).all() and float(tiny[0]) * 0.5 > 0
    """
    run(code)


def test_explain_has_a_row_for_every_op():
    table = backend.explain()
    assert all(op in table for op in backend.OPS)
    assert len(table.splitlines()) == 1 + len(backend.status())


def test_a_fallback_is_logged_once_and_not_per_call(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    x = random_tensor(3, 8, seed=0, dtype=torch.float16)
    with caplog.at_level(logging.WARNING, "ast_fast.backend"):
        for _ in range(3):
            ops.layer_norm(x, x[0], x[0])
    assert len(caplog.records) == 1


def test_autocast_falls_back_with_the_numbers_of_the_reference():
    x, w = random_tensor(4, 16, seed=0), random_tensor(16, seed=1)
    with torch.autocast("cpu", torch.float16):
        y = ops.layer_norm(x, w, w)
    assert y.dtype == torch.float16
    assert measure(y, ops.layer_norm(x.double(), w.double(), w.double())).rel_l2 < 1e-3
