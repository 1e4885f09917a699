"""Gradients in float64: the reference against finite differences, written-out formulas against autograd."""

import pytest
import torch

from ast_fast import backend as backends
from ast_fast import reference
from ast_fast.equivalence import cases
from ast_fast.equivalence.run_ops import SEED, draw_upstream, evaluate
from ast_fast.testing import log_mel_case, measure, random_tensor, small_op_cases

TINY = {
    "layer_norm": cases.layer_norm(3, 5),
    "add_layer_norm": cases.add_layer_norm(3, 5),
    "mlp": cases.mlp(3, 4, 2),
    "attention": cases.attention(2, 5, 1, 4),
    "attention with lengths": cases.attention(2, 5, 1, 4, [3, 0]),
    "attention_qkv": cases.attention_qkv(1, 4, 2, 3),
    "attention_varlen": cases.attention_varlen([3, 1, 2], 1, 4),
}


def double(value):
    return value.double() if value.is_floating_point() else value


def public(case):
    """The op as a function of its float64 tensors, and those tensors."""
    inputs = case.inputs(torch.Generator().manual_seed(SEED))
    names = [n for n, t in inputs.items() if t.is_floating_point()]

    def function(*tensors):
        return tuple(case.ours(inputs | dict(zip(names, tensors, strict=True))).values())

    return function, [inputs[n].requires_grad_() for n in names]


@pytest.mark.parametrize("name", TINY)
def test_gradcheck_through_the_public_op(name):
    assert torch.autograd.gradcheck(*public(TINY[name]), eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_gradgradcheck_through_the_public_op(name):
    assert torch.autograd.gradgradcheck(*public(TINY[name]), eps=1e-6, atol=1e-4, rtol=1e-2)


def test_gradcheck_of_patch_embed():
    x, weight = random_tensor(1, 6, 5, seed=0), random_tensor(2, 1, 3, 2, seed=1)
    others = [random_tensor(*s, seed=i) for i, s in enumerate(((2,), (2 + 2 * 3, 2), (2, 2)))]
    leaves = [t.double().requires_grad_() for t in (x, weight, *others)]

    def function(*tensors):
        return torch.ops.ast_fast.patch_embed(*tensors, 2, 2, False, "reference")

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)


def test_gradcheck_of_log_mel():
    case = log_mel_case(1, 720)
    wave = case.inputs(torch.Generator().manual_seed(1))["wave"]
    # a slope along random directions: the whole Jacobian of 720 samples would take minutes
    directions = random_tensor(3, 720, seed=2).double()
    steps = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def function(amounts):
        moved = wave + 1e-3 * amounts @ directions
        return case.ours({"wave": moved})["y"]

    assert torch.autograd.gradcheck(function, (steps,), eps=1e-4, atol=1e-5, rtol=1e-3)


WRITTEN = {
    "layer_norm": lambda t, b: torch.ops.ast_fast.layer_norm(
        t["x"], t["weight"], t["bias"], 1e-6, t["x"].dtype, b
    )[0],
    "add_layer_norm": lambda t, b: torch.ops.ast_fast.add_layer_norm(
        t["x"], t["residual"], t["weight"], t["bias"], 1e-6, t["x"].dtype, b
    )[:2],
    "mlp": lambda t, b: torch.ops.ast_fast.mlp(t["x"], t["w1"], t["b1"], t["w2"], t["b2"], True, b)[
        0
    ],
    "attention": lambda t, b: torch.ops.ast_fast.attention(
        t["q"], t["k"], t["v"], None, 32**-0.5, True, False, b
    )[0],
    "attention with lengths": lambda t, b: torch.ops.ast_fast.attention(
        t["q"], t["k"], t["v"], t["lengths"], 32**-0.5, True, False, b
    )[0],
    "attention_qkv": lambda t, b: torch.ops.ast_fast.attention_qkv(
        t["qkv"], None, 32**-0.5, True, False, b
    )[0],
    "attention_varlen": lambda t, b: torch.ops.ast_fast.attention_varlen(
        t["q"], t["k"], t["v"], t["starts"], t["starts"], 30, 30, 32**-0.5, True, False, b
    )[0],
    "patch_embed": lambda t, b: torch.ops.ast_fast.patch_embed(
        t["x"], t["weight"], t["bias"], t["pos"], t["prefix"], 56, 10, False, b
    ),
    "log_mel": lambda t, b: torch.ops.ast_fast.log_mel(
        t["wave"],
        None,
        [16000.0, 32.0, 25.0, 10.0, 20.0, 0.0, 0.97, 1.0, reference.mel.LOG_FLOOR],
        9,
        -4.0,
        4.5,
        t["wave"].dtype,
        b,
    ),
    "log_mel with lengths": lambda t, b: torch.ops.ast_fast.log_mel(
        t["wave"],
        t["lengths"],
        [16000.0, 32.0, 25.0, 10.0, 20.0, 0.0, 0.97, 1.0, reference.mel.LOG_FLOOR],
        10,
        -4.0,
        4.5,
        t["wave"].dtype,
        b,
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_out_gradients_equal_autograd_of_the_reference(name):
    case = small_op_cases()[name]
    generator = torch.Generator().manual_seed(SEED)
    inputs = {n: double(t) for n, t in case.inputs(generator).items()}
    shapes = evaluate(case.oracle, inputs)
    upstream = draw_upstream(shapes, generator, torch.float64)

    def registered(tensors):
        results = WRITTEN[name](tensors, "reference")
        results = results[::-1] if isinstance(results, tuple) else (results,)
        return dict(zip(shapes, results, strict=True))

    with backends.use_backend("reference"):
        want = evaluate(case.ours, inputs, upstream)
    got = evaluate(registered, inputs, upstream)
    assert got.keys() == want.keys()
    for tensor in want:
        assert measure(got[tensor], want[tensor]).rel_l2 < 1e-12, tensor


def test_gelu_gradient_equals_autograd_and_has_its_limits():
    h = torch.cat(
        (torch.linspace(-12, 12, 501, dtype=torch.float64), torch.tensor([1e200, -1e200]))
    )
    leaf = h.clone().requires_grad_()
    (want,) = torch.autograd.grad(reference.ops.gelu(leaf).sum(), leaf)
    got = reference.backward.gelu_backward(torch.ones_like(h), h)
    assert measure(got, want).worst < 1e-12
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    slopes = reference.backward.gelu_backward(torch.ones_like(ends), ends)
    assert slopes[0] == 1 and slopes[1] == 0 and slopes[2].isnan()
    leaf = ends.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(reference.ops.gelu(leaf).sum(), leaf)
    assert torch.equal(autograd[:2], slopes[:2])


def test_only_the_sum_of_add_layer_norm_used_still_gives_its_gradient():
    x, r = (random_tensor(3, 8, seed=s).requires_grad_() for s in range(2))
    w = random_tensor(8, seed=3).requires_grad_()
    args = (x, r, w, w, 1e-6, torch.float32, "reference")
    _, total, _, _ = torch.ops.ast_fast.add_layer_norm(*args)
    dx, dr, dw = torch.autograd.grad(total.sum(), (x, r, w), allow_unused=True)
    assert torch.equal(dx, torch.ones_like(x)) and torch.equal(dr, torch.ones_like(r))
    assert dw is None
