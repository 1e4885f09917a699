"""The whole AST in plain PyTorch, any dtype up to float64: the oracle of the fast model.

Written on its own, from the paper and the original's behaviour; it shares nothing with the fast
model but the names of its parameters.
Dimensions: B clips, S frames, F mel bins, T tokens, H heads, D head width, C width, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, tokens
from .tokens import MergePlan


class _Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)[0]


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        b, tokens, dim = x.shape
        width = dim // self.num_heads
        q, k, v = (
            part.reshape(b, tokens, self.num_heads, width) for part in self.qkv(x).split(dim, -1)
        )
        bias = None if sizes is None else sizes.log()
        o = ops.attention(q, k, v, width**-0.5, None, bias)[0]
        return self.proj(o.reshape(b, tokens, dim))

    def mean_keys(self, x: Tensor) -> Tensor:
        """Keys of normalised tokens, averaged over heads [B, T, D]."""
        b, tokens, dim = x.shape
        keys = self.qkv(x)[:, :, dim : 2 * dim]
        return keys.reshape(b, tokens, self.num_heads, -1).mean(2)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = _Norm(dim, eps)
        self.attn = _Attention(dim, num_heads)
        self.norm2 = _Norm(dim, eps)
        self.mlp = _Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def merging(
        self, x: Tensor, sizes: Tensor, r: int, num_prefix: int, plan: MergePlan | None
    ) -> tuple[Tensor, Tensor]:
        """The block with r tokens merged between attention and MLP."""
        normed = self.norm1(x)
        x = x + self.attn(normed, sizes)
        if r:
            plan = plan or tokens.match(self.attn.mean_keys(normed), r, num_prefix)
            x, sizes = tokens.merge(x, sizes, plan, num_prefix)
        return x + self.mlp(self.norm2(x)), sizes


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, patch, stride)


class _Trunk(nn.Module):
    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        eps: float,
        num_tokens: int,
        num_prefix_tokens: int,
        patch: tuple[int, int],
        stride: tuple[int, int],
        dead_heads: bool,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, dim))
        if num_prefix_tokens == 2:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = _PatchEmbed(dim, patch, stride)
        self.blocks = nn.ModuleList(_Block(dim, num_heads, hidden, eps) for _ in range(depth))
        self.norm = _Norm(dim, eps)
        if dead_heads:
            self.head = nn.Linear(dim, 1000).requires_grad_(False)
            if num_prefix_tokens == 2:
                self.head_dist = nn.Linear(dim, 1000).requires_grad_(False)


class ASTModel(nn.Module):
    """Audio Spectrogram Transformer, [B, S, F] to logits [B, label_dim], without any fast path.

    Args:
        label_dim: number of classes.
        input_fdim: mel bins F.
        input_tdim: frames S.
        patch_fdim: patch height in mel bins.
        patch_tdim: patch width in frames.
        fstride: step between patches in mel bins.
        tstride: step between patches in frames.
        embed_dim: C.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: hidden width of the MLP over C.
        num_prefix_tokens: 2 (class and distillation, averaged) or 1 (class).
        eps: of the LayerNorms in blocks and of the final one.
        head_eps: of the LayerNorm in the head.
        dead_heads: carry the unused image heads of original checkpoints.

    Attributes:
        kept_patches: [K] patches that `forward` runs on, if not on all: patchout with a draw that is
            given.
        merging: tokens to merge in each block, if any.
        merge_plans: merge by these, block by block, instead of matching.
    """

    kept_patches: Tensor | None = None
    merging: Sequence[int] | None = None
    merge_plans: Mapping[int, MergePlan] | None = None

    def __init__(
        self,
        *,
        label_dim: int,
        input_fdim: int,
        input_tdim: int,
        patch_fdim: int,
        patch_tdim: int,
        fstride: int,
        tstride: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_prefix_tokens: int,
        eps: float,
        head_eps: float,
        dead_heads: bool,
    ) -> None:
        super().__init__()
        self.stride, self.input_fdim = (fstride, tstride), input_fdim
        self.num_prefix_tokens = num_prefix_tokens
        f = (input_fdim - patch_fdim) // fstride + 1
        t = (input_tdim - patch_tdim) // tstride + 1
        self.v = _Trunk(
            embed_dim,
            depth,
            num_heads,
            int(embed_dim * mlp_ratio),
            eps,
            num_prefix_tokens + f * t,
            num_prefix_tokens,
            (patch_fdim, patch_tdim),
            self.stride,
            dead_heads,
        )
        self.mlp_head = nn.Sequential(_Norm(embed_dim, head_eps), nn.Linear(embed_dim, label_dim))

    @classmethod
    def from_model(cls, model: Any, dtype: torch.dtype = torch.float64) -> ASTModel:
        """The twin of a fast model: same sizes, and a copy of its weights in `dtype`.

        Args:
            model: an `ast_fast.ASTModel` (anything with its `config` and `state_dict`).
            dtype: of the copy.
        """
        settings = model.config.to_dict()
        for name in ("labels", "problem_type"):  # what no computation depends on
            settings.pop(name)
        twin = cls(**settings).to(dtype=dtype, device=next(model.parameters()).device)
        twin.load_state_dict(model.state_dict())
        return twin.train(model.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm [B, T, C]: those kept, merged ones as they are."""
        if x.shape[-1] != self.input_fdim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, {x.shape[-1]} mel bins: expected {self.input_fdim}, the model's"
            )
        v = self.v
        prefix = v.cls_token[0]
        if self.num_prefix_tokens == 2:
            prefix = torch.cat((prefix, v.dist_token[0]))
        proj = v.patch_embed.proj
        assert proj.bias is not None
        x = ops.patch_embed(x, proj.weight, proj.bias, v.pos_embed[0], prefix, *self.stride)
        if self.kept_patches is not None:
            p = self.num_prefix_tokens
            x = torch.cat((x[:, :p], x[:, p:][:, self.kept_patches]), dim=1)
        sizes = x.new_ones(x.shape[:2])
        blocks: list[Any] = list(v.blocks)
        for index, block in enumerate(blocks):
            if self.merging is None:
                x = block(x)
                continue
            plan = None if self.merge_plans is None else self.merge_plans.get(index)
            r = min(self.merging[index], (x.shape[1] - self.num_prefix_tokens) // 2)
            x, sizes = block.merging(x, sizes, r, self.num_prefix_tokens, plan)
        return v.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, label_dim] of spectrograms [B, S, F]."""
        tokens = self.forward_features(x)
        return self.mlp_head(tokens[:, : self.num_prefix_tokens].mean(1))
