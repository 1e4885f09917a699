"""Masked attention kernels in the Triton interpreter, against dense attention in float64; and their plans."""

from __future__ import annotations

import gc
import os

import numpy as np
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

from ast_fast.attention_mask import AttentionMask
from ast_fast.kernels import _tuned, attention_launch, attention_masked, attention_masked_plan
from ast_fast.kernels.attention_launch import Config
from ast_fast.kernels.attention_masked_plan import Shape

pytestmark = pytest.mark.interpret

# relative L2 error of o and of a gradient
FLOORS = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3)}
DTYPES = [torch.float32, torch.float16]
# small tiles, so that small masks have several of each kind
SQUARE = (Config(32, 32, 4, 2), Config(16, 16, 4, 2))
OBLONG = (Config(32, 64, 4, 2), Config(64, 32, 4, 2))
CHUNKED = (Config(32, 32, 4, 1, chunk=16), Config(16, 32, 4, 1, chunk=16))
PATHS = {"table": None, "square": SQUARE, "oblong": OBLONG, "chunked": CHUNKED}


def dense(queries, keys, share=0.4, seed=0):
    """A random mask with an empty row, an empty column and a row that sees all the others."""
    seen = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed)) < share
    if queries > 2 and keys > 2:
        seen[queries // 2] = False
        seen[1] = True
        seen[:, keys // 3] = False
    return AttentionMask.from_dense(seen)


MASKS = {
    "factorised 3x5+2": AttentionMask.factorised(3, 5),
    "factorised 2x9+0": AttentionMask.factorised(2, 9, 0),
    "factorised 12x7+2": AttentionMask.factorised(12, 7),
    "time window": AttentionMask.time_window(6, 14, 2),
    # rows that see nothing in their first column tiles
    "triangle": AttentionMask.from_dense(torch.ones(50, 50, dtype=torch.bool).triu()),
    "random": dense(70, 70),
    "more keys": dense(33, 90),
    "more queries": dense(75, 20),
    "one pair": AttentionMask.from_dense(torch.ones(1, 1, dtype=torch.bool)),
}


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def oracle(q, k, v, scale, mask, do, dtype=torch.float64):
    """o, lse, dq, dk, dv of dense attention, in float64 unless told."""
    seen = mask.dense()
    # what nobody sees may hold NaN, and counts as 0
    blank = [~seen.any(1), ~seen.any(0), ~seen.any(0)]
    leaves = [
        x.detach().masked_fill(gone[:, None, None], 0.0).to(dtype).requires_grad_()
        for x, gone in zip((q, k, v), blank, strict=True)
    ]
    s = torch.einsum("bihd,bjhd->bhij", leaves[0], leaves[1]) * scale
    s = s.masked_fill(~seen, -torch.inf)
    p = torch.softmax(s, -1).masked_fill(~seen, 0.0)
    o = torch.einsum("bhij,bjhd->bihd", p, leaves[2])
    upstream = do.masked_fill(blank[0][:, None, None], 0.0).to(dtype)
    # rows of -inf alone have a softmax of NaN, which must not get into the gradient
    grads = torch.autograd.grad((o * upstream).sum(), leaves)
    lse = torch.logsumexp(s.detach(), -1)
    return o.detach(), lse.masked_fill(blank[0], torch.inf), *(g.nan_to_num(0.0) for g in grads)


def gradients(do, q, k, v, o, lse, mask, scale, configs=None, out=None):
    """dq, dk, dv, written over NaN."""
    out = out or [
        torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in (q, k, v)
    ]
    attention_masked.backward(
        do, q, k, v, o, lse, sides(mask), scale, True, *out, dq_configs=configs, dkv_configs=configs
    )
    return out


def sides(mask):
    return [*mask.by_query, *mask.by_key]


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_close(name, ours, exact, floor, plain=None):
    """Within the floor, or twice the error of plain PyTorch in the same dtype where that is larger."""
    assert bool(ours.isfinite().all()), name
    # where all that is left is rounding of terms of order one, those are the measure
    size = max(float(exact.norm()), 0.1 * exact.numel() ** 0.5)
    error = float((ours.double() - exact).norm())
    budget = floor
    if plain is not None and error > floor * size:
        budget = max(floor, 2 * relative(plain(), exact))
    assert error <= budget * size, f"{name}: {error / size:.2e} of {budget:.2e}"


def check(mask, q, k, v, do, scale=None, configs=None, out=None):
    """Forward and gradients are within the floors of the dtype; returns what the kernels gave."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = attention_masked.forward(q, k, v, sides(mask), scale, configs=configs)
    grads = gradients(do, q, k, v, o, lse, mask, scale, configs, out)
    exact = oracle(q, k, v, scale, mask, do)
    forward_floor, backward_floor = FLOORS[q.dtype]
    queries = q.shape[1]
    assert o.is_contiguous() and o.shape == q.shape and o.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[0], q.shape[2], -(-queries // 128) * 128)
    assert bool((lse[..., queries:] == torch.inf).all())
    finite = exact[1].isfinite()
    ours = lse[..., :queries]
    assert torch.equal(ours.isfinite(), finite) and bool((ours[~finite] == torch.inf).all())
    # a float32 logarithm of a sum, and of a score that is itself rounded
    assert bool(((ours - exact[1]).abs() <= 2e-6 * (1 + exact[1].abs()))[finite].all())
    nothing = ~mask.dense().any(1)
    assert not o[:, nothing].any() and not grads[0][:, nothing].any()
    unseen = ~mask.dense().any(0)
    assert not grads[1][:, unseen].any() and not grads[2][:, unseen].any()

    def plain(i):
        return lambda: oracle(q, k, v, scale, mask, do, dtype=q.dtype)[i]

    assert_close("o", o, exact[0], forward_floor, plain(0))
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_close(name, grads[i], exact[2 + i], backward_floor, plain(2 + i))
    return o, lse, grads


def inputs(put, mask, clips, heads, width, dtype, seed=0):
    """q, k, v, do in guarded memory."""
    shapes = [(clips, n, heads, width) for n in (mask.queries, mask.keys, mask.keys, mask.queries)]
    return [put(random(*s, dtype=dtype, seed=seed + i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MASKS)
def test_forward_and_gradients_match_dense_fp64(arena, name, path):
    mask = MASKS[name]
    check(mask, *inputs(arena.put, mask, 2, 1, 32, torch.float32), configs=PATHS[path])


@pytest.mark.parametrize("name", MASKS)
def test_half_precision(arena, name):
    mask = MASKS[name]
    check(mask, *inputs(arena.put, mask, 1, 2, 64, torch.float16), configs=SQUARE)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_head_width(arena, width, dtype):
    mask = AttentionMask.factorised(3, 6)
    check(mask, *inputs(arena.put, mask, 1, 2, width, dtype))


def table_cases():
    """Every tile of the table once per kernel, kind of arithmetic and width."""
    seen = {}
    for capability in (75, 80, 86, 90, 100):
        for kernel in attention_masked.KERNELS:
            for arithmetic, widths in _tuned.configs("attention_masked", capability)[
                kernel
            ].items():
                for width in map(int, widths):
                    for config in attention_masked.table_configs(
                        capability, kernel, arithmetic, width
                    ):
                        # the interpreter knows neither warps nor stages, and widths have a test
                        dtype = torch.float16 if arithmetic == "16bit" else torch.float32
                        tile = config._replace(num_warps=4, num_stages=2)
                        key = (kernel, dtype, tile)
                        name = f"{kernel}-{arithmetic}-d{width}-{config.name}"
                        seen.setdefault(key, pytest.param(*key, id=name))
    return list(seen.values())


@pytest.mark.parametrize(("kernel", "dtype", "config"), table_cases())
def test_every_tuned_tile(arena, kernel, dtype, config):
    # more than a tile of rows and of columns, a whole column tile, and what is left of one
    mask = dense(config.block_m + 9, config.block_n + 13, share=0.97)
    q, k, v, do = inputs(arena.put, mask, 1, 1, 32, dtype)
    scale = 32**-0.5
    exact = oracle(q, k, v, scale, mask, do)
    if kernel == "forward":
        o, _ = attention_masked.forward(q, k, v, sides(mask), scale, configs=(config,))
        assert_close("o", o, exact[0], FLOORS[dtype][0])
        return
    lse = torch.full((1, 1, -(-mask.queries // 128) * 128), torch.inf)
    lse[..., : mask.queries] = exact[1]
    out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    configs = {"dq_configs": SQUARE, "dkv_configs": SQUARE, f"{kernel}_configs": (config,)}
    o = exact[0].to(dtype)
    attention_masked.backward(do, q, k, v, o, lse, sides(mask), scale, True, *out, **configs)
    for name, ours, want in zip(("dq", "dk", "dv"), out, exact[2:], strict=True):
        assert_close(name, ours, want, FLOORS[dtype][1])


def test_views_of_one_fused_buffer_are_read_and_written_in_place(arena):
    mask = AttentionMask.factorised(3, 7)
    fused = arena.put(random(2, 23, 3, 2, 32))
    grad = arena.empty(2, 23, 3, 2, 32)
    q, k, v = fused.unbind(2)
    out = list(grad.unbind(2))
    assert all(attention_launch.aligned(x) is x for x in (q, k, v, *out))
    do = arena.put(random(2, 23, 2, 32, seed=9))
    check(mask, q, k, v, do, configs=SQUARE, out=out)
    assert bool(grad.isfinite().all())


def test_other_layouts_of_inputs_and_gradients(arena):
    mask = AttentionMask.factorised(2, 7)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def one_element_off(x):
        flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)

    q, k, v, do = inputs(arena.put, mask, 2, 2, 32, torch.float32)
    check(mask, heads_first(q), one_element_off(k), v[:, :, :1].expand_as(v), heads_first(do))
    out = [one_element_off(x) for x in (q, k, v)]
    check(mask, q, k, v, one_element_off(do), out=out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_nobody_sees_never_leak(arena, value):
    # cut at tile edges too: 32 and 64 tokens are whole tiles
    seen = torch.zeros(70, 70, dtype=torch.bool)
    seen[:33, :31] = True
    seen[40:, 35:64] = True
    mask = AttentionMask.from_dense(seen)
    q, k, v, do = inputs(arena.put, mask, 1, 2, 32, torch.float32)
    clean = check(mask, q, k, v, do, configs=SQUARE)
    q[:, 33:40] = value
    do[:, 33:40] = value
    for x in (k, v):
        x[:, 31:35] = value
        x[:, 64:] = value
    dirty = check(mask, q, k, v, do, configs=SQUARE)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert all(map(torch.equal, clean[2], dirty[2]))


def test_a_hidden_pair_may_score_anything(arena):
    # key 3 has an enormous score with query 5, which does not see it
    seen = torch.ones(20, 20, dtype=torch.bool)
    seen[5, 3] = False
    mask = AttentionMask.from_dense(seen)
    q, k, v, do = inputs(arena.put, mask, 1, 1, 32, torch.float32)
    q[0, 5] = 1e4
    k[0, 3] = 1e36
    q[0, :, 0, 1] = 0.0
    o, lse = attention_masked.forward(q, k, v, sides(mask), 1e-3, configs=SQUARE)
    assert bool(o[0, 5].isfinite().all()) and bool(lse[0, 0, 5].isfinite())
    k[0, 3] = torch.inf
    again, _ = attention_masked.forward(q, k, v, sides(mask), 1e-3, configs=SQUARE)
    assert torch.equal(again[0, 5], o[0, 5])
    # in backward its exponential overflows, and must not be multiplied away
    k[0, 3] = 1e4
    q[0, 6:] = 0.0
    o, lse = attention_masked.forward(q, k, v, sides(mask), 1e-3, configs=SQUARE)
    for grad in gradients(do, q, k, v, o, lse, mask, 1e-3, SQUARE):
        assert bool(grad.isfinite().all())
    # a query that is lost takes with it the keys it sees, and no other
    do[0, 5] = torch.nan
    dk = gradients(do, q, k, v, o, lse, mask, 1e-3, SQUARE)[1]
    assert bool(dk[0, 3].isfinite().all()) and bool(dk[0, 4].isnan().all())


def test_scores_of_minus_infinity(arena):
    mask = AttentionMask.factorised(3, 7, 0)
    q, k, v, do = inputs(arena.put, mask, 1, 1, 32, torch.float32)
    q.abs_()
    # column 2 of the grid is out of reach: its tokens find nothing in the first pass
    k[:, 2::7, :, 0] = -torch.inf
    o, lse = attention_masked.forward(q, k, v, sides(mask), 0.1, configs=SQUARE)
    exact = oracle(q, k, v, 0.1, mask, do)
    assert_close("o", o, exact[0], 1e-6)
    k[..., 0] = -torch.inf
    o, lse = attention_masked.forward(q, k, v, sides(mask), 0.1, configs=SQUARE)
    assert not o.any() and bool((lse == torch.inf).all())


@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-20, 3.0])
def test_any_scale(arena, scale):
    mask = AttentionMask.factorised(3, 7)
    check(mask, *inputs(arena.put, mask, 1, 1, 32, torch.float32), scale=scale, configs=SQUARE)


@pytest.mark.parametrize("stride", [2**31 + 64, 2**26], ids=["clip", "row"])
def test_addresses_past_two_to_the_31_elements(stride):
    # untouched pages of a large allocation cost no memory
    mask = (
        AttentionMask.factorised(1, 5, 1) if stride > 2**31 else AttentionMask.factorised(3, 13, 1)
    )
    clips, rows, width = 2 if stride > 2**31 else 1, mask.queries, 32
    steps = (stride, width, width, 1) if clips == 2 else (0, stride, width, 1)
    extent = (clips - 1) * steps[0] + (rows - 1) * steps[1] + width
    far, far_grad = (
        torch.empty(extent, dtype=torch.float16).as_strided((clips, rows, 1, width), steps)
        for _ in range(2)
    )
    near = random(clips, rows, 1, width, dtype=torch.float16)
    far.copy_(near)
    do = random(clips, rows, 1, width, dtype=torch.float16, seed=1)
    results = []
    for x, out in ((near, torch.empty_like(near)), (far, far_grad)):
        o, lse = attention_masked.forward(x, x, x, sides(mask), 0.2)
        dk, dv = torch.empty_like(near), torch.empty_like(near)
        gradients(do, x, x, x, o, lse, mask, 0.2, out=[out, dk, dv])
        dq = torch.empty_like(near)
        gradients(do, x, x, x, o, lse, mask, 0.2, out=[dq, out, dv])
        results.append((o, lse, dq, out.clone(), dk, dv))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(0, 23, 23, 2), (2, 23, 23, 0)])
def test_empty_inputs(shape):
    clips, queries, keys, heads = shape
    mask = AttentionMask.factorised(3, 7)
    q, do = (torch.ones(clips, queries, heads, 32) for _ in range(2))
    k, v = (torch.ones(clips, keys, heads, 32) for _ in range(2))
    o, lse = attention_masked.forward(q, k, v, sides(mask), 1.0)
    assert o.shape == q.shape and lse.shape == (clips, heads, 128)
    assert all(g.numel() == 0 for g in gradients(do, q, k, v, o, lse, mask, 1.0))


@pytest.mark.parametrize("size", [(9, 9), (0, 9), (9, 0)])
def test_a_mask_that_shows_nothing(arena, size):
    mask = AttentionMask.from_dense(torch.zeros(*size, dtype=torch.bool))
    check(mask, *inputs(arena.put, mask, 1, 2, 32, torch.float32))


def test_two_runs_give_the_same_bits(arena):
    mask = AttentionMask.factorised(6, 9)
    tensors = inputs(arena.put, mask, 2, 2, 32, torch.float16)
    before = [x.clone() for x in tensors]
    runs = [check(mask, *tensors) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(map(torch.equal, runs[0][2], runs[1][2]))
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("clips", [1, 2])
def test_clips_in_runs_give_the_same_bits(arena, monkeypatch, clips):
    mask = AttentionMask.factorised(3, 7)
    tensors = inputs(arena.put, mask, 3, 1, 32, torch.float32)
    o, lse, grads = check(mask, *tensors)
    monkeypatch.setitem(_tuned.configs("attention_masked", 80), "clips_per_launch", clips)
    in_runs = check(mask, *tensors)
    assert torch.equal(in_runs[0], o) and torch.equal(in_runs[1], lse)
    assert all(map(torch.equal, in_runs[2], grads))


def covered(mask_side, plan, rows, columns):
    """How often each pair is computed and not hidden, from the tensors that the kernels read."""
    count = torch.zeros(rows, columns, dtype=torch.int64)
    written = torch.zeros(rows, dtype=torch.bool)
    for launch in plan.launches:
        seen_here = []
        for tile, (first, masked, end, _) in enumerate(launch.table.tolist()):
            entries = launch.rows[tile]
            present = entries >= 0
            tokens = (entries[present] >> 1).long()
            assert torch.equal((entries[present] & 1) != 0, written[tokens])
            seen_here.append(tokens)
            for step in range(first, end):
                run = launch.columns[step]
                visible = torch.ones(len(entries), len(run), dtype=torch.bool)
                if step < masked:
                    assert bool((run >= 0).all()) and int(launch.patterns[step]) == -1
                else:
                    words = launch.bits[int(launch.patterns[step])].long()
                    index = torch.arange(len(run))
                    visible = ((words[index // 32] >> (index % 32)[:, None]) & 1).T != 0
                    assert not visible[:, run < 0].any(), "padding is visible"
                for row, token in enumerate(tokens.tolist()):
                    count[token, run[visible[row]].long()] += 1
        together = torch.cat(seen_here)
        assert len(together.unique()) == len(together), "two tiles of a launch share a row"
        written[together] = True
    idle = torch.zeros(rows, dtype=torch.bool)
    if plan.idle is not None:
        idle[plan.idle] = True
    assert torch.equal(idle, ~written), "rows are neither written nor idle, or both"
    return count


SHAPES = {
    "one": (Shape(32, 32),),
    "narrow": (Shape(64, 16), Shape(16, 16)),
    "several": (Shape(128, 64), Shape(64, 64), Shape(16, 64)),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", MASKS)
def test_every_visible_pair_is_computed_once(name, shapes):
    mask = MASKS[name]
    for side, seen in ((mask.by_query, mask.dense()), (mask.by_key, mask.dense().T)):
        plan = attention_masked_plan.plan(side, SHAPES[shapes], *seen.shape, torch.device("cpu"))
        assert torch.equal(covered(side, plan, *seen.shape), seen.long())


@given(data=st.data())
def test_plans_of_any_mask(data):
    rows = data.draw(st.integers(1, 90), "rows")
    columns = data.draw(st.integers(1, 90), "columns")
    share = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), "share")
    seed = data.draw(st.integers(0, 99), "seed")
    shapes = data.draw(st.sampled_from(list(SHAPES)), "shapes")
    generator = np.random.default_rng(seed)
    seen = generator.random((rows, columns)) < share
    owner = generator.integers(0, 2, seen.shape)
    cut = [np.array_split(generator.permutation(rows).astype(np.int32), n) for n in (3, 7)]
    mask = AttentionMask(seen, cut, None, owner)
    plan = attention_masked_plan.plan(
        mask.by_query, SHAPES[shapes], rows, columns, torch.device("cpu")
    )
    assert torch.equal(covered(mask.by_query, plan, rows, columns), mask.dense().long())


def test_the_factorised_mask_computes_a_fifth_of_the_pairs():
    mask = AttentionMask.factorised(12, 101)
    all_pairs = 10 * 128 * 19 * 64
    for side in (mask.by_query, mask.by_key):
        large = attention_masked_plan.plan(
            side, (Shape(128, 64), Shape(16, 64)), 1214, 1214, torch.device("cpu")
        )
        assert large.pairs * 3.5 <= all_pairs
        best = attention_masked_plan.plan(side, SHAPES["several"], 1214, 1214, torch.device("cpu"))
        assert best.pairs * 5 <= all_pairs
        # columns in the small tile, then rows in the large one and the prefix in the narrow one
        assert [(x.choice, x.tiles) for x in best.launches] == [(1, 21), (0, 12), (2, 1)]
        # one pattern for whole tiles of columns and one for what is left of them, and one a padding
        assert [len(x.bits) for x in best.launches] == [2, 1, 1]


def test_a_window_reads_what_it_sees():
    mask = AttentionMask.time_window(12, 101, 5)
    plan = attention_masked_plan.plan(
        mask.by_query, SHAPES["several"], 1214, 1214, torch.device("cpu")
    )
    assert plan.pairs <= 2 * mask.pairs


def test_a_plan_is_made_once_and_goes_with_its_mask():
    mask = dense(40, 40)
    arguments = (SHAPES["one"], 40, 40, torch.device("cpu"))
    first = attention_masked_plan.plan(mask.by_query, *arguments)
    assert attention_masked_plan.plan(list(mask.by_query), *arguments) is first
    assert attention_masked_plan.plan(mask.by_key, *arguments) is not first
    assert attention_masked_plan.plan(mask.by_query, SHAPES["narrow"], *arguments[1:]) is not first
    held = len(attention_masked_plan._plans)
    del mask
    gc.collect()
    assert len(attention_masked_plan._plans) == held - 2


def test_a_mask_of_other_tokens_is_refused():
    mask = AttentionMask.factorised(3, 7)
    q = torch.zeros(1, 22, 1, 32)
    with pytest.raises(ValueError, match=r"row token 22.*22 tokens"):
        attention_masked.forward(q, q, q, sides(mask), 1.0)


def test_reasons_to_refuse():
    mask = AttentionMask.factorised(3, 7)
    q = torch.zeros(2, 23, 4, 64)
    assert attention_masked.unsupported(q, q, q, sides(mask)) is None
    assert "dimensions" in attention_masked.unsupported(q[0], q, q, sides(mask))
    assert "clips" in attention_masked.unsupported(q[:1], q, q, sides(mask))
    assert "8" in attention_masked.unsupported(q, q, q, [*mask.by_query])
    assert "float64" in attention_masked.unsupported(*[q.double()] * 3, sides(mask))
    assert "width 48" in attention_masked.unsupported(*[q[..., :48]] * 3, sides(mask))
    meta = [x.to("meta") for x in sides(mask)]
    assert "CPU" in attention_masked.unsupported(q, q, q, meta)
