"""LayerNorm and residual + LayerNorm of the C++ backend against float64."""

import pytest
import torch
import torch.nn.functional as F

from ast_fast.cpp import add_layer_norm, layer_norm

F32, BF16 = torch.float32, torch.bfloat16
FLOOR = {F32: 5e-7, BF16: 4e-3}
# one element, below and above a vector, odd, the model's widths, and more rows than chunks
SHAPES = [(1, 1), (3, 5), (33, 17), (130, 192), (7, 1023), (1214, 768)]


def oracle(x, weight, bias, dy, eps, residual=None, dtotal=None):
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    torch.autograd.backward((y,), (dy.double(),))
    dx = x.grad if dtotal is None else x.grad + dtotal.double()
    return y.detach(), dx, weight.grad, bias.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "parameters"),
    [(F32, F32, F32), (BF16, BF16, BF16), (F32, BF16, F32), (BF16, BF16, F32), (BF16, F32, F32)],
)
def test_layer_norm_matches_fp64(shape, dtype, out_dtype, parameters, within):
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    weight, bias = torch.randn(shape[1]).to(parameters), torch.randn(shape[1]).to(parameters)
    dy = torch.randn(shape).to(out_dtype)
    y, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, out_dtype)
    dx, dweight, dbias = layer_norm.backward(dy, x, weight, mean, rstd)
    assert y.dtype == out_dtype and dx.dtype == dtype
    assert {t.dtype for t in (mean, rstd, dweight, dbias)} == {F32}
    y64, dx64, dweight64, dbias64 = oracle(x, weight, bias, dy, 1e-6)
    within(y, None, y64, FLOOR[out_dtype], "y")
    if shape[1] > 1:  # one column: the exact gradient is 0
        within(dx, None, dx64, FLOOR[dtype] if dtype == BF16 else 2e-6, "dx")
        within(dweight, None, dweight64, 2e-6, "dweight")
    within(dbias, None, dbias64, 2e-6, "dbias")


@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, BF16), (F32, BF16, F32)]
)
@pytest.mark.parametrize("with_dtotal", [False, True])
def test_add_layer_norm_normalises_the_rounded_sum(dtypes, with_dtotal, within):
    x_type, residual_type, out_type = dtypes
    rows, cols = 67, 200
    x, residual = torch.randn(rows, cols).to(x_type), torch.randn(rows, cols).to(residual_type)
    weight, bias = torch.randn(cols), torch.randn(cols)
    y, total, mean, rstd = add_layer_norm.forward(x, residual, weight, bias, 1e-5, out_type)
    assert torch.equal(total, (x.float() + residual.float()).to(residual_type))
    dy = torch.randn(rows, cols).to(out_type)
    dtotal = torch.randn(rows, cols).to(residual_type) if with_dtotal else None
    y64, dsum64, dweight64, dbias64 = oracle(total, weight, bias, dy, 1e-5, dtotal=dtotal)
    dsum, dweight, dbias = add_layer_norm.backward(dy, dtotal, total, weight, mean, rstd)
    within(y, None, y64, FLOOR[out_type], "y")
    within(dsum, None, dsum64, FLOOR[residual_type] if residual_type == BF16 else 2e-6, "dsum")
    within(dweight, None, dweight64, 2e-6, "dweight")
    within(dbias, None, dbias64, 2e-6, "dbias")


def test_strided_rows_and_expanded_gradients_are_honoured():
    wide = torch.randn(40, 96)
    x, weight, bias = wide[::2, 16:80], torch.randn(64), torch.randn(64)
    assert not x.is_contiguous()
    y, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, F32)
    assert torch.equal(y, layer_norm.forward(x.contiguous(), weight, bias, 1e-6, F32)[0])
    dy = torch.randn(64).expand(20, 64)  # stride 0, as the gradient of a sum over rows has
    ours = layer_norm.backward(dy, x, weight, mean, rstd)
    same = layer_norm.backward(dy.contiguous(), x.contiguous(), weight, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    scalar = torch.ones(()).expand(20, 64)  # both strides 0
    ours = layer_norm.backward(scalar, x, weight, mean, rstd)
    same = layer_norm.backward(torch.ones(20, 64), x, weight, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    transposed = torch.randn(64, 20).t()
    assert torch.equal(
        layer_norm.forward(transposed, weight, bias, 1e-6, F32)[0],
        layer_norm.forward(transposed.contiguous(), weight, bias, 1e-6, F32)[0],
    )


def test_no_rows_give_empty_output_and_zero_parameter_gradients():
    x, weight, bias = torch.empty(0, 8), torch.ones(8), torch.zeros(8)
    y, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, BF16)
    assert y.shape == (0, 8) and y.dtype == BF16 and mean.shape == rstd.shape == (0,)
    dx, dweight, dbias = layer_norm.backward(y, x, weight, mean, rstd)
    assert dx.shape == (0, 8) and not dweight.any() and not dbias.any() and dbias.shape == (8,)


def test_a_constant_row_is_finite_and_a_nan_stays_in_its_row():
    x = torch.randn(9, 70)
    x[2] = 1e4
    x[5, 69] = float("nan")
    y, mean, rstd = layer_norm.forward(x, torch.ones(70), torch.zeros(70), 1e-6, F32)
    assert y[2].abs().max() < 1e-2
    assert y[5].isnan().all()
    rest = [i for i in range(9) if i != 5]
    assert y[rest].isfinite().all()
    dx = layer_norm.backward(torch.randn(9, 70), x, torch.ones(70), mean, rstd)[0]
    assert dx[5].isnan().all() and dx[rest].isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_extreme_scales_follow_fp64(scale, within):
    x = torch.randn(20, 384) * scale
    y = layer_norm.forward(x, torch.ones(384), torch.zeros(384), 1e-6, F32)[0]
    within(y, None, F.layer_norm(x.double(), (384,), eps=1e-6), 1e-6)


def test_the_reasons_for_not_taking_inputs_name_the_tensor():
    x = torch.randn(2, 4)
    weight, bias = torch.ones(4), torch.zeros(4)
    assert layer_norm.unsupported(x, weight, bias, F32) is None
    assert "x" in layer_norm.unsupported(x.double(), weight, bias, F32)
    assert "float16" in layer_norm.unsupported(x, weight, bias, torch.float16)
    assert "weight" in add_layer_norm.unsupported(x, x, weight.half(), bias, F32)
