"""Every op in plain differentiable PyTorch: the oracle, the fallback and the baseline of tests.

Dtype-agnostic: the arithmetic runs in the dtype of the inputs (16-bit inputs are raised to float32
for statistics and softmax, as PyTorch itself does on a GPU), so float64 inputs give the oracle.
Dimensions: B clips, N samples, S frames, F mel bins, T tokens, H heads, D head width, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .mel import MelTables

LSE_BLOCK = 128  # log-sum-exp rows are padded to a multiple of this, with +inf


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dim; returns y, mean and 1/std (Ba et al. 2016)."""
    stats = _statistics_dtype(x.dtype)
    wide = x.to(stats)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd * weight.to(stats) + bias.to(stats)
    return y.to(out_dtype or x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def add_layer_norm(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`total = x + residual`, then LayerNorm of it; returns y, total, mean and 1/std."""
    total = (x + residual).to(residual.dtype)
    y, mean, rstd = layer_norm(total, weight, bias, eps, out_dtype or x.dtype)
    return y, total, mean, rstd


def gelu(x: Tensor) -> Tensor:
    """Exact GELU x * Phi(x), with the limits +inf -> inf and -inf -> 0 (Hendrycks & Gimpel 2016)."""
    wide = x.to(_statistics_dtype(x.dtype))
    # at the infinities the product or its gradient is inf * 0, which PyTorch makes NaN: the limits
    # are 0 with slope 0 and inf with slope 1
    safe = torch.where(wide.isinf(), torch.zeros_like(wide), wide)
    product = safe * 0.5 * torch.special.erfc(-safe * 0.7071067811865476)
    return torch.where(wide == torch.inf, wide, product).to(x.dtype)


def mlp(
    x: Tensor,  # [..., C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
) -> Tensor:  # [..., C2]
    """Linear, exact GELU, linear: the feed-forward half of a transformer block."""
    return F.linear(gelu(F.linear(x, w1, b1)), w2, b2)


def patch_embed(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
    fstride: int,
    tstride: int,
) -> Tensor:  # [B, P + f*t, C]
    """Overlapping patches, projection, prefix tokens and position table (Gong et al. 2021).

    The convolution's first spatial axis is frequency; tokens are frequency-major.
    """
    patches = (
        x.transpose(1, 2).unfold(1, weight.shape[2], fstride).unfold(2, weight.shape[3], tstride)
    )
    b, f, t = patches.shape[:3]
    rows = patches.reshape(b, f * t, weight.shape[2] * weight.shape[3])
    tokens = F.linear(rows, weight.flatten(1), bias)
    return torch.cat((prefix.expand(b, -1, -1), tokens), dim=1) + pos


def attention(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    scale: float,
    key_lengths: Tensor | None = None,  # [B]
    key_bias: Tensor | None = None,  # [B, Tk]
) -> tuple[Tensor, Tensor]:  # [B, Tq, H, D], [B, H, Tpad]
    """Softmax attention with an optional number of valid keys per clip; returns o and log-sum-exp.

    Keys beyond `key_lengths` are ignored even where they hold NaN; a clip without keys gives 0.
    `key_bias` is added to the scores of each clip's keys. The log-sum-exp is natural, float32 or wider, padded to a multiple of 128 rows with +inf.
    """
    if key_lengths is None:
        return _attention(q, k, v, scale, None, key_bias)
    index = torch.arange(k.shape[1], device=k.device)
    valid = index < key_lengths.to(k.device)[:, None]  # [B, Tk]
    k = torch.where(valid[:, :, None, None], k, torch.zeros_like(k))
    v = torch.where(valid[:, :, None, None], v, torch.zeros_like(v))
    return _attention(q, k, v, scale, ~valid[:, None, None, :], key_bias)


def attention_masked(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    pairs: Tensor,  # [Tq, Tk] bool
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, Tq, H, D], [B, H, Tpad]
    """Softmax attention over the visible pairs, True in `pairs`; returns o and log-sum-exp as `attention`.

    Keys that no query sees are ignored even where they hold NaN; a query that sees nothing gives 0.
    """
    hidden = ~pairs.to(q.device)
    unseen, blind = hidden.all(0)[:, None, None], hidden.all(1)[:, None, None]
    q = torch.where(blind, torch.zeros_like(q), q)
    k = torch.where(unseen, torch.zeros_like(k), k)
    v = torch.where(unseen, torch.zeros_like(v), v)
    return _attention(q, k, v, scale, hidden)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    hidden: Tensor | None,  # broadcasts to [B, H, Tq, Tk]
    key_bias: Tensor | None = None,  # [B, Tk]
) -> tuple[Tensor, Tensor]:
    stats = _statistics_dtype(q.dtype)
    # 16-bit scores would cost a tenth of a percent of every probability: no fused attention has them
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(stats), k.to(stats)) * scale
    if key_bias is not None:
        scores = scores + key_bias.to(stats)[:, None, None, :]
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = (
        torch.logsumexp(scores, dim=-1)
        if k.shape[1]
        else scores.new_full(scores.shape[:3], -torch.inf)
    )
    # softmax rather than exp(scores - lse), which loses the digits that a large lse does not hold
    p = torch.softmax(scores, dim=-1)
    # a query without keys: probabilities are 0 rather than 0/0, and stay 0 in exp(scores - lse)
    empty = lse == -torch.inf
    p = torch.where(empty[..., None], torch.zeros_like(p), p)
    lse = torch.where(empty, torch.full_like(lse, torch.inf), lse)
    o = torch.einsum("bhqk,bkhd->bqhd", p, v.to(stats)).to(v.dtype).contiguous()
    padding = -q.shape[1] % LSE_BLOCK
    return o, F.pad(lse, (0, padding), value=float("inf"))


def varlen_offsets(cu_seqlens: Tensor) -> Tensor:
    """First column of each clip in a padded log-sum-exp row: clips start at multiples of 128."""
    clips = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return (cu_seqlens[:-1] + clips * LSE_BLOCK) // LSE_BLOCK * LSE_BLOCK


def varlen_columns(num_tokens: int, num_clips: int) -> int:
    """Columns of the padded log-sum-exp of `attention_varlen`."""
    return -(-(num_tokens + num_clips * LSE_BLOCK) // LSE_BLOCK) * LSE_BLOCK


def attention_varlen(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    scale: float,
) -> tuple[Tensor, Tensor]:  # [Nq, H, D], [H, Npad]
    """Attention within each clip of a packed batch; returns o and the padded log-sum-exp."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    num_clips = len(starts_q) - 1
    lse = q.new_full(
        (q.shape[1], varlen_columns(q.shape[0], num_clips)),
        float("inf"),
        dtype=_statistics_dtype(q.dtype),
    )
    outputs = [q.new_zeros((0, q.shape[1], q.shape[2]))]
    for clip, column in enumerate(varlen_offsets(cu_seqlens_q).tolist()):
        rows = slice(starts_q[clip], starts_q[clip + 1])
        keys = slice(starts_k[clip], starts_k[clip + 1])
        o, clip_lse = attention(q[None, rows], k[None, keys], v[None, keys], scale)
        outputs.append(o[0])
        length = starts_q[clip + 1] - starts_q[clip]
        lse[:, column : column + length] = clip_lse[0, :, :length].detach()
    return torch.cat(outputs), lse


def power_spectrum(frames: Tensor, tables: MelTables) -> Tensor:
    """Windowed power (or magnitude) spectrum [..., n_fft // 2 + 1] of raw frames [..., window_samples]."""
    if tables.remove_dc:
        frames = frames - frames.mean(-1, keepdim=True)
    if tables.preemphasis:
        previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
        frames = frames - tables.preemphasis * previous
    windowed = frames * tables.window.to(frames)
    spectrum = torch.fft.rfft(windowed, n=tables.n_fft)
    # the gradient of abs at 0 is 0, that of a square root of the power would be NaN
    return spectrum.abs() if tables.magnitude else spectrum.real.square() + spectrum.imag.square()


def frames_inside(lengths: Tensor, tables: MelTables, whole: int) -> Tensor:
    """Which of the first `whole` frames lie within a clip's valid samples: [B, whole] bool."""
    ends = torch.arange(whole, device=lengths.device) * tables.hop_samples + tables.window_samples
    return ends <= lengths[:, None]


def log_mel(
    wave: Tensor,  # [B, N] float, or int16 scaled by 1/32768
    lengths: Tensor | None,  # [B] valid samples a clip
    tables: MelTables,
    num_frames: int,
    mean: float,
    std: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, num_frames, F]
    """Kaldi log-mel energies, padded with raw 0 or cut to `num_frames`, then (x - mean) / (2 std).

    Padding happens before normalisation, as the original does it, so it is louder than silence.
    """
    if wave.dtype == torch.int16:
        wave = wave.to(torch.float32) / 32768.0
    b, n = wave.shape
    if lengths is None:
        lengths = torch.full((b,), n, dtype=torch.int64, device=wave.device)
    whole = min(tables.num_frames(n), num_frames) if b else 0
    if not whole:
        # an empty part of the waveform, so that its gradient is zeros rather than missing
        features = wave[:, :0, None].expand(b, 0, tables.num_mel_bins)
    else:
        frames = wave.unfold(1, tables.window_samples, tables.hop_samples)[:, :whole]
        inside = frames_inside(lengths, tables, whole)[:, :, None]
        # before the transform and after it: what lies in the padding may be NaN, whose gradient is too
        frames = torch.where(inside, frames, torch.zeros_like(frames))
        energy = power_spectrum(frames, tables) @ tables.filters.to(wave).T
        if tables.log_offset:
            energy = energy + tables.log_offset
        features = torch.log(torch.clamp(energy, min=tables.log_floor))
        features = torch.where(inside, features, torch.zeros_like(features))
    features = F.pad(features, (0, 0, 0, num_frames - whole))
    return ((features - mean) / (2.0 * std)).to(out_dtype or wave.dtype)
