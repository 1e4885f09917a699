"""Linear layers on a CPU: oneDNN's products where they are faster, PyTorch's everywhere else."""

import pytest
import torch
import torch.nn.functional as F

import ast_fast.cpp
from ast_fast import create_model, ops, use_backend
from ast_fast.equivalence import budget, measure

pytestmark = pytest.mark.skipif(not ast_fast.cpp.available(), reason="the C++ extension is absent")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN chosen on whatever CPU this is; counts its products."""
    from ast_fast.cpp import _gemm

    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(_gemm, "_LEAST_WORK", 1)
    calls = []
    real = _gemm.linear

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(_gemm, "linear", counted)
    return calls


def _inputs(*leading, width=48, out=72):
    x = torch.randn(*leading, width, requires_grad=True)
    weight = (torch.randn(out, width) / width**0.5).requires_grad_()
    return x, weight, torch.randn(out, requires_grad=True)


def _grads(function, tensors, dy):
    y = function(*tensors)
    return y.detach(), torch.autograd.grad(y, tensors, dy)


@pytest.mark.parametrize("leading", [(5,), (1,), (2, 7), (2, 3, 4)])
def test_values_and_gradients_stay_within_the_budget_of_a_product(onednn, leading):
    tensors = _inputs(*leading)
    dy = torch.randn(*leading, 72)
    y, grads = _grads(ops.linear, tensors, dy)
    assert len(onednn) == 3  # forward and two gradients; the bias is a sum
    plain = _grads(F.linear, tensors, dy)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    oracle = _grads(F.linear, wide, dy.double())
    for ours, theirs, exact in zip(
        (y, *grads), (plain[0], *plain[1]), (oracle[0], *oracle[1]), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert budget("product", "float32", measure(theirs, exact)).admits(measure(ours, exact))


def test_strided_inputs_and_expanded_gradients(onednn):
    x, weight, bias = (t.detach() for t in _inputs(6, 9))
    big = torch.randn(6, 20, 100)
    view = big[:, 3:12, 11:59]
    rows = torch.randn(144, 48)[::2]
    for given in (view, x.transpose(0, 1)):
        torch.testing.assert_close(ops.linear(given, rows, bias), F.linear(given, rows, bias))
    leaf = x.clone().requires_grad_()
    ops.linear(leaf, weight, None).sum().backward()  # dy has stride 0
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand_as(leaf), rtol=1e-4, atol=1e-4)
    assert onednn


def test_only_the_gradients_asked_for_are_made(onednn):
    x, weight, bias = _inputs(4)
    weight.requires_grad_(False)
    del onednn[:]
    y = ops.linear(x, weight, bias)
    y.sum().backward()
    assert len(onednn) == 2 and weight.grad is None
    assert x.grad is not None and bias.grad is not None


def test_nothing_is_computed_for_empty_batches():
    x, weight, bias = _inputs(0, 5)
    y = ops.linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 5, 72) and not weight.grad.any() and x.grad.shape == x.shape


@pytest.mark.parametrize(
    "what", ["reference", "autocast", "float64", "bfloat16", "compile", "vmap"]
)
def test_where_pytorch_does_it_itself(onednn, what):
    x, weight, bias = (t.detach() for t in _inputs(4, 5))
    expected = F.linear(x, weight, bias)
    if what == "reference":
        with use_backend("reference"):
            y = ops.linear(x, weight, bias)
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.linear(x, weight, bias)
        assert y.dtype == torch.bfloat16
        expected, y = expected, y.float()
    elif what == "compile":
        y = torch.compile(ops.linear, fullgraph=True, backend="eager")(x, weight, bias)
    elif what == "vmap":
        y = torch.func.vmap(ops.linear, (0, None, None))(x, weight, bias)
    else:
        dtype = getattr(torch, what)
        y = ops.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).float()
    assert not onednn
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


def test_small_products_and_switched_off_onednn_stay_with_pytorch(monkeypatch):
    from ast_fast.cpp import _gemm

    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: True)
    big, weight = torch.empty(1 << 12, 32), torch.empty(32, 32)
    assert _gemm.takes_onednn(big, weight) and not _gemm.takes_onednn(big[:8], weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _gemm.takes_onednn(big, weight)


def test_a_pytorch_without_the_operator_falls_back(monkeypatch):
    from ast_fast.cpp import _gemm

    class Absent:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(_gemm._C, "is_amd", lambda: True)
    monkeypatch.setattr(_gemm._C, "isa", lambda: "avx512")
    monkeypatch.setattr(torch.ops, "mkldnn", Absent())
    assert _gemm._onednn_is_faster.__wrapped__() is False


def test_a_second_gradient_says_no_instead_of_being_wrong(onednn):
    x, weight, bias = _inputs(4)
    (dx,) = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_model_uses_it_for_every_layer_and_hooks_are_still_seen(onednn):
    model = create_model("ast_mini_p16_s10", num_classes=3, depth=2).eval()
    x = torch.randn(2, model.config.input_tdim, model.config.input_fdim)
    with torch.no_grad():
        y = model(x)
        used = len(onednn)
        # the first block: qkv, proj, fc1, fc2; the last: q apart from k and v
        assert used == 9
        with use_backend("reference"):
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
        seen = []
        model.v.blocks[0].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert seen and len(onednn) == 2 * used - 1
