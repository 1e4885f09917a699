"""Patch embedding, transformer blocks and trunk of AST, built from the fused ops.

Modules keep timm's names (`blocks.N.attn.qkv` ...), so that checkpoints, hooks, LoRA and the like
find what they look for. On the fast path the residual stream is read and written once per half
block, by `add_layer_norm`, which also normalises it for the next half. A block that carries hooks,
or whose parts were replaced, runs through its modules instead.
Dimensions: B clips, S frames, F mel bins, T tokens, H heads, D head width, C width, P prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as torch_module
import torch.utils.checkpoint
from torch import Tensor, nn

from . import layers_fp8, ops, token_merging
from .activations import recomputed_norm
from .config import ModelConfig
from .patchout import Patchout
from .positions import trunc_normal_


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The dicts that a module keeps its hooks in; they stay the same objects."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def all_are_hooked() -> bool:
    """Whether a hook sits on every module of the process."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its class's forward.

    That is so when a hook sits on it (parts do not count) or on every module of the process, or
    when its forward was replaced, as offloading does.
    """
    if all_are_hooked():
        return True
    for module in modules:  # asked hundreds of times in a forward: no tuple is made
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed by `ops.layer_norm`.

    Under autocast it gives autocast's dtype, which the matrix product after it asks for anyway.

    Args:
        dim: C.
        eps: added to the variance.
        keep_dtype: give the dtype of the input under autocast too, as PyTorch's own does: for
            results that people see.
    """

    def __init__(self, dim: int, eps: float, keep_dtype: bool = False) -> None:
        super().__init__(dim, eps=eps)
        self.keep_dtype = keep_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        out_dtype = x.dtype if self.keep_dtype else None
        return ops.layer_norm(x, self.weight, self.bias, self.eps, out_dtype)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`total = x + residual`; returns the normalised total and the total."""
        out_dtype = residual.dtype if self.keep_dtype else None
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, out_dtype)


def apply_linear(module: nn.Module, x: Tensor, fp8: bool = False) -> Tensor:
    """`module(x)`; by `ops.linear` or `ops.linear_fp8` if it is a plain layer that nobody watches."""
    if type(module) is nn.Linear and not is_hooked(module):
        linear = ops.linear_fp8 if fp8 else ops.linear
        return linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y


class PatchEmbed(nn.Module):
    """Projection of overlapping patches: `proj` is a convolution over [B, 1, F, S].

    Its first spatial axis is frequency, its second time.
    """

    def __init__(self, proj: nn.Conv2d, num_patches: int) -> None:
        super().__init__()
        self.proj = proj
        self.num_patches = num_patches

    def forward(self, x: Tensor) -> Tensor:
        """Patches of [B, 1, F, S] as tokens [B, f*t, C], without positions."""
        return self.proj(x).flatten(2).transpose(1, 2)

    @property
    def is_plain(self) -> bool:
        """Whether `ops.patch_embed` may stand in for this module."""
        proj = self.proj
        return (
            type(proj) is nn.Conv2d
            and proj.bias is not None
            and proj.padding == (0, 0)
            and proj.dilation == (1, 1)
            and not is_hooked(self, proj)
        )


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v."""

    fp8 = False  # see layers_fp8.py

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.deterministic = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """Fused q, k and v [B, T, 3, H, D] of normalised tokens [B, T, C]."""
        return apply_linear(self.qkv, x, self.fp8).unflatten(2, (3, self.num_heads, self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.mixed(self.split(x))

    def mixed(self, qkv: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Attention and projection of [B, T, 3, H, D]; `key_bias` [B, T] is added to the scores."""
        if key_bias is None:
            o = ops.attention_qkv(qkv, self.scale, deterministic=self.deterministic)
        else:
            q, k, v = qkv.unbind(2)
            o = ops.attention_biased(q, k, v, key_bias, self.scale)
        return apply_linear(self.proj, o.flatten(2), self.fp8)

    def first(self, x: Tensor, keep: int, key_bias: Tensor | None = None) -> Tensor:
        """What `forward` gives for the first `keep` tokens: [B, T, C] to [B, keep, C].

        Only they ask; all tokens answer.
        """
        dim, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
        heads = (self.num_heads, self.head_dim)
        linear = ops.linear_fp8 if self.fp8 else ops.linear
        q = linear(x[:, :keep], weight[:dim], bias[:dim]).unflatten(2, heads)
        k, v = linear(x, weight[dim:], bias[dim:]).unflatten(2, (2, *heads)).unbind(2)
        if key_bias is None:
            o = ops.attention(q, k, v, self.scale, deterministic=self.deterministic)
            assert isinstance(o, Tensor)
        else:
            o = ops.attention_biased(q, k, v, key_bias, self.scale)
        return apply_linear(self.proj, o.flatten(2), self.fp8)

    def weights(self, x: Tensor) -> Tensor:
        """Attention probabilities [B, H, T, T] of normalised tokens, written out in full."""
        q, k, _ = self.split(x).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    fp8 = False  # see layers_fp8.py

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        fc1, fc2 = self.fc1, self.fc2
        if self.has_plain_parts and not is_hooked(fc1, self.act, fc2):
            block = ops.mlp_fp8 if self.fp8 else ops.mlp
            return block(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(self.act(fc1(x)))

    @property
    def has_plain_parts(self) -> bool:
        """Whether the weights say all about what is computed."""
        parts = type(self.fc1), type(self.act), type(self.fc2)
        return parts == (nn.Linear, nn.GELU, nn.Linear)


class Block(nn.Module):
    """Pre-norm transformer block: `x += attn(norm1(x)); x += mlp(norm2(x))`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.recompute_norms = False
        self.gathered = False  # its own hooks bring its weights and do nothing else (FSDP2)

    def forward(self, x: Tensor, keep: int | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]: the residual stream before and after the block.

        Args:
            x: [B, T, C].
            keep: only the first tokens are asked for; more may come back.
        """
        if type(self.norm2) is LayerNorm and not is_hooked(self.norm2):
            update, x = self.halves(x, self.norm1(x), keep)
            return x + update
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def halves(self, x: Tensor, normed: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        """Fast path: the MLP's output, not yet added, and the stream it belongs to.

        Args:
            x: residual stream [B, T, C].
            normed: `norm1(x)`, which the caller got when it last touched the stream.
            keep: compute the first tokens only, if no other is used further on.
        """
        less = self.recompute_norms
        with recomputed_norm(normed, x, self.norm1, less):
            update = self.attn(normed) if keep is None else self.attn.first(normed, keep)
        x = x if keep is None else x[:, :keep]
        normed, x = self.norm2.after_add(update, x)
        with recomputed_norm(normed, x, self.norm2, less):
            return self.mlp(normed), x

    @property
    def is_plain(self) -> bool:
        """Whether the trunk may fuse the block's norms with the additions before them."""
        return (
            type(self) is Block
            and type(self.norm1) is LayerNorm
            and type(self.norm2) is LayerNorm
            and not is_hooked(self, self.norm1, self.norm2)
        )

    @property
    def can_merge(self) -> bool:
        """Whether token merging may run the block's parts in its place."""
        return self.is_plain and type(self.attn) is Attention and not is_hooked(self.attn)

    @property
    def can_keep_first(self) -> bool:
        """Whether nobody looks at tokens that the block's output does not need."""
        return self.is_plain and self._parts_can_keep_first

    @property
    def can_be_called_for_first(self) -> bool:
        """The same of a block whose weights only a call of it brings."""
        hooks = (self._forward_pre_hooks, self._forward_hooks)
        watched = self._backward_hooks or self._backward_pre_hooks or "forward" in self.__dict__
        return (
            self.gathered
            and all(len(each) == 1 for each in hooks)
            and not watched
            and not is_hooked(self.norm1, self.norm2)
            and self._parts_can_keep_first
        )

    @property
    def _parts_can_keep_first(self) -> bool:
        attn, mlp = self.attn, self.mlp
        return (
            type(attn) is Attention
            and type(attn.qkv) is nn.Linear
            and type(mlp) is Mlp
            and not is_hooked(attn, attn.qkv, attn.proj, mlp, mlp.fc1, mlp.act, mlp.fc2)
        )

    @property
    def can_leave_out_parts(self) -> bool:
        """Whether the block may be computed from its weights, with no module called."""
        return (
            self.can_keep_first and type(self.attn.proj) is nn.Linear and self.mlp.has_plain_parts
        )


class Trunk(nn.Module):
    """The transformer of AST, named as timm's distilled vision transformer.

    Args:
        config: sizes.
        image_grid: side of the patch grid of the image model that the original builds first. Its
            random draws are then made too, so that equal seeds give equal weights, and `patch_embed`
            is left with an image convolution that the caller replaces (`set_patches`). None: draw
            only what is kept.
    """

    def __init__(self, config: ModelConfig, image_grid: int | None = None) -> None:
        super().__init__()
        dim, num_prefix = config.embed_dim, config.num_prefix_tokens
        self.num_prefix_tokens, self.input_fdim = num_prefix, config.input_fdim
        self.grad_checkpointing = False
        self.runner: Any = None  # computes run_blocks in its place where it can (optimized.py)
        self.patchout: Patchout | None = None  # in training
        self.merging: tuple[int, ...] | None = None  # in evaluation: tokens to merge a block
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        if num_prefix == 2:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        proj = patch_conv(config) if image_grid is None else nn.Conv2d(3, dim, 16, 16)
        self.patch_embed = PatchEmbed(proj, config.grid[0] * config.grid[1])
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, config.eps) for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim, eps=config.eps, keep_dtype=True)
        if config.dead_heads:
            self.head = nn.Linear(dim, 1000)
        self._initialise(config, image_grid)

    def _initialise(self, config: ModelConfig, image_grid: int | None) -> None:
        # in timm's order: table with one prefix token, class token, linear layers, then what
        # distillation adds, with a table of its own
        dim = config.embed_dim
        image_tokens = 0 if image_grid is None else image_grid**2
        if image_tokens:
            trunc_normal_(torch.empty(1, image_tokens + 1, dim))
        trunc_normal_(self.cls_token)
        self.apply(_initialise_linear)
        if config.num_prefix_tokens == 2:
            if config.dead_heads:
                self.head_dist = nn.Linear(dim, 1000)
            trunc_normal_(self.dist_token)
            if image_tokens:
                trunc_normal_(torch.empty(1, image_tokens + 2, dim))
            if config.dead_heads:
                _initialise_linear(self.head_dist)
        for name, head in self.named_children():
            if name.startswith("head"):
                # unused in forward: trainable without a gradient, they would stop distributed training
                head.requires_grad_(False)
        if image_grid is None:
            trunc_normal_(self.pos_embed)

    def set_patches(self, proj: nn.Conv2d, num_patches: int) -> None:
        """Replace the patch convolution."""
        self.patch_embed.proj, self.patch_embed.num_patches = proj, num_patches

    def prefix(self) -> Tensor:
        """Class and distillation tokens [P, C]."""
        if self.num_prefix_tokens == 1:
            return self.cls_token[0]
        return torch.cat((self.cls_token[0], self.dist_token[0]))

    def embed(self, x: Tensor) -> Tensor:
        """Tokens with positions [B, T, C] of spectrograms [B, S, F]."""
        if x.shape[-1] != self.input_fdim:
            # other bands of frequency, even where they give as many patches
            raise ValueError(
                f"x has shape {tuple(x.shape)}, {x.shape[-1]} mel bins: expected {self.input_fdim}, the model's"
            )
        patches = self.patch_embed
        if patches.is_plain:
            proj = patches.proj
            assert proj.bias is not None
            tokens = ops.patch_embed(
                x, proj.weight, proj.bias, self.pos_embed[0], self.prefix(), *proj.stride
            )
        else:
            tokens = patches(x.unsqueeze(1).transpose(2, 3))
            prefix = self.prefix().to(tokens.dtype).expand(x.shape[0], -1, -1)
            tokens = torch.cat((prefix, tokens), dim=1) + self.pos_embed
        # under autocast only matrix products are narrow: the residual stream keeps the parameters'
        # dtype, as the original's does
        return tokens.to(self.pos_embed.dtype)

    def forward(self, x: Tensor, prefix_only: bool = False) -> Tensor:
        """Tokens after the final norm of spectrograms [B, S, F].

        Args:
            x: [B, S, F].
            prefix_only: give the prefix tokens [B, P, C] alone rather than all [B, T, C]. The last
                block then leaves out what they do not depend on: all its queries and MLP rows but
                theirs, about a fourteenth of the whole model's work.
        """
        stream = self.embed(x)
        if self.patchout is not None and self.training and prefix_only:
            stream = self.patchout(stream)
        if self.merging is not None and not self.training:
            if self.runner is not None:
                self.runner.stand_aside("tokens are merged")
            keep = self.num_prefix_tokens if prefix_only else None
            merged = token_merging.run(self, stream, self.merging, keep)
            return merged.tokens[:, :keep] if prefix_only else merged.unmerged()
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in self.blocks:
                stream = torch.utils.checkpoint.checkpoint(block, stream, use_reentrant=False)
            tokens = self.norm(stream)
        else:
            keep = self.num_prefix_tokens if prefix_only else None
            tokens = self.run_blocks(stream, list(self.blocks), self.norm, keep)
        return tokens[:, : self.num_prefix_tokens] if prefix_only else tokens

    def run_blocks(
        self, stream: Tensor, blocks: list[Any], last_norm: nn.Module, keep: int | None = None
    ) -> Tensor:
        """`last_norm` of the stream after the blocks, each norm fused with the addition before it.

        Args:
            stream: [B, T, C].
            blocks: to be run in order.
            last_norm: applied after the last of them.
            keep: only the first tokens are asked for; more may come back.
        """
        if self.runner is not None:
            made: Tensor | None = self.runner(stream, blocks, last_norm, keep)
            if made is not None:
                return made
        plain = [type(block) is Block and block.is_plain for block in blocks]
        fuse_last = type(last_norm) is LayerNorm and not is_hooked(last_norm)
        if fuse_last and blocks and all(plain) and all(map(layers_fp8.can_fuse, blocks)):
            update, stream = layers_fp8.run(stream, blocks, keep)
            assert isinstance(last_norm, LayerNorm)
            return last_norm.after_add(update, stream)[0]
        return run_in_halves(stream, blocks, plain, last_norm, fuse_last, keep)


def run_in_halves(
    stream: Tensor,  # [B, T, C]
    blocks: list[Any],
    plain: list[bool],
    last_norm: Any,
    fuse_last: bool,
    keep: int | None = None,
) -> Tensor:  # [B, T, C]
    """`last_norm` of the stream after the blocks, each norm fused with the addition before it.

    Args:
        stream: [B, T, C].
        blocks: in order; each is called, or has the parts of `Block` (norm1, halves, can_keep_first).
        plain: which of them may be computed by these parts.
        last_norm: applied after the last of them.
        fuse_last: whether `last_norm.after_add` may stand in for calling it.
        keep: only the first tokens are asked for; more may come back.
    """
    normed = None  # norm of the stream, where the step before already computed it
    for index, block in enumerate(blocks):
        last = index + 1 == len(blocks)
        if not plain[index]:
            alone = last and keep is not None and getattr(block, "can_be_called_for_first", False)
            stream, normed = block(stream, keep) if alone else block(stream), None
            continue
        if normed is None:
            normed = block.norm1(stream)
        short = last and keep is not None and fuse_last and block.can_keep_first
        update, stream = block.halves(stream, normed, keep if short else None)
        following: Any = last_norm if last else blocks[index + 1]
        if fuse_last if last else plain[index + 1]:
            norm = following if last else following.norm1
            normed, stream = norm.after_add(update, stream)
        else:
            stream, normed = stream + update, None
    return last_norm(stream) if normed is None else normed


def patch_conv(config: ModelConfig) -> nn.Conv2d:
    """The patch projection, frequency before time, with PyTorch's own initialisation."""
    return nn.Conv2d(
        1,
        config.embed_dim,
        kernel_size=(config.patch_fdim, config.patch_tdim),
        stride=(config.fstride, config.tstride),
    )


def _initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight)
        nn.init.zeros_(module.bias)
