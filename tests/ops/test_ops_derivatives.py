"""Derivatives that only plain PyTorch has: forward mode and torch.func give them, or say how to get them."""

import pytest
import torch
from torch.autograd import forward_ad

from ast_fast import ASTModel, ops, optimize_for_inference, use_backend
from ast_fast.backend import BackendUnavailableError
from ast_fast.testing import available_backends, measure, random_tensor, small_op_cases
from ast_fast.testing_calls import op_calls, registered_ops

CASES = small_op_cases()
by_case = pytest.mark.parametrize("name", CASES)
SIDES = [name for name in available_backends() if name != "reference"]


def problem(name, dtype=torch.float64):
    """A function of one differentiable tensor of a case, that tensor, and a direction."""
    case = CASES[name]
    inputs = case.inputs(torch.Generator().manual_seed(0))
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    lead = next(n for n, t in inputs.items() if t.is_floating_point())
    results = [n for n in case.ours(inputs) if not n.startswith("d")]

    def function(x):
        made = case.ours(inputs | {lead: x})
        return torch.stack([made[n].sin().sum((-1, -2)).sum() for n in results]).sum()

    x = inputs[lead]
    return function, x, random_tensor(*x.shape, seed=9, dtype=dtype)


def slope(function, x, direction):
    """Derivative along a direction, by the reverse pass of the reference in float64."""
    with use_backend("reference"):
        leaf = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf)
    return (grad * direction).sum(), grad


def near(a, b, bound=1e-3):
    return bool((a - b).abs() <= bound * (1e-3 + b.abs()))


@by_case
def test_forward_mode_gives_the_slope_of_the_reverse_pass(name):
    function, x, direction = problem(name)
    want, _ = slope(function, x, direction)
    assert want.abs() > 1e-3
    narrow, tangent = x.float(), direction.float()
    with use_backend("auto"):
        _, by_func = torch.func.jvp(problem(name, torch.float32)[0], (narrow,), (tangent,))
        with forward_ad.dual_level():
            for leaf in (narrow, narrow.clone().requires_grad_()):
                y = problem(name, torch.float32)[0](forward_ad.make_dual(leaf, tangent))
                by_dual = forward_ad.unpack_dual(y).tangent
                assert by_dual is not None and near(by_dual, want)
    assert near(by_func, want)


@by_case
def test_torch_func_gives_the_gradients_of_the_reverse_pass(name):
    function, x, _ = problem(name, torch.float32)
    _, want = slope(*problem(name))
    got = torch.func.grad(function)(x)
    assert measure(got, want).rel_l2 < 1e-3
    assert measure(torch.func.jacrev(function)(x), want).rel_l2 < 1e-3
    both = torch.func.vmap(torch.func.grad(function))(torch.stack((x, x)))
    assert measure(both[1], want).rel_l2 < 1e-3
    _, pull = torch.func.vjp(function, x)
    assert measure(pull(torch.ones(()))[0], want).rel_l2 < 1e-3


@pytest.mark.parametrize("backend", SIDES)
@by_case
def test_a_backend_that_was_asked_for_by_name_says_which_has_the_derivative(name, backend):
    function, x, direction = problem(name, torch.float32)
    calls = (
        lambda: torch.func.jvp(function, (x,), (direction,)),
        lambda: torch.func.grad(function)(x),
        lambda: torch.func.jacrev(function)(x),
        lambda: torch.func.vmap(torch.func.grad(function))(torch.stack((x, x))),
        lambda: torch.func.hessian(function)(x),
    )
    with use_backend(backend):
        for call in calls:
            with pytest.raises(BackendUnavailableError, match=r"use_backend\('reference'\)"):
                call()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"use_backend\('refer"):
            function(forward_ad.make_dual(x, direction))


@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_a_registered_op_refuses_forward_mode(name):
    found = [
        (op, args)
        for label, op, args in op_calls("reference", torch.float32)
        if label.split()[0] == name
    ]
    op, args = found[-1]
    place = next(i for i, a in enumerate(args) if torch.is_tensor(a) and a.is_floating_point())
    lead = args[place].detach()
    rest = [a.detach() if torch.is_tensor(a) else a for a in args]

    def function(x):
        made = op(*rest[:place], x, *rest[place + 1 :])
        return made[0] if isinstance(made, (tuple, list)) else made

    with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        torch.func.jvp(function, (lead,), (torch.ones_like(lead),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        function(forward_ad.make_dual(lead, torch.ones_like(lead)))


def test_layers_in_fp8_say_that_they_have_no_such_derivative():
    x, w1, b1 = random_tensor(4, 32, seed=0), random_tensor(16, 32, seed=1), torch.zeros(16)
    w2, b2, ones = random_tensor(32, 16, seed=2), torch.zeros(32), torch.ones(32)
    calls = (
        lambda x: ops.linear_fp8(x, w1, b1),
        lambda x: ops.mlp_fp8(x, w1, b1, w2, b2),
        lambda x: ops.add_norm_linear_fp8(x, x, ones, b2, 1e-6, w1, b1)[0],
        lambda x: ops.add_norm_mlp_fp8(x, x, ones, b2, 1e-6, w1, b1, w2, b2)[0],
    )
    for call in calls:
        for transform in (
            lambda f: torch.func.jvp(f, (x,), (x,)),
            lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        ):
            with pytest.raises(RuntimeError, match="without FP8"):
                transform(call)


@pytest.mark.parametrize("optimized", (False, True))
def test_a_whole_model_has_forward_mode_and_per_clip_gradients(optimized):
    torch.manual_seed(0)
    model = ASTModel(
        5, input_tdim=48, imagenet_pretrain=False, model_size="tiny224", verbose=False
    ).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x, direction = random_tensor(2, 48, 128, seed=0), random_tensor(2, 48, 128, seed=1)
    with use_backend("reference"):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).sum(), leaf)
    want = (grad * direction).sum((1, 2))
    if optimized:
        model = optimize_for_inference(model)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    assert measure(tangent.sum(-1), want).rel_l2 < 1e-3
    _, tangent = torch.func.jvp(model, (x,), (direction,))
    assert measure(tangent.sum(-1), want).rel_l2 < 1e-3
    each = torch.func.vmap(torch.func.grad(lambda clip: model(clip[None]).sum()))(x)
    assert measure(each, grad).rel_l2 < 1e-3


def test_compiled_transforms_take_plain_pytorch_too():
    function, x, direction = problem("layer_norm", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.func.grad(function)(x), backend="aot_eager")
    assert measure(compiled(x), slope(*problem("layer_norm"))[1]).rel_l2 < 1e-3
    forward = torch.compile(
        lambda x, t: torch.func.jvp(function, (x,), (t,))[1], backend="aot_eager"
    )
    assert near(forward(x, direction), slope(*problem("layer_norm"))[0])
    torch._dynamo.reset()
