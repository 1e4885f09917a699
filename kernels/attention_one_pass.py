"""Attention backward in one pass over the scores, for callers who do not need the same bits twice.

A program owns a tile of keys and walks over the queries, as in the dk, dv pass of attention_backward.py,
and adds its share ds^T k of dq to an fp32 sum that all programs of a clip and head share: 5 matrix products
instead of 7, but additions in whatever order programs run. Two small kernels frame it: one computes
delta = rowsum(do * o) and clears the sum, one scales and rounds it into dq.

The sum has a row of D floats for every column of lse, padding included: B H Tpad D 4 bytes (252 MB for
64 clips of AST-base). It is cleared once, read once, and added to once for every tile of keys. On GPUs
with tensor maps a whole tile is added by one TMA reduction (REDUCE), elsewhere element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from ._tuned import INTERPRETED
from .attention_backward import add_queries
from .attention_tiles import (
    LOG2E,
    clip_base,
    clip_keys,
    clip_rows,
    descriptor_clip,
    load_rows,
    locate,
    scratch_column,
    store_rows,
)

# The interpreter knows no reductions through descriptors.
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _sum_places(dq_sum, row, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Addresses of rows row .. row + BLOCK_M of the sum.  # [BLOCK_M, BLOCK_D]"""
    # only the scalar part is 64 bits wide: the rest does not change over a loop
    rows = tl.arange(0, BLOCK_M)
    return dq_sum + row * D + (rows[:, None] * D + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _add_to_sum(
    dq_sum,  # [R, D] fp32, pointer, or descriptor when REDUCE
    row,
    ds,  # [BLOCK_N, BLOCK_M] fp32
    k,  # [BLOCK_N, BLOCK_D], zero where a key does not count
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Add ds^T k to rows row .. row + BLOCK_M of the sum, which are those of one clip and its padding."""
    ds = ds.to(k.dtype)
    if REDUCE:
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
    else:
        # k^T is the left operand here: as the right one every warp would hold all of k in its registers
        dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
    if REDUCE and not _INTERPRETED:
        dq_sum.atomic_add([row.to(tl.int32), 0], dq)
    else:
        places = _sum_places(dq_sum, row, D, BLOCK_D, BLOCK_M)
        if D == BLOCK_D:
            tl.atomic_add(places, dq, sem="relaxed")
        else:
            tl.atomic_add(places, dq, mask=(tl.arange(0, BLOCK_D) < D)[None, :], sem="relaxed")


@triton.jit
def _walk_queries(
    k,  # [BLOCK_N, BLOCK_D], zero where a key does not count
    v,
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
    n_q,
    dk,  # [BLOCK_N, BLOCK_D] fp32
    dv,  # [BLOCK_N, BLOCK_D] fp32
    lse_base,
    delta_base,
    dq_sum,
    scratch,
    qk_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    REDUCE: tl.constexpr,
    KEYS_MASKED: tl.constexpr,
):
    """Add all queries of the clip to dk / scale and dv, and the tile's share to the sum of dq."""
    whole = (n_q // BLOCK_M) * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        dk, dv, ds = add_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, start, n_q,
            dk, dv, lse_base, delta_base, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, 0, PRECISION, TMA, False, KEYS_MASKED,
        )  # fmt: skip
        _add_to_sum(dq_sum, scratch + start, ds, k, D, BLOCK_D, BLOCK_M, PRECISION, REDUCE)
    if whole < n_q:
        dk, dv, ds = add_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, whole, n_q,
            dk, dv, lse_base, delta_base, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, 0, PRECISION, TMA, True, KEYS_MASKED,
        )  # fmt: skip
        _add_to_sum(dq_sum, scratch + whole, ds, k, D, BLOCK_D, BLOCK_M, PRECISION, REDUCE)
    return dk, dv


@triton.jit(
    do_not_specialize=["packed", "has_lengths", "q_length", "k_length", "heads", "tiles"],
    do_not_specialize_on_alignment=["q_starts", "k_starts", "k_lengths", "tile_list"],
)
def attention_one_pass_kernel(
    q_source,  # pointer, or descriptor of [B, T, H, D] when TMA
    k_ptr,
    v_ptr,
    do_source,
    lse_ptr,
    delta_ptr,
    dq_sum,  # [R, D] fp32, a row a column of lse; pointer, or descriptor when REDUCE
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """One tile of keys of one clip and head: its dk and dv, and its share of dq."""
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
    # rows that do not count may hold NaN: they are loaded as 0
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
    counts = (start_n + tl.arange(0, BLOCK_N) < n_k)[:, None]

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    # a tile of keys that all do not count has nothing to add up
    n_q = tl.where(start_n < n_k, n_q, 0)
    # only a clip's last tile pays for the mask over keys, which costs a sixth of a step
    if start_n + BLOCK_N > n_k:
        dk, dv = _walk_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, n_q,
            dk, dv, lse_base, delta_base, dq_sum, scratch, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, TMA, REDUCE, True,
        )  # fmt: skip
    else:
        dk, dv = _walk_queries(
            k, v, k_base, stride_kt, v_base, stride_vt, start_n, n_k,
            q_source, q_base, stride_qt, do_source, do_base, stride_gt, box, q_first, head, n_q,
            dk, dv, lse_base, delta_base, dq_sum, scratch, qk_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, TMA, REDUCE, False,
        )  # fmt: skip

    # queries with NaN reach every key that counts, and no other
    dk = tl.where(counts, dk * scale, 0.0)
    dv = tl.where(counts, dv, 0.0)
    dk_base = clip_base(dk_ptr, clip, k_first, head, stride_dkb, stride_dkt, stride_dkh)
    store_rows(dk_base, stride_dkt, start_n, n_rows, dk, BLOCK_N, D, BLOCK_D)
    dv_base = clip_base(dv_ptr, clip, k_first, head, stride_dvb, stride_dvt, stride_dvh)
    store_rows(dv_base, stride_dvt, start_n, n_rows, dv, BLOCK_N, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["packed", "q_length", "heads", "tiles"],
    do_not_specialize_on_alignment=["q_starts", "tile_list"],
)
def attention_delta_kernel(
    o_ptr,
    do_ptr,
    delta_ptr,
    dq_sum,  # [R, D] fp32
    q_starts,  # [B+1] int32, read when packed
    tile_list,  # [entries, 2] int32, read when packed
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    stride_oh: tl.int64,
    stride_gb: tl.int64,  # of do
    stride_gt: tl.int64,
    stride_gh: tl.int64,
    stride_lb: tl.int64,
    stride_lh: tl.int64,
    packed,
    q_length,  # queries of a dense clip; 0 when packed
    heads,
    tiles,  # query tiles of a dense clip
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Delta of one tile of queries of one clip and head, and zeros in its rows of the sum."""
    clip, head, tile = locate(tile_list, tl.program_id(0), tiles, heads, packed)
    if clip < 0:
        return
    q_first, n_q = clip_rows(q_starts, clip, q_length, packed)
    start_m = tile * BLOCK_M
    if start_m >= n_q:
        return
    o_base = clip_base(o_ptr, clip, q_first, head, stride_ob, stride_ot, stride_oh)
    o = load_rows(o_base, stride_ot, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    do_base = clip_base(do_ptr, clip, q_first, head, stride_gb, stride_gt, stride_gh)
    do = load_rows(do_base, stride_gt, start_m, n_q, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    scratch = clip.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    row = scratch + scratch_column(q_starts, clip, packed) + start_m
    tl.store(delta_ptr + row + tl.arange(0, BLOCK_M), delta)
    places = _sum_places(dq_sum, row, D, BLOCK_D, BLOCK_M)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.store(places, zeros, mask=(tl.arange(0, BLOCK_D) < D)[None, :])


@triton.jit(
    do_not_specialize=["packed", "q_length", "heads", "tiles"],
    do_not_specialize_on_alignment=["q_starts", "tile_list"],
)
def attention_round_kernel(
    dq_sum,  # [R, D] fp32
    dq_ptr,
    q_starts,  # [B+1] int32, read when packed
    tile_list,  # [entries, 2] int32, read when packed
    stride_dqb: tl.int64,
    stride_dqt: tl.int64,
    stride_dqh: tl.int64,
    stride_lb: tl.int64,
    stride_lh: tl.int64,
    scale,
    packed,
    q_length,  # queries of a dense clip; 0 when packed
    heads,
    tiles,  # query tiles of a dense clip
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of one tile of queries, times scale, in the dtype and the place of dq."""
    clip, head, tile = locate(tile_list, tl.program_id(0), tiles, heads, packed)
    if clip < 0:
        return
    q_first, n_q = clip_rows(q_starts, clip, q_length, packed)
    start_m = tile * BLOCK_M
    if start_m >= n_q:
        return
    scratch = clip.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    row = scratch + scratch_column(q_starts, clip, packed) + start_m
    places = _sum_places(dq_sum, row, D, BLOCK_D, BLOCK_M)
    total = tl.load(places, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    dq_base = clip_base(dq_ptr, clip, q_first, head, stride_dqb, stride_dqt, stride_dqh)
    store_rows(dq_base, stride_dqt, start_m, n_q, total * scale, BLOCK_M, D, BLOCK_D)


settle(globals())
