"""FP8 operands in the Triton interpreter: the bits of PyTorch's casts, transposed copies, bounds.

The interpreter's own cast to FP8 neither rounds nor keeps NaN, so under it the kernels round by hand: what
is proved here is everything but the hardware's cast instruction, which rounds the same way.
"""

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

from ast_fast.kernels import _tuned, fp8
from ast_fast.ops import _fp8 as steps
from ast_fast.reference import backward as reference_backward
from ast_fast.reference import fp8 as emulation
from ast_fast.reference import ops as reference
from ast_fast.testing import LAYOUTS, assert_within, random_tensor

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])


def same_bits(got, want, what=""):
    """Equal bit for bit, NaN apart, whose payload is free."""
    assert got.dtype == want.dtype and got.shape == want.shape, what
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan), what
    assert torch.equal(got.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan]), what


def same_operand(got, want):
    for name in ("rows", "columns"):
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None), name
        if other is not None:
            same_bits(one, other, name)
    assert torch.equal(got.inverse, want.inverse)
    assert (got.sums is None) == (want.sums is None)
    if want.sums is not None:
        assert_within(got.sums, want.sums.double(), "row sum", what="sums")


@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
def test_every_number_is_rounded_as_pytorch_rounds_it(gradient):
    kind = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    codes = torch.arange(256, dtype=torch.uint8).view(kind).float()
    exact = codes[codes.isfinite()].sort().values.unique()
    middle = (exact[1:] + exact[:-1]) / 2
    near = [middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9))]
    values = torch.cat([exact, -exact, *near, torch.tensor([-0.0, 1e-12, -1e-12, math.nan])])
    x = values[None, :]
    # a bound that scales by 1
    top = torch.tensor([57344.0 if gradient else 448.0])
    got = fp8.quantise(x, top, gradient=gradient)
    assert float(got.inverse) == 1.0
    same_bits(got.rows, x.to(kind))


@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
def test_beyond_the_bound_saturates_and_what_is_not_finite_becomes_nan(gradient):
    largest = 57344.0 if gradient else 448.0
    x = torch.tensor([[1.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 500.0, 61440.0]])
    got = fp8.quantise(x, torch.tensor([largest]), gradient=gradient).rows.float()[0]
    assert got[0] == 1.0 and got[1] == largest and got[2] == -largest
    assert got[3:6].isnan().all() and got[7] == largest
    assert got[6] == (512.0 if gradient else 448.0)


@pytest.mark.parametrize(
    "bound", [0.0, 1e-44, 1e-30, 0.1, 1.0, 1.75, 1.7500001, 448.0, 449.0, 3e38, math.inf]
)
@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
def test_scales_are_the_largest_powers_of_two_that_fit(bound, gradient):
    x = torch.tensor([[bound if math.isfinite(bound) else 1.0, 0.0]])
    got = fp8.quantise(x, torch.tensor([bound]), gradient=gradient)
    scale = 1.0 / float(got.inverse)
    assert math.frexp(scale)[0] == 0.5
    assert float(got.inverse) == float(
        emulation.quantise(x, torch.tensor([bound]), gradient=gradient).inverse
    )
    if 1e-20 < bound < 1e20:
        largest = 57344.0 if gradient else 448.0
        assert bound * scale <= largest < 2 * bound * scale


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (7, 48), (65, 130), (16, 16), (130, 33)])
@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
def test_operands_match_the_emulation_bit_for_bit(arena, rows, cols, gradient, dtype):
    x = arena.put(random_tensor(rows, cols, seed=rows, dtype=dtype, scale=3.0))
    found = fp8.facts(x)
    want = emulation.facts(x)
    assert float(found[0].max()) == float(want[0]) == float(x.abs().max())
    assert float(found[1].max()) == pytest.approx(float(x.float().norm(dim=1).max()), rel=1e-6)
    options = {"gradient": gradient, "columns": True, "sums": True}
    got = fp8.quantise(x, found[0], **options)
    same_operand(got, emulation.quantise(x, want[0], **options))
    padding = got.columns.view(torch.uint8)[:, rows:]
    assert got.columns.shape == (cols, -(-rows // 16) * 16) and not padding.any()
    bare = fp8.quantise(x, found[0], gradient=gradient)
    assert bare.columns is None and bare.sums is None
    same_bits(bare.rows, got.rows)


def test_wide_rows_are_measured_over_all_their_columns():
    x = random_tensor(3, 1300, seed=0)
    found = fp8.facts(x)
    assert float(found[1].max()) == pytest.approx(float(x.norm(dim=1).max()), rel=1e-6)


def test_statistics_are_of_the_rounded_total():
    x = torch.full((2, 32), 1e-4) * torch.arange(32)
    residual = torch.ones(2, 32, dtype=torch.float16)
    made = fp8.norm_quantise(x, residual, torch.ones(32), torch.zeros(32), 1e-9, False)
    want = reference.layer_norm(made[2].double(), torch.ones(32), torch.zeros(32), 1e-9)
    assert made[2].dtype == torch.float16
    assert_within(made[4], want[2], "normalised", what="rstd")


def test_facts_leave_out_what_is_not_finite_and_keep_tiny_rows():
    x = torch.tensor([[1.0, -3.0, math.inf], [math.nan, 2.0, -math.inf]])
    found = fp8.facts(x)
    assert float(found[0].max()) == 3.0
    assert float(found[1].max()) == pytest.approx(10.0**0.5)
    tiny = fp8.facts(torch.full((2, 4), 1e-30))
    assert float(tiny[1].max()) == pytest.approx(1e-30, rel=1e-5)
    assert not fp8.facts(torch.zeros(5, 3)).any()
    huge = fp8.facts(torch.full((1, 4), 3e38))
    assert float(huge[1].max()) == pytest.approx(1e18) and float(huge[0].max()) > 2e38


def test_all_zero_tensors_stay_zero():
    x = torch.zeros(3, 16)
    got = fp8.quantise(x, fp8.facts(x)[0], columns=True)
    assert not got.rows.view(torch.uint8).any() and not got.columns.view(torch.uint8).any()
    assert got.inverse.isfinite().all()


def test_bounds_of_products():
    a, b = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0.5])
    bias = torch.cat([torch.linspace(-4.0, 1.0, 1500), torch.tensor([math.nan])])
    assert float(fp8.bound(a, b, 2.0)) == 3.0
    assert float(fp8.bound(a, b, 2.0, bias)) == 7.0
    assert float(emulation.bound(a, b, 2.0, bias)) == 7.0


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), [(5, 16), (70, 136)])
def test_gelu_and_its_gradient_go_to_fp8(arena, rows, cols, dtype):
    h = arena.put(random_tensor(rows, cols, seed=0, dtype=dtype, scale=2.0))
    dg = arena.put(random_tensor(rows, cols, seed=1, dtype=dtype))
    g_bound, dh_bound = torch.tensor([16.0]), torch.tensor([8.0])
    g = fp8.quantise(h, g_bound, gelu=True)
    dh, again = fp8.gelu_backward_quantise(dg, h, dh_bound, g_bound)
    # the fit of Phi may round to the neighbour where erf does not
    want = reference.gelu(h.double())
    assert_close_in_fp8(g.rows, g.inverse, want, 2.0**-4)
    exact = reference_backward.gelu_backward(dg.double(), h.double())
    assert_close_in_fp8(dh.rows, dh.inverse, exact, 2.0**-3)
    assert_within(dh.sums, exact.sum(0), "row sum", what="sums")
    same_bits(dh.columns[:, :rows].view(torch.uint8).t().contiguous().view(dh.rows.dtype), dh.rows)
    same_bits(again.columns[:, :rows].view(torch.uint8).t().contiguous().view(g.rows.dtype), g.rows)
    assert torch.equal(again.inverse, g.inverse) and again.rows is None
    for turned in (dh.columns, again.columns):
        assert not turned.view(torch.uint8)[:, rows:].any()


def assert_close_in_fp8(rows, inverse, want, roundoff):
    """Each entry within half a last place, and within half of the smallest number near zero."""
    got = rows.double() * inverse.double()
    smallest = 2.0 ** (-9 if roundoff == 2.0**-4 else -16)
    allowed = torch.maximum(want.abs() * roundoff, 0.5 * smallest * inverse.double())
    assert ((got - want).abs() <= 1.0001 * allowed).all()


def test_gelu_keeps_its_limits_on_the_way():
    h = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, 100.0, -100.0]])
    g = fp8.quantise(h, torch.tensor([448.0]), gelu=True).rows.float()[0]
    # -inf gives 0 as it should; +inf has no number in FP8
    assert g[0].isnan() and g[1] == 0 and g[2].isnan() and g[3] == 0 and g[5] == 0
    assert g[4] == 96.0 or g[4] == 104.0
    dh, _ = fp8.gelu_backward_quantise(
        torch.ones_like(h), h, torch.tensor([8.0]), torch.tensor([448.0])
    )
    slope = dh.rows.float()[0] * dh.inverse
    assert slope[0] == 1 and slope[1] == 0 and slope[2].isnan() and slope[3] == 0.5


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (5, 24), (37, 192), (3, 384), (18, 768)])
def test_residual_sum_and_layer_norm_go_to_fp8(arena, rows, cols, dtype):
    x = arena.put(random_tensor(rows, cols, seed=0, dtype=dtype))
    residual = arena.put(random_tensor(rows, cols, seed=1, scale=2.0))
    weight = arena.put(1.0 + 0.2 * random_tensor(cols, seed=2))
    bias = arena.put(0.3 * random_tensor(cols, seed=3))
    got, found, total, mean, rstd = fp8.norm_quantise(x, residual, weight, bias, 1e-6, True)
    want = emulation.norm_quantise(x, residual, weight, bias, 1e-6, True)
    assert torch.equal(total, x.float() + residual)
    exact, exact_mean, exact_rstd = reference.layer_norm(
        total.double(), weight.double(), bias.double(), 1e-6
    )
    assert_within(mean, exact_mean, "normalised")
    assert_within(rstd, exact_rstd, "normalised")
    assert torch.equal(got.inverse, want[0].inverse)
    assert_close_in_fp8(got.rows, got.inverse, exact, 2.0**-4)
    same_bits(
        got.columns[:, :rows].view(torch.uint8).t().contiguous().view(got.rows.dtype), got.rows
    )
    assert not got.columns.view(torch.uint8)[:, rows:].any()
    reach = float((weight.abs() * cols**0.5 + bias.abs()).max())
    assert float(found[0].max()) == pytest.approx(reach, rel=1e-6)
    assert float(exact.abs().max()) <= reach
    assert float(found[1].max()) == pytest.approx(float(exact.norm(dim=1).max()), rel=1e-5)
    bare = fp8.norm_quantise(x, residual, weight, bias, 1e-6, False)[0]
    assert bare.columns is None
    same_bits(bare.rows, got.rows)


def test_more_rows_than_programs_and_a_nan_row_stays_in_its_row(arena, monkeypatch):
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 1)
    x = arena.put(random_tensor(150, 192, seed=0))
    residual = arena.put(random_tensor(150, 192, seed=1))
    weight, bias = torch.ones(192), torch.zeros(192)
    clean = fp8.norm_quantise(x, residual, weight, bias, 1e-6, True)
    same_operand(clean[0], emulation.norm_quantise(x, residual, weight, bias, 1e-6, True)[0])
    assert float(fp8.facts(x)[0].max()) == float(x.abs().max())
    x[3, 5] = math.nan
    dirty = fp8.norm_quantise(x, residual, weight, bias, 1e-6, True)
    others = torch.arange(150) != 3
    assert dirty[0].rows[3].float().isnan().all()
    assert torch.equal(dirty[0].rows.float()[others], clean[0].rows.float()[others])
    assert dirty[1].isfinite().all() and torch.equal(dirty[0].inverse, clean[0].inverse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_bits_of_a_contiguous_copy(arena, layout):
    x = arena.put(random_tensor(20, 48, seed=0))
    moved = LAYOUTS[layout](x)
    same_operand(
        fp8.quantise(moved, fp8.facts(moved)[0], columns=True),
        fp8.quantise(x, fp8.facts(x)[0], columns=True),
    )


def tuned_families():
    """One GPU of every family in the table."""
    seen = {_tuned.family("fp8", arch): arch for arch in (120, 100, 90, 89)}
    return [pytest.param(arch, id=name) for name, arch in seen.items()]


@pytest.mark.parametrize("capability", tuned_families())
def test_every_tuned_configuration(arena, monkeypatch, capability):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    tile = _tuned.configs("fp8", capability)["quantise"]
    x = arena.put(random_tensor(tile["rows"] + 1, tile["cols"] + 3, seed=0))
    largest = fp8.facts(x)[0]
    same_operand(
        fp8.quantise(x, largest, columns=True, sums=True),
        emulation.quantise(x, largest, columns=True, sums=True),
    )
    for entry in _tuned.configs("fp8", capability)["norm"]:
        width = entry["max_width"]
        x = arena.put(random_tensor(entry["rows"] + 1, width, seed=1))
        residual, ones, zeros = torch.zeros_like(x), torch.ones(width), torch.zeros(width)
        got = fp8.norm_quantise(x, residual, ones, zeros, 1e-6, True)[0]
        exact = reference.layer_norm(x.double(), ones.double(), zeros.double(), 1e-6)[0]
        assert_close_in_fp8(got.rows, got.inverse, exact, 2.0**-4)


@by_dtype
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
def test_whole_layers_give_what_the_emulation_gives(arena, normed, dtype):
    rows, width, hidden = 21, 32, 64
    x = arena.put(random_tensor(rows, width, seed=0, dtype=dtype))
    dy = arena.put(random_tensor(rows, width, seed=1, dtype=dtype))
    w1 = arena.put(random_tensor(hidden, width, seed=2, scale=width**-0.5))
    b1 = arena.put(random_tensor(hidden, seed=3, scale=0.1))
    w2 = arena.put(random_tensor(width, hidden, seed=4, scale=hidden**-0.5))
    b2 = arena.put(random_tensor(width, seed=5, scale=0.1))
    norm = None
    if normed:
        stream = arena.put(random_tensor(rows, width, seed=6))
        norm = steps.Norm(stream, torch.ones(width), torch.zeros(width), 1e-6)
    results = []
    for backend in (fp8, emulation):
        y, rest, saved = steps.mlp_forward(backend, x, norm, w1, b1, w2, b2, True)
        grads = steps.mlp_backward(backend, dy, saved, torch.float32, [True] * 5)
        z, _, kept = steps.linear_forward(backend, x, norm, w1, b1, True)
        more = steps.linear_backward(backend, z, kept, torch.float32, [True] * 3)
        short = steps.mlp_forward(backend, x, norm, w1, b1, w2, b2, False)
        assert torch.equal(short[0], y) and short[2] == []
        results.append([y, *rest, *grads, z, *more])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        # a value in ten thousand falls on the other side of a rounding
        assert float((got.double() - want.double()).norm() / want.double().norm()) < 5e-3


def test_no_rows_give_no_rows_and_zero_sums():
    x = torch.zeros(0, 16)
    got = fp8.quantise(x, fp8.facts(x)[0], columns=True, sums=True)
    assert got.rows.shape == (0, 16) and got.columns.shape == (16, 0) and not got.sums.any()
    dh, g = fp8.gelu_backward_quantise(x, x, torch.ones(1), torch.ones(1))
    assert dh.columns.shape == g.columns.shape == (16, 0) and not dh.sums.any()
    made, found, total, mean, _ = fp8.norm_quantise(
        x, x, torch.ones(16), torch.zeros(16), 1e-6, True
    )
    assert made.rows.shape == total.shape == (0, 16) and mean.shape == (0,) and not found.any()
    w = fp8.quantise(torch.ones(32, 16), torch.ones(1), columns=True)
    y = fp8.matmul(made.rows, w.rows, made.inverse, w.inverse, torch.float32, torch.ones(32))
    assert y.shape == (0, 32)
    dw = fp8.matmul(w.columns[:, :0], made.columns, w.inverse, made.inverse, torch.float32)
    assert dw.shape == (16, 16) and not dw.any()


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    rows, cols, stride = 5, 32, 2**29 + 16
    x = random_tensor(rows, cols, seed=0, dtype=torch.float16)
    far = (
        torch.empty((rows - 1) * stride + cols, dtype=torch.float16)
        .as_strided((rows, cols), (stride, 1))
        .copy_(x)
    )
    assert torch.equal(fp8.facts(far), fp8.facts(x))
    largest = fp8.facts(x)[0]
    same_operand(fp8.quantise(far, largest), fp8.quantise(x, largest))


def test_unsupported_names_what_is_wrong(monkeypatch):
    x, w = torch.zeros(2, 32), torch.zeros(16, 32)
    assert fp8.unsupported(x, w) is None
    assert "multiples of 16" in fp8.unsupported(x[:, :24], w[:, :24])
    assert "float64" in fp8.unsupported(x.double(), w)
    assert "too wide" in fp8.unsupported(torch.zeros(1, 8192), torch.zeros(16, 8192))
    monkeypatch.setattr(_tuned, "INTERPRETED", False)
    monkeypatch.setattr(_tuned, "capability", lambda device: 86)
    assert "8.9 or newer, got 8.6" in fp8.unsupported(x, w)


@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    gradient=st.booleans(),
    columns=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_scale(arena, rows, cols, dtype, gradient, columns, scale, seed):
    x = arena.put(random_tensor(rows, cols, seed=seed, dtype=dtype, scale=scale))
    largest = fp8.facts(x)[0]
    options = {"gradient": gradient, "columns": columns, "sums": True}
    same_operand(fp8.quantise(x, largest, **options), emulation.quantise(x, largest, **options))
