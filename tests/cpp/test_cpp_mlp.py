"""GELU and the MLP of the C++ backend against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from ast_fast.cpp import _gemm, mlp

F32, BF16 = torch.float32, torch.bfloat16
INF = float("inf")


def gelu64(x):
    return x.double() * 0.5 * torch.special.erfc(-x.double() * math.sqrt(0.5))


def slope64(x):
    x = x.double()
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5)) + x * density


def test_gelu_is_exact_to_2e_6_over_its_whole_range():
    x = torch.cat(
        (
            torch.linspace(-15, 15, 300001),
            torch.logspace(-38, 38, 4001),
            -torch.logspace(-38, 1, 4001),
        )
    )
    x = x[None, :]
    exact, slope = gelu64(x), slope64(x)
    g = mlp.gelu_forward(x)
    assert ((g.double() - exact).abs() <= 2e-6 * exact.abs().clamp(min=1)).all()
    # small results keep their relative accuracy too, where PyTorch's own 1 + erf cancels
    seen = exact.abs() > 1e-12
    assert ((g.double() - exact).abs() / exact.abs())[seen].max() < 5e-6
    dh, again = mlp.gelu_backward(torch.ones_like(x), x)
    assert torch.equal(again, g)
    assert (dh.double() - slope).abs().max() < 1e-6


def test_gelu_of_every_bf16_value_is_the_exact_one_rounded_or_its_neighbour():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    x = x[x.isfinite()][None]
    exact, slope = gelu64(x), slope64(x)
    g = mlp.gelu_forward(x)
    dh, _ = mlp.gelu_backward(torch.ones_like(x), x)

    def half_unit(value):
        return torch.ldexp(torch.ones_like(value), torch.frexp(value).exponent - 9)

    # the function itself may add 2.5e-4 to the rounding
    assert ((g.double() - exact).abs() <= half_unit(exact) + 2.5e-4 * exact.abs() + 1e-37).all()
    assert ((dh.double() - slope).abs() <= half_unit(slope) + 2.5e-4).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gelu_limits_and_denormals(dtype):
    # the fourth and fifth are denormal: halved, not flushed to zero
    x = torch.tensor([[INF, -INF, float("nan"), 1e-39, -1e-39, 0.0, 100.0, -100.0]]).to(dtype)
    g = mlp.gelu_forward(x)
    assert g[0, 0] == INF and g[0, 1] == 0 and g[0, 2].isnan()
    assert g[0, 3] > 0 and g[0, 4] < 0
    assert torch.allclose(g[0, 3].double(), x[0, 3].double() / 2, rtol=0, atol=5e-41)
    assert g[0, 5] == 0 and g[0, 6] == x[0, 6] and g[0, 7] == 0
    dh, _ = mlp.gelu_backward(torch.ones_like(x), x)
    assert dh[0, 0] == 1 and dh[0, 1] == 0 and dh[0, 2].isnan() and dh[0, 5] == 0.5


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sizes", [(1, 3, 5, 2), (37, 32, 130, 24), (700, 64, 2050, 48)])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_mlp_matches_fp64(dtype, sizes, save, onednn, within, monkeypatch):
    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(_gemm, "_LEAST_WORK", 1)
    rows, width, hidden, out = sizes
    shapes = ((rows, width), (hidden, width), (hidden,), (out, hidden), (out,))
    tensors = [(torch.randn(shape) * 0.3).to(dtype) for shape in shapes]
    exact = [t.double().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    dy = torch.randn(rows, out).to(dtype)

    def run(x, w1, b1, w2, b2):
        y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
        y.backward(dy.to(y.dtype))
        return y.detach()

    y64, y_torch = run(*exact), run(*theirs)
    y, h = mlp.forward(*tensors, save)
    floor = 2e-6 if dtype == F32 else 8e-3
    within(y, y_torch, y64, floor, "y")
    assert (h is not None) == save
    if h is not None:
        x, w1, _, w2, _ = tensors
        before = h.clone()
        grads = mlp.backward(dy, x, h, w1, w2, (True,) * 5)
        assert torch.equal(h, before), "backward changed its input"
        for name, ours, other, oracle in zip(
            ["x", "w1", "b1", "w2", "b2"], grads, theirs, exact, strict=True
        ):
            assert ours.dtype == dtype
            within(ours, other.grad, oracle.grad, floor, name)


def test_only_the_gradients_asked_for_are_made():
    x, w1, b1, w2, b2 = (torch.randn(s) for s in ((4, 8), (16, 8), (16,), (8, 16), (8,)))
    _, h = mlp.forward(x, w1, b1, w2, b2, True)
    dy = torch.randn(4, 8)
    everything = mlp.backward(dy, x, h, w1, w2, (True,) * 5)
    for index in range(5):
        needs = tuple(i == index for i in range(5))
        grads = mlp.backward(dy, x, h, w1, w2, needs)
        assert [g is not None for g in grads] == list(needs)
        assert torch.equal(grads[index], everything[index])
    expanded = mlp.backward(torch.ones(()).expand(4, 8), x, h, w1, w2, (True,) * 5)
    dense = mlp.backward(torch.ones(4, 8), x, h, w1, w2, (True,) * 5)
    assert all(torch.allclose(a, b) for a, b in zip(expanded, dense, strict=True))


def test_no_rows():
    w1, b1, w2, b2 = torch.randn(16, 8), torch.randn(16), torch.randn(8, 16), torch.randn(8)
    y, h = mlp.forward(torch.empty(0, 8), w1, b1, w2, b2, True)
    assert y.shape == (0, 8) and h.shape == (0, 16)
    grads = mlp.backward(y, torch.empty(0, 8), h, w1, w2, (True,) * 5)
    assert [tuple(g.shape) for g in grads] == [(0, 8), (16, 8), (16,), (8, 16), (8,)]
    assert not any(g.any() for g in grads)


def test_bias_gradients_are_summed_in_fp32_over_many_rows(within):
    rows = 20000
    h = torch.randn(rows, 8).to(BF16)
    dy = (torch.rand(rows, 8) + 0.5).to(BF16)
    w = torch.eye(8).to(BF16)
    db1, db2 = mlp.backward(dy, h, h, w, w, (False, False, True, False, True))[2::2]
    within(db2, None, dy.double().sum(0), 2**-8, "db2")
    within(db1, None, (dy.double() * slope64(h)).sum(0), 2**-8, "db1")


def test_the_bias_gradient_sums_the_gradients_as_they_are_stored():
    h, dy = torch.randn(2, 512).to(BF16), torch.randn(2, 512).to(BF16)
    eye = torch.eye(512).to(BF16)
    # through an identity dx is dh as it was rounded; two rows have an exact sum in float32
    dx, _, db1, _, _ = mlp.backward(dy, h, h, eye, eye, (True, False, True, False, False))
    assert torch.equal(db1, dx.float().sum(0).to(BF16))
