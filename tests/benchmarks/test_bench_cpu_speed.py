"""Small CPU timings under pytest-benchmark: `pytest tests/benchmarks --benchmark-only`.

In an ordinary test run each runs once, as a check that it runs at all.
"""

from __future__ import annotations

import pytest
import torch

from ast_fast import ops
from ast_fast.backend import use_backend

pytest.importorskip("pytest_benchmark")

BACKENDS = ("cpp", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn, on one thread."""
    from ast_fast import cpp

    if request.param == "cpp" and not cpp.available():
        pytest.skip(cpp.why_unavailable())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend(request.param), torch.no_grad():
        yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def timed(benchmark, request):
    """`benchmark`, or a single call where timing was not asked for."""
    if request.config.getoption("benchmark_only", default=False):
        return benchmark
    return lambda function, *arguments, **options: benchmark.pedantic(
        function, arguments, options, rounds=1, iterations=1
    )


def test_log_mel_of_ten_seconds(timed, backend):
    wave = torch.randn(1, 160000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert timed(ops.log_mel, wave).shape == (1, 998, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_short_clip(timed, backend, dtype):
    qkv = torch.randn(1, 146, 3, 12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert timed(ops.attention_qkv, qkv).shape == (1, 146, 12, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_and_layer_norm(timed, backend, dtype):
    draw = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(602, 768, generator=draw).to(dtype) for _ in range(2))
    weight, bias = torch.ones(768, dtype=dtype), torch.zeros(768, dtype=dtype)
    y, _ = timed(ops.add_layer_norm, x, residual, weight, bias)
    assert y.shape == (602, 768)


def test_patch_embedding_of_a_short_clip(timed, backend):
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(1, 128, 128, generator=draw),
        torch.randn(192, 1, 16, 16, generator=draw),
    )
    pos, prefix = torch.randn(146, 192, generator=draw), torch.randn(2, 192, generator=draw)
    y = timed(ops.patch_embed, x, weight, torch.zeros(192), pos, prefix, 10, 10)
    assert y.shape == (1, 146, 192)
