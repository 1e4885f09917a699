"""The one-pass backward of attention, dense and packed, against the reference in float64.

The interpreter adds to the sum of dq element by element; that the compiler makes reductions of a
tensor map out of it on GPUs that have them is what the compile gate shows.
"""

from __future__ import annotations

import itertools
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

from ast_fast.kernels import _tuned, attention, attention_launch, attention_varlen
from ast_fast.kernels.attention_launch import Config
from ast_fast.reference import ops as reference

pytestmark = pytest.mark.interpret

FLOORS = {torch.float32: 2e-6, torch.float16: 2e-3}
DTYPES = [torch.float32, torch.float16]
POINTER = Config(32, 64, 4, 1)
DESCRIPTOR = Config(64, 32, 4, 1, tma=True, reduce=True)
PATHS = [POINTER, DESCRIPTOR]
SCALE = 0.2


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def starts(lengths):
    """cu_seqlens of clips of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(arena, q_shape, k_shape, dtype=torch.float32, seed=0):
    """q, k, v, do in guarded memory."""
    shapes = (q_shape, k_shape, k_shape, q_shape)
    return [arena.put(random(*s, dtype=dtype, seed=seed + i)) for i, s in enumerate(shapes)]


def gradients(q, k, v, do, key_lengths=None, config=POINTER, scale=SCALE, out=None, **options):
    """dq, dk, dv of dense attention, written over NaN."""
    o, lse = attention.forward(q, k, v, scale, key_lengths)
    out = out or [torch.full_like(x, float("nan")) for x in (q, k, v)]
    options = {"one_pass_config": config, **options} if config else options
    attention.backward(do, q, k, v, o, lse, scale, key_lengths, False, *out, **options)
    return out


def packed_gradients(q, k, v, do, cu_q, cu_k, config=POINTER):
    """dq, dk, dv of packed attention, written over NaN."""
    o, lse = attention_varlen.forward(q, k, v, cu_q, cu_k, 0, 0, SCALE)
    out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    attention_varlen.backward(
        do, q, k, v, o, lse, cu_q, cu_k, 0, 0, SCALE, False, *out, one_pass_config=config
    )
    return out


def exact(run, q, k, v, do, *arguments):
    """dq, dk, dv of the reference in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(run(*leaves, *arguments)[0], leaves, do.double())


def assert_close(ours, want, dtype, floor=None):
    """Every gradient is within the floor of the dtype."""
    floor = floor or FLOORS[dtype]
    for name, x, y in zip(("dq", "dk", "dv"), ours, want, strict=True):
        error = x.double() - y
        if float(y.norm()) <= 1e-12 * y.numel():
            # nothing but cancellation: sums of up to a hundred terms of order one
            assert not error.numel() or float(error.abs().max()) <= 10 * floor, name
            continue
        # of few tokens little is left but the rounding of terms of order one
        size = max(float(y.norm()), 0.1 * y.numel() ** 0.5)
        assert float(error.norm()) <= floor * size, name


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 130), (130, 1), (65, 127), (128, 64)])
def test_gradients_match_fp64(arena, queries, keys, config, dtype):
    tensors = inputs(arena, (2, queries, 2, 32), (2, keys, 2, 32), dtype)
    want = exact(reference.attention, *tensors, SCALE, None)
    assert_close(gradients(*tensors, config=config), want, dtype)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width(arena, width, config):
    tensors = inputs(arena, (1, 70, 2, width), (1, 37, 2, width), torch.float16)
    want = exact(reference.attention, *tensors, SCALE, None)
    assert_close(gradients(*tensors, config=config), want, torch.float16)


PACKED = {
    "around_the_padding": ([127, 128, 1, 129], [127, 128, 1, 129]),
    "one_long_many_short": ([3, 0, 150, 5, 1], [3, 0, 150, 5, 1]),
    "different": ([1, 70, 5], [130, 3, 64]),
    "some_empty": ([40, 0, 9, 0], [0, 20, 33, 0]),
    "no_keys": ([10, 20], [0, 0]),
    "no_queries": ([0, 0], [9, 1]),
}


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize(("queries", "keys"), PACKED.values(), ids=PACKED)
def test_packed_clips_of_any_length(arena, queries, keys, config):
    cu_q, cu_k = starts(queries), starts(keys)
    tensors = inputs(arena, (sum(queries), 2, 32), (sum(keys), 2, 32))
    want = exact(reference.attention_varlen, *tensors, cu_q, cu_k, SCALE)
    assert_close(packed_gradients(*tensors, cu_q, cu_k, config), want, torch.float32)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("wrong", [[0, 40, 20, 60], [0, 20, 61], [0, 20, 59], [2, 20, 60]])
@pytest.mark.parametrize("side", ["q", "k"])
def test_wrong_starts_give_nan_everywhere(arena, wrong, side, config):
    # every operand and result lies between guard zones
    q, k, v, do = inputs(arena, (60, 2, 32), (60, 2, 32))
    o, lse = (
        arena.put(torch.ones(60, 2, 32)),
        arena.put(torch.ones(2, reference.varlen_columns(60, len(wrong) - 1))),
    )
    right = starts([60, *[0] * (len(wrong) - 2)])
    bounds = [torch.tensor(wrong, dtype=torch.int32), right]
    out = [arena.put(torch.zeros_like(x)) for x in (q, k, v)]
    attention_varlen.backward(
        do, q, k, v, o, lse, *(bounds if side == "q" else bounds[::-1]), 0, 0, SCALE, False, *out,
        one_pass_config=config,
    )  # fmt: skip
    assert all(bool(x.isnan().all()) for x in out)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
def test_packed_clips_of_one_length_give_the_bits_of_dense_attention(arena, config):
    q, k, v, do = inputs(arena, (3, 40, 2, 32), (3, 40, 2, 32))
    cu = starts([40] * 3)
    packed = packed_gradients(*(x.flatten(0, 1) for x in (q, k, v, do)), cu, cu, config)
    dense = gradients(q, k, v, do, config=config)
    assert all(torch.equal(x.view_as(y), y) for x, y in zip(packed, dense, strict=True))


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_past_the_length_never_leak(arena, poison, config):
    lengths = torch.tensor([70, 37, 0, 200, 64], dtype=torch.int32)
    q, k, v, do = inputs(arena, (5, 17, 1, 32), (5, 70, 1, 32))
    clean = gradients(q, k, v, do, lengths, config)
    assert_close(clean, exact(reference.attention, q, k, v, do, SCALE, lengths), torch.float32)
    for clip, length in enumerate(lengths.tolist()):
        k[clip, length:] = poison
        v[clip, length:] = poison
    dirty = gradients(q, k, v, do, lengths, config)
    assert all(map(torch.equal, dirty, clean))
    assert not dirty[0][2].any() and not dirty[1][1, 37:].any() and not dirty[2][1, 37:].any()


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
def test_padding_stays_out_where_every_score_is_far_below_zero(arena, config):
    # exp(0 - lse) of an absent key overflows, and infinity times its zeros would be NaN
    q, k, v, do = inputs(arena, (1, 20, 1, 32), (1, 37, 1, 32))
    q.abs_().add_(5.0)
    k.abs_().add_(5.0).neg_()
    grads = gradients(q, k, v, do, config=config, scale=1.0)
    want = exact(reference.attention, q, k, v, do, 1.0, None)
    # scores near -1000 are known to 6e-5, and dq is a small difference of large terms
    assert_close(grads, want, torch.float32, 3e-3)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "do"])
def test_a_clip_full_of_nan_changes_no_other_clip(arena, which, config):
    # tiles of the clips before and after reach into the poisoned one
    cu = starts([40, 30, 45])
    tensors = inputs(arena, (115, 2, 32), (115, 2, 32))
    clean = packed_gradients(*tensors, cu, cu, config)
    tensors[which][40:70] = float("nan")
    dirty = packed_gradients(*tensors, cu, cu, config)
    others = torch.ones(115, dtype=torch.bool)
    others[40:70] = False
    assert all(torch.equal(x[others], y[others]) for x, y in zip(dirty, clean, strict=True))
    assert bool(dirty[0][40:70].isnan().any())


def test_gradients_go_into_views_of_one_fused_buffer(arena):
    tensors = inputs(arena, (2, 70, 2, 32), (2, 70, 2, 32))
    want = gradients(*tensors)
    fused = arena.empty(2, 70, 3, 2, 32)
    gradients(*tensors, out=list(fused.unbind(2)))
    assert all(map(torch.equal, fused.unbind(2), want))


@pytest.mark.parametrize("scale", [-0.25, 0.0, 3.0])
def test_any_scale(arena, scale):
    tensors = inputs(arena, (1, 40, 1, 32), (1, 70, 1, 32))
    want = exact(reference.attention, *tensors, scale, None)
    assert_close(gradients(*tensors, scale=scale), want, torch.float32, 1e-5)


@pytest.fixture
def launched(monkeypatch):
    """Names of the backward kernels in the order of their launches."""
    names = []
    for name in ("one_pass", "_two_passes"):
        real = getattr(attention_launch, name)

        def run(*arguments, name=name, real=real):
            names.append(name)
            real(*arguments)

        monkeypatch.setattr(attention_launch, name, run)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
def test_a_deterministic_backward_never_takes_one_pass(arena, launched, dtype):
    q, k, v, do = inputs(arena, (1, 40, 1, 32), (1, 40, 1, 32), dtype)
    o, lse = attention.forward(q, k, v, SCALE, None)
    out = [torch.empty_like(x) for x in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, SCALE, None, True, *out)
    with pytest.raises(ValueError, match="deterministic=False"):
        attention.backward(
            do, q, k, v, o, lse, SCALE, None, True, *out, one_pass_config=POINTER
        )  # fmt: skip
    cu = starts([15, 25])
    q, k, v, do, o = (x[0] for x in (q, k, v, do, o))
    o, lse = attention_varlen.forward(q, k, v, cu, cu, 25, 25, SCALE)
    out = [torch.empty_like(x) for x in (q, k, v)]
    attention_varlen.backward(do, q, k, v, o, lse, cu, cu, 25, 25, SCALE, True, *out)
    assert launched == ["_two_passes"] * 2


def test_the_table_decides_where_the_order_of_additions_is_free(arena, launched, monkeypatch):
    tensors = inputs(arena, (1, 40, 1, 32), (1, 40, 1, 32), torch.float16)
    gradients(*tensors, config=None)
    assert launched == ["one_pass"]
    launched.clear()
    # fp32 has no entry, and neither has a GPU without one
    gradients(*(x.float() for x in tensors), config=None)
    monkeypatch.setattr(_tuned, "capability", lambda device: 75)
    gradients(*tensors, config=None)
    assert launched == ["_two_passes"] * 2


def test_configurations_of_two_passes_ask_for_two_passes(arena, launched):
    tensors = inputs(arena, (1, 40, 1, 32), (1, 40, 1, 32), torch.float16)
    gradients(*tensors, config=None, dq_config=Config(32, 32, 4, 1))
    gradients(*tensors, config=None, dkv_config=Config(32, 32, 4, 1))
    assert launched == ["_two_passes"] * 2


def test_a_configuration_that_cannot_run_in_one_pass_is_refused(arena):
    tensors = inputs(arena, (1, 5, 1, 32), (1, 5, 1, 32))
    with pytest.raises(ValueError, match="one piece"):
        gradients(*tensors, config=Config(32, 32, 4, 1, chunk=16))


@given(data=st.data())
def test_any_lengths_width_and_path(arena, data):
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=3), "pairs"
    )
    width = data.draw(st.sampled_from([32, 64, 96, 128]), "width")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    config = data.draw(st.sampled_from(PATHS), "config")
    queries, keys = ([pair[side] for pair in pairs] for side in (0, 1))
    cu_q, cu_k = starts(queries), starts(keys)
    tensors = inputs(arena, (sum(queries), 1, width), (sum(keys), 1, width), dtype)
    want = exact(reference.attention_varlen, *tensors, cu_q, cu_k, SCALE)
    assert_close(packed_gradients(*tensors, cu_q, cu_k, config), want, dtype)
