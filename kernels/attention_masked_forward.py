"""Masked attention forward: the online softmax of attention_forward.py over gathered tiles of tokens.

One program owns a tile of queries of one clip and head and walks over the column tiles that the plan
lists for it: first those in which every pair is visible, then those with a pattern. A row that an
earlier pass has written goes on from its o and lse: there the sum of exponentials is 1 at a peak of lse.
Traffic of a pass: q and o of its rows once (o twice where written before), k and v of its columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from .attention_masked_tiles import (
    gather_rows,
    gathered_product,
    head_base,
    row_tokens,
    scatter_rows,
    visible_pairs,
)
from .attention_tiles import LN2, LOG2E


@triton.jit
def _fold_columns(
    q,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    q_base,
    stride_qt,
    queries,
    k_base,
    stride_kt,
    v_base,
    stride_vt,
    columns_ptr,
    patterns_ptr,
    bits_ptr,
    step,
    acc,  # [BLOCK_M, BLOCK_D] fp32
    peak,  # [BLOCK_M] fp32, running maximum in log2 units
    total,  # [BLOCK_M] fp32, running sum
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys of column tile `step` into the running softmax."""
    keys = tl.load(columns_ptr + step * BLOCK_N + tl.arange(0, BLOCK_N))
    k = k_base if CHUNK else gather_rows(k_base, stride_kt, keys, keys >= 0, D, BLOCK_D, MASKED)
    v = gather_rows(v_base, stride_vt, keys, keys >= 0, D, BLOCK_D, MASKED)
    s = gathered_product(
        q, k, q_base, stride_qt, queries, k_base, stride_kt, keys,
        BLOCK_M, BLOCK_N, D, CHUNK, MASKED, PRECISION,
    )  # fmt: skip
    if MASKED:
        s = tl.where(
            visible_pairs(patterns_ptr, bits_ptr, step, BLOCK_M, BLOCK_N), s, float("-inf")
        )
    highest = tl.maximum(peak, tl.max(s, 1) * qk_scale)
    # a row of nothing but -inf so far must not compute inf - inf
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    shrink = tl.math.exp2(peak - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit(do_not_specialize=["first_clip", "heads", "tiles"])
def attention_masked_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    rows_ptr,  # [tiles, BLOCK_M] int32: 2 * token + written before, or -1
    table_ptr,  # [tiles, 4] int32: first column tile, first with a pattern, end, 0
    columns_ptr,  # [column tiles, BLOCK_N] int32: token or -1
    patterns_ptr,
    bits_ptr,
    stride_qb: tl.int64,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    stride_oh: tl.int64,
    stride_lb: tl.int64,
    stride_lh: tl.int64,
    scale,
    first_clip,
    heads,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one clip and head."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % heads
    clip = first_clip + pid // tiles // heads
    queries, written = row_tokens(rows_ptr, tile, BLOCK_M)
    start = tl.load(table_ptr + tile * 4)
    masked = tl.load(table_ptr + tile * 4 + 1)
    end = tl.load(table_ptr + tile * 4 + 2)

    q_base = head_base(q_ptr, clip, head, stride_qb, stride_qh)
    k_base = head_base(k_ptr, clip, head, stride_kb, stride_kh)
    v_base = head_base(v_ptr, clip, head, stride_vb, stride_vh)
    o_base = head_base(o_ptr, clip, head, stride_ob, stride_oh)
    lse_ptrs = head_base(lse_ptr, clip, head, stride_lb, stride_lh) + queries
    q = q_base if CHUNK else gather_rows(q_base, stride_qt, queries, queries >= 0, D, BLOCK_D, True)

    # what an earlier pass wrote and found nothing for has an lse of +inf: it starts anew
    before = tl.load(lse_ptrs, mask=written, other=float("inf"))
    written = written & (before != float("inf"))
    peak = tl.where(written, before * LOG2E, float("-inf"))
    total = tl.where(written, 1.0, 0.0)
    acc = gather_rows(o_base, stride_ot, queries, written, D, BLOCK_D, True).to(tl.float32)
    qk_scale = scale * LOG2E
    if CHUNK:
        # without tensor cores a mask costs nothing next to the products: one loop serves all
        masked = start
    else:
        for step in range(start, masked):
            acc, peak, total = _fold_columns(
                q, q_base, stride_qt, queries, k_base, stride_kt, v_base, stride_vt,
                columns_ptr, patterns_ptr, bits_ptr, step, acc, peak, total, qk_scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, False,
            )  # fmt: skip
    for step in range(masked, end):
        acc, peak, total = _fold_columns(
            q, q_base, stride_qt, queries, k_base, stride_kt, v_base, stride_vt,
            columns_ptr, patterns_ptr, bits_ptr, step, acc, peak, total, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, True,
        )  # fmt: skip

    # with scores of -inf alone the output is 0 and lse is +inf, so that backward sees probabilities of 0
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    scatter_rows(o_base, stride_ot, queries, acc / total[:, None], D, BLOCK_D)
    lse = tl.where(nothing, float("inf"), (peak + tl.math.log2(total)) * LN2)
    tl.store(lse_ptrs, lse, mask=queries >= 0)


settle(globals())
