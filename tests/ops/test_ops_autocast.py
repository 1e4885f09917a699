"""Autocast: products take its dtype, statistics stay float32, log-mel and float64 are never touched."""

import pytest
import torch

from ast_fast import backend as backends
from ast_fast import ops
from ast_fast.equivalence.run_ops import SEED
from ast_fast.testing import available_backends, measure, random_tensor, small_op_cases

CASES = small_op_cases()
DTYPES = (torch.bfloat16, torch.float16)
PRODUCTS = (
    "mlp",
    "patch_embed",
    "attention",
    "attention with lengths",
    "attention_qkv",
    "attention_varlen",
)


def allowed(backend, dtype):
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("the C++ extension takes float32 and bfloat16")


def draw(name, dtype=torch.float32):
    inputs = CASES[name].inputs(torch.Generator().manual_seed(SEED))
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_under_autocast_equal_the_op_on_cast_inputs(name, dtype, backend):
    allowed(backend, dtype)
    inputs = draw(name)
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    with backends.use_backend(backend):
        want = CASES[name].ours(cast)
        with torch.autocast("cpu", dtype):
            got = CASES[name].ours(inputs)
    for key in want:
        assert got[key].dtype == dtype
        assert torch.equal(got[key], want[key])


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("layer_norm", "add_layer_norm"))
def test_layer_norm_under_autocast_rounds_only_its_output(name, dtype, backend):
    allowed(backend, dtype)
    inputs = draw(name)
    with backends.use_backend(backend):
        want = CASES[name].ours(inputs)
        with torch.autocast("cpu", dtype):
            got = CASES[name].ours(inputs)
    assert got["y"].dtype == dtype
    assert measure(got["y"], want["y"]).worst <= 2 * torch.finfo(dtype).eps
    if "total" in got:
        assert got["total"].dtype == torch.float32
        assert torch.equal(got["total"], want["total"])


@pytest.mark.parametrize("backend", available_backends())
def test_gradients_come_back_in_the_dtype_of_the_parameters(backend):
    inputs = {n: t.requires_grad_(t.is_floating_point()) for n, t in draw("mlp").items()}
    with backends.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        CASES["mlp"].ours(inputs)["y"].sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs.values())


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_mel_is_never_cast(dtype, backend):
    inputs = draw("log_mel with lengths")
    with backends.use_backend(backend):
        want = CASES["log_mel with lengths"].ours(inputs)["y"]
        with torch.autocast("cpu", dtype):
            got = CASES["log_mel with lengths"].ours(inputs)["y"]
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_float64_is_never_cast(name):
    inputs = draw(name, torch.float64)
    want = CASES[name].ours(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = CASES[name].ours(inputs)
    for key in want:
        assert got[key].dtype == torch.float64
        assert torch.equal(got[key], want[key])


@pytest.mark.parametrize("backend", available_backends())
def test_log_sum_exp_is_never_cast(backend):
    q = random_tensor(1, 5, 2, 32, seed=0)
    with backends.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        o, lse = ops.attention(q, q, q, return_lse=True)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("backend", available_backends())
def test_autocast_compiles_without_graph_breaks(backend):
    inputs = draw("attention_qkv")
    torch._dynamo.reset()
    compiled = torch.compile(CASES["attention_qkv"].ours, backend="aot_eager", fullgraph=True)
    with backends.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(inputs)["o"], CASES["attention_qkv"].ours(inputs)["o"])


@pytest.mark.parametrize("backend", available_backends())
def test_wider_parameters_than_inputs(backend):
    x = random_tensor(6, 40, seed=0, dtype=torch.bfloat16).requires_grad_()
    weight, bias = (random_tensor(40, seed=s).requires_grad_() for s in (1, 2))
    with backends.use_backend(backend):
        y = ops.layer_norm(x, weight, bias)
        y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full((40,), 6.0))
