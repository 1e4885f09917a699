"""Every op and the whole AST as a PyTorch user would write them: the yardstick of the budgets.

Deliberately not our reference: `F.layer_norm`, `F.scaled_dot_product_attention`, `F.conv2d`, `F.gelu`
in the dtype and on the device of the inputs. The error of these against float64 is what an ordinary
implementation makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._optional import optional_import
from ..reference.tokens import MergePlan, merge

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Linear, exact GELU, linear."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def patch_embed(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
    fstride: int,
    tstride: int,
) -> Tensor:  # [B, P + f*t, C]
    """The original's convolution on [B, 1, F, S], prefix tokens and positions."""
    image = x.unsqueeze(1).transpose(2, 3)
    tokens = F.conv2d(image, weight, bias, stride=(fstride, tstride)).flatten(2).transpose(1, 2)
    return torch.cat((prefix.expand(x.shape[0], -1, -1), tokens), dim=1) + pos


def attention(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    key_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:  # [B, Tq, H, D]
    """Scaled dot product attention; a mask where clips differ in length or keys have a bias."""
    mask = None if key_bias is None else key_bias[:, None, None, :]
    if mask is not None and q.device.type != "cpu":
        mask = mask.to(q.dtype)  # a GPU's fused kernels take no other
    if key_lengths is not None:
        valid = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
        mask = valid[:, None, None, :]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_masked(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """Scaled dot product attention with a boolean mask [Tq, Tk]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs).transpose(1, 2)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """Clip by clip over packed tokens [N, H, D]."""
    clips = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    return torch.cat([attention(q[None, c], k[None, c], v[None, c])[0] for c in clips])


def kaldi_fbank(wave: Tensor, **settings: Any) -> Tensor | None:
    """The Kaldi filterbank of torchaudio, clip by clip, as the original AST calls it; None if absent."""
    torchaudio = optional_import("torchaudio")
    kaldi = optional_import("torchaudio.compliance.kaldi") if torchaudio is not None else None
    if kaldi is None:
        return None
    rate = settings.get("sample_rate_hz", 16000)
    clips = [
        kaldi.fbank(
            clip[None],
            htk_compat=True,
            sample_frequency=rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=settings.get("num_mel_bins", 128),
            dither=0.0,
            frame_shift=10,
        )
        for clip in wave
    ]
    return torch.stack(clips)


def ast_logits(
    weights: Mapping[str, Tensor],
    x: Tensor,  # [B, S, F]
    *,
    num_heads: int,
    strides: tuple[int, int],
    eps: float = 1e-6,
    head_eps: float = 1e-5,
    linear: Linear = F.linear,
    kept: Tensor | None = None,
    plans: Mapping[int, MergePlan] | None = None,
) -> Tensor:  # [B, label_dim]
    """Logits of an AST from its state dict (the original's keys).

    Args:
        weights: state dict, or the parameters by name if gradients are wanted.
        x: [B, S, F] normalised log-mel.
        num_heads: H.
        strides: patch steps in mel bins and in frames.
        eps: of the LayerNorms in the body.
        head_eps: of the head's LayerNorm.
        linear: computes the blocks' linear layers.
        kept: [K] patches to run on, all by default.
        plans: which tokens the blocks merge, by the block's number; none by default.
    """
    names = [name for name in ("v.cls_token", "v.dist_token") if name in weights]
    prefix = torch.cat([weights[name] for name in names], dim=1)[0]
    tokens = patch_embed(
        x,
        weights["v.patch_embed.proj.weight"],
        weights["v.patch_embed.proj.bias"],
        weights["v.pos_embed"][0],
        prefix,
        *strides,
    )
    if kept is not None:
        tokens = torch.cat((tokens[:, : len(names)], tokens[:, len(names) :][:, kept]), dim=1)
    sizes: Tensor | None = None
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("v.blocks."))
    for index in range(depth):
        block = f"v.blocks.{index}."
        normal = _norm(tokens, weights, block + "norm1", eps)
        qkv = _linear(normal, weights, block + "attn.qkv", linear)
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        bias = None if sizes is None else sizes.log()
        mixed = attention(q, k, v, key_bias=bias).flatten(2)
        tokens = tokens + _linear(mixed, weights, block + "attn.proj", linear)
        if plans is not None and index in plans:
            if sizes is None:
                # 8 bits hold neither a size nor its logarithm
                wide = torch.promote_types(tokens.dtype, torch.float32)
                sizes = torch.ones(tokens.shape[:2], dtype=wide, device=tokens.device)
            merged, sizes = merge(tokens, sizes, plans[index], len(names))
            tokens = merged.to(tokens.dtype)
        normal = _norm(tokens, weights, block + "norm2", eps)
        hidden = F.gelu(_linear(normal, weights, block + "mlp.fc1", linear))
        tokens = tokens + _linear(hidden, weights, block + "mlp.fc2", linear)
    tokens = _norm(tokens, weights, "v.norm", eps)
    pooled = tokens[:, : len(names)].mean(dim=1)
    return _linear(_norm(pooled, weights, "mlp_head.0", head_eps), weights, "mlp_head.1")


def _norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    return layer_norm(x, weights[name + ".weight"], weights[name + ".bias"], eps)


def _linear(
    x: Tensor, weights: Mapping[str, Tensor], name: str, linear: Linear = F.linear
) -> Tensor:
    return linear(x, weights[name + ".weight"], weights[name + ".bias"])
