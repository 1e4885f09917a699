"""A matrix product whose result is finished before it is stored: bias, GELU, residual, GELU's gradient.

One program walks over tiles of the output, column after column of a group of GROUP_M row tiles, so that a
group's rows of A and the tiles of B it meets stay in L2. Rows, columns and depth may end anywhere: what
lies outside reads as zero and is not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from .gelu_tiles import gelu, gelu_and_slope


@triton.jit
def _tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of a place in the order."""
    per_group = GROUP_M * tiles_n
    first = index // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = index % per_group
    return first + within % rows, within // rows


@triton.jit
def _load(
    source,
    stride,
    row,
    column,
    num_rows,
    num_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile [ROWS, COLS] of a matrix that starts at (row, column), zero outside."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = column + tl.arange(0, COLS)
        ptrs = source + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _finish(
    acc,  # [BLOCK_M, WIDTH] float32
    bias_ptr,
    extra_ptr,
    out_ptr,
    second_ptr,
    partial_ptr,
    tile_m,
    row,
    col,
    num_rows,
    num_cols,
    stride_extra,
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The epilogue of columns col .. col + WIDTH of a tile."""
    rows, cols = tl.arange(0, BLOCK_M), col + tl.arange(0, WIDTH)
    inside = (row + rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    # 64 bits for where the tile starts; within a tile 32 are enough
    base = row.to(tl.int64) * num_cols
    offsets = rows[:, None] * num_cols + cols[None, :]
    dtype = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if extra_ptr is not None:
        extra_ptrs = extra_ptr + (row + rows).to(tl.int64)[:, None] * stride_extra + cols[None, :]
        extra = tl.load(extra_ptrs, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "gelu":
        # rounded first, as backward will see it: both compute the same activation
        h = acc.to(dtype)
        if second_ptr is not None:
            tl.store(second_ptr + base + offsets, h, mask=inside)
        acc = gelu(h.to(tl.float32))
    if EPILOGUE == "residual":
        acc += extra
    if EPILOGUE == "gelu backward":
        g, slope = gelu_and_slope(extra)
        tl.store(second_ptr + base + offsets, g.to(dtype), mask=inside)
        acc = acc * slope
        partial_ptrs = partial_ptr + tile_m.to(tl.int64) * num_cols + cols
        tl.store(partial_ptrs, tl.sum(acc, axis=0), mask=cols < num_cols)
    tl.store(out_ptr + base + offsets, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gemm_kernel(
    a_source,  # [M, K]: pointer, or descriptor when TMA
    b_source,  # [N, K], or [K, N] when B_SUMS_ROWS
    bias_ptr,  # [N], or None
    extra_ptr,  # [M, N]: the residual to add, or the pre-activation; or None
    out_ptr,  # [M, N]
    second_ptr,  # [M, N]: the pre-activation kept, or the recomputed activation; or None
    partial_ptr,  # [tiles of rows, N] float32: column sums of out; or None
    num_rows,
    num_cols,
    depth,
    stride_a,
    stride_b,
    stride_extra,
    EPILOGUE: tl.constexpr,  # "none", "gelu", "residual", "gelu backward"
    B_SUMS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tiles of the product, one after the other."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_cols, BLOCK_N)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile_of(index, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            a = _load(a_source, stride_a, row, k, num_rows, depth, BLOCK_M, BLOCK_K, TMA)
            if B_SUMS_ROWS:
                b = _load(b_source, stride_b, k, col, depth, num_cols, BLOCK_K, BLOCK_N, TMA)
            else:
                b = _load(b_source, stride_b, col, k, num_cols, depth, BLOCK_N, BLOCK_K, TMA)
                b = tl.trans(b)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SPLIT:
            # half a tile at a time: what the epilogue reads needs registers as well
            halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
            left, right = tl.split(halves)
            _finish(
                left, bias_ptr, extra_ptr, out_ptr, second_ptr, partial_ptr, tile_m, row, col,
                num_rows, num_cols, stride_extra, EPILOGUE, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            _finish(
                right, bias_ptr, extra_ptr, out_ptr, second_ptr, partial_ptr, tile_m, row,
                col + BLOCK_N // 2, num_rows, num_cols, stride_extra, EPILOGUE, BLOCK_M,
                BLOCK_N // 2,
            )  # fmt: skip
        else:
            _finish(
                acc, bias_ptr, extra_ptr, out_ptr, second_ptr, partial_ptr, tile_m, row, col,
                num_rows, num_cols, stride_extra, EPILOGUE, BLOCK_M, BLOCK_N,
            )  # fmt: skip


settle(globals())
