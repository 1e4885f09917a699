"""The Audio Spectrogram Transformer (Gong, Chung and Glass 2021), a drop-in for the original class.

Constructor, attributes, checkpoint keys and numbers are the original's; what is added is
keyword-only. Dimensions: B clips, N samples, S frames, F mel bins, T tokens, H heads, C width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import LogMelConfig, ModelConfig, PositionRule
from ..frontend import log_mel_features
from ..layers import Block, LayerNorm, Trunk, patch_conv
from ..layers_fp8 import ModelPrecision, set_precision, uses_fp8
from ..positions import trunc_normal_
from . import pretrained
from .hub_mixin import HubMixin
from .registry import register_model
from .token_options import TokenOptions


class ASTModel(HubMixin, TokenOptions):
    """Audio Spectrogram Transformer: `[B, S, F]` normalised log-mel to logits `[B, label_dim]`.

    The positional arguments are the original's, with its defaults. Unlike the original, forward
    computes in the dtype of the caller's autocast rather than always in float16 on a GPU.

    Args:
        label_dim: number of classes.
        fstride: step between patches in mel bins.
        tstride: step between patches in frames.
        input_fdim: mel bins F.
        input_tdim: frames S.
        imagenet_pretrain: start from image weights (through timm, or from a local file).
        audioset_pretrain: start from the AudioSet checkpoint (base384 only). Any stride works, and
            with 527 classes its head is kept; the original works at stride 10 only and drops it.
        model_size: tiny224, small224, base224 or base384.
        verbose: print a summary, as the original does.
        patch_shape: patch size in mel bins and frames: (16, 16), (128, 2), (32, 32), ...
        position_rule: how positions reach the new grid: bilinear, nearest or reinitialise.
        init_source: timm name of other image weights, such as "vit_base_patch16_384"; it then
            sets the sizes in place of model_size.
        labels: display names, one a class.
        frontend_config: the front end of `forward_waveform`; AudioSet statistics by default.

    Raises:
        ValueError: an argument does not fit (`Exception` for model_size, as the original).
        CheckpointError: weights were asked for and are not to be had; says what to download.

    >>> model = ASTModel(35, input_tdim=128, imagenet_pretrain=False, model_size="tiny224", verbose=False)
    >>> model(torch.randn(1, 128, 128)).shape
    torch.Size([1, 35])
    """

    config: ModelConfig
    frontend_config: LogMelConfig

    def __init__(
        self,
        label_dim: int = 527,
        fstride: int = 10,
        tstride: int = 10,
        input_fdim: int = 128,
        input_tdim: int = 1024,
        imagenet_pretrain: bool = True,
        audioset_pretrain: bool = False,
        model_size: str = "base384",
        verbose: bool = True,
        *,
        patch_shape: tuple[int, int] = (16, 16),
        position_rule: PositionRule = "bilinear",
        init_source: str | None = None,
        labels: tuple[str, ...] | None = None,
        frontend_config: LogMelConfig | None = None,
    ) -> None:
        super().__init__()
        if verbose:
            print("---------------AST Model Summary---------------")
            print(
                f"ImageNet pretraining: {imagenet_pretrain}, AudioSet pretraining: {audioset_pretrain}"
            )
        source = pretrained.image_source(
            model_size, init_source, bool(imagenet_pretrain), bool(audioset_pretrain)
        )
        config = ModelConfig(
            label_dim=label_dim,
            input_fdim=input_fdim,
            input_tdim=input_tdim,
            patch_fdim=patch_shape[0],
            patch_tdim=patch_shape[1],
            fstride=fstride,
            tstride=tstride,
            embed_dim=source.embed_dim,
            depth=source.depth,
            num_heads=source.num_heads,
            num_prefix_tokens=source.num_prefix_tokens,
            labels=labels,
        )
        weights = None  # before the model is built, to fail at once where there are none
        if audioset_pretrain:
            weights = pretrained.load_audioset()
        elif imagenet_pretrain:
            weights = pretrained.load_image(source)
        self._build(config, frontend_config, source.image_grid)
        self.original_num_patches = source.image_grid**2
        self.oringal_hw = source.image_grid  # sic: the original's spelling
        if weights is None:
            trunc_normal_(self.v.pos_embed)
        else:
            pretrained.start_from(self, weights, position_rule)
        if verbose:
            print(f"frequncey stride={fstride:d}, time stride={tstride:d}")
            print(f"number of patches={self.v.patch_embed.num_patches:d}")

    @classmethod
    def from_config(cls, config: ModelConfig, frontend_config: LogMelConfig | None = None) -> Self:
        """A model of any sizes with random weights.

        Args:
            config: sizes.
            frontend_config: the front end of `forward_waveform`; AudioSet statistics by default.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(config, frontend_config, None)
        f, t = config.grid
        model.original_num_patches, model.oringal_hw = f * t, f
        return model

    def _build(
        self, config: ModelConfig, frontend_config: LogMelConfig | None, image_grid: int | None
    ) -> None:
        self.config = config
        self.frontend_config = _check_frontend(frontend_config, config)
        self.original_embedding_dim = config.embed_dim
        self.v = Trunk(config, image_grid)
        self.mlp_head = nn.Sequential(
            LayerNorm(config.embed_dim, eps=config.head_eps, keep_dtype=True),
            nn.Linear(config.embed_dim, config.label_dim),
        )
        if image_grid is not None:
            # the original finds the patch grid by running a random convolution: the same draws keep
            # equal seeds comparable
            torch.randn(1, 1, config.input_fdim, config.input_tdim)
            patch_conv(config)
            f, t = config.grid
            self.v.set_patches(patch_conv(config), f * t)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Display names, one a class, if known."""
        return self.config.labels

    def get_shape(
        self, fstride: int, tstride: int, input_fdim: int = 128, input_tdim: int = 1024
    ) -> tuple[int, int]:
        """Patches along frequency and time for these strides and input sizes."""
        sizes = self.config.replace(
            fstride=fstride, tstride=tstride, input_fdim=input_fdim, input_tdim=input_tdim
        )
        return sizes.grid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and recompute the rest: less memory, more time."""
        self.v.grad_checkpointing = enable

    def set_precision(self, precision: ModelPrecision) -> Self:
        """Compute the blocks' matrix products in FP8 ("fp8") or in the dtype of what they get ("exact").

        e4m3 forward, e5m2 for gradients, with budgets of their own (NUMERICS.md); emulated where the
        device has no FP8. Weights and checkpoints stay as they are. Takes away what
        `optimize_for_inference` packed. Returns the model.
        """
        set_precision(self.v.blocks, precision)
        self.v.runner = None  # packed weights are of the precision before
        return self

    @property
    def precision(self) -> ModelPrecision:
        """What `set_precision` said."""
        return "fp8" if any(map(uses_fp8, self.v.blocks)) else "exact"

    def set_activation_memory(self, mode: str = "fast") -> None:
        """What backward keeps of the forward pass, against what it computes again.

        Args:
            mode: "fast" keeps everything (12 tensors [T, C] a block and clip); "less" computes the outputs
                of the LayerNorms again (10); "least" keeps each block's input alone, as
                `set_grad_checkpointing` does (1). Results are the same to the bit on a CPU, and within
                the budgets on a GPU. "less" does nothing under torch.compile and in FP8.
        """
        if mode not in ("fast", "less", "least"):
            raise ValueError(f"mode={mode!r}: expected fast, less or least")
        self.v.grad_checkpointing = mode == "least"
        for block in self.v.blocks:
            if isinstance(block, Block):
                block.recompute_norms = mode == "less"

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, label_dim] of spectrograms [B, S, F]."""
        self._check_input(x)
        return self._head(self.v(x, prefix_only=True))

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, P + f*t, C] after the final norm: class, distillation, then patches."""
        self._check_input(x)
        return self.v(x)

    def forward_waveform(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, label_dim] of waveforms, front end included.

        Args:
            wave: [B, N] mono at `frontend_config.sample_rate_hz`, float32 in [-1, 1] or int16.
            lengths: [B] valid samples a clip.
        """
        return self(
            log_mel_features(wave, self.frontend_config, lengths).to(self.v.pos_embed.dtype)
        )

    def frame_logits(self, x: Tensor) -> Tensor:
        """Logits over time [B, t, label_dim]: the head on the mean over frequency of patch tokens."""
        tokens = self.forward_features(x)[:, self.config.num_prefix_tokens :]
        return self.mlp_head(tokens.unflatten(1, self.config.grid).mean(1))

    def attention_maps(self, x: Tensor, layer: int = -1) -> Tensor:
        """Attention probabilities [B, H, T, T] of one block, rows summing to 1.

        Args:
            x: [B, S, F].
            layer: index of the block; negative counts from the end.
        """
        self._check_input(x)
        depth = self.config.depth
        if not -depth <= layer < depth:
            raise ValueError(
                f"layer={layer}: expected -{depth} to {depth - 1}, the model has {depth} blocks"
            )
        blocks: list[Any] = list(self.v.blocks)
        block: Any = blocks[layer]
        normed = self.v.run_blocks(self.v.embed(x), blocks[: layer % depth], block.norm1)
        return block.attn.weights(normed)

    def _head(self, tokens: Tensor) -> Tensor:
        if self.config.num_prefix_tokens == 1:
            return self.mlp_head(tokens[:, 0])
        return self.mlp_head((tokens[:, 0] + tokens[:, 1]) / 2)

    def _check_input(self, x: Tensor) -> None:
        config, weight = self.config, self.v.pos_embed
        expected = f"[B, {config.input_tdim}, {config.input_fdim}], frames before mel bins"
        if x.dim() != 3:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected {expected}; add or drop dimensions"
            )
        frames, bins = x.shape[1:]
        # frames that fill no patch are never read: other lengths of the same grid give the same. Other mel bins
        # are other bands of frequency, even where they give the same grid.
        if (
            bins != config.input_fdim
            or frames < config.patch_tdim
            or (frames - config.patch_tdim) // config.tstride + 1 != config.grid[1]
        ):
            fix = f"build the model with input_tdim={frames}, input_fdim={bins}, or pad or cut the input"
            if bins != config.input_fdim:
                fix = (
                    f"compute the features with num_mel_bins={config.input_fdim}, or build the model with "
                    f"input_fdim={bins}: bands of frequency cannot be padded or cut"
                )
            if (frames, bins) == (config.input_fdim, config.input_tdim):
                fix = "it looks transposed: pass x.transpose(1, 2)"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}; {fix}")
        if not x.is_floating_point():
            raise TypeError(
                f"x is {x.dtype}: expected {weight.dtype}; convert it with x.to({weight.dtype})"
            )
        if x.device != weight.device:
            raise ValueError(
                f"x is on {x.device} and the model on {weight.device}: move one with .to(device)"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype} and the model {weight.dtype}: convert the input with x.to({weight.dtype})"
            )


def _check_frontend(frontend: LogMelConfig | None, config: ModelConfig) -> LogMelConfig:
    if frontend is None:
        return LogMelConfig(num_mel_bins=config.input_fdim, num_frames=config.input_tdim)
    if (frontend.num_frames, frontend.num_mel_bins) != (config.input_tdim, config.input_fdim):
        raise ValueError(
            f"frontend_config gives {frontend.num_frames} frames of {frontend.num_mel_bins} mel bins: "
            f"expected {config.input_tdim} and {config.input_fdim}, the model's input"
        )
    return frontend


_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
_BASE = {"embed_dim": 768, "num_heads": 12}


def _create(
    sizes: dict[str, Any],
    num_classes: int = 527,
    frontend_config: LogMelConfig | None = None,
    **overrides: Any,
) -> ASTModel:
    config = ModelConfig.from_dict({**sizes, "label_dim": num_classes, **overrides})
    return ASTModel.from_config(config, frontend_config)


@register_model
def ast_tiny_p16_s10(**settings: Any) -> ASTModel:
    """AST-tiny: 5.7 M parameters, 16x16 patches with stride 10."""
    return _create(_TINY, **settings)


@register_model
def ast_small_p16_s10(**settings: Any) -> ASTModel:
    """AST-small: 22 M parameters, 16x16 patches with stride 10."""
    return _create(_SMALL, **settings)


@register_model
def ast_base_p16_s10(**settings: Any) -> ASTModel:
    """AST-base, the paper's model: 87 M parameters, 16x16 patches with stride 10."""
    return _create(_BASE, **settings)


@register_model
def ast_base_p16_s12(**settings: Any) -> ASTModel:
    """AST-base with stride 12: 0.66 of the work of stride 10."""
    return _create({**_BASE, "fstride": 12, "tstride": 12}, **settings)


@register_model
def ast_base_p16_s14(**settings: Any) -> ASTModel:
    """AST-base with stride 14: 0.49 of the work of stride 10."""
    return _create({**_BASE, "fstride": 14, "tstride": 14}, **settings)


@register_model
def ast_base_p16_s16(**settings: Any) -> ASTModel:
    """AST-base without overlap: 0.37 of the work of stride 10."""
    return _create({**_BASE, "fstride": 16, "tstride": 16}, **settings)


@register_model
def ast_base_p128x2(**settings: Any) -> ASTModel:
    """AST-base on whole columns of two frames (the paper's Table 6)."""
    patch = {"patch_fdim": 128, "patch_tdim": 2, "fstride": 128, "tstride": 2}
    return _create({**_BASE, **patch}, **settings)


@register_model
def ast_base_p32(**settings: Any) -> ASTModel:
    """AST-base on 32x32 patches without overlap (the paper's Table 6)."""
    patch = {"patch_fdim": 32, "patch_tdim": 32, "fstride": 32, "tstride": 32}
    return _create({**_BASE, **patch}, **settings)


@register_model
def ast_mini_p16_s10(**settings: Any) -> ASTModel:
    """A small AST for short sounds, trained from scratch: 64 mel bins, 64 frames, 0.9 M parameters."""
    sizes = {"embed_dim": 128, "depth": 4, "num_heads": 4, "input_fdim": 64, "input_tdim": 64}
    return _create({**sizes, "dead_heads": False}, **settings)
