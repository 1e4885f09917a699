"""Attention with a bias a key: accuracy, layouts, extremes, gradients, registration."""

from __future__ import annotations

import pytest
import torch

from ast_fast import ops, reference
from ast_fast.backend import use_backend
from ast_fast.equivalence import cases
from ast_fast.equivalence.run_ops import run_op_case
from ast_fast.testing import available_backends, measure, random_tensor

by_backend = pytest.mark.parametrize("backend", available_backends())


def tensors(clips=2, queries=7, keys=37, heads=2, width=32, dtype=torch.float32):
    q = random_tensor(clips, queries, heads, width, seed=0, dtype=dtype)
    k, v = (random_tensor(clips, keys, heads, width, seed=s, dtype=dtype) for s in (1, 2))
    sizes = torch.randint(1, 40, (clips, keys), generator=torch.Generator().manual_seed(3))
    return q, k, v, sizes.float().log()


def oracle(q, k, v, bias, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = (each.double() for each in (q, k, v))
    return reference.ops.attention(*wide, scale, None, bias.double())[0]


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 16, 33, 515])
def test_it_stays_within_attentions_budget(tokens, width, dtype, backend):
    case = cases.attention_biased(2, tokens, 2, width)
    (row,) = run_op_case(case, torch.device("cpu"), dtype, backend)
    assert row.ok and row.backend == backend, row


@by_backend
@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 1e-20, 3.0])
def test_any_scale_and_different_lengths(scale, backend):
    q, k, v, bias = tensors()
    with use_backend(backend), torch.no_grad():
        got = ops.attention_biased(q, k, v, bias, scale)
    assert measure(got, oracle(q, k, v, bias, scale)).rel_l2 < 2e-6


@by_backend
def test_copies_of_a_key_count_as_its_size(backend):
    q, k, v, _ = tensors(keys=20)
    times = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(5))
    many = (each.repeat_interleave(times, dim=1) for each in (k, v))
    bias = times.float().log().expand(2, 20)  # a clip stride of 0
    with use_backend(backend), torch.no_grad():
        got, want = ops.attention_biased(q, k, v, bias), ops.attention(q, *many)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@by_backend
def test_without_bias_it_is_attention_bit_for_bit(backend):
    q, k, v, bias = tensors()
    with use_backend(backend), torch.no_grad():
        assert torch.equal(
            ops.attention_biased(q, k, v, torch.zeros_like(bias)), ops.attention(q, k, v)
        )


@by_backend
@pytest.mark.parametrize("clip", [0, 1])
def test_a_bias_reaches_its_own_clip_and_key_alone(clip, backend):
    q, k, v, bias = tensors()
    changed = bias.clone()
    changed[clip, 36] += 80.0  # the last key, in an incomplete tile
    with use_backend(backend), torch.no_grad():
        before = ops.attention_biased(q, k, v, bias)
        after = ops.attention_biased(q, k, v, changed)
    assert torch.equal(before[1 - clip], after[1 - clip])
    torch.testing.assert_close(after[clip], v[clip, 36].expand_as(after[clip]))


@by_backend
def test_fused_views_and_empty_inputs(backend):
    qkv = random_tensor(2, 21, 3, 2, 32, seed=0)
    bias = tensors(keys=21)[3]
    with use_backend(backend), torch.no_grad():
        q, k, v = qkv.unbind(2)
        assert torch.equal(
            ops.attention_biased(q, k, v, bias),
            ops.attention_biased(q.clone(), k.clone(), v.clone(), bias),
        )
        none = ops.attention_biased(q[:0], k[:0], v[:0], bias[:0])
        assert none.shape == (0, 21, 2, 32)
        assert ops.attention_biased(q[:, :0], k, v, bias).shape == (2, 0, 2, 32)
        keyless = ops.attention_biased(q, k[:, :0], v[:, :0], bias[:, :0])
        assert not keyless.any()


def test_nan_spreads_as_in_attention_and_threads_agree():
    q, k, v, bias = tensors(queries=200, keys=300)
    k[0, 3] = float("nan")
    with torch.no_grad():
        got = ops.attention_biased(q, k, v, bias)
        assert got[0].isnan().all() and not got[1].isnan().any()


def test_gradients_come_from_the_reference():
    q, k, v, bias = (each.double() for each in tensors(1, 3, 4, 1, 32))
    leaves = [each.requires_grad_() for each in (q, k, v, bias)]
    assert torch.autograd.gradcheck(ops.attention_biased, leaves)
    narrow = [each.detach().float().requires_grad_() for each in leaves]
    got = torch.autograd.grad(ops.attention_biased(*narrow).sum(), narrow)
    want = torch.autograd.grad(ops.attention_biased(*leaves).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_autocast_narrows_all_but_the_bias():
    q, k, v, bias = tensors()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = ops.attention_biased(q, k, v, bias)
        narrow = [each.bfloat16() for each in (q, k, v)]
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, ops.attention_biased(*narrow, bias))


@by_backend
def test_it_is_registered_well(backend):
    arguments = (*tensors(), 0.2, False, backend)
    torch.library.opcheck(
        torch.ops.ast_fast.attention_biased.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_bare_op_says_that_it_has_no_gradient():
    q, k, v, bias = tensors()
    o = torch.ops.ast_fast.attention_biased(q.requires_grad_(), k, v, bias, 0.2, False, "reference")
    with pytest.raises(RuntimeError, match="attention_biased"):
        o.sum().backward()


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(2, 36), r"key_bias has shape \(2, 36\).*expected \(2, 37\)"),
        (torch.zeros(2, 37, dtype=torch.int64), "int64"),
    ],
)
def test_a_wrong_bias_is_named(bias, message):
    with pytest.raises(ValueError, match=message):
        ops.attention_biased(*tensors()[:3], bias)
