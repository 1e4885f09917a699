"""LayerNorm kernels, alone and with the residual add, in the Triton interpreter against float64."""

from __future__ import annotations

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

from ast_fast.kernels import _tuned, add_layer_norm, layer_norm
from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference
from ast_fast.testing import LAYOUTS, assert_same, assert_within, random_tensor

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
EPS = 1e-6


def inputs(arena, rows, width, dtype, parameters=torch.float32, seed=0):
    """x, residual, weight, bias, dy, dtotal in guarded memory."""
    draw = [random_tensor(rows, width, seed=seed + i, dtype=dtype) for i in range(4)]
    x, residual, dy, dtotal = (arena.put(tensor) for tensor in draw)
    weight = arena.put(1 + 0.5 * random_tensor(width, seed=seed + 4)).to(parameters)
    bias = arena.put(random_tensor(width, seed=seed + 5)).to(parameters)
    return x, residual, weight, bias, dy, dtotal


def check_statistics(x, mean, rstd, want_mean, want_rstd):
    """A mean is as good as the rounding of its terms, which may cancel; 1/std is relative."""
    if x.numel():
        worst = (mean - want_mean).abs() / x.double().abs().amax(1).clamp(min=1e-30)
        assert float(worst.max()) < 5e-7
    assert_within(rstd, want_rstd, "normalised", what="rstd")


def check_plain(x, weight, bias, dy, out_dtype=None):
    """Forward and gradients of layer_norm keep their budgets; returns all of them."""
    out_dtype = out_dtype or x.dtype
    y, mean, rstd = layer_norm.forward(x, weight, bias, EPS, out_dtype)
    dx, dweight, dbias = layer_norm.backward(dy, x, weight, mean, rstd)
    wide = [tensor.double() for tensor in (x, weight, bias, dy)]
    want_y, want_mean, want_rstd = reference.layer_norm(*wide[:3], EPS)
    want = reference_backward.layer_norm(wide[3], wide[0], wide[1], want_mean, want_rstd)
    assert y.dtype == out_dtype and dx.dtype == x.dtype
    assert y.is_contiguous() and dx.is_contiguous()
    assert {t.dtype for t in (mean, rstd, dweight, dbias)} == {torch.float32}
    assert_within(y, want_y, "normalised", what="y")
    check_statistics(x, mean, rstd, want_mean, want_rstd)
    assert_within(dx, want[0], "normalised", what="dx")
    assert_within(dweight, want[1], "row sum", what="dweight")
    assert_within(dbias, want[2], "row sum", what="dbias")
    return y, mean, rstd, dx, dweight, dbias


def check_fused(x, residual, weight, bias, dy, dtotal, out_dtype=None):
    """Forward and gradients of add_layer_norm keep their budgets; returns all of them."""
    out_dtype = out_dtype or x.dtype
    y, total, mean, rstd = add_layer_norm.forward(x, residual, weight, bias, EPS, out_dtype)
    dsum, dweight, dbias = add_layer_norm.backward(dy, dtotal, total, weight, mean, rstd)
    assert_same(total, (x + residual).to(residual.dtype), "total")
    wide = [tensor.double() for tensor in (total, weight, bias, dy)]
    want_y, want_mean, want_rstd = reference.layer_norm(*wide[:3], EPS)
    wide_dtotal = None if dtotal is None else dtotal.double()
    want = reference_backward.add_layer_norm(
        wide[3], wide_dtotal, wide[0], wide[1], want_mean, want_rstd
    )
    assert y.dtype == out_dtype and dsum.dtype == total.dtype
    assert {t.dtype for t in (mean, rstd, dweight, dbias)} == {torch.float32}
    assert_within(y, want_y, "normalised", what="y")
    check_statistics(total, mean, rstd, want_mean, want_rstd)
    assert_within(dsum, want[0], "normalised", what="dsum")
    assert_within(dweight, want[1], "row sum", what="dweight")
    assert_within(dbias, want[2], "row sum", what="dbias")
    return y, total, mean, rstd, dsum, dweight, dbias


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 768), (2, 192), (7, 1), (5, 3), (129, 384), (67, 768), (33, 1023), (3, 1025), (2, 5000)],
)
def test_forward_and_gradients_match_fp64(arena, rows, width, dtype):
    x, residual, weight, bias, dy, dtotal = inputs(arena, rows, width, dtype, dtype)
    check_plain(x, weight, bias, dy)
    check_fused(x, residual, weight, bias, dy, dtotal)


def tuned_entries():
    """Every entry of both tables once, with the direction it serves."""
    seen = {}
    for op in ("layer_norm", "add_layer_norm"):
        for capability in (75, 80, 86, 90, 100, 120):
            for direction, entries in _tuned.configs(op, capability).items():
                for entry in entries:
                    tile = f"{entry['rows']}x{entry['max_width']}"
                    label = f"{op}-{direction}-{tile}"
                    seen.setdefault(label, pytest.param(op, entry, capability, id=label))
    return list(seen.values())


@pytest.mark.parametrize(("op", "entry", "capability"), tuned_entries())
def test_every_tuned_configuration(arena, monkeypatch, op, entry, capability):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    # one whole tile of rows and an incomplete one, at the widest row and one short of it
    rows, width = entry["rows"] + 1, entry["max_width"] - 1
    x, residual, weight, bias, dy, dtotal = inputs(arena, rows, width, torch.float32)
    if op == "layer_norm":
        check_plain(x, weight, bias, dy)
    else:
        check_fused(x, residual, weight, bias, dy, dtotal)


def test_more_rows_than_programs_take_several_blocks_each(arena, monkeypatch):
    x, residual, weight, bias, dy, dtotal = inputs(arena, 300, 40, torch.float32)
    few = check_plain(x, weight, bias, dy)
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 1000)
    many = check_plain(x, weight, bias, dy)
    assert all(map(torch.equal, few[:4], many[:4]))
    check_fused(x, residual, weight, bias, dy, dtotal)


@pytest.mark.parametrize(
    ("dtype", "parameters", "out"),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_parameters_and_output_may_have_dtypes_of_their_own(arena, dtype, parameters, out):
    x, residual, weight, bias, dy, dtotal = inputs(arena, 9, 130, dtype, parameters)
    dy = dy.to(out)
    check_plain(x, weight, bias, dy, out)
    check_fused(x, residual, weight, bias, dy, dtotal, out)
    # a stream in float32 with branches in 16 bits
    check_fused(x, residual.float(), weight, bias, dy, dtotal.float(), out)


def test_statistics_are_those_of_the_rounded_total(arena):
    x, residual, weight, bias, *_ = inputs(arena, 4, 96, torch.float32)
    residual = (100 * residual).half()
    y, total, mean, _ = add_layer_norm.forward(x, residual, weight, bias, EPS, torch.float32)
    assert total.dtype == torch.float16
    assert_within(mean, total.double().mean(1), "normalised")
    assert_within(y, reference.layer_norm(total.double(), weight, bias, EPS)[0], "normalised")


def test_without_a_gradient_of_the_total_the_norm_gradient_is_alone(arena):
    x, residual, weight, bias, dy, dtotal = inputs(arena, 6, 70, torch.float32)
    alone = check_fused(x, residual, weight, bias, dy, None)
    zero = check_fused(x, residual, weight, bias, dy, torch.zeros_like(dtotal))
    assert all(map(torch.equal, alone, zero))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    tensors = inputs(arena, 6, 40, torch.float32)
    plain = check_fused(*tensors)
    x, residual, weight, bias, dy, dtotal = tensors
    moved = [LAYOUTS[layout](tensor) for tensor in (x, residual, dy, dtotal)]
    strided = check_fused(moved[0], moved[1], LAYOUTS[layout](weight), bias, moved[2], moved[3])
    assert all(map(torch.equal, plain, strided))
    for ours, want in zip(
        check_plain(moved[0], weight, LAYOUTS[layout](bias), moved[2]),
        check_plain(x, weight, bias, dy),
        strict=True,
    ):
        assert torch.equal(ours, want)


@pytest.mark.parametrize("how", ["rows", "all"])
def test_expanded_gradients_are_read_with_stride_zero(arena, how):
    x, residual, weight, bias, dy, _ = inputs(arena, 7, 33, torch.float32)
    expanded = dy[:1].expand_as(dy) if how == "rows" else dy[:1, :1].expand_as(dy)
    check_plain(x, weight, bias, expanded)
    check_fused(x, residual, weight, bias, expanded, expanded)


def test_no_rows_give_no_rows_and_zero_gradients():
    weight = torch.ones(24)
    empty = torch.zeros(0, 24)
    y, mean, rstd = layer_norm.forward(empty, weight, weight, EPS, torch.float16)
    assert y.shape == (0, 24) and y.dtype == torch.float16 and mean.shape == rstd.shape == (0,)
    dx, dweight, dbias = layer_norm.backward(empty, empty, weight, mean, rstd)
    assert dx.shape == (0, 24) and not dweight.any() and not dbias.any()
    y, total, mean, rstd = add_layer_norm.forward(empty, empty, weight, weight, EPS, torch.float32)
    assert y.shape == total.shape == (0, 24)
    dsum, dweight, dbias = add_layer_norm.backward(empty, None, total, weight, mean, rstd)
    assert dsum.shape == (0, 24) and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_value_stays_in_its_row(arena, poison):
    x, residual, weight, bias, dy, dtotal = inputs(arena, 9, 50, torch.float32)
    clean_y, clean_total, clean_mean, clean_rstd = add_layer_norm.forward(
        x, residual, weight, bias, EPS, torch.float32
    )
    clean = add_layer_norm.backward(dy, dtotal, clean_total, weight, clean_mean, clean_rstd)[0]
    x[4, 17] = poison
    y, total, mean, rstd = add_layer_norm.forward(x, residual, weight, bias, EPS, torch.float32)
    dsum, dweight, _ = add_layer_norm.backward(dy, dtotal, total, weight, mean, rstd)
    others = torch.arange(9) != 4
    assert y[4].isnan().all() and dsum[4].isnan().all() and dweight.isnan().all()
    assert torch.equal(y[others], clean_y[others]) and torch.equal(dsum[others], clean[others])
    plain = layer_norm.forward(x, weight, bias, EPS, torch.float32)[0]
    assert plain[4].isnan().all() and plain[others].isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4])
def test_extreme_scales_and_constant_rows(arena, scale):
    x, _, weight, bias, dy, _ = inputs(arena, 5, 64, torch.float32)
    check_plain(arena.put(scale * x), weight, bias, dy)
    constant = torch.full((2, 64), 3.0)
    y, _, rstd = layer_norm.forward(constant, weight, bias, EPS, torch.float32)
    assert torch.equal(y, bias.expand(2, -1))
    assert torch.allclose(rstd, torch.full((2,), 1000.0))


def test_a_large_mean_does_not_spoil_the_variance(arena):
    # one pass over x and x^2 would lose all digits here
    x, _, weight, bias, *_ = inputs(arena, 4, 256, torch.float32)
    shifted = arena.put(x + 1000)
    y, _, _ = layer_norm.forward(shifted, weight, bias, EPS, torch.float32)
    want = reference.layer_norm(shifted.double(), weight.double(), bias.double(), EPS)[0]
    # the mean itself is rounded to 6e-5 of the spread
    assert float((y - want).abs().max()) < 3e-4


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    rows, width, stride = 5, 48, 2**29 + 16
    far_x, far_dy = (
        torch.empty((rows - 1) * stride + width, dtype=torch.float16).as_strided(
            (rows, width), (stride, 1)
        )
        for _ in range(2)
    )
    x = random_tensor(rows, width, seed=1, dtype=torch.float16)
    dy = random_tensor(rows, width, seed=2, dtype=torch.float16)
    far_x.copy_(x)
    far_dy.copy_(dy)
    weight, bias = random_tensor(width, seed=3), random_tensor(width, seed=4)
    near = check_fused(x, x, weight, bias, dy, dy)
    far = check_fused(far_x, far_x, weight, bias, far_dy, far_dy)
    assert all(map(torch.equal, near, far))
    assert all(
        map(
            torch.equal,
            check_plain(x, weight, bias, dy),
            check_plain(far_x, weight, bias, far_dy),
        )
    )


def test_repeated_runs_are_bitwise_equal(arena):
    tensors = inputs(arena, 70, 65, torch.float32)
    first = check_fused(*tensors)
    assert all(map(torch.equal, first, check_fused(*tensors)))


def test_unsupported_names_what_is_wrong():
    x, weight = torch.zeros(2, 8), torch.ones(8)
    assert layer_norm.unsupported(x, weight, weight, torch.float32) is None
    assert add_layer_norm.unsupported(x, x, weight, weight, torch.float16) is None
    assert "float64" in layer_norm.unsupported(x.double(), weight, weight, torch.float32)
    assert "bfloat16" in add_layer_norm.unsupported(x, x, weight, weight, torch.bfloat16)
    wide = torch.zeros(1, 9000)
    assert "9000" in layer_norm.unsupported(wide, wide[0], wide[0], torch.float32)
    with pytest.raises(ValueError, match="9000"):
        layer_norm.forward(wide, wide[0], wide[0], EPS, torch.float32)


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_layout_and_scale(arena, rows, width, dtype, layout, scale, seed):
    x, residual, weight, bias, dy, dtotal = inputs(arena, rows, width, dtype, seed=seed)
    move = LAYOUTS.get(layout, lambda tensor: tensor)
    x, residual = move(x * scale), move(residual * scale)
    if width < 3:
        # rows this short are their own mean: what is left is rounding over eps
        y, _, _ = layer_norm.forward(x, weight, bias, EPS, dtype)
        assert y.isfinite().all()
        return
    check_fused(x, residual, weight, bias, move(dy), move(dtotal))
