"""Attention backward in two passes without atomics: the same bits on every run.

With p = exp(scale * q k^T - lse) and dp = do v^T, the softmax gradient is ds = p * (dp - delta), where
delta = rowsum(do * o). The dq pass owns a tile of queries, walks over the keys, and stores delta for
the second pass, which owns a tile of keys, walks over the queries and gives dk and dv. p is computed in
both (7 matrix products instead of 5), which costs less than summing dq through memory, and needs no
fp32 copy of dq.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from .attention_tiles import (
    LOG2E,
    clip_base,
    clip_keys,
    clip_rows,
    descriptor_clip,
    load_rows,
    locate,
    product,
    scratch_column,
    store_rows,
    stream_rows,
)


@triton.jit
def _add_keys(
    q,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    do,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    q_base,
    stride_qt,
    do_base,
    stride_gt,
    start_m,
    n_q,
    k_source,
    k_base,
    stride_kt,
    v_source,
    v_base,
    stride_vt,
    box,
    k_first,
    head,
    start,
    n_k,
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
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys start .. start + BLOCK_N to dq / scale."""
    k = stream_rows(
        k_source,
        k_base,
        stride_kt,
        box,
        k_first,
        head,
        start,
        n_k,
        BLOCK_N,
        D,
        BLOCK_D,
        MASKED,
        TMA,
    )
    if CHUNK:
        v = v_base
    else:
        v = stream_rows(
            v_source,
            v_base,
            stride_vt,
            box,
            k_first,
            head,
            start,
            n_k,
            BLOCK_N,
            D,
            BLOCK_D,
            MASKED,
            TMA,
            # what it makes of absent keys is masked below; k would reach dq as 0 times NaN
            ZEROED=False,
        )
    s = product(
        q, k, q_base, stride_qt, start_m, n_q, k_base, stride_kt, start, n_k,
        BLOCK_M, BLOCK_N, D, CHUNK, True, MASKED, PRECISION,
    )  # fmt: skip
    p = tl.math.exp2(s * qk_scale - lse[:, None])
    dp = product(
        do, v, do_base, stride_gt, start_m, n_q, v_base, stride_vt, start, n_k,
        BLOCK_M, BLOCK_N, D, CHUNK, True, MASKED, PRECISION,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where((start + tl.arange(0, BLOCK_N) < n_k)[None, :], ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def add_queries(
    k,  # [BLOCK_N, BLOCK_D], not read when CHUNK
    v,  # [BLOCK_N, BLOCK_D], not read when CHUNK
    k_base,
    stride_kt,
    v_base,
    stride_vt,
    start_n,
    n_k,
    q_source,
    q_base,
    stride_qt,
    do_source,
    do_base,
    stride_gt,
    box,
    q_first,
    head,
    start,
    n_q,
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
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS_MASKED: tl.constexpr = False,
):
    """Add the queries start .. start + BLOCK_M to dk / scale and dv; scores are transposed, as is ds.

    A key that does not count has arbitrary rows of dk, dv and ds, or with KEYS_MASKED a ds of 0.
    """
    q = stream_rows(
        q_source,
        q_base,
        stride_qt,
        box,
        q_first,
        head,
        start,
        n_q,
        BLOCK_M,
        D,
        BLOCK_D,
        MASKED,
        TMA,
    )
    do = stream_rows(
        do_source,
        do_base,
        stride_gt,
        box,
        q_first,
        head,
        start,
        n_q,
        BLOCK_M,
        D,
        BLOCK_D,
        MASKED,
        TMA,
    )
    # both are padded to whole tiles, so these loads need no mask
    queries = start + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_base + queries) * LOG2E
    delta = tl.load(delta_base + queries)
    s = product(
        k, q, k_base, stride_kt, start_n, n_k, q_base, stride_qt, start, n_q,
        BLOCK_N, BLOCK_M, D, CHUNK, True, MASKED, PRECISION,
    )  # fmt: skip
    p = tl.math.exp2(s * qk_scale - lse[None, :])
    dp = product(
        v, do, v_base, stride_vt, start_n, n_k, do_base, stride_gt, start, n_q,
        BLOCK_N, BLOCK_M, D, CHUNK, True, MASKED, PRECISION,
    )  # fmt: skip
    ds = p * (dp - delta[None, :])
    if MASKED:
        # the padding of lse makes p 0, but that of delta holds anything
        ds = tl.where((queries < n_q)[None, :], ds, 0.0)
    if KEYS_MASKED:
        # exp of an absent key may overflow: what dq adds up must not hold infinity times its zeros
        ds = tl.where((start_n + tl.arange(0, BLOCK_N) < n_k)[:, None], ds, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit(
    do_not_specialize=["packed", "has_lengths", "q_length", "k_length", "heads", "tiles"],
    do_not_specialize_on_alignment=["q_starts", "k_starts", "k_lengths", "tile_list"],
)
def attention_dq_kernel(
    q_ptr,
    k_source,  # pointer, or descriptor of [B, T, H, D] when TMA
    v_source,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_starts,  # [B+1] int32, read when packed
    k_starts,
    k_lengths,  # [B] int32, read when has_lengths
    tile_list,  # [entries, 2] int32, read when packed
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
    packed,
    has_lengths,
    q_length,  # queries of a dense clip; 0 when packed
    k_length,
    heads,
    tiles,  # query tiles of a dense clip
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of queries of one clip and head."""
    clip, head, tile = locate(tile_list, tl.program_id(0), tiles, heads, packed)
    if clip < 0:
        return
    q_first, n_q = clip_rows(q_starts, clip, q_length, packed)
    k_first, n_k = clip_keys(k_starts, k_lengths, clip, k_length, packed, has_lengths)
    start_m = tile * BLOCK_M
    if start_m >= n_q:
        return

    do_base = clip_base(do_ptr, clip, q_first, head, stride_gb, stride_gt, stride_gh)
    do = load_rows(do_base, stride_gt, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    o_base = clip_base(o_ptr, clip, q_first, head, stride_ob, stride_ot, stride_oh)
    o = load_rows(o_base, stride_ot, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = scratch_column(q_starts, clip, packed) + start_m + tl.arange(0, BLOCK_M)
    scratch = clip.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    tl.store(delta_ptr + scratch + rows, delta)
    lse = tl.load(lse_ptr + scratch + rows) * LOG2E

    q_base = clip_base(q_ptr, clip, q_first, head, stride_qb, stride_qt, stride_qh)
    q = q_base if CHUNK else load_rows(q_base, stride_qt, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    if TMA:
        k_base = k_source
        v_base = v_source
    else:
        k_base = clip_base(k_source, clip, k_first, head, stride_kb, stride_kt, stride_kh)
        v_base = clip_base(v_source, clip, k_first, head, stride_vb, stride_vt, stride_vh)
    box = descriptor_clip(clip, packed)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    whole = (n_k // BLOCK_N) * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq = _add_keys(
            q, do, q_base, stride_qt, do_base, stride_gt, start_m, n_q,
            k_source, k_base, stride_kt, v_source, v_base, stride_vt, box, k_first, head, start, n_k,
            dq, lse, delta, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, False,
        )  # fmt: skip
    if whole < n_k:
        dq = _add_keys(
            q, do, q_base, stride_qt, do_base, stride_gt, start_m, n_q,
            k_source, k_base, stride_kt, v_source, v_base, stride_vt, box, k_first, head, whole, n_k,
            dq, lse, delta, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, True,
        )  # fmt: skip

    dq_base = clip_base(dq_ptr, clip, q_first, head, stride_dqb, stride_dqt, stride_dqh)
    store_rows(dq_base, stride_dqt, start_m, n_q, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["packed", "has_lengths", "q_length", "k_length", "heads", "tiles"],
    do_not_specialize_on_alignment=["q_starts", "k_starts", "k_lengths", "tile_list"],
)
def attention_dkv_kernel(
    q_source,  # pointer, or descriptor of [B, T, H, D] when TMA
    k_ptr,
    v_ptr,
    do_source,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_starts,  # [B+1] int32, read when packed
    k_starts,
    k_lengths,  # [B] int32, read when has_lengths
    tile_list,  # [entries, 2] int32, read when packed
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
    packed,
    has_lengths,
    q_length,  # queries of a dense clip; 0 when packed
    k_length,
    heads,
    tiles,  # key tiles of a dense clip
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of keys of one clip and head."""
    clip, head, tile = locate(tile_list, tl.program_id(0), tiles, heads, packed)
    if clip < 0:
        return
    q_first, n_q = clip_rows(q_starts, clip, q_length, packed)
    # rows of k that exist, and those among them that count: the rest get a gradient of 0
    k_first, n_rows = clip_rows(k_starts, clip, k_length, packed)
    k_first, n_k = clip_keys(k_starts, k_lengths, clip, k_length, packed, has_lengths)
    start_n = tile * BLOCK_N
    if start_n >= n_rows:
        return

    k_base = clip_base(k_ptr, clip, k_first, head, stride_kb, stride_kt, stride_kh)
    v_base = clip_base(v_ptr, clip, k_first, head, stride_vb, stride_vt, stride_vh)
    # rows that do not count may hold NaN: they are loaded as 0, so their scores are 0, not NaN
    if CHUNK:
        k = k_base
        v = v_base
    else:
        k = load_rows(k_base, stride_kt, start_n, n_k, BLOCK_N, D, BLOCK_D, True)
        v = load_rows(v_base, stride_vt, start_n, n_k, BLOCK_N, D, BLOCK_D, True)
    if TMA:
        q_base = q_source
        do_base = do_source
    else:
        q_base = clip_base(q_source, clip, q_first, head, stride_qb, stride_qt, stride_qh)
        do_base = clip_base(do_source, clip, q_first, head, stride_gb, stride_gt, stride_gh)
    box = descriptor_clip(clip, packed)
    column = scratch_column(q_starts, clip, packed)
    scratch = clip.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + column
    lse_base = lse_ptr + scratch
    delta_base = delta_ptr + scratch

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    # a tile of keys that all do not count has nothing to add up
    n_q = tl.where(start_n < n_k, n_q, 0)
    whole = (n_q // BLOCK_M) * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        dk, dv, _ = add_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, start, n_q,
            dk, dv, lse_base, delta_base, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, False,
        )  # fmt: skip
    if whole < n_q:
        dk, dv, _ = add_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, whole, n_q,
            dk, dv, lse_base, delta_base, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, True,
        )  # fmt: skip

    # queries with NaN reach every key that counts, and no other
    counts = (start_n + tl.arange(0, BLOCK_N) < n_k)[:, None]
    dk = tl.where(counts, dk * scale, 0.0)
    dv = tl.where(counts, dv, 0.0)
    dk_base = clip_base(dk_ptr, clip, k_first, head, stride_dkb, stride_dkt, stride_dkh)
    store_rows(dk_base, stride_dkt, start_n, n_rows, dk, BLOCK_N, D, BLOCK_D)
    dv_base = clip_base(dv_ptr, clip, k_first, head, stride_dvb, stride_dvt, stride_dvh)
    store_rows(dv_base, stride_dvt, start_n, n_rows, dv, BLOCK_N, D, BLOCK_D)


settle(globals())
