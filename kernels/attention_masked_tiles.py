"""Pieces shared by the kernels of masked attention: tiles of gathered tokens, and which pairs of one are visible.

A tile is a list of row tokens and a run of column tiles, made on the host by attention_masked_plan.py.
An absent token is negative. Rows carry one more bit: whether an earlier pass has written the row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tokens(rows_ptr, tile, BLOCK: tl.constexpr):
    """Tokens of the rows of a tile, negative where absent, and whether an earlier pass wrote them."""
    entries = tl.load(rows_ptr + tile * BLOCK + tl.arange(0, BLOCK))
    # -1 shifted by one is -1 still
    return entries >> 1, (entries >= 0) & ((entries & 1) != 0)


@triton.jit
def head_base(ptr, clip, head, stride_clip, stride_head):
    """Address of token 0 of one clip and head; 64-bit before any multiplication."""
    return ptr + clip.to(tl.int64) * stride_clip + head.to(tl.int64) * stride_head


@triton.jit
def gather_rows(
    base,
    stride_row,
    tokens,  # [BLOCK] int32
    wanted,  # [BLOCK], read when MASKED: rows that are loaded, the others are 0
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of the given tokens, zero beyond column D.  # [BLOCK, BLOCK_D]"""
    cols = tl.arange(0, BLOCK_D)
    ptrs = base + tokens.to(tl.int64)[:, None] * stride_row + cols[None, :]
    if MASKED:
        return tl.load(ptrs, mask=wanted[:, None] & (cols < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def scatter_rows(
    base,
    stride_row,
    tokens,  # [BLOCK] int32
    tile,  # [BLOCK, BLOCK_D]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the rows of the tokens that are present, rounded to the type behind `base`."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = base + tokens.to(tl.int64)[:, None] * stride_row + cols[None, :]
    mask = (tokens >= 0)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _gather_chunk(base, stride_row, tokens, col, CHUNK: tl.constexpr, MASKED: tl.constexpr):
    """Columns col .. col + CHUNK of the rows of the given tokens.  # [BLOCK, CHUNK]"""
    cols = col + tl.arange(0, CHUNK)
    ptrs = base + tokens.to(tl.int64)[:, None] * stride_row + cols[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(tokens >= 0)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def gathered_product(
    a,  # [BLOCK_A, BLOCK_D], not read when CHUNK
    b,  # [BLOCK_B, BLOCK_D], not read when CHUNK
    a_base,
    stride_a,
    a_tokens,
    b_base,
    stride_b,
    b_tokens,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    B_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product of a and b transposed; CHUNK as in attention_tiles.product.  # [BLOCK_A, BLOCK_B]"""
    if CHUNK == 0:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for col in tl.static_range(0, D, CHUNK):
            left = _gather_chunk(a_base, stride_a, a_tokens, col, CHUNK, True)
            right = _gather_chunk(b_base, stride_b, b_tokens, col, CHUNK, B_MASKED)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
        return s


@triton.jit
def visible_pairs(
    patterns_ptr,  # [column tiles] int32
    bits_ptr,  # [patterns, WORDS, BLOCK_R] int32
    step,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Which pairs of a tile and its column tile `step` are visible.  # [BLOCK_R, BLOCK_C] bool

    A word holds 32 columns of one row: few loads, and the bit of a column is a shift away. A column tile
    without a pattern is visible throughout.
    """
    WORDS: tl.constexpr = (BLOCK_C + 31) // 32
    pattern = tl.load(patterns_ptr + step)
    base = bits_ptr + pattern.to(tl.int64) * (WORDS * BLOCK_R) + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    word = tl.broadcast_to(tl.load(base, mask=pattern >= 0, other=-1)[:, None], [BLOCK_R, BLOCK_C])
    for i in tl.static_range(1, WORDS):
        later = tl.load(base + i * BLOCK_R, mask=pattern >= 0, other=-1)[:, None]
        word = tl.where((columns >= 32 * i)[None, :], later, word)
    return ((word >> (columns & 31)[None, :]) & 1) != 0
