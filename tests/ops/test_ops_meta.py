"""Tensors without memory: every op and a whole model give shapes, dtypes and strides of the real ones."""

import pytest
import torch
from torch.utils._pytree import tree_map

from ast_fast import ASTModel, use_backend
from ast_fast.equivalence.run_ops import place
from ast_fast.testing import available_backends, random_tensor, small_op_cases
from ast_fast.testing_calls import op_calls, registered_ops

CASES = small_op_cases()
META = torch.device("meta")


def described(results):
    return {n: (tuple(t.shape), t.dtype, t.stride()) for n, t in results.items()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", (*available_backends(), "auto"))
@pytest.mark.parametrize("name", CASES)
def test_an_op_gives_the_shapes_of_real_tensors(name, backend, dtype):
    case = CASES[name]
    dtype = torch.float32 if name.startswith("log_mel") else dtype
    inputs = place(case.inputs(torch.Generator().manual_seed(0)), torch.device("cpu"), dtype)
    with use_backend(backend):
        want = case.ours(inputs)
        leaves = {n: t.to(META).requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
        made = case.ours(leaves)
        assert described(made) == described(want)
        sum(y.sum() for y in made.values()).backward()
    for tensor in (*made.values(), *(t.grad for t in leaves.values() if t.requires_grad)):
        assert tensor.device == META


@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_a_registered_op_gives_the_shapes_of_real_tensors(name):
    calls = [c for c in op_calls("reference", torch.float32) if c[0].split()[0] == name]
    for _, op, args in calls:
        args = [a.detach() if torch.is_tensor(a) else a for a in args]
        moved = tree_map(lambda a: a.to(META) if torch.is_tensor(a) else a, args)
        want, got = op(*args), op(*moved)
        for a, b in zip(
            *(r if isinstance(r, (tuple, list)) else (r,) for r in (want, got)), strict=True
        ):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert b.device == META


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_whole_model_runs_without_memory(dtype):
    options = {"imagenet_pretrain": False, "model_size": "base384", "verbose": False}
    with torch.device("meta"):
        model = ASTModel(527, input_tdim=1024, **options).to(dtype)
    assert {p.device for p in model.parameters()} == {META}
    x = torch.empty(3, 1024, 128, device="meta", dtype=dtype)
    y = model(x)
    assert (y.shape, y.dtype, y.device) == ((3, 527), dtype, META)
    y.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # the original's image heads take no part
    without = {n for n, _ in model.named_parameters()} - set(grads)
    assert all("head" in n and not n.startswith("mlp_head") for n in without)
    assert all(grad.device == META for grad in grads.values())
    waves = torch.empty(3, 160000, device="meta")
    if dtype == torch.float32:
        assert model.forward_waveform(waves).shape == (3, 527)


def test_a_real_model_moves_to_meta_and_back_into_memory():
    options = {"imagenet_pretrain": False, "model_size": "tiny224", "verbose": False}
    model = ASTModel(5, input_tdim=48, **options).eval()
    state = model.state_dict()
    x = random_tensor(1, 48, 128, seed=0)
    want = model(x)
    empty = model.to("meta")
    assert empty(x.to("meta")).shape == want.shape
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), want)
