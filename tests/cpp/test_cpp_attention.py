"""Attention of the C++ backend, padded and packed, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F

from ast_fast import reference
from ast_fast.cpp import attention, attention_varlen

F32, BF16 = torch.float32, torch.bfloat16
# clips, queries, keys, heads, width: one token, around the tiles of 12 and 32 and the blocks of 96, 192 and 512
SHAPES = [
    (1, 1, 1, 1, 32),
    (2, 13, 31, 2, 64),
    (1, 97, 193, 3, 96),
    (1, 129, 128, 2, 128),
    (2, 2, 600, 2, 32),
    (1, 300, 513, 1, 64),
    (1, 1214, 1214, 1, 64),
    (40, 20, 20, 1, 32),
]


def inputs(shape, dtype, fused=True):
    clips, tq, tk, heads, width = shape
    if fused and tq == tk:
        q, k, v = torch.randn(clips, tq, 3, heads, width).to(dtype).unbind(2)
    else:
        q = torch.randn(clips, tq, heads, width).to(dtype)
        k, v = torch.randn(2, clips, tk, heads, width).to(dtype)
    return q, k, v, torch.randn(clips, tq, heads, width).to(dtype)


def gradients(q, k, v, do, o, lse, scale, lengths=None):
    # filled with a wrong value: everything must be written
    grads = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, scale, lengths, True, *grads)
    return grads


def oracle(q, k, v, do, scale, lengths=None):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    o, lse = reference.ops.attention(q, k, v, scale, lengths)
    o.backward(do.double())
    return o.detach(), lse.detach(), (q.grad, k.grad, v.grad)


def plain(q, k, v, do, scale):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), scale=scale).transpose(
        1, 2
    )
    o.backward(do)
    return o.detach(), [t.grad for t in leaves]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_and_its_gradients_match_fp64(shape, dtype, within):
    q, k, v, do = inputs(shape, dtype)
    scale = shape[-1] ** -0.5
    o64, lse64, grads64 = oracle(q, k, v, do, scale)
    o_torch, grads_torch = plain(q, k, v, do, scale)
    o, lse = attention.forward(q, k, v, scale, None)
    tq = shape[1]
    assert o.dtype == dtype and o.is_contiguous() and lse.dtype == F32
    assert lse.shape[2] % 128 == 0 and (lse[:, :, tq:] == float("inf")).all()
    within(o, o_torch, o64, 1e-6 if dtype == F32 else 6e-3, "o")
    assert (lse[:, :, :tq] - lse64[:, :, :tq]).abs().max() < 5e-6
    grads = gradients(q, k, v, do, o, lse, scale)
    for name, ours, theirs, exact in zip("qkv", grads, grads_torch, grads64, strict=True):
        if shape[2] == 1 and name in "qk":
            # one key: the probabilities are constant and both gradients are exactly 0
            assert ours.abs().max() < (1e-5 if dtype == F32 else 0.2)
        else:
            within(ours, theirs, exact, 2e-6 if dtype == F32 else 1e-2, "d" + name)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ignored_keys_may_hold_nan_and_get_zero_gradients(dtype, within):
    q, k, v, do = inputs((5, 40, 70, 2, 64), dtype)
    lengths = torch.tensor([70, 0, 1, 33, 64], dtype=torch.int32)
    for clip, length in enumerate(lengths.tolist()):
        k[clip, length:], v[clip, length:] = float("nan"), float("inf")
    o, lse = attention.forward(q, k, v, 0.125, lengths)
    clean = [torch.nan_to_num(t, 0.0, 0.0) for t in (k, v)]
    o64, lse64, grads64 = oracle(q, *clean, do, 0.125, lengths)
    within(o, None, o64, 1e-6 if dtype == F32 else 6e-3, "o")
    assert not o[1].any() and (lse[1] == float("inf")).all()
    assert torch.allclose(
        lse[[0, 2, 3, 4], :, :40].double(), lse64[[0, 2, 3, 4], :, :40], atol=5e-6
    )
    dq, dk, dv = gradients(q, k, v, do, o, lse, 0.125, lengths)
    for name, ours, exact in zip("qkv", (dq, dk, dv), grads64, strict=True):
        within(ours, None, exact, 2e-6 if dtype == F32 else 1e-2, "d" + name)
    for clip, length in enumerate(lengths.tolist()):
        assert not dk[clip, length:].any() and not dv[clip, length:].any()
    assert not dq[1].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_go_into_strided_views(dtype):
    q, k, v, do = inputs((2, 50, 50, 2, 32), dtype)
    o, lse = attention.forward(q, k, v, 0.2, None)
    dense = gradients(q, k, v, do, o, lse, 0.2)
    buffer = torch.full((2, 52, 3, 2, 48), 5.0, dtype=dtype)
    views = [buffer[:, 1:51, i, :, 8:40] for i in range(3)]
    attention.backward(do, q, k, v, o, lse, 0.2, None, True, *views)
    assert all(torch.equal(a, b) for a, b in zip(views, dense, strict=True))
    mask = torch.ones_like(buffer, dtype=torch.bool)
    mask[:, 1:51, :, :, 8:40] = False
    assert (buffer[mask] == 5.0).all(), "wrote outside the views"


def test_odd_strides_of_the_inputs():
    q, k, v, _ = inputs((2, 30, 45, 2, 64), F32, fused=False)
    o, lse = attention.forward(q, k, v, 0.125, None)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention.forward(*heads_first, 0.125, None)[0], o)
    last_strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    assert torch.equal(attention.forward(*last_strided, 0.125, None)[0], o)
    offset = torch.zeros(q.numel() + 1)[1:].view(q.shape).copy_(q)
    assert torch.equal(attention.forward(offset, k, v, 0.125, None)[0], o)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)  # one key head for both: stride 0
    assert torch.equal(
        attention.forward(q, shared, v, 0.125, None)[0],
        attention.forward(q, shared.contiguous(), v, 0.125, None)[0],
    )
    expanded = torch.ones(()).expand(q.shape)  # the gradient of a plain sum
    for a, b in zip(
        gradients(q, k, v, expanded, o, lse, 0.125),
        gradients(q, k, v, torch.ones(q.shape), o, lse, 0.125),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_unusual_scales(scale, within):
    q, k, v, do = inputs((1, 30, 40, 2, 32), F32)
    o64, _, grads64 = oracle(q, k, v, do, scale)
    o, lse = attention.forward(q, k, v, scale, None)
    within(o, None, o64, 1e-5, "o")
    for name, ours, exact in zip(
        "qkv", gradients(q, k, v, do, o, lse, scale), grads64, strict=True
    ):
        within(ours, None, exact, 2e-5, "d" + name)


def test_scores_of_ten_thousand_stay_finite():
    q, k, v, do = inputs((1, 40, 600, 1, 64), F32)
    q, k = q * 50, k * 50
    o, lse = attention.forward(q, k, v, 0.125, None)
    assert o.isfinite().all() and lse[:, :, :40].isfinite().all()
    assert all(g.isfinite().all() for g in gradients(q, k, v, do, o, lse, 0.125))


def test_a_nan_query_and_a_nan_clip_touch_nothing_else():
    q, k, v, do = inputs((2, 30, 30, 2, 32), F32, fused=False)
    q[0, 4, 1, 3] = float("nan")
    o, _ = attention.forward(q, k, v, 0.2, None)
    bad = o.isnan().any(-1)
    assert bad[0, 4, 1] and bad.sum() == 1
    v[1, 3] = float("nan")
    o, lse = attention.forward(q, k, v, 0.2, None)
    assert o[1].isnan().all() and o[0].isnan().any(-1).sum() == 1
    dq = gradients(q, k, v, do, o, lse, 0.2)[0]
    assert dq[0].isnan().any(-1).sum() == 1


@pytest.mark.parametrize(
    "shape", [(0, 5, 5, 2, 32), (2, 0, 5, 2, 32), (2, 5, 0, 2, 32), (2, 5, 5, 0, 32)]
)
def test_empty_inputs(shape):
    q, k, v, do = inputs(shape, F32, fused=False)
    o, lse = attention.forward(q, k, v, 0.2, None)
    assert o.shape == q.shape and not o.any()
    assert (lse == float("inf")).all()
    assert not any(g.any() for g in gradients(q, k, v, do, o, lse, 0.2))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lengths", [([5, 200, 1, 64], [5, 200, 1, 64]), ([3, 0, 130], [7, 9, 0])])
def test_packed_clips_equal_clips_on_their_own(dtype, lengths):
    q_lengths, k_lengths = lengths
    cu_q = torch.tensor([0, *q_lengths]).cumsum(0).int()
    cu_k = torch.tensor([0, *k_lengths]).cumsum(0).int()
    rows, keys, heads, width = int(cu_q[-1]), int(cu_k[-1]), 2, 64
    q, do = torch.randn(2, rows, heads, width).to(dtype)
    k, v = torch.randn(2, keys, heads, width).to(dtype)
    limits = (cu_q, cu_k, max(q_lengths), max(k_lengths), 0.125)
    o, lse = attention_varlen.forward(q, k, v, *limits)
    assert lse.shape == (heads, -(-(rows + len(q_lengths) * 128) // 128) * 128)
    grads = [torch.full(t.shape, 7.0, dtype=dtype) for t in (q, k, v)]
    attention_varlen.backward(do, q, k, v, o, lse, *limits, True, *grads)
    used = torch.zeros(lse.shape[1], dtype=torch.bool)
    for b, length in enumerate(q_lengths):
        at, to = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        column = (int(cu_q[b]) + b * 128) // 128 * 128
        used[column : column + length] = True
        single = q[None, at], k[None, to], v[None, to]
        o1, lse1 = attention.forward(*single, 0.125, None)
        assert torch.equal(o[at], o1[0])
        assert torch.equal(lse[:, column : column + length], lse1[0, :, :length])
        _, _, grads64 = oracle(*single, do[None, at], 0.125)
        for ours, exact in zip((grads[0][at], grads[1][to], grads[2][to]), grads64, strict=True):
            # with one key the exact gradients of q and k are 0: rounding errors remain
            tolerance = (2e-6 if dtype == F32 else 1e-2) * max(exact.norm().item(), 5.0)
            assert (ours.double() - exact[0]).norm() <= tolerance
    assert (lse[:, ~used] == float("inf")).all()


def test_backward_of_clips_that_are_all_without_keys_divides_by_no_zero():
    q, k, v, do = (torch.randn(2, 5, 2, 32) for _ in range(4))
    lengths = torch.zeros(2, dtype=torch.int32)
    o, lse = attention.forward(q, k, v, 0.2, lengths)
    grads = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    attention.backward(do, q, k, v, o, lse, 0.2, lengths, True, *grads)
    assert not o.any()
    assert not any(grad.any() for grad in grads)


def test_what_is_unsupported_is_said():
    q = torch.randn(1, 4, 2, 48)
    assert "48" in attention.unsupported(q, q, q, None)
    q = torch.randn(1, 4, 2, 64)
    assert attention.unsupported(q, q, q, None) is None
    assert "float64" in attention.unsupported(q.double(), q.double(), q.double(), None)
    assert attention_varlen.unsupported(q[0], q[0], q[0], None, None) is None


def test_probabilities_hold_exp2s_own_error():
    # one query, two keys, of which the first has score 0 and the second y: the output is p(y)
    y = torch.linspace(-1.0, 1.0, 4001)  # in units of ln 2: both halves of exp2's polynomial
    q = torch.zeros(len(y), 1, 1, 32)
    q[:, 0, 0, 0] = y * 0.6931471805599453
    k, v = torch.zeros(2, len(y), 2, 1, 32)
    k[:, 1, 0, 0] = v[:, 1, 0, 0] = 1.0
    o, _ = attention.forward(q, k, v, 1.0, None)
    want = torch.sigmoid(q[:, 0, 0, 0].double())
    # exp2's 2e-7, and a rounding each of the score, the sum, the quotient and the product
    assert ((o[:, 0, 0, 0] - want) / want).abs().max() < 3.5e-7
