"""Dense attention kernels in the Triton interpreter, against the reference in float64."""

from __future__ import annotations

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

from ast_fast.kernels import _tuned, attention, attention_launch
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


def oracle(q, k, v, scale, key_lengths, do, dtype=torch.float64):
    """o, lse, dq, dk, dv of the reference, in float64 unless told."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    o, lse = reference.attention(*leaves, scale, key_lengths)
    grads = torch.autograd.grad(o, leaves, do.to(dtype))
    return o.detach(), lse.detach(), *grads


def gradients(do, q, k, v, o, lse, scale, key_lengths, config=None, out=None):
    """dq, dk, dv, written over NaN."""
    out = out or [
        torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in (q, k, v)
    ]
    attention.backward(
        do, q, k, v, o, lse, scale, key_lengths, True, *out, dq_config=config, dkv_config=config
    )
    return out


def relative(ours, exact):
    """Relative L2 error."""
    return float((ours.double() - exact).norm() / exact.norm())


def assert_close(name, ours, exact, floor, plain=None):
    """Within the floor, or twice the error of plain PyTorch in the same dtype where that is larger."""
    error = ours.double() - exact
    if float(exact.norm()) <= 1e-12 * exact.numel():
        # nothing but cancellation: sums of up to a hundred terms of order one
        assert not error.numel() or float(error.abs().max()) <= 10 * floor, name
        return
    budget = floor
    if plain is not None and relative(ours, exact) > floor:
        budget = max(floor, 2 * relative(plain(), exact))
    size = float(exact.norm())
    if exact.ndim == 4 and exact.shape[1] <= 2:
        # of one or two tokens little is left but the rounding of terms of order one
        size = max(size, 0.1 * exact.numel() ** 0.5)
    assert float(error.norm()) <= budget * size, name


def check(q, k, v, do, scale=None, key_lengths=None, config=None):
    """Forward and gradients are within the floors of the dtype; returns what the kernels gave."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = attention.forward(q, k, v, scale, key_lengths, config=config)
    grads = gradients(do, q, k, v, o, lse, scale, key_lengths, config)
    exact = oracle(q, k, v, scale, key_lengths, do)
    forward_floor, backward_floor = FLOORS[q.dtype]
    assert o.is_contiguous() and o.shape == q.shape and o.dtype == q.dtype
    assert lse.dtype == torch.float32 and lse.shape == exact[1].shape
    finite = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), finite) and bool((lse[~finite] == torch.inf).all())
    assert bool(((lse - exact[1]).abs() <= 2e-6 * (1 + exact[1].abs()))[finite].all())
    assert_close("o", o, exact[0], forward_floor)
    for i, (ours, want) in enumerate(zip(grads, exact[2:], strict=True)):
        assert_close(
            ("dq", "dk", "dv")[i],
            ours,
            want,
            backward_floor,
            lambda i=i: oracle(q, k, v, scale, key_lengths, do, dtype=q.dtype)[2 + i],
        )
    return o, lse, grads


def inputs(arena, clips, queries, keys, heads, width, dtype, seed=0):
    """q, k, v, do in guarded memory."""
    shapes = [(clips, n, heads, width) for n in (queries, keys, keys, queries)]
    return [arena.put(random(*s, dtype=dtype, seed=seed + i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_forward_and_gradients_match_fp64_at_every_kind_of_length(arena, length, dtype):
    heads = 2 if length < 100 else 1
    # float32 takes the slow path without tensor cores: half the width, half the time
    width = 64 if dtype == torch.float16 else 32
    check(*inputs(arena, 1, length, length, heads, width, dtype))


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (130, 1), (65, 127), (96, 160)])
def test_queries_and_keys_of_different_length(arena, queries, keys, config):
    check(*inputs(arena, 2, queries, keys, 1, 32, torch.float32), config=config)


def table_cases():
    """Every configuration in the table once per kernel, arithmetic and width."""
    seen = {}
    for capability in (75, 80, 86, 90, 100):
        for kernel, kinds in _tuned.configs("attention", capability).items():
            for arithmetic, widths in kinds.items():
                for width in widths:
                    for config in attention_launch.table_configs(
                        capability, kernel, arithmetic, int(width)
                    ):
                        # the interpreter knows neither warps nor stages
                        tile = config._replace(num_warps=4, num_stages=2)
                        dtype = torch.float16 if arithmetic == "16bit" else torch.float32
                        key = (kernel, str(dtype), int(width), tile)
                        name = f"{kernel}-{arithmetic}-d{width}-{config.name}"
                        seen.setdefault(key, pytest.param(kernel, dtype, int(width), tile, id=name))
    return list(seen.values())


@pytest.mark.parametrize(("kernel", "dtype", "width", "config"), table_cases())
def test_every_tuned_configuration(arena, kernel, dtype, width, config):
    # one whole tile and one incomplete one along both axes
    queries, keys = config.block_m + 5, config.block_n + 7
    q, k, v, do = inputs(arena, 1, queries, keys, 1, width, dtype)
    scale = width**-0.5
    exact = oracle(q, k, v, scale, None, do)
    forward_floor, backward_floor = FLOORS[dtype]
    if kernel == "forward":
        o, lse = attention.forward(q, k, v, scale, None, config=config)
        assert_close("o", o, exact[0], forward_floor)
        assert relative(lse[..., :queries], exact[1][..., :queries]) < 1e-6
        return
    out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    one_pass = kernel == "one_pass"
    others = {} if one_pass else {"dq_config": POINTER, "dkv_config": POINTER}
    configs = {**others, f"{kernel}_config": config}
    o, lse = exact[0].to(dtype), exact[1].float()
    attention.backward(do, q, k, v, o, lse, scale, None, not one_pass, *out, **configs)
    for name, ours, want in zip(("dq", "dk", "dv"), out, exact[2:], strict=True):
        assert_close(name, ours, want, backward_floor)


@pytest.mark.parametrize("config", [None, DESCRIPTOR], ids=["table", "descriptor"])
def test_views_of_one_fused_qkv_buffer_are_read_without_a_copy(arena, config):
    fused = arena.put(random(2, 70, 3, 2, 32))
    q, k, v = fused.unbind(2)
    assert all(attention_launch.aligned(x) is x for x in (q, k, v))
    assert all(attention_launch.describable(x) for x in (q, k, v))
    do = arena.put(random(2, 70, 2, 32, seed=9))
    o, lse, grads = check(q, k, v, do, config=config)
    again = attention.forward(*(x.contiguous() for x in (q, k, v)), 32**-0.5, None, config=config)
    assert torch.equal(o, again[0]) and torch.equal(lse, again[1])
    fused_grad = arena.empty(2, 70, 3, 2, 32)
    gradients(do, q, k, v, o, lse, 32**-0.5, None, config, out=list(fused_grad.unbind(2)))
    for ours, want in zip(fused_grad.unbind(2), grads, strict=True):
        assert torch.equal(ours, want)


LAYOUTS = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second_row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one_element_off": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "odd_row_stride": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "last_dim_strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "head_expanded": lambda x: x[:, :, :1].expand_as(x),
    "row_expanded": lambda x: x[:, :1].expand_as(x),
    "clip_expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    q, k, v, do = (LAYOUTS[layout](x) for x in inputs(arena, 2, 40, 40, 2, 32, torch.float32))
    o, lse, grads = check(q, k, v, do)
    plain = [x.contiguous() for x in (q, k, v, do)]
    o_plain, lse_plain, grads_plain = check(*plain)
    assert torch.equal(o, o_plain) and torch.equal(lse, lse_plain)
    assert all(map(torch.equal, grads, grads_plain))


@pytest.mark.parametrize(
    "layout", ["heads_first", "every_second_row", "one_element_off", "odd_row_stride"]
)
def test_gradients_into_any_layout(arena, layout):
    q, k, v, do = inputs(arena, 2, 40, 40, 2, 32, torch.float32)
    o, lse, grads = check(q, k, v, do)
    out = [LAYOUTS[layout](torch.zeros_like(x)) for x in (q, k, v)]
    assert not out[0].is_contiguous() or layout == "one_element_off"
    gradients(do, q, k, v, o, lse, 32**-0.5, None, out=out)
    assert all(map(torch.equal, out, grads))


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_keys_past_the_length_never_leak(arena, poison, config):
    lengths = torch.tensor([70, 37, 0, 200, 64], dtype=torch.int32)
    q, k, v, do = inputs(arena, 5, 17, 70, 1, 32, torch.float32)
    clean = check(q, k, v, do, key_lengths=lengths, config=config)
    for clip, length in enumerate(lengths.tolist()):
        k[clip, length:] = poison
        v[clip, length:] = poison
    o, lse, grads = check(q, k, v, do, key_lengths=lengths, config=config)
    assert torch.equal(o, clean[0]) and torch.equal(lse, clean[1])
    assert all(map(torch.equal, grads, clean[2]))
    for clip, length in enumerate(lengths.tolist()):
        assert not grads[1][clip, length:].any() and not grads[2][clip, length:].any()
    assert not o[2].any() and bool((lse[2] == torch.inf).all()) and not grads[0][2].any()


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_nan_stays_in_its_clip_and_head(arena, which, config):
    # the last tile of a clip ends inside the next one
    rows = 20 if config is CHUNKED else 40
    tensors = dict(
        zip(("q", "k", "v", "do"), inputs(arena, 3, rows, rows, 2, 32, torch.float32), strict=True)
    )
    scale = 32**-0.5

    def run():
        q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
        o, lse = attention.forward(q, k, v, scale, None, config=config)
        return [o, *gradients(do, q, k, v, o, lse, scale, None, config)], lse

    clean, clean_lse = run()
    tensors[which][1, 3, 0] = float("nan")
    dirty, dirty_lse = run()
    for ours, want in zip(dirty, clean, strict=True):
        untouched = torch.ones(3, 2, dtype=torch.bool)
        untouched[1, 0] = False
        same = (ours == want).all(dim=(1, 3))
        assert bool(same[untouched].all())
    assert not all(map(torch.equal, dirty, clean))
    assert torch.equal(dirty_lse[[0, 2]], clean_lse[[0, 2]])
    assert torch.equal(dirty_lse[1, 1], clean_lse[1, 1])
    if which == "q":
        # a query is a row of its own: only row 3 of o and dq may change
        others = torch.arange(rows) != 3
        assert torch.equal(dirty[0][:, others], clean[0][:, others])
        assert torch.equal(dirty[1][:, others], clean[1][:, others])


@pytest.mark.parametrize("config", [POINTER, DESCRIPTOR], ids=lambda c: c.name)
def test_nan_of_the_next_head_stays_out_of_a_padded_width(arena, config):
    # a width of 96 is computed as 128: the padding must not be the columns of the next head
    q, k, v, do = inputs(arena, 1, 40, 40, 2, 96, torch.float16)
    clean, _ = attention.forward(q, k, v, 0.1, None, config=config)
    for x in (q, k, v, do):
        x[:, :, 1] = float("nan")
    o, lse = attention.forward(q, k, v, 0.1, None, config=config)
    assert torch.equal(o[:, :, 0], clean[:, :, 0])
    for grad in gradients(do, q, k, v, o, lse, 0.1, None, config):
        assert bool(grad[:, :, 0].isfinite().all())


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
def test_padding_stays_out_where_every_score_is_far_below_zero(arena, config):
    # exp(0 - lse) of an absent key overflows, and infinity times its zeros would be NaN
    q, k, v, do = inputs(arena, 1, 20, 37, 1, 32, torch.float32)
    q.abs_().add_(5.0)
    k.abs_().add_(5.0).neg_()
    o, lse = attention.forward(q, k, v, 1.0, None, config=config)
    assert bool((lse[..., :20] < -700).all())
    grads = gradients(do, q, k, v, o, lse, 1.0, None, config)
    exact = oracle(q, k, v, 1.0, None, do)
    # scores near -1000 are known to 6e-5
    for name, ours, want in zip(("dq", "dk", "dv"), grads, exact[2:], strict=True):
        assert_close(name, ours, want, 1e-3)


@pytest.mark.parametrize("config", PATHS, ids=lambda c: c.name)
def test_passes_with_different_query_tiles_agree_on_the_padding(arena, config):
    # the dq pass writes delta for 16 rows of a clip, the dkv pass reads whole tiles of them
    q, k, v, do = inputs(arena, 2, 11, 40, 1, 32, torch.float32)
    narrow = Config(16, 32, 4, 1)
    o, lse = attention.forward(q, k, v, 0.2, None, config=narrow)
    out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    attention.backward(
        do, q, k, v, o, lse, 0.2, None, True, *out, dq_config=narrow, dkv_config=config
    )
    exact = oracle(q, k, v, 0.2, None, do)
    for name, ours, want in zip(("dq", "dk", "dv"), out, exact[2:], strict=True):
        assert_close(name, ours, want, 2e-6)


def test_scores_of_minus_infinity(arena):
    q, k, v, _ = inputs(arena, 1, 5, 70, 1, 32, torch.float32)
    q.abs_()
    # the first whole tile of keys is out of reach; the running maximum starts at -inf
    k[:, :64, :, 0] = -torch.inf
    check_forward_only(q, k, v)
    k[:, :, :, 0] = -torch.inf
    o, lse = check_forward_only(q, k, v)
    assert not o.any() and bool((lse == torch.inf).all())


def check_forward_only(q, k, v, scale=0.1):
    o, lse = attention.forward(q, k, v, scale, None)
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    assert_close("o", o, exact[0], 1e-6)
    finite = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert torch.allclose(lse[finite].double(), exact[1][finite], rtol=1e-6, atol=1e-6)
    return o, lse


@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-20, 3.0])
def test_any_scale(arena, scale):
    check(*inputs(arena, 1, 40, 70, 1, 32, torch.float32), scale=scale)


@pytest.mark.parametrize("factor", [1e-20, 30.0])
def test_extreme_inputs_stay_finite_and_exact(arena, factor):
    q, k, v, do = inputs(arena, 1, 33, 70, 1, 32, torch.float32)
    scale = 32**-0.5
    o, lse = attention.forward(q * factor, k * factor, v, scale, None)
    exact = oracle(q * factor, k * factor, v, scale, None, do)
    grads = gradients(do, q * factor, k * factor, v, o, lse, scale, None)
    assert all(bool(x.isfinite().all()) for x in (o, *grads))
    # logits reach several thousand, where the rounding of one float32 score is 1e-4
    bound = 2e-6 if factor < 1 else 1e-3
    assert relative(o, exact[0]) < bound
    assert relative(grads[2], exact[4]) < bound


@pytest.mark.parametrize("stride", [2**31 + 64, 2**26], ids=["clip", "row"])
def test_addresses_past_two_to_the_31_elements(stride):
    # untouched pages of a large allocation cost no memory
    clips, rows, width = (2, 5, 32) if stride > 2**31 else (1, 40, 32)
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
        o, lse = attention.forward(x, x, x, 0.2, None, config=POINTER)
        dk, dv = torch.empty_like(near), torch.empty_like(near)
        gradients(do, x, x, x, o, lse, 0.2, None, POINTER, out=[out, dk, dv])
        dq = torch.empty_like(near)
        gradients(do, x, x, x, o, lse, 0.2, None, POINTER, out=[dq, out, dv])
        results.append((o, lse, dq, out.clone(), dk, dv))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)])
def test_empty_inputs(shape):
    clips, queries, keys, heads = shape
    q, do = (torch.ones(clips, queries, heads, 32) for _ in range(2))
    k, v = (torch.ones(clips, keys, heads, 32) for _ in range(2))
    o, lse = attention.forward(q, k, v, 1.0, None)
    assert o.shape == q.shape and lse.shape == (clips, heads, -(-queries // 128) * 128)
    assert not o.any() and bool((lse == torch.inf).all())
    grads = gradients(do, q, k, v, o, lse, 1.0, None)
    assert all(not g.any() and not g.isnan().any() for g in grads)


def test_two_runs_give_the_same_bits(arena):
    q, k, v, do = inputs(arena, 2, 70, 90, 2, 32, torch.float16)
    lengths = torch.tensor([90, 31], dtype=torch.int32)
    runs = [check(q, k, v, do, key_lengths=lengths) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(map(torch.equal, runs[0][2], runs[1][2]))


def test_inputs_are_not_changed(arena):
    tensors = inputs(arena, 1, 40, 50, 1, 32, torch.float32)
    before = [x.clone() for x in tensors]
    check(*tensors, scale=-0.5)
    assert all(map(torch.equal, tensors, before))


def test_a_grid_too_small_to_fill_the_gpu_takes_the_smaller_tile():
    large, small = Config(128, 64, 8, 3), Config(64, 64, 4, 3)
    described = Config(128, 64, 8, 3, tma=True)
    table = (described, large, small)
    assert attention_launch.choose(table, False, 1214, 12, 132) == small
    assert attention_launch.choose(table, False, 1214, 14, 132) == large
    assert attention_launch.choose(table, True, 1214, 1, 132) == described


@given(data=st.data())
def test_any_shape_stride_and_length(arena, data):
    clips = data.draw(st.integers(1, 2), "clips")
    queries = data.draw(st.integers(1, 50), "queries")
    keys = data.draw(st.integers(1, 50), "keys")
    heads = data.draw(st.integers(1, 2), "heads")
    width = data.draw(st.sampled_from([32, 64, 96, 128]), "width")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    config = data.draw(st.sampled_from([None, *PATHS]), "config")
    seed = data.draw(st.integers(0, 99), "seed")
    names = list(LAYOUTS) if config is not DESCRIPTOR else ["heads_first", "every_second_row"]
    tensors = [
        LAYOUTS[data.draw(st.sampled_from(names), "layout")](x)
        for x in inputs(arena, clips, queries, keys, heads, width, dtype, seed)
    ]
    lengths = None
    if data.draw(st.booleans(), "ragged"):
        drawn = data.draw(st.lists(st.integers(0, keys), min_size=clips, max_size=clips), "lengths")
        lengths = torch.tensor(drawn, dtype=torch.int32)
    check(*tensors, key_lengths=lengths, config=config)


def test_reasons_to_refuse():
    q = torch.zeros(2, 3, 4, 64)
    assert attention.unsupported(q, q, q, None) is None
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    assert attention.unsupported(q, q, q, lengths) is None
    assert "int32" in attention.unsupported(q, q, q, lengths.long())
    assert "int32 [2]" in attention.unsupported(q, q, q, lengths[:1])
    assert "dimensions" in attention.unsupported(q[0], q, q, None)
    assert "clips" in attention.unsupported(q[:1], q, q, None)
    assert "shapes" in attention.unsupported(q, q[:, :, :2], q, None)
    assert "shapes" in attention.unsupported(q, q, q[:, :2], None)
    assert "width 48" in attention.unsupported(*[torch.zeros(2, 3, 4, 48)] * 3, None)
    assert "float64" in attention.unsupported(*[q.double()] * 3, None)
    assert "different dtypes" in attention.unsupported(q, q.half(), q, None)
    assert "bfloat16" in attention.unsupported(*[q.bfloat16()] * 3, None)
