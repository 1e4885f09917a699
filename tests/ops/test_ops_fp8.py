"""FP8 layers as ops and in the model: budgets, what they leave alone, and who may watch."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from ast_fast import backend, create_model, ops, use_backend
from ast_fast.equivalence import EquivalenceMonitor, budget, measure
from ast_fast.equivalence.cases_fp8 import fp8_cases
from ast_fast.equivalence.run_models import build, model_configs, model_rows
from ast_fast.equivalence.run_ops import run_op_case
from ast_fast.reference import fp8 as emulation

CPU = torch.device("cpu")
FP8_CASES = {case.op: case for case in fp8_cases(full=False)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("ast_mini_p16_s10", num_classes=3, depth=3).eval()


@pytest.fixture
def x(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.config.input_tdim, model.config.input_fdim, generator=generator)


@pytest.mark.parametrize("op", FP8_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_keep_the_budget_of_fp8(op, dtype):
    rows = run_op_case(FP8_CASES[op], CPU, dtype)
    assert rows and all(row.ok for row in rows), [r for r in rows if not r.ok]
    assert {row.dtype for row in rows} == {"fp8"}
    # and they are FP8: no exact product hides behind the name
    assert rows[0].error[1] > 1e-2


def test_bounds_instead_of_maxima_cost_next_to_nothing():
    for case in FP8_CASES.values():
        for row in run_op_case(case, CPU, torch.float32):
            if "row sum" not in case.kinds.values() or row.error[1] > 1e-3:
                assert row.error[1] <= 1.15 * row.torch_error[1], row


def test_scales_are_exact_so_a_power_of_two_changes_nothing():
    x, weight, bias = torch.randn(9, 32), torch.randn(48, 32), torch.zeros(48)
    y = ops.linear_fp8(x, weight, bias)
    assert torch.equal(ops.linear_fp8(1024 * x, weight / 4, bias), 256 * y)


@pytest.mark.parametrize("shape", [(5, 24), (3, 7), (1, 1)])
def test_any_width_is_emulated(shape):
    x, weight, bias = torch.randn(4, 2, shape[1]), torch.randn(*shape), torch.randn(shape[0])
    y = ops.linear_fp8(x.requires_grad_(), weight.requires_grad_(), bias)
    y.square().sum().backward()
    exact = F.linear(x, weight, bias)
    assert y.shape == (4, 2, shape[0]) and x.grad.shape == x.shape
    assert float((y - exact).norm() / exact.norm()) < 0.1


def test_a_bias_may_be_absent_and_inputs_stay_as_they_are():
    x, weight = torch.randn(6, 16), torch.randn(32, 16)
    before = x.clone(), weight.clone()
    y = ops.linear_fp8(x, weight)
    assert torch.equal(y, ops.linear_fp8(x, weight, torch.zeros(32)))
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


def test_only_the_gradients_asked_for_are_made():
    tensors = [torch.randn(6, 32), torch.randn(6, 32), torch.ones(32), torch.zeros(32)]
    weights = [torch.randn(64, 32), torch.randn(64), torch.randn(32, 64), torch.randn(32)]
    every = [t.clone().requires_grad_() for t in (*tensors, *weights)]

    def run(values):
        norm, layers = values[:4], values[4:]
        y, total = ops.add_norm_mlp_fp8(*norm, 1e-6, *layers)
        return (y * 0.7).sum() + (total * 0.3).sum()

    wanted = torch.autograd.grad(run(every), every)
    for index in range(8):
        one = [t.detach().requires_grad_(i == index) for i, t in enumerate(every)]
        (grad,) = torch.autograd.grad(run(one), one[index])
        assert torch.equal(grad, wanted[index]), index


def test_one_of_two_results_may_go_unused():
    args = [torch.randn(4, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)]
    norm, weight = (torch.ones(32), torch.zeros(32)), torch.randn(16, 32)
    y, total = ops.add_norm_linear_fp8(*args, *norm, 1e-6, weight)
    first = torch.autograd.grad(total.sum(), args, retain_graph=True)
    assert all(torch.equal(g, torch.ones(4, 32)) for g in first)
    dx, dr = torch.autograd.grad(y.sum(), args)
    assert torch.equal(dx, dr) and dx.isfinite().all()


def test_a_bad_clip_spoils_its_own_rows_only():
    x, weight, bias = torch.randn(8, 32), torch.randn(16, 32), torch.randn(16)
    clean = ops.linear_fp8(x, weight, bias)
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[2, 3] = bad
        y = ops.linear_fp8(spoilt, weight, bias)
        others = torch.arange(8) != 2
        # its own largest magnitude no longer counts, so scales may differ, never the numbers much
        assert y[2].isnan().all() and y[others].isfinite().all()
        assert float((y - clean)[others].norm() / clean[others].norm()) < 0.02


def test_gradients_of_any_size_survive_without_loss_scaling():
    for size in (1e-12, 1.0, 1e12):
        x = torch.randn(8, 32, requires_grad=True)
        weight = torch.randn(16, 32, requires_grad=True)
        dy = size * torch.randn(8, 16)
        dx, dw = torch.autograd.grad(ops.linear_fp8(x, weight), (x, weight), dy)
        exact = dy @ weight.detach()
        assert float((dx - exact).norm() / exact.norm()) < 0.12
        assert dw.isfinite().all() and dw.any()


def test_zeros_and_empty_batches():
    weight, bias = torch.randn(16, 32, requires_grad=True), torch.randn(16)
    assert torch.equal(ops.linear_fp8(torch.zeros(3, 32), weight, bias)[0], bias)
    x = torch.zeros(0, 4, 32, requires_grad=True)
    y = ops.linear_fp8(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 4, 16) and x.grad.shape == x.shape and not weight.grad.any()
    y, total = ops.add_norm_mlp_fp8(
        x, x, torch.ones(32), torch.zeros(32), 1e-6, torch.randn(48, 32), torch.randn(48),
        torch.randn(32, 48), torch.randn(32),
    )  # fmt: skip
    assert y.shape == total.shape == x.shape


def test_what_comes_out_is_contiguous_as_compilers_are_told_whatever_goes_in():
    x, residual, dy, dtotal = (torch.randn(32, 8).t() for _ in range(4))
    weights = torch.randn(16, 32), torch.randn(16)
    second = torch.randn(32, 16), torch.randn(32)
    norm = (torch.ones(32), torch.zeros(32), 1e-6)
    # kept as they are, where a wrapper might tidy them
    linear = (x, residual, *norm, *weights, False, "reference")
    mlp = (x, residual, *norm, *weights, *second, False, "reference")
    backward = (dy, dtotal, x, norm[0], torch.zeros(8), torch.ones(8), "reference")
    named = ("linear_fp8", linear), ("mlp_fp8", mlp), ("add_layer_norm_backward", backward)
    for op, args in named:
        assert args[0].stride() == args[1].stride() == (1, 8)
        made = getattr(torch.ops.ast_fast, op)(*args)
        assert all(part.is_contiguous() for part in made), (op, [part.stride() for part in made])
        torch.library.opcheck(getattr(torch.ops.ast_fast, op), args, test_utils="test_faketensor")


def test_autocast_narrows_what_comes_out_and_weights_keep_their_gradient_dtype():
    x, stream = torch.randn(6, 32, requires_grad=True), torch.randn(6, 32, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_fp8(x, weight)
        z, total = ops.add_norm_linear_fp8(x, stream, torch.ones(32), torch.zeros(32), 1e-6, weight)
    assert y.dtype == z.dtype == torch.bfloat16 and total.dtype == torch.float32
    (y.sum() + z.sum() + total.sum()).backward()
    assert x.grad.dtype == stream.grad.dtype == weight.grad.dtype == torch.float32


def test_the_fallback_is_said_once_and_named_backends_refuse(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_announced", set())
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    with caplog.at_level(logging.WARNING, "ast_fast.backend"):
        ops.linear_fp8(x, weight)
        ops.linear_fp8(x, weight)
    assert [r.getMessage() for r in caplog.records if "linear_fp8" in r.getMessage()] == [
        "ast_fast.linear_fp8 runs in plain PyTorch: a CPU has no FP8 products: they are emulated, "
        "with the same roundings"
    ]
    with use_backend("cpp"), pytest.raises(backend.BackendUnavailableError, match="linear_fp8"):
        ops.linear_fp8(x, weight)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weight \(16, 24\)"):
        ops.linear_fp8(torch.randn(4, 32), torch.randn(16, 24))
    with pytest.raises(ValueError, match="w2"):
        ops.mlp_fp8(
            torch.randn(4, 32), torch.randn(64, 32), torch.randn(64), torch.randn(32, 48),
            torch.randn(32),
        )  # fmt: skip
    with pytest.raises(ValueError, match="residual"):
        ops.add_norm_linear_fp8(
            torch.randn(4, 32), torch.randn(3, 32), torch.ones(32), torch.zeros(32), 1e-6,
            torch.randn(16, 32),
        )  # fmt: skip


def test_second_derivatives_say_that_they_are_missing():
    x = torch.randn(4, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(
        ops.linear_fp8(x, torch.randn(16, 32)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_the_emulation_multiplies_what_pytorchs_scaled_product_multiplies():
    a = emulation.quantise(torch.randn(32, 48), torch.tensor([5.0]))
    b = emulation.quantise(torch.randn(16, 48), torch.tensor([5.0]), gradient=True)
    want = torch._scaled_mm(
        a.rows,
        b.rows.t(),
        scale_a=a.inverse.view(()),
        scale_b=b.inverse.view(()),
        out_dtype=torch.float32,
    )
    got = emulation.matmul(a.rows, b.rows, a.inverse, b.inverse, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# the model


def test_precision_is_a_switch_that_leaves_checkpoints_alone(model, x):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = model(x)
    assert model.precision == "exact" and model.set_precision("fp8") is model
    assert model.precision == copy.deepcopy(model).precision == "fp8"
    narrow = model(x)
    assert 1e-3 < float((narrow - exact).norm() / exact.norm()) < 0.2
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.set_precision("exact")(x), exact)
    with pytest.raises(ValueError, match="precision='fp4'"):
        model.set_precision("fp4")


@pytest.mark.parametrize("name", ["AST-tiny, 2 blocks"])
def test_whole_model_and_gradient_keep_the_budget(name):
    config = dict(model_configs(False))[name]
    rows = model_rows(name, build(config).set_precision("fp8"), CPU, torch.bfloat16)
    assert len(rows) == 3 and all(row.ok for row in rows), rows
    assert {row.dtype for row in rows} == {"fp8"}


def test_the_fused_blocks_do_what_their_modules_do(model, x):
    model.set_precision("fp8")
    fused = model.forward_features(x)
    # a hook on the block itself: it then runs through its modules
    handles = [block.register_forward_hook(lambda *_: None) for block in model.v.blocks]
    apart = model.forward_features(x)
    for handle in handles:
        handle.remove()
    # powers of two as scales: the same bits but for what underflows
    torch.testing.assert_close(fused, apart, rtol=1e-3, atol=2e-2)
    assert float((fused - apart).norm() / apart.norm()) < 5e-3
    assert torch.equal(model.forward_features(x), fused)


def test_prefix_only_gives_the_tokens_of_the_whole(model, x):
    model.set_precision("fp8")
    tokens = model.v(x, prefix_only=True)
    whole = model.forward_features(x)[:, :2]
    assert float((tokens - whole).norm() / whole.norm()) < 2e-2


def test_hooked_layers_are_seen_and_run_exactly(model, x):
    model.set_precision("fp8")
    seen = []
    model.v.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]


def test_checkpointing_and_graph_tools_give_the_same_bits(model, x):
    model.set_precision("fp8")

    def gradient(call):
        model.zero_grad()
        logits = call(x)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    want = gradient(model)
    compiled = gradient(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, want, compiled))
    assert all(map(torch.equal, want, gradient(model)))
    model.set_grad_checkpointing(True)
    for one, other in zip(gradient(model), want, strict=True):
        assert float((one - other).norm()) <= 2e-2 * float(other.norm()) + 1e-6


def test_the_model_exports(model, x):
    model.set_precision("fp8")
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


def test_the_monitor_holds_fp8_to_its_own_budget_and_leaves_no_trace(model, x):
    model.set_precision("fp8").train()
    monitor = EquivalenceMonitor(model)
    row = monitor.step(x, lambda logits: logits.logsumexp(-1).mean())
    assert row.ok and row.precision == "fp8"
    assert row.logits[1] > 1e-3  # FP8 was measured
    before = model(x)
    monitor.step(x)
    assert torch.equal(model(x), before)


def test_the_budget_of_fp8_refuses_what_is_worse_than_fp8():
    exact = torch.randn(64, 64, dtype=torch.float64)
    coarse = (exact / 0.5).round() * 0.5
    assert not budget("logits", "fp8").admits(measure(coarse, exact))
