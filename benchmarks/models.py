"""The AST in plain PyTorch, transformers and timm, all carrying one set of weights.

`PlainAST` is the honest baseline where no other package is installed: nn.Linear, nn.LayerNorm, conv2d
and `F.scaled_dot_product_attention`, with the original's names of weights. It shares nothing with
ast_fast. The builders give models that compute the same function, ready to be timed or trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .peers import need

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width C, heads H
DEPTH = 12
LABELS = 527
# matrix products of a block of the base model, width in and out, over the tokens of ten seconds
PRODUCTS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
TOKENS = 1214

State = dict[str, Tensor]


def sizes(size: str, frames: int, depth: int = DEPTH) -> dict[str, int]:
    """Keyword sizes of a `ModelConfig`."""
    width, heads = SIZES[size]
    return {"input_tdim": frames, "embed_dim": width, "num_heads": heads, "depth": depth}


def num_tokens(frames: int, stride: int = 10) -> int:
    """T of 128 mel bins and 16 x 16 patches."""
    return 2 + ((128 - 16) // stride + 1) * ((frames - 16) // stride + 1)


def forward_flops(size: str, frames: int, depth: int = DEPTH) -> float:
    """Operations of one clip's forward, two a multiply-add."""
    width, tokens = SIZES[size][0], num_tokens(frames)
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2.0 * (depth * block + (tokens - 2) * width * 256 + width * LABELS)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    """One pre-norm transformer block in plain PyTorch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Trunk(nn.Module):
    """What the original calls `v`, a distilled ViT."""

    def __init__(self, width: int, heads: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, width, 16, stride=10)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class PlainAST(nn.Module):
    """The AST with two prefix tokens, 16 x 16 patches and stride 10."""

    def __init__(self, size: str, frames: int, depth: int = DEPTH, labels: int = LABELS) -> None:
        super().__init__()
        width, heads = SIZES[size]
        self.v = _Trunk(width, heads, depth, num_tokens(frames))
        self.mlp_head = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, labels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, F] -> logits [B, labels]."""
        v = self.v
        tokens = v.patch_embed.proj(x.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        prefix = (v.cls_token.expand(len(x), -1, -1), v.dist_token.expand(len(x), -1, -1))
        x = torch.cat((*prefix, tokens), dim=1) + v.pos_embed
        for block in v.blocks:
            x = block(x)
        x = v.norm(x)
        return self.mlp_head((x[:, 0] + x[:, 1]) / 2)


def weights(size: str, frames: int, depth: int = DEPTH, seed: int = 0) -> State:
    """Random weights of trained-like scale, the same for every model of a case."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in PlainAST(size, frames, depth).state_dict().items():
        values = torch.randn(tensor.shape, generator=draw)
        if "norm" in name or name.startswith("mlp_head.0"):
            state[name] = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            state[name] = values * 0.02
        else:
            state[name] = values * (0.02 if tensor.dim() != 2 else tensor.shape[1] ** -0.5)
    return state


def plain(size: str, frames: int, depth: int, state: State) -> nn.Module:
    """Plain PyTorch with SDPA."""
    model = PlainAST(size, frames, depth)
    model.load_state_dict(state)
    return model


def ours(size: str, frames: int, depth: int, state: State) -> nn.Module:
    """ast_fast's model, without the dead heads, which take no part in a forward."""
    ast = need("ast_fast.models.ast")
    config = need("ast_fast.config")
    model = ast.ASTModel.from_config(
        config.ModelConfig(**sizes(size, frames, depth), label_dim=LABELS, dead_heads=False)
    )
    model.load_state_dict(state)
    return model


def oracle(size: str, frames: int, depth: int, state: State) -> nn.Module:
    """The reference in float64 with the weights as they are rounded."""
    model = PlainAST(size, frames, depth)
    model.load_state_dict(state)
    return model.double()


class _Timm(nn.Module):
    def __init__(self, size: str, frames: int, depth: int, state: State) -> None:
        super().__init__()
        transformer = need("timm.models.vision_transformer")
        width, heads = SIZES[size]
        self.v = _Trunk(width, heads, 0, num_tokens(frames))
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.v.blocks = nn.ModuleList(
            transformer.Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, LABELS))
        self.load_state_dict(state)

    forward = PlainAST.forward


def with_timm(size: str, frames: int, depth: int, state: State) -> nn.Module:
    """timm's blocks in the original's forward."""
    return _Timm(size, frames, depth, state)


_TRANSFORMERS = (
    ("v.cls_token", "audio_spectrogram_transformer.embeddings.cls_token"),
    ("v.dist_token", "audio_spectrogram_transformer.embeddings.distillation_token"),
    ("v.pos_embed", "audio_spectrogram_transformer.embeddings.position_embeddings"),
    (
        "v.patch_embed.proj.",
        "audio_spectrogram_transformer.embeddings.patch_embeddings.projection.",
    ),
    ("v.blocks.", "audio_spectrogram_transformer.layers."),
    ("v.norm.", "audio_spectrogram_transformer.layernorm."),
    ("mlp_head.0.", "classifier.layernorm."),
    ("mlp_head.1.", "classifier.dense."),
)
_TRANSFORMERS_BLOCK = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
)


def to_transformers(state: State) -> State:
    """The weights under the names transformers 5 uses in memory."""
    renamed = {}
    for name, tensor in state.items():
        start, replacement = next(pair for pair in _TRANSFORMERS if name.startswith(pair[0]))
        target = replacement + name[len(start) :]
        for old, new in _TRANSFORMERS_BLOCK:
            target = target.replace(old, new)
        if ".attn.qkv." in target:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[target.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows.clone()
        else:
            renamed[target] = tensor
    return renamed


class _Logits(nn.Module):
    """A transformers model whose forward gives the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def with_transformers(attention: str) -> Callable[[str, int, int, State], nn.Module]:
    """transformers' AST with one of its attention implementations."""

    def build(size: str, frames: int, depth: int, state: State) -> nn.Module:
        library = need("transformers")
        width, heads = SIZES[size]
        config = library.ASTConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            max_length=frames,
            layer_norm_eps=1e-6,
            num_labels=LABELS,
            attn_implementation=attention,
        )
        model = library.ASTForAudioClassification(config)
        # its head shares the blocks' epsilon; the original's is 1e-5
        model.classifier.layernorm.eps = 1e-5
        model.load_state_dict(to_transformers(state))
        return _Logits(model)

    return build


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients under the original's names, q, k and v joined; parameters without one left out."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
    if not any(name.startswith("model.audio_spectrogram") for name in found):
        return found
    back: dict[str, Tensor] = {}
    for name, grad in found.items():
        target = name.removeprefix("model.")
        for old, new in _TRANSFORMERS_BLOCK:
            target = target.replace(new, old)
        start, replacement = next(pair for pair in _TRANSFORMERS if target.startswith(pair[1]))
        target = start + target[len(replacement) :]
        back[target] = grad
    for name in [n for n in back if ".attention.q_proj." in n]:
        parts = [back.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        back[name.replace(".attention.q_proj.", ".attn.qkv.")] = torch.cat(parts)
    return back
