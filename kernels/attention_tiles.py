"""Pieces shared by the attention kernels: where a clip's rows lie, and how a tile of rows is loaded.

One kernel serves dense and packed inputs. A packed tensor [N, H, D] is a dense one whose clip stride
is 0 and whose clips start at cu_seqlens[b], so the difference is a few scalar loads in the prologue:
no extra specialisation. Scratch of one float a query row (lse, delta) is padded so that every clip
starts at a multiple of LSE_PAD; tiles of at most LSE_PAD rows can then load it without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One value for every kernel: kernels that disagreed on it would read each other's padding.
LSE_PAD = 128

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_PAD = tl.constexpr(LSE_PAD)


@triton.jit
def locate(list_ptr, pid, tiles, heads, packed):
    """Clip, head and tile of program `pid`; the clip is -1 past the end of the list of packed tiles."""
    tile = pid % tiles
    head = (pid // tiles) % heads
    clip = pid // tiles // heads
    if packed:
        head = pid % heads
        entry = list_ptr + pid // heads * 2
        clip = tl.load(entry)
        tile = tl.load(entry + 1)
    return clip, head, tile


@triton.jit
def clip_rows(starts_ptr, clip, length, packed):
    """First row and number of rows of `clip`; a dense clip starts at row 0 of its own stride."""
    first = clip * 0
    count = first + length
    if packed:
        first = tl.load(starts_ptr + clip)
        count = tl.load(starts_ptr + clip + 1) - first
    return first, count


@triton.jit
def clip_keys(starts_ptr, lengths_ptr, clip, length, packed, has_lengths):
    """First key row of `clip` and how many of its keys count."""
    first, count = clip_rows(starts_ptr, clip, length, packed)
    if has_lengths:
        count = tl.minimum(tl.maximum(tl.load(lengths_ptr + clip), 0), count)
    return first, count


@triton.jit
def scratch_column(starts_ptr, clip, packed):
    """Column of lse and delta where the rows of `clip` begin."""
    column = clip * 0
    if packed:
        column = ((tl.load(starts_ptr + clip) + clip * _PAD) // _PAD) * _PAD
    # lost where the branches meet; without it scratch is read four bytes at a time
    return tl.multiple_of(column, _PAD)


@triton.jit
def descriptor_clip(clip, packed):
    """Index of `clip` in the first dimension of a descriptor, where packed clips share index 0."""
    return tl.where(packed != 0, 0, clip)


@triton.jit
def clip_base(ptr, clip, first, head, stride_clip, stride_row, stride_head):
    """Address of row 0, column 0 of one clip and head; 64-bit before any multiplication."""
    return (
        ptr
        + clip.to(tl.int64) * stride_clip
        + first.to(tl.int64) * stride_row
        + head.to(tl.int64) * stride_head
    )


@triton.jit
def load_rows(
    base,
    stride_row,
    start,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows start .. start + BLOCK of a tile, zero outside [count, D].  # [BLOCK, BLOCK_D]"""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    # the offsets inside the tile do not change over a loop; only the scalar part does
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    ptrs = base + start * stride_row.to(tl.int64) + offsets
    if MASKED:
        mask = (start + rows < count)[:, None] & (cols < D)[None, :]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif D != BLOCK_D:
        tile = tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(
    base,
    stride_row,
    start,
    count,
    tile,  # [BLOCK, BLOCK_D]
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the rows of `tile` that lie below `count`, rounded to the type behind `base`."""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    ptrs = base + (start + rows).to(tl.int64)[:, None] * stride_row + cols[None, :]
    mask = (start + rows < count)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def stream_rows(
    source,
    base,
    stride_row,
    clip,
    first,
    head,
    start,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    ZEROED: tl.constexpr = True,
):
    """One tile of an operand that a loop walks over, by descriptor or by pointer.  # [BLOCK, BLOCK_D]

    Past the last row that counts a descriptor delivers padding or the next packed clip, which may hold
    NaN: a masked tile is zeroed after the load, unless the caller does without (ZEROED is False).
    """
    if TMA:
        tile = source.load([clip, first + start, head, 0]).reshape(BLOCK, BLOCK_D)
        if MASKED and ZEROED:
            tile = zero_rows(tile, start, count, BLOCK)
    else:
        tile = load_rows(base, stride_row, start, count, BLOCK, D, BLOCK_D, MASKED)
    return tile


@triton.jit
def zero_rows(tile, start, count, BLOCK: tl.constexpr):
    """A tile of rows start .. start + BLOCK with zeros from row `count` on."""
    return tl.where((start + tl.arange(0, BLOCK) < count)[:, None], tile, 0.0)


@triton.jit
def load_chunk(
    base,
    stride_row,
    start,
    count,
    col,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns col .. col + CHUNK of a tile of rows, zero past `count`.  # [BLOCK, CHUNK]"""
    rows = tl.arange(0, BLOCK)
    cols = col + tl.arange(0, CHUNK)
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    ptrs = base + start * stride_row.to(tl.int64) + offsets
    if MASKED:
        return tl.load(ptrs, mask=(start + rows < count)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def product(
    a,  # [BLOCK_A, BLOCK_D], not read when CHUNK
    b,  # [BLOCK_B, BLOCK_D], not read when CHUNK
    a_base,
    stride_a,
    a_start,
    a_count,
    b_base,
    stride_b,
    b_start,
    b_count,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    A_MASKED: tl.constexpr,
    B_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product of a and b transposed.  # [BLOCK_A, BLOCK_B]

    Without tensor cores every thread holds whole rows of both operands, and a width of D does not fit
    its registers: then CHUNK columns at a time come from memory, where L1 serves them.
    """
    if CHUNK == 0:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for col in tl.static_range(0, D, CHUNK):
            left = load_chunk(a_base, stride_a, a_start, a_count, col, BLOCK_A, CHUNK, A_MASKED)
            right = load_chunk(b_base, stride_b, b_start, b_count, col, BLOCK_B, CHUNK, B_MASKED)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
        return s
