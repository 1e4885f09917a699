"""Masked attention backward over gathered tiles: the same sums as attention_backward.py, the same bits every run.

The dq kernel owns a tile of queries and walks over the column tiles of its plan; the dkv kernel owns a
tile of keys of the plan by keys. A row that an earlier pass has written is read back, added to in fp32
and rounded again. delta = rowsum(do * o) is written where a query comes up first.
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
from .attention_tiles import LOG2E


@triton.jit
def _add_keys(
    q,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    do,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    q_base,
    stride_qt,
    do_base,
    stride_gt,
    queries,
    k_base,
    stride_kt,
    v_base,
    stride_vt,
    columns_ptr,
    patterns_ptr,
    bits_ptr,
    step,
    dq,  # [BLOCK_M, BLOCK_D] fp32
    lse,  # [BLOCK_M] fp32, log2 units
    delta,  # [BLOCK_M] fp32
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys of column tile `step` to dq / scale."""
    keys = tl.load(columns_ptr + step * BLOCK_N + tl.arange(0, BLOCK_N))
    k = gather_rows(k_base, stride_kt, keys, keys >= 0, D, BLOCK_D, MASKED)
    v = v_base if CHUNK else gather_rows(v_base, stride_vt, keys, keys >= 0, D, BLOCK_D, MASKED)
    s = gathered_product(
        q, k, q_base, stride_qt, queries, k_base, stride_kt, keys,
        BLOCK_M, BLOCK_N, D, CHUNK, MASKED, PRECISION,
    )  # fmt: skip
    p = tl.math.exp2(s * qk_scale - lse[:, None])
    dp = gathered_product(
        do, v, do_base, stride_gt, queries, v_base, stride_vt, keys,
        BLOCK_M, BLOCK_N, D, CHUNK, MASKED, PRECISION,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if MASKED:
        # chosen, not multiplied: a hidden score may be anything
        ds = tl.where(visible_pairs(patterns_ptr, bits_ptr, step, BLOCK_M, BLOCK_N), ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _add_queries(
    k,  # [BLOCK_N, BLOCK_D], not read when CHUNK
    v,  # [BLOCK_N, BLOCK_D], not read when CHUNK
    k_base,
    stride_kt,
    v_base,
    stride_vt,
    keys,
    q_base,
    stride_qt,
    do_base,
    stride_gt,
    columns_ptr,
    patterns_ptr,
    bits_ptr,
    step,
    dk,  # [BLOCK_N, BLOCK_D] fp32
    dv,  # [BLOCK_N, BLOCK_D] fp32
    lse_base,
    delta_base,
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the queries of column tile `step` to dk / scale and dv; scores are transposed."""
    queries = tl.load(columns_ptr + step * BLOCK_M + tl.arange(0, BLOCK_M))
    q = gather_rows(q_base, stride_qt, queries, queries >= 0, D, BLOCK_D, MASKED)
    do = gather_rows(do_base, stride_gt, queries, queries >= 0, D, BLOCK_D, MASKED)
    if MASKED:
        lse = tl.load(lse_base + queries, mask=queries >= 0, other=float("inf")) * LOG2E
        delta = tl.load(delta_base + queries, mask=queries >= 0, other=0.0)
    else:
        lse = tl.load(lse_base + queries) * LOG2E
        delta = tl.load(delta_base + queries)
    s = gathered_product(
        k, q, k_base, stride_kt, keys, q_base, stride_qt, queries,
        BLOCK_N, BLOCK_M, D, CHUNK, MASKED, PRECISION,
    )  # fmt: skip
    p = tl.math.exp2(s * qk_scale - lse[None, :])
    if MASKED:
        visible = visible_pairs(patterns_ptr, bits_ptr, step, BLOCK_N, BLOCK_M)
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = gathered_product(
        v, do, v_base, stride_vt, keys, do_base, stride_gt, queries,
        BLOCK_N, BLOCK_M, D, CHUNK, MASKED, PRECISION,
    )  # fmt: skip
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["first_clip", "heads", "tiles"])
def attention_masked_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_gb: tl.int64,  # of do
    stride_gt: tl.int64,
    stride_gh: tl.int64,
    stride_dqb: tl.int64,
    stride_dqt: tl.int64,
    stride_dqh: tl.int64,
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
    present = queries >= 0
    start = tl.load(table_ptr + tile * 4)
    masked = tl.load(table_ptr + tile * 4 + 1)
    end = tl.load(table_ptr + tile * 4 + 2)

    q_base = head_base(q_ptr, clip, head, stride_qb, stride_qh)
    k_base = head_base(k_ptr, clip, head, stride_kb, stride_kh)
    v_base = head_base(v_ptr, clip, head, stride_vb, stride_vh)
    o_base = head_base(o_ptr, clip, head, stride_ob, stride_oh)
    do_base = head_base(do_ptr, clip, head, stride_gb, stride_gh)
    dq_base = head_base(dq_ptr, clip, head, stride_dqb, stride_dqh)
    lse_ptrs = head_base(lse_ptr, clip, head, stride_lb, stride_lh) + queries
    delta_ptrs = head_base(delta_ptr, clip, head, stride_lb, stride_lh) + queries

    first = present & (written == 0)
    do = gather_rows(do_base, stride_gt, queries, present, D, BLOCK_D, True)
    o = gather_rows(o_base, stride_ot, queries, first, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptrs, delta, mask=first)
    delta = tl.where(written, tl.load(delta_ptrs, mask=written, other=0.0), delta)
    lse = tl.load(lse_ptrs, mask=present, other=float("inf")) * LOG2E
    q = q_base if CHUNK else gather_rows(q_base, stride_qt, queries, present, D, BLOCK_D, True)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    if CHUNK:
        # without tensor cores a mask costs nothing next to the products: one loop serves all
        masked = start
    else:
        for step in range(start, masked):
            dq = _add_keys(
                q, do, q_base, stride_qt, do_base, stride_gt, queries, k_base, stride_kt, v_base, stride_vt,
                columns_ptr, patterns_ptr, bits_ptr, step, dq, lse, delta, qk_scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, False,
            )  # fmt: skip
    for step in range(masked, end):
        dq = _add_keys(
            q, do, q_base, stride_qt, do_base, stride_gt, queries, k_base, stride_kt, v_base, stride_vt,
            columns_ptr, patterns_ptr, bits_ptr, step, dq, lse, delta, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, True,
        )  # fmt: skip

    before = gather_rows(dq_base, stride_dqt, queries, written, D, BLOCK_D, True)
    scatter_rows(dq_base, stride_dqt, queries, before.to(tl.float32) + dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["first_clip", "heads", "tiles"])
def attention_masked_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    rows_ptr,  # [tiles, BLOCK_N] int32: 2 * token + written before, or -1
    table_ptr,  # [tiles, 4] int32: first column tile, first with a pattern, end, 0
    columns_ptr,  # [column tiles, BLOCK_M] int32: token or -1
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
    stride_gb: tl.int64,  # of do
    stride_gt: tl.int64,
    stride_gh: tl.int64,
    stride_dkb: tl.int64,
    stride_dkt: tl.int64,
    stride_dkh: tl.int64,
    stride_dvb: tl.int64,
    stride_dvt: tl.int64,
    stride_dvh: tl.int64,
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
    """One tile of keys of one clip and head."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % heads
    clip = first_clip + pid // tiles // heads
    keys, written = row_tokens(rows_ptr, tile, BLOCK_N)
    start = tl.load(table_ptr + tile * 4)
    masked = tl.load(table_ptr + tile * 4 + 1)
    end = tl.load(table_ptr + tile * 4 + 2)

    q_base = head_base(q_ptr, clip, head, stride_qb, stride_qh)
    k_base = head_base(k_ptr, clip, head, stride_kb, stride_kh)
    v_base = head_base(v_ptr, clip, head, stride_vb, stride_vh)
    do_base = head_base(do_ptr, clip, head, stride_gb, stride_gh)
    dk_base = head_base(dk_ptr, clip, head, stride_dkb, stride_dkh)
    dv_base = head_base(dv_ptr, clip, head, stride_dvb, stride_dvh)
    lse_base = head_base(lse_ptr, clip, head, stride_lb, stride_lh)
    delta_base = head_base(delta_ptr, clip, head, stride_lb, stride_lh)
    if CHUNK:
        k = k_base
        v = v_base
    else:
        k = gather_rows(k_base, stride_kt, keys, keys >= 0, D, BLOCK_D, True)
        v = gather_rows(v_base, stride_vt, keys, keys >= 0, D, BLOCK_D, True)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    if CHUNK:
        # without tensor cores a mask costs nothing next to the products: one loop serves all
        masked = start
    else:
        for step in range(start, masked):
            dk, dv = _add_queries(
                k, v, k_base, stride_kt, v_base, stride_vt, keys, q_base, stride_qt, do_base, stride_gt,
                columns_ptr, patterns_ptr, bits_ptr, step, dk, dv, lse_base, delta_base, qk_scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, False,
            )  # fmt: skip
    for step in range(masked, end):
        dk, dv = _add_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, keys, q_base, stride_qt, do_base, stride_gt,
            columns_ptr, patterns_ptr, bits_ptr, step, dk, dv, lse_base, delta_base, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, True,
        )  # fmt: skip

    before = gather_rows(dk_base, stride_dkt, keys, written, D, BLOCK_D, True)
    scatter_rows(dk_base, stride_dkt, keys, before.to(tl.float32) + dk * scale, D, BLOCK_D)
    before = gather_rows(dv_base, stride_dvt, keys, written, D, BLOCK_D, True)
    scatter_rows(dv_base, stride_dvt, keys, before.to(tl.float32) + dv, D, BLOCK_D)


settle(globals())
