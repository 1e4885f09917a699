"""Matrix products with epilogues in the Triton interpreter, against float64."""

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

from ast_fast.kernels import _tuned, gemm, mlp
from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference
from ast_fast.testing import LAYOUTS, assert_same, assert_within, random_tensor

pytestmark = pytest.mark.interpret

DTYPES = [torch.float32, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
SMALL = {
    "block_m": 32,
    "block_n": 32,
    "block_k": 16,
    "group_m": 2,
    "split": False,
    "warps": 4,
    "stages": 2,
    "programs_per_sm": 1,
}
CONFIGS = {
    "pointers": SMALL | {"tma": False},
    "pointers, halves": SMALL | {"tma": False, "split": True},
    "descriptors": SMALL | {"tma": True},
    "descriptors, halves": SMALL | {"tma": True, "split": True},
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# below, at and above tiles; more row tiles than a group; depths that end inside a step
SHAPES = [(1, 8, 16), (32, 32, 32), (33, 40, 24), (70, 72, 40), (130, 40, 56)]
by_shape = pytest.mark.parametrize(("rows", "depth", "cols"), SHAPES)


def operands(arena, rows, depth, cols, dtype):
    """a, weight, bias and an [M, N] tensor in guarded memory."""
    return (
        arena.put(random_tensor(rows, depth, seed=0, dtype=dtype)),
        arena.put(random_tensor(cols, depth, seed=1, dtype=dtype, scale=depth**-0.5)),
        arena.put(random_tensor(cols, seed=2, dtype=dtype)),
        arena.put(random_tensor(rows, cols, seed=3, dtype=dtype)),
    )


def check_all(a, weight, bias, extra, config):
    """Every product with every epilogue; returns all results."""
    wide = [t.double() for t in (a, weight, bias, extra)]
    exact = wide[0] @ wide[1].t() + wide[2]
    y = gemm.linear(a, weight, bias, config)
    assert_within(y, exact, "product", what="linear")
    bare = gemm.linear(a, weight, None, config)
    assert_within(bare, exact - wide[2], "product", what="without bias")
    total = gemm.linear_residual(a, weight, bias, extra, config)
    assert_within(total, exact + wide[3], "product", what="residual")
    g, h = gemm.linear_gelu(a, weight, bias, True, config)
    assert_same(h, y, "pre-activation")
    assert_within(g, reference.gelu(h.double()), "elementwise", what="gelu")
    alone, none = gemm.linear_gelu(a, weight, bias, False, config)
    assert none is None
    assert_same(alone, g, "without keeping the pre-activation")
    turned = weight.t().contiguous()  # [C, K]
    dh, again, sums = gemm.gelu_backward(a, turned, extra, config)
    want = reference_backward.gelu_backward(exact - wide[2], wide[3])
    assert_within(dh, want, "product", what="dh")
    assert_within(again, reference.gelu(wide[3]), "elementwise", what="g")
    assert sums.dtype == torch.float32
    assert_within(sums, want.sum(0), "product", what="sums")
    return [y, bare, total, g, h, dh, again, sums]


@by_dtype
@by_config
@by_shape
def test_products_and_epilogues_match_fp64(arena, rows, depth, cols, dtype, config):
    check_all(*operands(arena, rows, depth, cols, dtype), config)


@pytest.mark.parametrize("config", [CONFIGS["pointers"], CONFIGS["descriptors, halves"]])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(5, 7, 3), (35, 33, 41)])
def test_widths_that_no_tensor_map_can_describe(arena, rows, depth, cols, config):
    check_all(*operands(arena, rows, depth, cols, torch.float16), config)


@by_config
def test_every_tile_is_visited_once_whoever_walks(arena, monkeypatch, config):
    given_ = operands(arena, 200, 16, 136, torch.float32)
    many = check_all(*given_, config)
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 1)
    assert all(map(torch.equal, many, check_all(*given_, config)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    given_ = operands(arena, 40, 32, 48, torch.float32)
    plain = check_all(*given_, CONFIGS["descriptors"])
    moved = [LAYOUTS[layout](t) if t.dim() == 2 else t for t in given_]
    assert all(map(torch.equal, plain, check_all(*moved, CONFIGS["descriptors"])))


@pytest.mark.parametrize("how", ["rows", "all"])
def test_expanded_operands(arena, how):
    a, weight, bias, extra = operands(arena, 12, 16, 24, torch.float32)
    flat = a[:1].expand_as(a) if how == "rows" else a[:1, :1].expand_as(a)
    same = extra[:1].expand_as(extra)
    check_all(flat, weight, bias, same, CONFIGS["descriptors"])


def test_limits_of_gelu_and_nan_in_its_row():
    h = torch.tensor([[math.inf, -math.inf, math.nan, 25.0, -25.0, 0.0, 1.0, -1.0]] * 3)
    one = torch.eye(8)[None].expand(1, 8, 8)[0].contiguous()
    dy = torch.ones(3, 8)
    dh, g, _ = gemm.gelu_backward(dy, one, h, CONFIGS["pointers"])
    assert g[0, 0] == math.inf and g[0, 1] == 0 and g[0, 2].isnan() and g[0, 3] == 25
    assert dh[0, 0] == 1 and dh[0, 1] == 0 and dh[0, 2].isnan() and dh[0, 5] == 0.5
    a = torch.randn(7, 8)
    a[3, 2] = math.nan
    g, _ = gemm.linear_gelu(a, one, torch.zeros(8), False, CONFIGS["pointers"])
    others = torch.arange(7) != 3
    assert g[3].isnan().all() and g[others].isfinite().all()


def test_gelu_is_of_the_pre_activation_as_it_is_stored(arena):
    # backward recomputes the activation from what is stored: forward must have used the same
    a, weight, bias, _ = operands(arena, 40, 64, 48, torch.float16)
    g, h = gemm.linear_gelu(a, weight, bias, True, CONFIGS["pointers"])
    assert_same(g, mlp.gelu_forward(h))


def tuned_families():
    """One GPU of every family in the table."""
    seen = {_tuned.family("gemm", arch): arch for arch in (120, 100, 90, 86, 80)}
    return [pytest.param(arch, id=name) for name, arch in seen.items()]


@pytest.mark.parametrize("capability", tuned_families())
def test_every_tuned_configuration(arena, monkeypatch, capability):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    configs = _tuned.configs("gemm", capability)
    assert set(configs) == set(gemm.KINDS)
    a, weight, bias, extra = operands(arena, 130, 72, 264, torch.float32)
    check_all(a, weight, bias, extra, None)


def test_cublas_stays_until_a_measurement_says_otherwise(monkeypatch):
    x, w = torch.zeros(4, 16), torch.zeros(8, 16)
    for arch in (75, 80, 86, 89, 90, 100, 120):
        monkeypatch.setattr(_tuned, "capability", lambda device, arch=arch: arch)
        for kind in gemm.KINDS:
            assert not gemm.chosen(kind, x, w)
            with gemm.force(True):
                assert gemm.chosen(kind, x, w) == (arch >= 80)
                assert not gemm.chosen(kind, x, w.half())
            with gemm.force(False):
                assert not gemm.chosen(kind, x, w)
    origin = _tuned.table("gemm")["origin"]
    used = [c["use"] for f in _tuned.table("gemm")["families"].values() for c in f.values()]
    assert not any(used) or "measured" in origin.split(":")[0]


@by_dtype
def test_the_feed_forward_block_gives_the_same_with_its_products_here(arena, dtype):
    x = arena.put(random_tensor(33, 24, seed=0, dtype=dtype))
    dy = arena.put(random_tensor(33, 24, seed=1, dtype=dtype))
    w1, b1 = random_tensor(104, 24, seed=2, dtype=dtype, scale=0.2), torch.ones(104, dtype=dtype)
    w2, b2 = random_tensor(24, 104, seed=3, dtype=dtype, scale=0.1), torch.ones(24, dtype=dtype)
    results = []
    for use in (False, True):
        with gemm.force(use):
            y, h = mlp.forward(x, w1, b1, w2, b2, True)
            assert_same(mlp.forward(x, w1, b1, w2, b2, False)[0], y)
            results.append([y, h, *mlp.backward(dy, x, h, w1, w2, (True,) * 5)])
    wide = [t.double().requires_grad_() for t in (x, w1, b1, w2, b2)]
    exact = reference.mlp(*wide)
    grads = torch.autograd.grad(exact, wide, dy.double())
    h = torch.nn.functional.linear(*wide[:3]).detach()
    for made in results:
        for got, want in zip(made, (exact.detach(), h, *grads), strict=True):
            assert got.dtype == dtype
            assert_within(got, want, "product")


def test_no_rows_and_no_columns():
    w, b = torch.ones(8, 16), torch.ones(8)
    assert gemm.linear(torch.zeros(0, 16), w, b).shape == (0, 8)
    assert gemm.linear(torch.zeros(3, 16), w[:0], b[:0]).shape == (3, 0)
    dh, g, sums = gemm.gelu_backward(torch.zeros(0, 8), w, torch.zeros(0, 16))
    assert dh.shape == g.shape == (0, 16) and not sums.any() and sums.shape == (16,)


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    rows, depth, stride = 5, 16, 2**29 + 16
    a, extra = (random_tensor(rows, depth, seed=s, dtype=torch.float16) for s in (0, 1))
    far_a, far_extra = (
        torch.empty((rows - 1) * stride + depth, dtype=torch.float16)
        .as_strided((rows, depth), (stride, 1))
        .copy_(x)
        for x in (a, extra)
    )
    w = random_tensor(16, 16, seed=2, dtype=torch.float16)
    config = CONFIGS["pointers"]
    near = gemm.linear_residual(a, w, None, extra, config)
    assert torch.equal(near, gemm.linear_residual(far_a, w, None, far_extra, config))


def test_unsupported_names_what_is_wrong(monkeypatch):
    x, w = torch.zeros(2, 16), torch.zeros(8, 16)
    assert gemm.unsupported(x, w) is None
    assert "one dtype" in gemm.unsupported(x.half(), w)
    assert "float64" in gemm.unsupported(x.double(), w.double())
    monkeypatch.setattr(_tuned, "INTERPRETED", False)
    monkeypatch.setattr(_tuned, "capability", lambda device: 80)
    assert "16-bit" in gemm.unsupported(x, w)
    monkeypatch.setattr(_tuned, "capability", lambda device: 75)
    assert "8.0 or newer" in gemm.unsupported(x.half(), w.half())


@given(
    rows=st.integers(1, 90),
    depth=st.integers(1, 70),
    cols=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from(list(CONFIGS.values())),
)
def test_any_shape(arena, rows, depth, cols, dtype, config):
    check_all(*operands(arena, rows, depth, cols, dtype), config)
