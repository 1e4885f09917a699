"""Memory layouts, empty inputs and writes outside tensors: the same numbers, or nothing."""

import pytest
import torch

from ast_fast import backend as backends
from ast_fast import ops
from ast_fast.equivalence.run_ops import SEED, draw_upstream, evaluate, place
from ast_fast.testing import LAYOUTS, available_backends, measure, small_op_cases

CASES = small_op_cases()
pytestmark = pytest.mark.parametrize("backend", available_backends())
by_case = pytest.mark.parametrize("name", CASES)


def draw(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(SEED)
    inputs = place(case.inputs(generator), torch.device("cpu"), dtype)
    wide = place(inputs, torch.device("cpu"), torch.float64)
    return inputs, draw_upstream(evaluate(case.oracle, wide), generator, dtype)


# the waveform's gradient goes through 1/energy: another order of summation shows at 1e-5
BOUND = {"dwave": 1e-4}


def assert_close(got, want, bound):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype
        assert measure(got[name], want[name]).rel_l2 <= BOUND.get(name, bound), name


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout_give_the_same(name, layout, backend, guarded):
    case, move = CASES[name], LAYOUTS[layout]
    inputs, upstream = draw(case)

    def moved(tensors):
        return case.ours({n: move(t) if t.is_floating_point() else t for n, t in tensors.items()})

    with backends.use_backend(backend):
        want = evaluate(case.ours, inputs, upstream)
        got = evaluate(moved, inputs, upstream)
    assert_close(got, want, 2e-6)
    guarded.check()


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout_give_the_same(name, layout, backend, guarded):
    case = CASES[name]
    inputs, upstream = draw(case)
    moved = {n: LAYOUTS[layout](t.float()) for n, t in upstream.items()}
    with backends.use_backend(backend):
        want = evaluate(case.ours, inputs, upstream)
        got = evaluate(case.ours, inputs, moved)
    assert_close(got, want, 2e-6)


@by_case
def test_a_gradient_expanded_from_one_number_is_read_by_its_strides(name, backend, guarded):
    case = CASES[name]
    inputs, upstream = draw(case)
    ones = {n: torch.ones_like(t) for n, t in upstream.items()}
    expanded = {n: torch.ones(()).expand(t.shape) for n, t in upstream.items()}
    with backends.use_backend(backend):
        assert_close(evaluate(case.ours, inputs, expanded), evaluate(case.ours, inputs, ones), 2e-6)


@by_case
def test_inputs_expanded_over_the_first_dim_are_read_by_their_strides(name, backend, guarded):
    case = CASES[name]
    inputs, upstream = draw(case)
    first = {n: t[:1].clone() if t.dim() > 1 else t for n, t in inputs.items()}
    shapes = {n: t.shape for n, t in inputs.items()}

    def expanded(tensors):
        return case.ours({n: t.expand(shapes[n]) for n, t in tensors.items()})

    def copied(tensors):
        return case.ours({n: t.expand(shapes[n]).contiguous() for n, t in tensors.items()})

    with backends.use_backend(backend):
        want = evaluate(copied, first, upstream)
        assert_close(evaluate(expanded, first, upstream), want, 2e-6)


@by_case
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_output_element_is_written_and_nothing_else(name, dtype, backend, guarded):
    case = CASES[name]
    inputs, upstream = draw(case, dtype)
    inside = {n: guarded.copy(t, n) for n, t in inputs.items()}
    before = {n: t.clone() for n, t in inside.items()}
    with backends.use_backend(backend):
        results = evaluate(case.ours, inside, upstream)
        direct = case.ours(inside)
    assert all(t.isfinite().all() for t in results.values())
    for n, tensor in direct.items():
        assert torch.equal(tensor, results[n])
        assert tensor.is_contiguous()
    for n, tensor in inside.items():
        assert torch.equal(tensor, before[n]), f"{n} was changed"


EMPTY = {
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones(6), torch.zeros(6)),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x * 2, torch.ones(6), torch.zeros(6))[0],
    "mlp": lambda x: ops.mlp(x, torch.ones(8, 6), torch.ones(8), torch.ones(6, 8), torch.ones(6)),
}


@pytest.mark.parametrize("op", EMPTY)
@pytest.mark.parametrize("shape", ((0, 5, 6), (3, 0, 6), (0, 6)))
def test_no_rows_give_no_rows(op, shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    with backends.use_backend(backend):
        y = EMPTY[op](x)
        y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape


def test_layer_norm_of_no_rows_gives_zero_gradients_of_its_parameters(backend):
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    with backends.use_backend(backend):
        ops.layer_norm(torch.zeros(0, 6), weight, bias).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(6))
    assert torch.equal(bias.grad, torch.zeros(6))


def test_patch_embed_of_no_clips(backend):
    args = [torch.randn(4, 1, 16, 16), torch.randn(4), torch.randn(5, 4), torch.randn(2, 4)]
    for tensor in args:
        tensor.requires_grad_()
    x = torch.zeros(0, 36, 16, requires_grad=True)
    with backends.use_backend(backend):
        y = ops.patch_embed(x, *args, 10, 10)
        y.sum().backward()
    assert y.shape == (0, 5, 4)
    assert x.grad.shape == x.shape
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in args)


@pytest.mark.parametrize("shape", ((0, 5, 2, 32), (2, 0, 2, 32)))
def test_attention_of_nothing(shape, backend):
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    with backends.use_backend(backend):
        o = ops.attention(q, k, v)
        o.sum().backward()
    assert o.shape == shape
    assert all(t.grad.shape == shape for t in (q, k, v))


def test_attention_without_keys_is_zero(backend):
    q = torch.randn(2, 5, 2, 32, requires_grad=True)
    k, v = (torch.zeros(2, 0, 2, 32, requires_grad=True) for _ in range(2))
    with backends.use_backend(backend):
        o, lse = ops.attention(q, k, v, return_lse=True)
        o.sum().backward()
    assert torch.equal(o, torch.zeros(2, 5, 2, 32))
    assert (lse == torch.inf).all()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_attention_of_queries_and_keys_of_different_number(backend):
    q = torch.randn(2, 7, 2, 32, dtype=torch.float64)
    k, v = (torch.randn(2, 150, 2, 32, dtype=torch.float64) for _ in range(2))
    with backends.use_backend("reference"):
        want = ops.attention(q, k, v)
    with backends.use_backend(backend):
        got = ops.attention(q.float(), k.float(), v.float())
    assert measure(got, want).rel_l2 < 1e-6


def test_varlen_of_no_clips_and_of_empty_clips(backend):
    starts = torch.tensor([0], dtype=torch.int32)
    none = torch.zeros(0, 2, 32)
    with backends.use_backend(backend):
        assert ops.attention_varlen(none, none, none, starts, starts, 0, 0).shape == (0, 2, 32)
        starts = torch.tensor([0, 0, 3, 3], dtype=torch.int32)
        q = torch.randn(3, 2, 32, requires_grad=True)
        o = ops.attention_varlen(q, q, q, starts, starts, 3, 3)
        o.sum().backward()
        alone = ops.attention(q[None], q[None], q[None])[0]
    assert measure(o, alone).rel_l2 < 1e-6
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("samples", (0, 1, 399))
def test_log_mel_of_less_than_a_window(samples, backend):
    wave = torch.zeros(2, samples, requires_grad=True)
    with backends.use_backend(backend):
        assert ops.log_mel(wave).shape == (2, 0, 128)
        padded = ops.log_mel(wave, num_frames=3, mean=-4.0, std=2.0)
        padded.sum().backward()
    assert torch.equal(padded, torch.ones(2, 3, 128))
    assert torch.equal(wave.grad, torch.zeros(2, samples))


def test_log_mel_of_no_clips(backend):
    with backends.use_backend(backend):
        assert ops.log_mel(torch.zeros(0, 1600)).shape == (0, 8, 128)
