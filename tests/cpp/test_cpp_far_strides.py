"""Rows more than 2^31 elements apart: addresses are 64 bits wide in every C++ kernel.

The memory between the rows is mapped and never touched, so that a test takes kilobytes. Only what a kernel touches by
mistake would be another page: all of it is 0, and so a wrong row shows in the numbers.
"""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from ast_fast import ops, use_backend
from ast_fast.attention_mask import AttentionMask
from ast_fast.cpp import attention, layer_norm, mlp, packed
from ast_fast.cpp._common import column_sum
from ast_fast.testing import assert_same, random_tensor

FAR = (1 << 31) + 64  # elements between two rows
DTYPES = (torch.float32, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])


def reserved(num_bytes):
    """Zeros that take memory only where they are written, as a tensor of bytes."""
    # Python has a name for it since 3.13
    without_reserve = 0x4000 if sys.platform == "linux" else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
    try:
        return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
    except (OSError, ValueError) as error:
        pytest.skip(f"this machine does not map {num_bytes / 2**30:.0f} GiB: {error}")


def far(x, dims=(0,)):
    """x with elements along `dims` FAR apart (the second of them two rows less so)."""
    steps = list(x.stride())
    for place, dim in enumerate(dims):
        steps[dim] = FAR << place * 2
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, steps, strict=True))
    base = reserved(extent * x.element_size()).view(x.dtype)
    spread = base.as_strided(x.shape, steps)
    spread.copy_(x)
    assert max(spread.stride()) > 2**31
    return spread


def rand(*shape, seed=0, dtype=torch.float32):
    return random_tensor(*shape, seed=seed, dtype=dtype)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        if a is not None:
            assert_same(a, b)


@by_dtype
def test_rows_of_a_layer_norm(dtype):
    x, dy, residual = (rand(3, 40, seed=s, dtype=dtype) for s in range(3))
    w, b = rand(40, seed=4), rand(40, seed=5)
    y, mean, rstd = layer_norm.forward(x, w, b, 1e-6, dtype)
    same(layer_norm.forward(far(x), w, b, 1e-6, dtype), (y, mean, rstd))
    same(
        layer_norm.backward(far(dy), far(x), w, mean, rstd),
        layer_norm.backward(dy, x, w, mean, rstd),
    )
    with use_backend("cpp"):
        assert_same(ops.layer_norm(far(x), w, b), ops.layer_norm(x, w, b))
        same(ops.add_layer_norm(far(x), far(residual), w, b), ops.add_layer_norm(x, residual, w, b))


@by_dtype
def test_rows_of_gelu_sums_and_the_passes_between_bytes(dtype):
    h, dg = rand(3, 40, dtype=dtype), rand(3, 40, seed=1, dtype=dtype)
    assert_same(mlp.gelu_forward(far(h)), mlp.gelu_forward(h))
    same(mlp.gelu_backward(far(dg), far(h)), mlp.gelu_backward(dg, h))
    assert_same(column_sum(far(h)), column_sum(h))
    norm = (torch.ones(40), torch.zeros(40), 1e-6)
    same(
        packed.int8_rows(far(h), residual=far(dg), norm=norm),
        packed.int8_rows(h, residual=dg, norm=norm),
    )


OPERANDS = {"clips": (0,), "rows": (1,), "heads": (2,), "clips and rows": (1, 0)}


@by_dtype
@pytest.mark.parametrize("dims", OPERANDS.values(), ids=OPERANDS)
def test_clips_rows_and_heads_of_attention(dims, dtype):
    q, k, v, do = (rand(2, 3, 2, 32, seed=s, dtype=dtype) for s in range(4))
    lengths = torch.tensor([3, 2])
    bias = rand(2, 3)
    mask = AttentionMask.time_window(1, 3, 1, prefix=0)

    def run(move):
        with use_backend("cpp"):
            leaves = [move(x).requires_grad_() for x in (q, k, v)]
            results = [
                ops.attention(*leaves, 0.2, lengths),
                ops.attention_masked(*leaves, mask, 0.2),
            ]
            grads = [torch.autograd.grad(o, leaves, move(do)) for o in results]
            with torch.no_grad():
                results.append(ops.attention_biased(*leaves, bias, 0.2))
        return [*results, *grads[0], *grads[1]]

    for a, b in zip(run(lambda x: far(x, dims)), run(torch.clone), strict=True):
        assert_same(a, b)
    # gradients written where they lie far apart
    o, lse = attention.forward(q, k, v, 0.2, lengths)
    near = [torch.empty_like(q) for _ in range(3)]
    attention.backward(do, q, k, v, o, lse, 0.2, lengths, True, *near)
    spread = [far(torch.zeros_like(q), dims) for _ in range(3)]
    attention.backward(do, q, k, v, o, lse, 0.2, lengths, True, *spread)
    same(spread, near)


@by_dtype
@pytest.mark.parametrize("dim", (0, 1))
def test_tokens_and_heads_of_packed_attention(dim, dtype):
    q, k, v, do = (rand(5, 2, 32, seed=s, dtype=dtype) for s in range(4))
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)

    def run(move):
        with use_backend("cpp"):
            leaves = [move(x).requires_grad_() for x in (q, k, v)]
            o = ops.attention_varlen(*leaves, starts, starts, 3, 3)
            return [o, *torch.autograd.grad(o, leaves, move(do))]

    same(run(lambda x: far(x, (dim,))), run(torch.clone))


@by_dtype
@pytest.mark.parametrize("width", (32, 8))  # with a product of its own, and without
@pytest.mark.parametrize("dims", ((0,), (1,)), ids=["clips", "frames"])
def test_clips_and_frames_of_a_patch_embedding(dims, width, dtype):
    x, w = rand(2, 20, 16, dtype=dtype), rand(width, 1, 16, 16, seed=1, dtype=dtype)
    pos, prefix = rand(2, width, seed=2, dtype=dtype), rand(1, width, seed=3, dtype=dtype)
    bias, dy = rand(width, seed=4, dtype=dtype), rand(2, 2, width, seed=5, dtype=dtype)

    def run(move):
        with use_backend("cpp"):
            leaf, weight = move(x).requires_grad_(), w.clone().requires_grad_()
            y = ops.patch_embed(leaf, weight, bias, pos, prefix, 10, 10)
            return [y, *torch.autograd.grad(y, (leaf, weight), dy)]

    same(run(lambda x: far(x, dims)), run(torch.clone))


@pytest.mark.parametrize("dtype", (torch.float32, torch.int16))
def test_clips_of_a_waveform(dtype):
    wave = (rand(2, 1600) * 1000).to(dtype)
    lengths = torch.tensor([1600, 900])
    with use_backend("cpp"):
        spread = far(wave)
        assert_same(ops.log_mel(spread, lengths), ops.log_mel(wave, lengths))
        if dtype == torch.float32:
            grads = []
            for leaf in (spread.requires_grad_(), wave.clone().requires_grad_()):
                grads += torch.autograd.grad(ops.log_mel(leaf, lengths).sum(), leaf)
            assert_same(*grads)


@pytest.mark.slow
@by_dtype
def test_more_than_2_31_results(dtype):
    """Rows that repeat in memory, and results that do not: 4.3 or 8.6 GB are written."""
    cols = 1 << 16
    rows = (1 << 31) // cols + 5
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if int(found[1]) << 10 < 1.3 * rows * cols * dtype.itemsize:
        pytest.skip("needs the memory of its results")
    row = rand(1, cols, dtype=dtype)
    x = row.expand(rows, cols)
    want = mlp.gelu_forward(row)[0]
    y = mlp.gelu_forward(x)
    assert y.numel() > 2**31
    for place in (0, rows // 2, rows - 6, rows - 1):
        assert_same(y[place], want)
    del y
    w, b = torch.ones(cols), torch.zeros(cols)
    want = layer_norm.forward(row, w, b, 1e-6, dtype)[0][0]
    y = layer_norm.forward(x, w, b, 1e-6, dtype)[0]
    for place in (0, rows // 2, rows - 6, rows - 1):
        assert_same(y[place], want)
