"""Packed attention kernels in the Triton interpreter, against the reference in float64."""

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

from ast_fast.kernels import attention, attention_launch, attention_varlen
from ast_fast.kernels.attention_launch import Config
from ast_fast.reference import ops as reference

pytestmark = pytest.mark.interpret

FLOORS = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3)}
DTYPES = [torch.float32, torch.float16]
POINTER = Config(64, 32, 4, 2)
DESCRIPTOR = Config(64, 32, 4, 2, tma=True)
CHUNKED = Config(32, 32, 4, 1, chunk=16)
PATHS = [POINTER, DESCRIPTOR, CHUNKED]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def starts(lengths):
    """cu_seqlens of clips of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def oracle(q, k, v, cu_q, cu_k, scale, do):
    """o, lse, dq, dk, dv in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o, lse = reference.attention_varlen(*leaves, cu_q, cu_k, scale)
    grads = torch.autograd.grad(o, leaves, do.double())
    return o.detach(), lse.detach(), *grads


def relative(ours, exact):
    """Relative L2 error."""
    return float((ours.double() - exact).norm() / exact.norm())


def assert_close(name, ours, exact, floor):
    """Within the floor of the dtype."""
    if float(exact.norm()) <= 1e-12 * exact.numel():
        # nothing but cancellation: sums of up to a hundred terms of order one
        error = (ours.double() - exact).abs()
        assert not error.numel() or float(error.max()) <= 10 * floor, name
        return
    assert relative(ours, exact) <= floor, name


def run(q, k, v, do, cu_q, cu_k, scale, config=None, out=None):
    """o, lse and the gradients, written over NaN."""
    longest = [max(cu.diff().tolist(), default=0) for cu in (cu_q, cu_k)]
    o, lse = attention_varlen.forward(q, k, v, cu_q, cu_k, *longest, scale, config=config)
    out = out or [
        torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in (q, k, v)
    ]
    attention_varlen.backward(
        do, q, k, v, o, lse, cu_q, cu_k, *longest, scale, True, *out,
        dq_config=config, dkv_config=config,
    )  # fmt: skip
    return o, lse, out


def check(q, k, v, do, cu_q, cu_k, scale=None, config=None):
    """Forward and gradients are within the floors of the dtype; returns what the kernels gave."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse, grads = run(q, k, v, do, cu_q, cu_k, scale, config)
    exact = oracle(q, k, v, cu_q, cu_k, scale, do)
    forward_floor, backward_floor = FLOORS[q.dtype]
    assert o.is_contiguous() and o.shape == q.shape and o.dtype == q.dtype
    assert lse.dtype == torch.float32 and lse.shape == exact[1].shape
    finite = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), finite) and bool((lse[~finite] == torch.inf).all())
    assert bool(((lse - exact[1]).abs() <= 2e-6 * (1 + exact[1].abs()))[finite].all())
    assert_close("o", o, exact[0], forward_floor)
    for name, ours, want in zip(("dq", "dk", "dv"), grads, exact[2:], strict=True):
        assert_close(name, ours, want, backward_floor)
    return o, lse, grads


def inputs(arena, rows_q, rows_k, heads, width, dtype=torch.float32, seed=0):
    """q, k, v, do in guarded memory."""
    shapes = [(rows, heads, width) for rows in (rows_q, rows_k, rows_k, rows_q)]
    return [arena.put(random(*s, dtype=dtype, seed=seed + i)) for i, s in enumerate(shapes)]


LENGTHS = {
    "one": [1],
    "one_clip": [129],
    "around_a_tile": [63, 64, 65],
    "around_the_padding": [127, 128, 1, 129],
    "empty_first": [0, 5, 70],
    "empty_between": [40, 0, 0, 33],
    "empty_last": [66, 3, 0],
    "uneven": [140, 2, 31],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward_and_gradients_match_fp64_for_clips_of_any_length(arena, lengths, dtype):
    cu = starts(lengths)
    # float32 takes the slow path without tensor cores: half the width, half the time
    width = 64 if dtype == torch.float16 else 32
    check(*inputs(arena, sum(lengths), sum(lengths), 1, width, dtype), cu, cu)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([1, 70, 5], [130, 3, 64]), ([40, 0, 9], [0, 20, 33]), ([10, 20], [0, 0])],
    ids=["uneven", "some_empty", "no_keys"],
)
def test_queries_and_keys_of_different_length(arena, queries, keys, config):
    if not sum(keys) and config.tma:
        # a tensor map cannot describe nothing, so a launch never picks this
        config = None
    tensors = inputs(arena, sum(queries), sum(keys), 2, 32)
    check(*tensors, starts(queries), starts(keys), config=config)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width(arena, width, config):
    cu = starts([70, 37])
    check(*inputs(arena, 107, 107, 1, width, torch.float16), cu, cu, config=config)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
def test_clips_of_one_length_give_the_bits_of_dense_attention(arena, config):
    q, k, v, do = inputs(arena, 3 * 40, 3 * 40, 2, 32)
    cu = starts([40] * 3)
    o, lse, grads = run(q, k, v, do, cu, cu, 0.2, config)
    dense = [x.view(3, 40, 2, 32) for x in (q, k, v, do)]
    o_dense, lse_dense = attention.forward(*dense[:3], 0.2, None, config=config)
    out = [torch.empty_like(x) for x in dense[:3]]
    attention.backward(
        dense[3], *dense[:3], o_dense, lse_dense, 0.2, None, True, *out,
        dq_config=config, dkv_config=config,
    )  # fmt: skip
    assert torch.equal(o.view_as(o_dense), o_dense)
    assert all(torch.equal(g.view_as(want), want) for g, want in zip(grads, out, strict=True))
    columns = reference.varlen_offsets(cu).tolist()
    for clip, column in enumerate(columns):
        assert torch.equal(lse[:, column : column + 40], lse_dense[clip, :, :40])


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_a_clip_full_of_nan_changes_no_other_clip(arena, which, config):
    # tiles of the clips before and after reach into the poisoned one
    cu = starts([40, 30, 45])
    tensors = dict(zip(("q", "k", "v", "do"), inputs(arena, 115, 115, 2, 32), strict=True))
    clean = run(*tensors.values(), cu, cu, 0.2, config)
    tensors[which][40:70] = float("nan")
    dirty = run(*tensors.values(), cu, cu, 0.2, config)
    others = torch.ones(115, dtype=torch.bool)
    others[40:70] = False
    assert torch.equal(dirty[0][others], clean[0][others])
    for ours, want in zip(dirty[2], clean[2], strict=True):
        assert torch.equal(ours[others], want[others])
    for column in reference.varlen_offsets(cu)[[0, 2]].tolist():
        assert torch.equal(dirty[1][:, column : column + 40], clean[1][:, column : column + 40])
    assert bool(dirty[2][0][40:70].isnan().any())


@pytest.mark.parametrize("config", [None, DESCRIPTOR], ids=["table", "descriptor"])
def test_views_of_one_fused_qkv_buffer_are_read_and_written_in_place(arena, config):
    cu = starts([70, 37])
    fused = arena.put(random(107, 3, 2, 32))
    q, k, v = fused.unbind(1)
    assert all(attention_launch.aligned(x) is x for x in (q, k, v))
    do = arena.put(random(107, 2, 32, seed=9))
    _, _, grads = check(q, k, v, do, cu, cu, config=config)
    fused_grad = arena.empty(107, 3, 2, 32)
    run(q, k, v, do, cu, cu, 32**-0.5, config, out=list(fused_grad.unbind(1)))
    for ours, want in zip(fused_grad.unbind(1), grads, strict=True):
        assert torch.equal(ours, want)


def test_lse_lies_where_the_contract_says(arena):
    lengths = [130, 0, 5, 128]
    cu = starts(lengths)
    q, k, v, _ = inputs(arena, sum(lengths), sum(lengths), 1, 32)
    _, lse = attention_varlen.forward(q, k, v, cu, cu, 130, 130, 1.0)
    assert lse.shape == (1, -(-(263 + 4 * 128) // 128) * 128)
    expected = torch.zeros(lse.shape[1], dtype=torch.bool)
    for clip, length in enumerate(lengths):
        column = (int(cu[clip]) + clip * 128) // 128 * 128
        expected[column : column + length] = True
    assert torch.equal(lse[0].isfinite(), expected)
    assert bool((lse[0, ~expected] == torch.inf).all())


@pytest.mark.parametrize("stride", [2**31 + 64, 2**26], ids=["head", "row"])
def test_addresses_past_two_to_the_31_elements(stride):
    # untouched pages of a large allocation cost no memory
    rows, heads, width = (5, 2, 32) if stride > 2**31 else (40, 1, 32)
    steps = (width, stride, 1) if heads == 2 else (stride, width, 1)
    extent = (rows - 1) * steps[0] + (heads - 1) * steps[1] + width
    far, far_grad = (
        torch.empty(extent, dtype=torch.float16).as_strided((rows, heads, width), steps)
        for _ in range(2)
    )
    near = random(rows, heads, width, dtype=torch.float16)
    far.copy_(near)
    do = random(rows, heads, width, dtype=torch.float16, seed=1)
    cu = starts([3, rows - 3])
    o, lse, grads = run(near, near, near, do, cu, cu, 0.2, POINTER)
    out = [far_grad, *[torch.empty_like(near) for _ in range(2)]]
    o_far, lse_far, grads_far = run(far, far, far, do, cu, cu, 0.2, POINTER, out=out)
    assert torch.equal(o, o_far) and torch.equal(lse, lse_far)
    assert all(map(torch.equal, grads, grads_far))


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([], []), ([0, 0], [0, 0]), ([0], [9])])
def test_empty_inputs(lengths_q, lengths_k):
    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    q, do = torch.ones(rows_q, 2, 32), torch.ones(rows_q, 2, 32)
    k, v = torch.ones(rows_k, 2, 32), torch.ones(rows_k, 2, 32)
    o, lse, grads = run(q, k, v, do, starts(lengths_q), starts(lengths_k), 1.0)
    assert o.shape == q.shape
    assert lse.shape == (2, reference.varlen_columns(rows_q, len(lengths_q)))
    assert bool((lse == torch.inf).all())
    assert all(not g.any() and not g.isnan().any() for g in grads)


def test_two_runs_give_the_same_bits(arena):
    cu = starts([70, 20])
    tensors = inputs(arena, 90, 90, 2, 32, torch.float16)
    first, second = (check(*tensors, cu, cu) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(map(torch.equal, first[2], second[2]))


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "broken",
    [[0, 70, 40, 107], [0, 70, 108], [0, 70, 106], [3, 70, 107], [0, -900, 107], [0, 2**30, 107]],
    ids=["backwards", "past", "short", "late", "before", "far"],
)
@pytest.mark.parametrize("side", ["q", "k"])
def test_wrong_starts_give_nan_everywhere_and_touch_no_other_memory(arena, broken, side, config):
    # every operand and result lies between guard zones
    wrong = torch.tensor(broken, dtype=torch.int32)
    right = starts([107, *[0] * (len(broken) - 2)])
    cu_q, cu_k = (wrong, right) if side == "q" else (right, wrong)
    q, k, v, do = inputs(arena, 107, 107, 2, 32)
    out = [arena.put(torch.zeros_like(x)) for x in (q, k, v)]
    o, lse, grads = run(q, k, v, do, cu_q, cu_k, 0.2, config, out=out)
    assert all(bool(x.isnan().all()) for x in (o, lse, *grads))
    # saved results of a forward that was right do not help
    o, lse = (arena.put(torch.ones_like(x)) for x in (o, lse))
    out = [arena.put(torch.zeros_like(x)) for x in (q, k, v)]
    attention_varlen.backward(
        do, q, k, v, o, lse, cu_q, cu_k, 107, 107, 0.2, True, *out,
        dq_config=config, dkv_config=config,
    )  # fmt: skip
    assert all(bool(x.isnan().all()) for x in out)


@given(data=st.data())
def test_any_lengths_width_and_path(arena, data):
    lengths_q = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=3), "lengths_q")
    same = data.draw(st.booleans(), "same")
    count = len(lengths_q)
    drawn = data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count), "lengths_k")
    lengths_k = lengths_q if same else drawn
    heads = data.draw(st.integers(1, 2), "heads")
    width = data.draw(st.sampled_from([32, 64, 96, 128]), "width")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    config = data.draw(st.sampled_from([None, *PATHS]), "config")
    seed = data.draw(st.integers(0, 99), "seed")
    if config is DESCRIPTOR and not (sum(lengths_q) and sum(lengths_k)):
        config = None
    tensors = inputs(arena, sum(lengths_q), sum(lengths_k), heads, width, dtype, seed)
    check(*tensors, starts(lengths_q), starts(lengths_k), config=config)


def test_reasons_to_refuse():
    q = torch.zeros(9, 4, 64)
    cu = starts([4, 5])
    assert attention_varlen.unsupported(q, q, q, cu, cu) is None
    assert "dimensions" in attention_varlen.unsupported(q[None], q, q, cu, cu)
    assert "int32" in attention_varlen.unsupported(q, q, q, cu.long(), cu)
    assert "as many" in attention_varlen.unsupported(q, q, q, cu, cu[:2])
    assert "width 48" in attention_varlen.unsupported(*[torch.zeros(9, 4, 48)] * 3, cu, cu)
