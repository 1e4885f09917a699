"""Gradients of the reference ops written out, for use where autograd cannot run.

A registered op's body runs below autograd, so its reference backend needs formulas. Tests hold each
of them against autograd of the twin in `reference/ops.py`, in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .mel import MelTables
from .ops import LSE_BLOCK, _statistics_dtype, frames_inside, gelu, varlen_offsets


def layer_norm(
    dy: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the last two stay in the statistics' dtype."""
    stats = _statistics_dtype(x.dtype)
    dy_wide = dy.to(stats)
    normal = (x.to(stats) - mean[:, None].to(stats)) * rstd[:, None].to(stats)
    scaled = dy_wide * weight.to(stats)
    inner = (scaled * normal).mean(-1, keepdim=True)
    dx = (scaled - scaled.mean(-1, keepdim=True) - normal * inner) * rstd[:, None].to(stats)
    return dx.to(x.dtype), (dy_wide * normal).sum(0), dy_wide.sum(0)


def add_layer_norm(
    dy: Tensor,  # [R, C]
    dtotal: Tensor | None,  # [R, C]
    total: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the sum (of both its terms alike), of weight and of bias."""
    stats = _statistics_dtype(total.dtype)
    dsum, dweight, dbias = layer_norm(dy, total.to(stats), weight, mean, rstd)
    if dtotal is not None:
        dsum = dsum + dtotal.to(stats)
    return dsum.to(total.dtype), dweight, dbias


def gelu_backward(dg: Tensor, h: Tensor) -> Tensor:
    """Gradient of exact GELU: Phi(h) + h phi(h), with limits 1 and 0 at the infinities."""
    wide = h.to(_statistics_dtype(h.dtype))
    density = torch.exp(-0.5 * wide.square()) * (1.0 / math.sqrt(2.0 * math.pi))
    slope = 0.5 * torch.special.erfc(-wide * math.sqrt(0.5)) + torch.where(
        wide.isinf(), torch.zeros_like(wide), wide * density
    )
    return (dg.to(slope.dtype) * slope).to(h.dtype)


def mlp(
    dy: Tensor,  # [R, C2]
    x: Tensor,  # [R, C]
    h: Tensor,  # [R, K]
    w1: Tensor,  # [K, C]
    w2: Tensor,  # [C2, K]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2."""
    stats = _statistics_dtype(x.dtype)
    dh = gelu_backward(dy @ w2, h)
    db1 = dh.to(stats).sum(0).to(x.dtype)
    db2 = dy.to(stats).sum(0).to(x.dtype)
    return dh @ w1, dh.T @ x, db1, dy.T @ gelu(h), db2


def patch_embed(
    dy: Tensor,  # [B, P + f*t, C]
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    fstride: int,
    tstride: int,
    num_prefix: int,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of weight, bias, position table, prefix tokens and (if asked) the spectrogram."""
    stats = _statistics_dtype(x.dtype)
    width, _, pf, pt = weight.shape
    image = x.transpose(1, 2)  # [B, F, S]
    patches = image.unfold(1, pf, fstride).unfold(2, pt, tstride)
    b, f, t = patches.shape[:3]
    dpos = dy.to(stats).sum(0)
    dtokens = dy[:, num_prefix:].reshape(b * f * t, width)
    dweight = dtokens.to(stats).T @ patches.reshape(b * f * t, pf * pt).to(stats)
    dx = None
    if needs_dx:
        columns = (dtokens.to(stats) @ weight.flatten(1).to(stats)).view(b, f * t, pf * pt)
        size = ((f - 1) * fstride + pf, (t - 1) * tstride + pt)
        folded = F.fold(columns.transpose(1, 2), size, (pf, pt), stride=(fstride, tstride))
        full = torch.zeros(image.shape, dtype=stats, device=x.device)
        full[:, : size[0], : size[1]] = folded[:, 0]
        dx = full.transpose(1, 2).to(x.dtype).contiguous()
    grads = (dweight.view(weight.shape), dpos[num_prefix:].sum(0), dpos, dpos[:num_prefix])
    return (*(grad.to(weight.dtype).clone() for grad in grads), dx)  # type: ignore[return-value]


def attention(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    lse: Tensor,  # [B, H, Tpad]
    scale: float,
    key_lengths: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; keys beyond `key_lengths` get exact zeros."""
    if key_lengths is None:
        return _attention(do, q, k, v, lse, scale, None)
    valid = torch.arange(k.shape[1], device=k.device) < key_lengths.to(k.device)[:, None]
    k = torch.where(valid[:, :, None, None], k, torch.zeros_like(k))
    v = torch.where(valid[:, :, None, None], v, torch.zeros_like(v))
    return _attention(do, q, k, v, lse, scale, ~valid[:, None, None, :])


def attention_masked(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    lse: Tensor,  # [B, H, Tpad]
    scale: float,
    pairs: Tensor,  # [Tq, Tk] bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a key that no query sees, and a query that sees none, get exact zeros."""
    hidden = ~pairs.to(q.device)
    unseen = hidden.all(0)[:, None, None]
    k = torch.where(unseen, torch.zeros_like(k), k)
    v = torch.where(unseen, torch.zeros_like(v), v)
    blind = hidden.all(1)[:, None, None]
    q = torch.where(blind, torch.zeros_like(q), q)
    do = torch.where(blind, torch.zeros_like(do), do)
    return _attention(do, q, k, v, lse, scale, hidden)


def _attention(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    hidden: Tensor | None,  # broadcasts to [B, H, Tq, Tk]
) -> tuple[Tensor, Tensor, Tensor]:
    stats = _statistics_dtype(q.dtype)
    qw, kw, vw, dow = (tensor.to(stats) for tensor in (q, k, v, do))
    p = torch.exp(
        torch.einsum("bqhd,bkhd->bhqk", qw, kw) * scale - lse[:, :, : q.shape[1], None].to(stats)
    )
    if hidden is not None:
        p = p.masked_fill(hidden, 0.0)
    dv = torch.einsum("bhqk,bqhd->bkhd", p, dow)
    dp = torch.einsum("bqhd,bkhd->bhqk", dow, vw)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, kw)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, qw)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def attention_varlen(
    do: Tensor,  # [Nq, H, D]
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    lse: Tensor,  # [H, Npad]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed q, k and v, clip by clip."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for clip, column in enumerate(varlen_offsets(cu_seqlens_q).tolist()):
        rows = slice(starts_q[clip], starts_q[clip + 1])
        keys = slice(starts_k[clip], starts_k[clip + 1])
        length = rows.stop - rows.start
        clip_lse = F.pad(lse[None, :, column : column + length], (0, -length % LSE_BLOCK))
        grads = attention(
            do[None, rows], q[None, rows], k[None, keys], v[None, keys], clip_lse, scale, None
        )
        dq[rows], dk[keys], dv[keys] = (grad[0] for grad in grads)
    return dq, dk, dv


def log_mel(
    dy: Tensor,  # [B, num_frames, F]
    wave: Tensor,  # [B, N] float
    lengths: Tensor | None,  # [B]
    tables: MelTables,
    std: float,
) -> Tensor:  # [B, N]
    """Gradient of the waveform: adjoint of mel, power, DFT, window, pre-emphasis, DC and framing."""
    b, n = wave.shape
    whole = min(tables.num_frames(n), dy.shape[1])
    dwave = wave.new_zeros(wave.shape)
    if not whole or not b:
        return dwave
    win, hop = tables.window_samples, tables.hop_samples
    frames = wave.unfold(1, win, hop)[:, :whole]
    if lengths is not None:  # the padding may hold NaN
        inside = frames_inside(lengths, tables, whole)[:, :, None]
        frames = torch.where(inside, frames, torch.zeros_like(frames))
    if tables.remove_dc:
        frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    window = tables.window.to(wave)
    spectrum = torch.fft.rfft((frames - tables.preemphasis * previous) * window, n=tables.n_fft)
    filters = tables.filters.to(wave)
    power = spectrum.real.square() + spectrum.imag.square()
    magnitude = power.sqrt() if tables.magnitude else power
    energy = magnitude @ filters.T + tables.log_offset
    denergy = dy[:, :whole].to(wave.dtype) / (2.0 * std) / torch.clamp(energy, min=tables.log_floor)
    dead = energy <= tables.log_floor
    if lengths is not None:
        dead = dead | ~inside
    dpower = denergy.masked_fill(dead, 0.0) @ filters  # [B, S, n_fft // 2 + 1]
    if tables.magnitude:
        dpower = torch.where(power <= 0, torch.zeros_like(dpower), 0.5 * dpower / magnitude)
    # sum_k Re(conj(g_k) X_k) with g = 2 dpower X is a real inverse transform without Hermitian weights
    full = torch.fft.fft(torch.conj(2.0 * dpower * spectrum), n=tables.n_fft)
    dframes = full.real[..., :win] * window
    shifted = F.pad(dframes[..., 1:], (0, 1))
    shifted[..., 0] += dframes[..., 0]
    dframes = dframes - tables.preemphasis * shifted
    if tables.remove_dc:
        dframes = dframes - dframes.mean(-1, keepdim=True)
    span = (whole - 1) * hop + win
    folded = F.fold(dframes.transpose(1, 2), (1, span), (1, win), stride=(1, hop))
    dwave[:, :span] = folded[:, 0, 0]
    return dwave
