"""Threads: the same bits for any count, torch's count honoured, loader workers and forked children safe."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ast_fast.cpp import (
    add_layer_norm,
    attention,
    attention_varlen,
    layer_norm,
    log_mel,
    mlp,
    patch_embed,
)
from ast_fast.reference.mel import mel_tables

ROOT = Path(__file__).resolve().parents[2]


def everything(dtype):
    """One forward and backward of every op that is ours alone (no GEMM of PyTorch's inside)."""
    torch.manual_seed(3)
    results = []
    x, residual, dy = (torch.randn(317, 200).to(dtype) for _ in range(3))
    weight, bias = torch.randn(200), torch.randn(200)
    y, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, dtype)
    results += [y, *layer_norm.backward(dy, x, weight, mean, rstd)]
    y, total, mean, rstd = add_layer_norm.forward(x, residual, weight, bias, 1e-6, dtype)
    results += [y, *add_layer_norm.backward(dy, dy, total, weight, mean, rstd)]
    results += [mlp.gelu_forward(x), *mlp._gelu_backward(dy, x)]
    for clips in (1, 3):
        q, k, v = torch.randn(clips, 230, 3, 3, 64).to(dtype).unbind(2)
        o, lse = attention.forward(q, k, v, 0.125, None)
        grads = [torch.empty(t.shape, dtype=dtype) for t in (q, k, v)]
        attention.backward(torch.ones_like(o), q, k, v, o, lse, 0.125, None, True, *grads)
        results += [o, lse, *grads]
    cu = torch.tensor([0, 3, 90, 200], dtype=torch.int32)
    q, k, v = torch.randn(3, 200, 2, 32).to(dtype)
    o, lse = attention_varlen.forward(q, k, v, cu, cu, 110, 110, 0.2)
    grads = [torch.empty_like(q) for _ in range(3)]
    attention_varlen.backward(
        torch.ones_like(o), q, k, v, o, lse, cu, cu, 110, 110, 0.2, True, *grads
    )
    results += [o, lse, *grads]
    wave, tables = torch.rand(3, 9000) - 0.5, mel_tables()
    results.append(log_mel.forward(wave, None, tables, 60, -4.0, 4.0, dtype))
    results.append(log_mel.backward(torch.ones(3, 60, 128), wave, None, tables, -4.0, 4.0))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_two_and_five_threads_give_the_same_bits(dtype):
    torch.set_num_threads(1)
    one = everything(dtype)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for index, (a, b) in enumerate(zip(one, everything(dtype), strict=True)):
            assert torch.equal(a, b), f"result {index} differs with {threads} threads"


def test_patch_embedding_gradients_of_the_input_do_not_depend_on_threads():
    x, weight = torch.randn(2, 60, 40), torch.randn(6, 1, 16, 16)
    dy = torch.randn(2, 2 + 3 * 5, 6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(patch_embed.backward(dy, x, weight, 10, 10, 2, True))
    # PyTorch's GEMM may group its sums by thread; what the kernels add themselves is exact
    assert torch.equal(results[0][2], results[1][2])
    assert torch.allclose(results[0][4], results[1][4], atol=1e-5)


def test_the_team_has_as_many_threads_as_torch_says():
    code = (
        "import os, torch\n"
        "torch.set_num_threads(int(os.environ['WANTED']))\n"
        "from ast_fast.cpp import mlp\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "mlp.gelu_forward(torch.randn(4000, 256))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    for wanted in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "WANTED": str(wanted), "OMP_DYNAMIC": "false"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == wanted - 1


def test_a_loader_worker_computes_features_after_the_parent_used_its_threads():
    torch.set_num_threads(2)
    tables = mel_tables()
    waves = torch.rand(4, 8000) - 0.5
    expected = log_mel.forward(waves, None, tables, 48, 0.0, 0.5, torch.float32)

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            wave = waves[index : index + 1]
            return log_mel.forward(wave, None, tables, 48, 0.0, 0.5, torch.float32)[0]

    loader = torch.utils.data.DataLoader(
        Clips(), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(next(iter(loader)), expected)


def test_a_forked_child_that_asks_for_two_threads_does_not_hang():
    code = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "from ast_fast.cpp import mlp\n"
        "x = torch.randn(512, 512); expected = mlp.gelu_forward(x).numpy()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        # numpy compares: PyTorch's own kernels do hang here
        "    os._exit(0 if (mlp.gelu_forward(x).numpy() == expected).all() else 3)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_python_threads_may_call_at_once():
    x = torch.randn(300, 500)
    expected = mlp.gelu_forward(x)
    same = []

    def work():
        same.append(all(torch.equal(mlp.gelu_forward(x), expected) for _ in range(20)))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert same == [True] * 4
