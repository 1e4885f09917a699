"""Masked attention of the C++ backend against a dense masked softmax in float64."""

import pytest
import torch
import torch.nn.functional as F

from ast_fast.attention_mask import AttentionMask
from ast_fast.cpp import attention, attention_masked

F32, BF16 = torch.float32, torch.bfloat16
INF = float("inf")


def random_mask(queries, keys, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(queries, keys, generator=generator) < share


def with_gaps():
    """Some queries see nothing and some keys are seen by nobody, beside others in the same rectangle."""
    seen = random_mask(70, 90, 0.4)
    seen[[0, 3, 69]] = False
    seen[:, [0, 17, 89]] = False
    return seen


def tall_tiles():
    """Rectangles with more rows than a block of the kernels has, in no order."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = (torch.randperm(n, generator=generator).int().numpy() for n in (230, 410))
    return AttentionMask(random_mask(230, 410, 0.5).numpy(), [[queries]], [[keys]])


def late_queries():
    """A tile half of whose queries were in a rectangle before, and half were not: their sums begin there."""
    tokens = torch.arange(18, dtype=torch.int32).numpy()
    passes = torch.ones(18, 40, dtype=torch.int64)
    passes[:12, :20] = 0
    tiles = [[tokens[:12]], [tokens[6:], tokens[:6]]]
    return AttentionMask(random_mask(18, 40, 0.8).numpy(), tiles, None, passes.numpy())


MASKS = {
    "tall tiles": tall_tiles,
    "late queries": late_queries,
    "factorised": lambda: AttentionMask.factorised(3, 5),
    "factorised, no prefix": lambda: AttentionMask.factorised(4, 37, prefix=0),
    "one row": lambda: AttentionMask.factorised(1, 33),
    "one column": lambda: AttentionMask.factorised(33, 1, prefix=1),
    "time window": lambda: AttentionMask.time_window(12, 20, 2),
    "time window, tall": lambda: AttentionMask.time_window(70, 3, 0, prefix=0),
    "random": lambda: AttentionMask.from_dense(random_mask(150, 77, 0.3)),
    "sparse": lambda: AttentionMask.from_dense(random_mask(65, 700, 0.01)),
    "long": lambda: AttentionMask.from_dense(random_mask(5, 600, 0.9)),
    "gaps": lambda: AttentionMask.from_dense(with_gaps()),
    "all seen": lambda: AttentionMask.from_dense(torch.ones(130, 250, dtype=torch.bool)),
    "one pair": lambda: AttentionMask.from_dense(torch.ones(1, 1, dtype=torch.bool)),
}


def inputs(mask, clips=1, heads=2, width=32, dtype=F32):
    q, do = torch.randn(2, clips, mask.queries, heads, width).to(dtype)
    k, v = torch.randn(2, clips, mask.keys, heads, width).to(dtype)
    return q, k, v, do


def flat(mask):
    return [*mask.by_query, *mask.by_key]


def gradients(mask, q, k, v, do, o, lse, scale):
    # filled with a wrong value: everything must be written
    grads = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in (q, k, v)]
    attention_masked.backward(do, q, k, v, o, lse, flat(mask), scale, True, *grads)
    return grads


def oracle(mask, q, k, v, do, scale):
    """o, lse and gradients; tokens that see nothing or are seen by nobody may hold anything."""
    seen = mask.dense()
    blind, unseen = ~seen.any(1), ~seen.any(0)
    leaves = [t.detach().double().clone() for t in (q, k, v)]
    for leaf, unused in zip(leaves, (blind, unseen, unseen), strict=True):
        leaf[:, unused] = 0.0
        leaf.requires_grad_()
    do = do.double().masked_fill(blind[:, None, None], 0.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", *leaves[:2]) * scale
    scores = scores.masked_fill(~seen, -INF).masked_fill(blind[:, None], 0.0)
    weights = scores.softmax(-1).masked_fill(blind[:, None], 0.0)
    o = torch.einsum("bhqk,bkhd->bqhd", weights, leaves[2])
    o.backward(do)
    lse = scores.logsumexp(-1).masked_fill(blind, INF)
    return o.detach(), lse.detach(), [leaf.grad for leaf in leaves]


def plain(mask, q, k, v, do, scale):
    """torch's own, dense with the bool mask; None where a query sees nothing, which torch makes NaN."""
    seen = mask.dense()
    if not seen.any(1).all():
        return None, (None, None, None)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        heads_first = (t.transpose(1, 2) for t in leaves)
        o = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale)
    o = o.transpose(1, 2)
    o.backward(do)
    return o.detach(), [t.grad for t in leaves]


def check(mask, q, k, v, do, scale, within, looser=1):
    """Forward and backward against the oracle, budgets as for dense attention."""
    dtype, tq = q.dtype, mask.queries
    o64, lse64, grads64 = oracle(mask, q, k, v, do, scale)
    o_torch, grads_torch = plain(mask, q, k, v, do, scale)
    o, lse = attention_masked.forward(q, k, v, flat(mask), scale)
    assert o.dtype == dtype and o.is_contiguous() and lse.dtype == F32
    assert lse.shape[2] == -(-tq // 128) * 128 and (lse[:, :, tq:] == INF).all()
    within(o, o_torch, o64, looser * (1e-6 if dtype == F32 else 6e-3), "o")
    blind = lse64 == INF
    assert torch.equal(lse[:, :, :tq] == INF, blind)
    error = (lse[:, :, :tq] - lse64).masked_fill(blind, 0.0).abs().max()
    assert error < 5e-6 * max(1.0, lse64.masked_fill(blind, 0.0).abs().max() / 8)
    assert not o.transpose(1, 2)[blind].any()
    grads = gradients(mask, q, k, v, do, o, lse, scale)
    for name, ours, theirs, exact in zip("qkv", grads, grads_torch, grads64, strict=True):
        if exact.norm() < 1e-9 * do.double().nan_to_num(0.0, 0.0, 0.0).norm():
            assert ours.abs().max() < (1e-5 if dtype == F32 else 0.2), "d" + name
        else:
            within(ours, theirs, exact, looser * (2e-6 if dtype == F32 else 1e-2), "d" + name)
    seen = mask.dense()
    assert not grads[0][:, ~seen.any(1)].any()
    assert not grads[1][:, ~seen.any(0)].any() and not grads[2][:, ~seen.any(0)].any()


# heads few enough to be shared by all threads, and enough to be an item each
@pytest.mark.parametrize("clips, heads", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_and_its_gradients_match_fp64(name, dtype, clips, heads, within):
    mask = MASKS[name]()
    check(mask, *inputs(mask, clips, heads, 32, dtype), 0.2, within)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_head_width(width, dtype, within):
    for mask in (AttentionMask.factorised(5, 43), AttentionMask.from_dense(with_gaps())):
        check(mask, *inputs(mask, 1, 9, width, dtype), width**-0.5, within)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_grid_of_the_base_model(dtype, within):
    mask = AttentionMask.factorised(12, 101)
    check(mask, *inputs(mask, 1, 1, 64, dtype), 0.125, within)


def test_a_whole_mask_equals_dense_attention():
    mask = MASKS["all seen"]()
    q, k, v, _ = inputs(mask, 2, 4, 64)
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.125)
    dense, dense_lse = attention.forward(q, k, v, 0.125, None)
    assert torch.allclose(o, dense, atol=1e-6) and torch.allclose(lse, dense_lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", [2, 9])
def test_fused_views_and_gradients_into_slices_of_one_buffer(dtype, heads):
    mask = AttentionMask.factorised(4, 20)
    tokens = mask.queries
    q, k, v = torch.randn(2, tokens, 3, heads, 32).to(dtype).unbind(2)
    do = torch.randn(2, tokens, heads, 32).to(dtype)
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.2)
    copies = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(attention_masked.forward(*copies, flat(mask), 0.2)[0], o)
    expected = gradients(mask, *copies, do, o, lse, 0.2)
    buffer = torch.full((2, tokens + 2, 3, heads, 48), 5.0, dtype=dtype)
    views = [buffer[:, 1:-1, i, :, 8:40] for i in range(3)]
    attention_masked.backward(do, q, k, v, o, lse, flat(mask), 0.2, True, *views)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[:, 1:-1, :, :, 8:40] = False
    assert (buffer[outside] == 5.0).all(), "wrote outside the views"


def test_odd_strides_of_the_inputs():
    mask = MASKS["random"]()
    q, k, v, _ = inputs(mask, 2, 2, 64)
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.125)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention_masked.forward(*heads_first, flat(mask), 0.125)[0], o)
    last_strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    assert torch.equal(attention_masked.forward(*last_strided, flat(mask), 0.125)[0], o)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)  # one key head for both: stride 0
    assert torch.equal(
        attention_masked.forward(q, shared, v, flat(mask), 0.125)[0],
        attention_masked.forward(q, shared.contiguous(), v, flat(mask), 0.125)[0],
    )
    expanded = torch.ones(()).expand(q.shape)  # the gradient of a plain sum
    for a, b in zip(
        gradients(mask, q, k, v, expanded, o, lse, 0.125),
        gradients(mask, q, k, v, torch.ones(q.shape), o, lse, 0.125),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [2, 9])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_tokens_that_play_no_part_may_hold_anything(heads, dtype, poison, within):
    mask = AttentionMask.from_dense(with_gaps())
    seen = mask.dense()
    q, k, v, do = inputs(mask, 1, heads, 32, dtype)
    k[:, ~seen.any(0)] = v[:, ~seen.any(0)] = poison
    q[:, ~seen.any(1)] = do[:, ~seen.any(1)] = poison
    check(mask, q, k, v, do, 0.2, within)


def test_a_nan_query_touches_its_own_output_alone():
    mask = AttentionMask.factorised(4, 9)
    q, k, v, _ = inputs(mask, 1, 2)
    q[0, 8, 1, 3] = float("nan")
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.2)
    bad = o.isnan().any(-1)
    assert bad[0, 8, 1] and bad.sum() == 1 and lse.isnan().sum() == 1


def test_nothing_is_seen():
    mask = AttentionMask.from_dense(torch.zeros(40, 50, dtype=torch.bool))
    for heads in (2, 9):
        q, k, v, do = inputs(mask, 1, heads)
        q[:], do[:] = float("nan"), float("nan")
        o, lse = attention_masked.forward(q, k, v, flat(mask), 0.2)
        assert not o.any() and (lse == INF).all()
        assert not any(g.any() for g in gradients(mask, q, k, v, do, o, lse, 0.2))


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_unusual_scales(scale, within):
    for mask in (AttentionMask.factorised(3, 11), AttentionMask.from_dense(with_gaps())):
        check(mask, *inputs(mask), scale, within, looser=10)


def test_scores_of_ten_thousand_stay_exact(within):
    # the maximum of a query moves from one pass to the next by far more than the exponential's range
    mask = AttentionMask.factorised(6, 40)
    q, k, v, do = inputs(mask, 1, 2, 64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scale = (1e4 / scores.abs().max()).item()
    o, lse = attention_masked.forward(q, k, v, flat(mask), scale)
    o64, lse64, _ = oracle(mask, q, k, v, do, scale)
    within(o, plain(mask, q, k, v, do, scale)[0], o64, 1e-3, "o")
    assert ((lse[:, :, : mask.queries] - lse64).abs() <= 1e-6 * lse64.abs() + 1e-5).all()
    assert all(g.isfinite().all() for g in gradients(mask, q, k, v, do, o, lse, scale))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("clips, heads", [(1, 1), (1, 3), (3, 3), (2, 7)])
def test_one_two_and_five_threads_give_the_same_bits(dtype, clips, heads):
    for mask in (AttentionMask.factorised(5, 30), MASKS["random"](), MASKS["time window"]()):
        q, k, v, do = inputs(mask, clips, heads, 64, dtype)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            o, lse = attention_masked.forward(q, k, v, flat(mask), 0.125)
            results.append([o, lse, *gradients(mask, q, k, v, do, o, lse, 0.125)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("clips, heads", [(0, 2), (2, 0)])
def test_empty_inputs(clips, heads):
    mask = AttentionMask.factorised(2, 3)
    q, k, v, do = inputs(mask, clips, heads)
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.2)
    assert o.shape == q.shape and lse.shape == (clips, heads, 128) and (lse == INF).all()
    assert all(g.numel() == 0 for g in gradients(mask, q, k, v, do, o, lse, 0.2))


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(queries, keys):
    mask = AttentionMask.from_dense(torch.ones(queries, keys, dtype=torch.bool))
    q, k, v, do = inputs(mask)
    o, lse = attention_masked.forward(q, k, v, flat(mask), 0.2)
    assert o.shape == q.shape and not o.any() and (lse == INF).all()
    assert not any(g.any() for g in gradients(mask, q, k, v, do, o, lse, 0.2))


def test_rectangles_of_another_size_are_refused():
    mask = AttentionMask.factorised(3, 5)
    q, k, v, do = inputs(AttentionMask.factorised(3, 4))
    with pytest.raises(ValueError, match="14 x 14 tokens"):
        attention_masked.forward(q, k, v, flat(mask), 0.2)
    o, lse = torch.zeros_like(q), torch.zeros(1, 2, 128)
    with pytest.raises(ValueError, match="AttentionMask"):
        gradients(mask, q, k, v, do, o, lse, 0.2)
    q, k, v, _ = inputs(mask)
    for place, value in ((1, 1000), (3, 1000), (4, 10_000), (0, -1)):
        bent = [t.clone() for t in flat(mask)]
        bent[2][-1, place] = value
        with pytest.raises(ValueError, match="rectangles"):
            attention_masked.forward(q, k, v, bent, 0.2)


def test_what_is_unsupported_is_said():
    mask = AttentionMask.factorised(2, 2)
    q = torch.randn(1, 6, 2, 48)
    assert "48" in attention_masked.unsupported(q, q, q, flat(mask))
    q = torch.randn(1, 6, 2, 64)
    assert attention_masked.unsupported(q, q, q, flat(mask)) is None
    assert "float16" in attention_masked.unsupported(q.half(), q.half(), q.half(), flat(mask))
    away = [t.to("meta") for t in flat(mask)]
    assert "meta" in attention_masked.unsupported(q, q, q, away)
