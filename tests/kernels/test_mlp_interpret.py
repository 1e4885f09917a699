"""GELU kernels and the feed-forward block in the Triton interpreter, against float64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast.kernels import _tuned, mlp
from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference
from ast_fast.testing import LAYOUTS, assert_same, assert_within, random_tensor

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
ALL = (True,) * 5


def check_gelu(h, dg):
    """GELU, its derivative and the column sums keep their budgets; returns all of them."""
    g = mlp.gelu_forward(h)
    dh, again, sums = mlp.gelu_backward_with_sums(dg, h)
    want = reference_backward.gelu_backward(dg.double(), h.double())
    assert g.dtype == dh.dtype == h.dtype and sums.dtype == torch.float32
    assert_same(again, g, "recomputed g")
    assert_within(g, reference.gelu(h.double()), "elementwise", what="g")
    assert_within(dh, want, "elementwise", what="dh")
    assert_within(sums, want.sum(0), "row sum", what="column sums")
    return g, dh, sums


def weights(arena, width, hidden, out, dtype):
    """w1, b1, w2, b2 in guarded memory."""
    shapes = [(hidden, width), (hidden,), (out, hidden), (out,)]
    scales = [width**-0.5, 0.1, hidden**-0.5, 0.1]
    return [
        arena.put(random_tensor(*shape, seed=10 + i, dtype=dtype, scale=scale))
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 768), (130, 70), (9, 257), (40, 512)])
def test_gelu_and_its_gradient_match_fp64(arena, rows, cols, dtype):
    h = arena.put(random_tensor(rows, cols, seed=0, dtype=dtype, scale=2.0))
    dg = arena.put(random_tensor(rows, cols, seed=1, dtype=dtype))
    check_gelu(h, dg)


def test_the_fit_of_phi_keeps_its_stated_error():
    h = torch.linspace(-12, 12, 48001)
    exact = h.double()
    g = mlp.gelu_forward(h).double()
    want = reference.gelu(exact)
    scale = want.abs().clamp(min=1.0)
    assert float(((g - want).abs() / scale).max()) < 2.5e-7
    slope = mlp.gelu_backward(torch.ones_like(h), h)[0].double()
    want_slope = reference_backward.gelu_backward(torch.ones_like(exact), exact)
    assert float((slope - want_slope).abs().max()) < 4e-7
    # the left tail keeps its digits, not only its size
    tail = (exact > -5) & (exact < -0.5)
    assert float(((g - want) / want).abs()[tail].max()) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
def test_limits_at_infinity_and_nan_in_its_place(dtype):
    inf, nan = math.inf, math.nan
    h = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, 25.0, -25.0, 60000.0, -60000.0], dtype=dtype)
    g = mlp.gelu_forward(h)
    dh, again = mlp.gelu_backward(torch.ones_like(h), h)
    assert_same(again, g)
    assert g[0] == inf and g[1] == 0 and g[2].isnan() and g[3] == 0 and g[4] == 0
    assert g[6] == 25 and g[7] == 0 and g[8] == h[8] and g[9] == 0
    assert dh[0] == 1 and dh[1] == 0 and dh[2].isnan() and dh[6] == 1 and dh[7] == 0
    assert dh[3] == 0.5 and dh[4] == 0.5 and dh[8] == 1 and dh[9] == 0
    assert g[5].isfinite() and dh[5].isfinite()


def test_gradients_that_are_infinite_or_nan_stay_in_their_place():
    h = torch.zeros(2, 3)
    dg = torch.tensor([[1.0, math.nan, math.inf], [1.0, 1.0, 1.0]])
    dh, _, sums = mlp.gelu_backward_with_sums(dg, h)
    assert torch.equal(dh.isnan(), dg.isnan()) and torch.equal(dh.isinf(), dg.isinf())
    assert sums[0] == 1 and sums[1].isnan() and sums[2] == math.inf


def tuned_families():
    """One GPU of every family in the table."""
    seen = {_tuned.family("mlp", arch): arch for arch in (120, 100, 90, 86, 80, 75)}
    return [pytest.param(arch, id=name) for name, arch in seen.items()]


@pytest.mark.parametrize("capability", tuned_families())
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
def test_every_tuned_configuration(arena, monkeypatch, capability, dtype):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    tile = _tuned.configs("mlp", capability)["gelu_backward"]
    rows, cols = tile["rows"] + 1, tile["cols"] + 3
    h = arena.put(random_tensor(rows, cols, seed=0, dtype=dtype))
    check_gelu(h, arena.put(random_tensor(rows, cols, seed=1, dtype=dtype)))
    elements = _tuned.configs("mlp", capability)["gelu_forward"]["elements"]
    for count in (elements - 1, elements, elements + 1):
        h = arena.put(random_tensor(count, seed=2, dtype=dtype))
        assert_within(mlp.gelu_forward(h), reference.gelu(h.double()), "elementwise")


def test_rows_are_summed_the_same_way_whatever_shares_them(arena, monkeypatch):
    h = arena.put(random_tensor(500, 20, seed=0))
    dg = arena.put(random_tensor(500, 20, seed=1))
    one = check_gelu(h, dg)
    assert all(map(torch.equal, one, check_gelu(h, dg)))
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 1)
    check_gelu(h, dg)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    h = arena.put(random_tensor(12, 30, seed=0))
    dg = arena.put(random_tensor(12, 30, seed=1))
    plain = check_gelu(h, dg)
    assert all(map(torch.equal, plain, check_gelu(LAYOUTS[layout](h), LAYOUTS[layout](dg))))


@pytest.mark.parametrize("how", ["rows", "all"])
def test_expanded_gradients_are_read_with_stride_zero(arena, how):
    h = arena.put(random_tensor(12, 30, seed=0))
    dg = arena.put(random_tensor(12, 30, seed=1))
    check_gelu(h, dg[:1].expand_as(dg) if how == "rows" else dg[:1, :1].expand_as(dg))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize(("rows", "width", "hidden", "out"), [(5, 16, 64, 16), (33, 24, 100, 40)])
def test_block_and_all_gradients_match_fp64(arena, rows, width, hidden, out, dtype):
    x = arena.put(random_tensor(rows, width, seed=0, dtype=dtype))
    dy = arena.put(random_tensor(rows, out, seed=1, dtype=dtype))
    w1, b1, w2, b2 = weights(arena, width, hidden, out, dtype)
    y, h = mlp.forward(x, w1, b1, w2, b2, save=True)
    grads = mlp.backward(dy, x, h, w1, w2, ALL)
    wide = [tensor.double().requires_grad_() for tensor in (x, w1, b1, w2, b2)]
    want = reference.mlp(*wide)
    want_grads = torch.autograd.grad(want, wide, dy.double())
    assert_within(y, want.detach(), "product", what="y")
    assert_within(h, torch.nn.functional.linear(*wide[:3]).detach(), "product", what="h")
    for name, ours, exact in zip(
        ("dx", "dw1", "db1", "dw2", "db2"), grads, want_grads, strict=True
    ):
        assert ours.dtype == dtype
        assert_within(ours, exact, "product", what=name)


def test_the_activation_overwrites_nothing_that_is_kept(arena):
    x = arena.put(random_tensor(6, 16, seed=0))
    parameters = weights(arena, 16, 32, 16, torch.float32)
    kept_y, h = mlp.forward(x, *parameters, save=True)
    dropped_y, none = mlp.forward(x, *parameters, save=False)
    assert none is None
    assert_same(kept_y, dropped_y)
    assert_same(h, torch.addmm(parameters[1], x, parameters[0].t()))


@pytest.mark.parametrize("index", range(5))
def test_only_the_gradients_asked_for_are_made(arena, index):
    x = arena.put(random_tensor(7, 8, seed=0))
    dy = arena.put(random_tensor(7, 8, seed=1))
    w1, b1, w2, b2 = weights(arena, 8, 24, 8, torch.float32)
    h = mlp.forward(x, w1, b1, w2, b2, save=True)[1]
    every = mlp.backward(dy, x, h, w1, w2, ALL)
    one = mlp.backward(dy, x, h, w1, w2, tuple(i == index for i in range(5)))
    assert [grad is not None for grad in one] == [i == index for i in range(5)]
    assert_same(one[index], every[index])


def test_no_rows_give_no_rows_and_zero_gradients(arena):
    w1, b1, w2, b2 = weights(arena, 8, 24, 8, torch.float32)
    x = torch.zeros(0, 8)
    y, h = mlp.forward(x, w1, b1, w2, b2, save=True)
    assert y.shape == (0, 8) and h.shape == (0, 24)
    grads = mlp.backward(torch.zeros(0, 8), x, h, w1, w2, ALL)
    shapes = [(0, 8), (24, 8), (24,), (8, 24), (8,)]
    assert [tuple(grad.shape) for grad in grads] == shapes
    assert not any(grad.any() for grad in grads)
    assert mlp.gelu_forward(torch.zeros(0)).shape == (0,)


def test_a_nan_row_stays_in_its_row(arena):
    x = arena.put(random_tensor(7, 8, seed=0))
    w1, b1, w2, b2 = weights(arena, 8, 24, 8, torch.float32)
    clean = mlp.forward(x, w1, b1, w2, b2, save=True)[0]
    x[3, 2] = math.nan
    y, h = mlp.forward(x, w1, b1, w2, b2, save=True)
    dx = mlp.backward(torch.ones_like(y), x, h, w1, w2, ALL)[0]
    others = torch.arange(7) != 3
    assert y[3].isnan().all() and dx[3].isnan().all()
    assert torch.equal(y[others], clean[others]) and dx[others].isfinite().all()


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    rows, cols, stride = 5, 40, 2**29 + 16
    h = random_tensor(rows, cols, seed=0, dtype=torch.float16)
    dg = random_tensor(rows, cols, seed=1, dtype=torch.float16)
    far = [
        torch.empty((rows - 1) * stride + cols, dtype=torch.float16)
        .as_strided((rows, cols), (stride, 1))
        .copy_(tensor)
        for tensor in (h, dg)
    ]
    near = mlp.gelu_backward_with_sums(dg, h)
    assert all(map(torch.equal, near, mlp.gelu_backward_with_sums(far[1], far[0])))


def test_unsupported_names_what_is_wrong():
    x, w = torch.zeros(2, 8), torch.zeros(8, 8)
    b = torch.zeros(8)
    assert mlp.unsupported(x, w, b, w, b) is None
    assert "one dtype" in mlp.unsupported(x.half(), w, b, w, b)
    wide = [tensor.double() for tensor in (x, w, b, w, b)]
    assert "float64" in mlp.unsupported(*wide)


# far below 0 GELU's slope is small and as badly conditioned as a Gaussian's tail: its error is promised relative to
# the tensor's scale, for which it needs some elements
@given(
    rows=st.integers(1, 60),
    cols=st.integers(16, 400),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
    scale=st.sampled_from([1e-3, 1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_layout_and_scale(arena, rows, cols, dtype, layout, scale, seed):
    move = LAYOUTS.get(layout, lambda tensor: tensor)
    h = arena.put(random_tensor(rows, cols, seed=seed, dtype=dtype, scale=scale))
    dg = arena.put(random_tensor(rows, cols, seed=seed + 1, dtype=dtype))
    check_gelu(move(h), move(dg))
