"""Patch embedding kernels in the Triton interpreter, against the reference in float64."""

from __future__ import annotations

import math
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

from ast_fast.kernels import _tuned, patch_embed, patch_embed_backward
from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference
from ast_fast.testing import LAYOUTS, assert_same, assert_within, random_tensor

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
NAMES = ("dweight", "dbias", "dpos", "dprefix", "dx")


def inputs(arena, clips, frames, bins, patch, strides, prefixes, width, dtype, seed=0):
    """x, weight, bias, pos, prefix, dy in guarded memory."""
    (pf, pt), (fstride, tstride) = patch, strides
    tokens = prefixes + ((bins - pf) // fstride + 1) * ((frames - pt) // tstride + 1)
    shapes = [
        (clips, frames, bins),
        (width, 1, pf, pt),
        (width,),
        (tokens, width),
        (prefixes, width),
        (clips, tokens, width),
    ]
    scales = [1.0, (pf * pt) ** -0.5, 1.0, 1.0, 1.0, 1.0]
    return [
        arena.put(random_tensor(*shape, seed=seed + i, dtype=dtype, scale=scale))
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


def check(x, weight, bias, pos, prefix, dy, strides):
    """Forward and every gradient keep their budgets; returns all of them."""
    y = patch_embed.forward(x, weight, bias, pos, prefix, *strides)
    grads = patch_embed.backward(dy, x, weight, *strides, prefix.shape[0], True)
    wide = [tensor.double() for tensor in (x, weight, bias, pos, prefix)]
    want = reference.patch_embed(*wide, *strides)
    want_grads = reference_backward.patch_embed(
        dy.double(), wide[0], wide[1], *strides, prefix.shape[0], True
    )
    assert y.dtype == weight.dtype and y.is_contiguous() and y.shape == want.shape
    assert_within(y, want, "product", what="y")
    for name, ours, exact in zip(NAMES, grads, want_grads, strict=True):
        assert ours.dtype == weight.dtype and ours.is_contiguous() and ours.shape == exact.shape
        assert_within(ours, exact, "product", what=name)
    return y, *grads


SHAPES = {
    # clips, frames, bins, (pf, pt), (fstride, tstride), prefixes, width
    "ast": (2, 48, 40, (16, 16), (10, 10), 2, 72),
    "no_overlap": (2, 40, 33, (16, 16), (16, 16), 1, 33),
    "strip": (2, 9, 128, (128, 2), (1, 2), 2, 40),
    "large": (1, 52, 44, (32, 32), (12, 20), 2, 64),
    "no_prefix": (3, 30, 26, (16, 16), (3, 14), 0, 17),
    "odd_patch": (2, 11, 9, (3, 5), (4, 6), 2, 8),
    "gaps": (2, 17, 17, (2, 3), (5, 4), 1, 5),
    "one_patch": (1, 16, 16, (16, 16), (10, 10), 2, 1),
    "dense": (1, 6, 7, (4, 3), (1, 1), 1, 6),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_match_fp64(arena, shape, dtype):
    tensors = inputs(arena, *SHAPES[shape], dtype)
    check(*tensors, SHAPES[shape][4])


def tuned_tiles():
    """Every dot tile of the table once, with a GPU that uses it."""
    seen = {}
    for capability in (75, 80, 90, 100):
        family = _tuned.family("patch_embed", capability)
        for kernel, modes in _tuned.configs("patch_embed", capability).items():
            if kernel in ("forward", "weight_gradient", "columns"):
                for mode, tile in modes.items():
                    label = f"{kernel}-{mode}-{tile['rows']}x{tile['cols']}x{tile['inner']}"
                    case = pytest.param(capability, mode, id=f"{family}-{label}")
                    seen.setdefault((label, tile["warps"]), case)
    # one GPU and mode runs all three kernels: keep what brings something new
    kept = {(case.values[0], case.values[1]): case for case in seen.values()}
    return [pytest.param(*key, id=f"sm{key[0]}-{key[1]}") for key in kept]


@pytest.mark.parametrize(("capability", "mode"), tuned_tiles())
def test_every_tuned_configuration(arena, monkeypatch, capability, mode):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    dtype = torch.float16 if mode == "f16" else torch.float32
    tables = _tuned.configs("patch_embed", capability)
    width = max(tables[kernel][mode]["cols"] for kernel in ("forward", "weight_gradient")) + 3
    x, weight, bias, pos, prefix, dy = inputs(arena, 3, 56, 46, (16, 16), (10, 10), 2, width, dtype)
    # the interpreter computes every float32 dot exactly, so TF32 here tests its tiles alone
    tf32 = mode == "tf32"
    y = patch_embed.forward(x, weight, bias, pos, prefix, 10, 10, tf32)
    grads = patch_embed.backward(dy, x, weight, 10, 10, 2, True, tf32)
    wide = [tensor.double() for tensor in (x, weight, bias, pos, prefix)]
    assert_within(y, reference.patch_embed(*wide, 10, 10), "product")
    want = reference_backward.patch_embed(dy.double(), *wide[:2], 10, 10, 2, True)
    for name, ours, exact in zip(NAMES, grads, want, strict=True):
        assert_within(ours, exact, "product", what=name)


@pytest.mark.parametrize("sms", [1, 3, 64])
def test_any_number_of_splits_sums_every_row_once(arena, monkeypatch, sms):
    monkeypatch.setattr(_tuned, "sm_count", lambda device: sms)
    tensors = inputs(arena, 4, 60, 46, (16, 16), (10, 10), 2, 24, torch.float32)
    first = check(*tensors, (10, 10))
    assert all(map(torch.equal, first, check(*tensors, (10, 10))))


def test_clips_in_chunks_give_the_same_input_gradient(arena, monkeypatch):
    tensors = inputs(arena, 5, 30, 26, (16, 16), (5, 7), 2, 16, torch.float32)
    whole = check(*tensors, (5, 7))
    monkeypatch.setattr(patch_embed_backward, "_COLUMNS_BYTES", 2 * 4 * 3 * 3 * 256)
    parts = check(*tensors, (5, 7))
    assert all(map(torch.equal, whole[:5], parts[:5]))
    # tiles of rows run across clips, and NumPy sums other tiles in another order
    assert_within(parts[5], whole[5].double(), "product")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    tensors = inputs(arena, 3, 30, 26, (16, 16), (5, 7), 2, 16, torch.float32)
    move = LAYOUTS[layout]
    plain = check(*tensors, (5, 7))
    assert all(map(torch.equal, plain, check(*map(move, tensors), (5, 7))))


@pytest.mark.parametrize("how", ["clips", "tokens", "all"])
def test_expanded_gradients_are_read_with_stride_zero(arena, how):
    *tensors, dy = inputs(arena, 3, 30, 26, (16, 16), (5, 7), 2, 16, torch.float32)
    cut = {"clips": dy[:1], "tokens": dy[:, :1], "all": dy[:1, :1, :1]}[how]
    check(*tensors, cut.expand_as(dy), (5, 7))


def test_the_input_gradient_is_made_only_when_asked_for(arena):
    *tensors, dy = inputs(arena, 2, 30, 26, (16, 16), (5, 7), 2, 16, torch.float32)
    grads = patch_embed.backward(dy, tensors[0], tensors[1], 5, 7, 2, False)
    assert grads[4] is None
    assert all(map(torch.equal, grads[:4], check(*tensors, dy, (5, 7))[1:5]))


def test_no_clips_give_no_tokens_and_zero_gradients():
    weight, bias = torch.ones(8, 1, 16, 16), torch.ones(8)
    pos, prefix = torch.ones(6, 8), torch.ones(2, 8)
    x = torch.zeros(0, 26, 26)
    assert patch_embed.forward(x, weight, bias, pos, prefix, 10, 10).shape == (0, 6, 8)
    grads = patch_embed.backward(torch.zeros(0, 6, 8), x, weight, 10, 10, 2, True)
    shapes = [(8, 1, 16, 16), (8,), (6, 8), (2, 8), (0, 26, 26)]
    assert [tuple(grad.shape) for grad in grads] == shapes
    assert not any(grad.any() for grad in grads)


def test_a_nan_stays_in_the_patches_and_the_clip_that_hold_it(arena):
    x, weight, bias, pos, prefix, _ = inputs(
        arena, 3, 36, 26, (16, 16), (10, 10), 2, 16, torch.float32
    )
    clean = patch_embed.forward(x, weight, bias, pos, prefix, 10, 10)
    # frame 3 lies in the first patch along time alone, bin 12 in both along frequency
    x[1, 3, 12] = math.nan
    y = patch_embed.forward(x, weight, bias, pos, prefix, 10, 10)
    hit = torch.zeros(3, 8, dtype=torch.bool)
    hit[1, [2, 5]] = True
    assert y[hit].isnan().all() and torch.equal(y[~hit], clean[~hit])


def test_a_nan_in_the_gradient_of_a_prefix_token_reaches_no_patch(arena):
    *tensors, dy = inputs(arena, 2, 30, 26, (16, 16), (5, 7), 2, 16, torch.float32)
    clean = check(*tensors, dy, (5, 7))[1:]
    dy[0, 1] = math.nan
    dweight, dbias, dpos, dprefix, dx = patch_embed.backward(
        dy, tensors[0], tensors[1], 5, 7, 2, True
    )
    assert torch.equal(dweight, clean[0]) and torch.equal(dbias, clean[1])
    assert torch.equal(dx, clean[4])
    assert dprefix[1].isnan().all() and dpos[1].isnan().all()
    assert torch.equal(dprefix[0], clean[3][0]) and torch.equal(dpos[2:], clean[2][2:])


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    dtype = torch.float16
    x = random_tensor(5, 20, 18, seed=0, dtype=dtype)
    weight = random_tensor(8, 1, 16, 16, seed=1, dtype=dtype, scale=0.1)
    bias = random_tensor(8, seed=2, dtype=dtype)
    pos, prefix = random_tensor(8, 8, seed=3, dtype=dtype), random_tensor(2, 8, seed=4, dtype=dtype)
    dy = random_tensor(5, 8, 8, seed=5, dtype=dtype)
    far = []
    for tensor in (x, dy):
        stride = (2**29 + 16, tensor.shape[2], 1)
        extent = 4 * stride[0] + tensor[0].numel()
        far.append(torch.empty(extent, dtype=dtype).as_strided(tensor.shape, stride).copy_(tensor))
    # two by three patches
    near = (
        patch_embed.forward(x, weight, bias, pos, prefix, 2, 2),
        *patch_embed.backward(dy, x, weight, 2, 2, 2, True),
    )
    distant = (
        patch_embed.forward(far[0], weight, bias, pos, prefix, 2, 2),
        *patch_embed.backward(far[1], far[0], weight, 2, 2, 2, True),
    )
    for ours, want in zip(distant, near, strict=True):
        assert_same(ours, want)


def test_unsupported_names_what_is_wrong():
    x, weight = torch.zeros(1, 16, 16), torch.zeros(8, 1, 16, 16)
    vector, table = torch.zeros(8), torch.zeros(1, 8)
    assert patch_embed.unsupported(x, weight, vector, table, table[:0]) is None
    assert "one dtype" in patch_embed.unsupported(x.half(), weight, vector, table, table)
    assert "float64" in patch_embed.unsupported(x.double(), weight.double(), vector, table, table)


@given(
    clips=st.integers(1, 3),
    patch=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    strides=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    extra=st.tuples(st.integers(0, 25), st.integers(0, 25)),
    prefixes=st.integers(0, 2),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
    seed=st.integers(0, 2**16),
)
def test_any_patch_stride_and_layout(
    arena, clips, patch, strides, extra, prefixes, width, dtype, layout, seed
):
    frames, bins = patch[1] + extra[1], patch[0] + extra[0]
    move = LAYOUTS.get(layout, lambda tensor: tensor)
    tensors = inputs(arena, clips, frames, bins, patch, strides, prefixes, width, dtype, seed)
    check(*(move(tensor) if tensor.numel() else tensor for tensor in tensors), strides)
