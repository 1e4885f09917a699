"""Packed linear layers and the passes between products of bytes, against plain twins."""

import pytest
import torch
import torch.nn.functional as F

from ast_fast.cpp import packed
from ast_fast.reference import int8 as twin

F32, BF16 = torch.float32, torch.bfloat16

needs_packing = pytest.mark.skipif(packed.unsupported() is not None, reason="no oneDNN weights")
needs_vnni = pytest.mark.skipif(packed.int8_unsupported() is not None, reason="no VNNI")


def row_values(x, x_scale, bias, residual, norm, gelu):
    """What is to be quantised, in float64, and the sum with the residual."""
    value, total = x.double(), None
    if x_scale is not None:
        value = value * x_scale.double()[:, None] + bias.double()
    if residual is not None:
        total = (value + residual.double()).to(residual.dtype)
        value = total.double()
    if norm is not None:
        weight, shift, eps = norm
        value = F.layer_norm(value, value.shape[1:], weight.double(), shift.double(), eps)
    return (F.gelu(value) if gelu else value), total


def require_bytes_of(made, value, zero, slack):
    """Levels and scales are those of the value: half a level off, and what the value may be off itself."""
    levels, scale = made
    _, want = twin.quantise_rows(value, zero)
    assert levels.dtype == torch.uint8
    assert ((scale.double() - want).abs() <= 1e-5 * want + slack * want).all()
    restored = (levels.double() - zero) * scale.double()[:, None]
    room = scale.double() * (0.5 + 1e-3) + slack * value.abs().amax(1)
    assert ((restored - value).abs() <= room[:, None]).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 15), (2, 16), (5, 33), (7, 768), (2, 1023)])
@pytest.mark.parametrize("zero", [packed.ZERO, packed.GELU_ZERO])
def test_rows_become_bytes(rows, cols, zero, dtype):
    x = torch.randn(rows, cols).to(dtype) * torch.logspace(-3, 3, rows)[:, None].to(dtype)
    levels, scale, total = packed.int8_rows(x, zero=zero)
    assert total is None
    require_bytes_of((levels, scale), x.double(), zero, 0.0)
    if (
        zero == packed.ZERO
    ):  # the same arithmetic: the same bytes but where a value stands between two
        want, _ = twin.quantise_rows(x, zero)
        assert (levels.int() - want.int()).abs().max() <= 1
        assert (levels != want).float().mean() <= 0.01


@pytest.mark.parametrize("stream", [F32, BF16])
@pytest.mark.parametrize("product", [F32, BF16])
@pytest.mark.parametrize("cols", [15, 64, 197])
@pytest.mark.parametrize("quantised", [True, False])
def test_one_pass_rescales_adds_and_normalises(cols, product, stream, quantised):
    rows = 9
    x, residual = (torch.randn(rows, cols) * 300).to(product), torch.randn(rows, cols).to(stream)
    x_scale, bias = torch.rand(rows) * 0.01 + 1e-4, torch.randn(cols)
    norm = (1 + 0.1 * torch.randn(cols), 0.1 * torch.randn(cols), 1e-6)
    value, want_total = row_values(x, x_scale, bias, residual, norm, False)
    made, scale, total = packed.int8_rows(
        x, x_scale, bias, residual=residual, norm=norm, restore_to=None if quantised else stream
    )
    assert total.dtype == stream
    step = 2**-7 if stream == BF16 else 1e-6  # a sum between two numbers may go either way
    assert torch.allclose(total.double(), want_total.double(), rtol=step, atol=1e-5)
    value, _ = row_values(total, None, None, None, norm, False)  # of the sum as it was rounded
    if quantised:
        require_bytes_of((made, scale), value, packed.ZERO, 1e-5)
    else:
        assert made.dtype == stream and scale.numel() == 0
        assert torch.allclose(
            made.double(), value, rtol=2**-8 if stream == BF16 else 1e-5, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cols", [7, 3072])
def test_gelu_becomes_bytes(cols, dtype):
    x, x_scale, bias = (
        (torch.randn(5, cols) * 90).to(dtype),
        torch.full((5,), 0.02),
        torch.randn(cols),
    )
    value, _ = row_values(x, x_scale, bias, None, None, True)
    levels, scale, _ = packed.int8_rows(x, x_scale, bias, gelu=True, zero=packed.GELU_ZERO)
    require_bytes_of((levels, scale), value, packed.GELU_ZERO, 3e-4)


def test_strided_rows_and_no_rows():
    x = torch.randn(6, 200)
    part = x[::2, 20:120]
    made = packed.int8_rows(part)
    whole = packed.int8_rows(part.contiguous())
    assert torch.equal(made[0], whole[0]) and torch.equal(made[1], whole[1])
    levels, scale, _ = packed.int8_rows(x[:0])
    assert levels.shape == (0, 200) and scale.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_a_row_that_is_not_finite_gets_scale_nan_and_no_other_does(place, bad):
    x = torch.randn(4, 37)
    x[2, place] = bad
    _, scale, _ = packed.int8_rows(x)
    assert scale[2].isnan() and scale[[0, 1, 3]].isfinite().all()
    assert twin.quantise_rows(x, 128)[1][2].isnan()


def test_rows_of_any_layout_are_taken_as_what_they_hold():
    x, residual = torch.randn(6, 40).t(), torch.randn(40, 12)[:, ::2]
    norm = (torch.rand(12)[::2], torch.rand(12)[::2], 1e-6)
    made = packed.int8_rows(x, residual=residual, norm=norm)
    plain = packed.int8_rows(
        x.contiguous(),
        residual=residual.contiguous(),
        norm=(norm[0].contiguous(), norm[1].contiguous(), 1e-6),
    )
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x_scale": torch.ones(2)}, "x_scale and bias"),
        ({"bias": torch.ones(4)}, "x_scale and bias"),
        ({"zero": 0}, "zero=0"),
        ({"zero": 255}, "zero=255"),
        ({"residual": torch.ones(2, 4), "restore_to": BF16}, "restore_to"),
    ],
)
def test_arguments_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        packed.int8_rows(torch.ones(2, 4), **given)


def test_a_fingerprint_sees_a_write_that_leaves_no_trace():
    tensors = [torch.randn(1000), torch.randn(3), torch.randn(0)]
    before = packed.fingerprint(tensors)
    assert packed.fingerprint(tensors) == before
    tensors[0].data.mul_(1.01)
    assert packed.fingerprint(tensors) != before


def test_zeros_denormals_and_huge_values_keep_finite_scales():
    x = torch.zeros(4, 40)
    x[1], x[2], x[3] = 1e-42, 3e38, -3e38
    levels, scale, _ = packed.int8_rows(x)
    assert scale.isfinite().all() and (scale > 0).all()
    restored = (levels.double() - packed.ZERO) * scale.double()[:, None]
    assert (restored[0] == 0).all()
    assert torch.allclose(restored[2:], x[2:].double(), rtol=5e-3)


def test_bytes_do_not_depend_on_the_number_of_threads():
    x, norm = torch.randn(61, 384), (torch.rand(384), torch.rand(384), 1e-6)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(packed.int8_rows(x, norm=norm)[:2])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@needs_packing
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 2, 134])
def test_a_packed_layer_gives_what_linear_gives(rows, dtype, within):
    x, weight, bias = (
        torch.randn(rows, 96).to(dtype),
        torch.randn(80, 96).to(dtype),
        torch.randn(80).to(dtype),
    )
    oracle = F.linear(x.double(), weight.double(), bias.double())
    layer = packed.PackedLinear(weight, bias)
    floor = 6e-3 if dtype == BF16 else 2e-6
    within(layer(x), F.linear(x, weight, bias), oracle, floor)
    simple = F.gelu(F.linear(x, weight, bias))
    within(layer(x, gelu=True), simple, F.gelu(oracle), floor)
    bare = packed.PackedLinear(weight, None)
    within(bare(x), F.linear(x, weight), F.linear(x.double(), weight.double()), floor)


@needs_packing
def test_a_packed_layer_keeps_its_weights_when_the_original_changes():
    weight, bias, x = torch.randn(8, 8), torch.randn(8), torch.randn(3, 8)
    layer = packed.PackedLinear(weight, bias)
    before = layer(x)
    weight.zero_(), bias.zero_()
    assert torch.equal(layer(x), before)


@needs_vnni
@pytest.mark.parametrize("rows", [1, 2, 135])
@pytest.mark.parametrize(("zero", "gelu"), [(packed.ZERO, False), (packed.GELU_ZERO, True)])
def test_a_layer_of_bytes_gives_the_exact_product_of_its_levels(rows, zero, gelu):
    x = torch.randn(rows, 3072)
    x = F.gelu(x) if gelu else x
    weight, bias = torch.randn(70, 3072), torch.randn(70)
    layer = packed.Int8Linear(weight, bias)
    levels, scale, _ = packed.int8_rows(x, zero=zero)
    made = layer(levels, zero).double() * scale.double()[:, None] + layer.bias.double()
    weights, worth = twin.quantise_weight(weight)
    exact = (levels.double() - zero) @ weights.double().t() * worth.double()
    exact = exact * scale.double()[:, None]
    assert ((made - bias.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    whole = twin.linear(x, weight, bias, zero)
    assert ((made - whole).norm() / whole.norm()) < 5e-3


@needs_vnni
def test_products_of_bytes_do_not_overflow_between_neighbours():
    layer = packed.Int8Linear(torch.full((4, 64), 1.0), None)
    made = layer(torch.full((2, 64), 255, dtype=torch.uint8), 1)
    assert torch.equal(made, torch.full((2, 4), 64 * 254.0, dtype=BF16).to(BF16))


def test_int8_is_refused_where_the_cpu_would_overflow(monkeypatch):
    packed.int8_unsupported.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    try:
        assert "VNNI" in packed.int8_unsupported()
    finally:
        packed.int8_unsupported.cache_clear()


def test_packing_is_refused_where_pytorch_lost_the_operator(monkeypatch):
    packed.unsupported.cache_clear()
    monkeypatch.delattr(torch.ops.mkldnn, "_reorder_linear_weight", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    try:
        assert "does not pack" in packed.unsupported()
    finally:
        packed.unsupported.cache_clear()
