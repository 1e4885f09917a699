"""Attention forward: o = softmax(scale * q k^T) v and its log-sum-exp, without the score matrix.

One program owns BLOCK_M queries of one clip and head and walks over the keys once, keeping the running
maximum m and sum l of each row (Milakov and Gimelshein 2018; Dao et al. 2022). Scores stay in units of
log2, so that exp is one exp2. The last, incomplete tile of keys is peeled off: the hot loop has no mask.
Traffic: q, o once; k, v once a query tile (mostly from L2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from .attention_tiles import (
    LN2,
    LOG2E,
    LSE_PAD,
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
    zero_rows,
)

_PAD = tl.constexpr(LSE_PAD)


@triton.jit
def _fold_keys(
    q,  # [BLOCK_M, BLOCK_D], not read when CHUNK
    q_base,
    stride_qt,
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
    foreign,
    acc,  # [BLOCK_M, BLOCK_D] fp32
    peak,  # [BLOCK_M] fp32, running maximum in log2 units
    total,  # [BLOCK_M] fp32, running sum
    qk_scale,
    bias,  # None, or the clip's [n_k] fp32
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys start .. start + BLOCK_N into the running softmax.

    A masked tile is the clip's last. By descriptor its rows past the last key are zeros of the tensor map,
    or, where `foreign`, whatever the next clip or a key beyond the length holds: NaN perhaps.
    """
    if CHUNK:
        k = k_base
    else:
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
            # their scores are masked, whatever they are
            ZEROED=False,
        )
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
        ZEROED=False,
    )
    s = product(
        q, k, q_base, stride_qt, start_m, n_q, k_base, stride_kt, start, n_k,
        BLOCK_M, BLOCK_N, D, CHUNK, True, MASKED, PRECISION,
    )  # fmt: skip
    if bias is not None:
        keys = start + tl.arange(0, BLOCK_N)
        extra = tl.load(bias + keys, mask=keys < n_k) if MASKED else tl.load(bias + keys)
        # from here on scores are in units of log2
        s = s * qk_scale + (extra * LOG2E)[None, :]
        qk_scale = 1.0
    if MASKED:
        s = tl.where((start + tl.arange(0, BLOCK_N) < n_k)[None, :], s, float("-inf"))
    highest = tl.maximum(peak, tl.max(s, 1) * qk_scale)
    # a row of nothing but -inf so far must not compute inf - inf
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    shrink = tl.math.exp2(peak - shift)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = acc * shrink[:, None]
    if MASKED and TMA:
        # 0 times NaN is NaN; the branch spares dense clips a round trip of v through registers
        if foreign:
            acc = tl.dot(p, zero_rows(v, start, n_k, BLOCK_N), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(p, v, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    return acc, highest, total


@triton.jit(
    do_not_specialize=[
        "packed",
        "has_lengths",
        "q_length",
        "k_length",
        "heads",
        "tiles",
        "clips",
        "pad_end",
    ],
    do_not_specialize_on_alignment=["q_starts", "k_starts", "k_lengths", "tile_list", "key_bias"],
)
def attention_forward_kernel(
    q_ptr,
    k_source,  # pointer, or descriptor of [B, T, H, D] when TMA
    v_source,
    o_ptr,
    lse_ptr,
    q_starts,  # [B+1] int32, read when packed
    k_starts,
    k_lengths,  # [B] int32, read when has_lengths
    tile_list,  # [entries, 2] int32, read when packed
    key_bias,  # None, or [B, Tk] fp32 that is added to the scores of a dense clip's keys
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
    packed,
    has_lengths,
    q_length,  # queries of a dense clip; 0 when packed
    k_length,
    heads,
    tiles,  # query tiles of a dense clip
    clips,
    pad_end,  # end of the lse columns of the last clip
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
    # the first tile of an empty clip stays: it writes the padding of lse
    if (start_m >= n_q) & (tile > 0):
        return

    q_base = clip_base(q_ptr, clip, q_first, head, stride_qb, stride_qt, stride_qh)
    if TMA:
        k_base = k_source
        v_base = v_source
    else:
        k_base = clip_base(k_source, clip, k_first, head, stride_kb, stride_kt, stride_kh)
        v_base = clip_base(v_source, clip, k_first, head, stride_vb, stride_vt, stride_vh)
    box = descriptor_clip(clip, packed)
    q = q_base if CHUNK else load_rows(q_base, stride_qt, start_m, n_q, BLOCK_M, D, BLOCK_D, True)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = scale * LOG2E
    bias = key_bias
    if key_bias is not None:
        bias = key_bias + clip.to(tl.int64) * k_length
    foreign = packed | has_lengths
    whole = (n_k // BLOCK_N) * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, peak, total = _fold_keys(
            q, q_base, stride_qt, start_m, n_q,
            k_source, k_base, stride_kt, v_source, v_base, stride_vt, box, k_first, head, start, n_k,
            foreign, acc, peak, total, qk_scale, bias,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, False,
        )  # fmt: skip
    if whole < n_k:
        acc, peak, total = _fold_keys(
            q, q_base, stride_qt, start_m, n_q,
            k_source, k_base, stride_kt, v_source, v_base, stride_vt, box, k_first, head, whole, n_k,
            foreign, acc, peak, total, qk_scale, bias,
            D, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, TMA, True,
        )  # fmt: skip

    # without keys, or with scores of -inf alone, the output is 0 and lse is +inf, so that backward sees
    # probabilities of 0
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    o_base = clip_base(o_ptr, clip, q_first, head, stride_ob, stride_ot, stride_oh)
    store_rows(o_base, stride_ot, start_m, n_q, acc / total[:, None], BLOCK_M, D, BLOCK_D)

    rows = start_m + tl.arange(0, BLOCK_M)
    column = scratch_column(q_starts, clip, packed)
    lse_base = lse_ptr + clip.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    lse = tl.where((rows >= n_q) | nothing, float("inf"), (peak + tl.math.log2(total)) * LN2)
    tl.store(lse_base + column + rows, lse)
    end = start_m + BLOCK_M
    if end >= n_q:
        # the clip's last tile fills the columns up to the next clip
        limit = pad_end - column
        if packed & (clip + 1 < clips):
            limit = scratch_column(q_starts, clip + 1, packed) - column
        for pad in range(end, limit, _PAD):
            cols = pad + tl.arange(0, _PAD)
            tl.store(
                lse_base + column + cols,
                tl.full([_PAD], float("inf"), tl.float32),
                mask=cols < limit,
            )


settle(globals())
