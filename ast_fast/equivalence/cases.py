"""What is compared for each op: inputs, ours, plain PyTorch, oracle, and the budget of every tensor.

Each case lists its outputs and, as "d" + name, the gradients of its inputs, with the kind of budget.
Inputs are drawn in float64 and rounded to the dtype under test, so that all three see the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .. import ops, reference
from . import plain
from .budgets import Kind, Precision

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]

# clips, frames and mel bins of the three recipes: Speech Commands, ESC-50, AudioSet
RECIPE_FRAMES = {"speechcommands": 128, "esc50": 512, "audioset": 1024}
BLOCK_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpCase:
    """One op on one shape.

    Attributes:
        op: public name in `ast_fast.ops`.
        shape: the shape in words.
        inputs: draws the tensors in float64 on the CPU; integer tensors stay as they are.
        ours: the public op.
        plain: the same in plain PyTorch.
        oracle: the reference op.
        kinds: budget of each output by name, and of each gradient by "d" + input name.
        precision: of the budgets, where it is not that of the dtype.
        inference: an op without a gradient of its own: only its outputs are compared.
    """

    op: str
    shape: str
    inputs: Callable[[torch.Generator], Tensors]
    ours: Function
    plain: Function
    oracle: Function
    kinds: Mapping[str, Kind]
    precision: Precision | None = None
    inference: bool = False


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64 on the CPU."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer_norm(rows: int, width: int) -> OpCase:
    """LayerNorm of [rows, width] with a mean far from 0 in some rows, as residual streams have."""

    def inputs(generator: torch.Generator) -> Tensors:
        offset = normal(generator, rows, 1)
        return {
            "x": normal(generator, rows, width) * 2.0 + offset,
            "weight": 1.0 + 0.1 * normal(generator, width),
            "bias": 0.1 * normal(generator, width),
        }

    return OpCase(
        op="layer_norm",
        shape=f"{rows}x{width}",
        inputs=inputs,
        ours=lambda t: {"y": ops.layer_norm(t["x"], t["weight"], t["bias"], BLOCK_EPS)},
        plain=lambda t: {"y": plain.layer_norm(t["x"], t["weight"], t["bias"], BLOCK_EPS)},
        oracle=lambda t: {
            "y": reference.ops.layer_norm(t["x"], t["weight"], t["bias"], BLOCK_EPS)[0]
        },
        kinds={"y": "normalised", "dx": "normalised", "dweight": "row sum", "dbias": "row sum"},
    )


def add_layer_norm(rows: int, width: int) -> OpCase:
    """Residual sum and LayerNorm, with a gradient arriving at both results."""

    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "x": normal(generator, rows, width),
            "residual": normal(generator, rows, width) * 2.0,
            "weight": 1.0 + 0.1 * normal(generator, width),
            "bias": 0.1 * normal(generator, width),
        }

    def ours(t: Tensors) -> Tensors:
        y, total = ops.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], BLOCK_EPS)
        return {"total": total, "y": y}

    def simple(t: Tensors) -> Tensors:
        total = t["x"] + t["residual"]
        return {"total": total, "y": plain.layer_norm(total, t["weight"], t["bias"], BLOCK_EPS)}

    def oracle(t: Tensors) -> Tensors:
        args = (t["x"], t["residual"], t["weight"], t["bias"], BLOCK_EPS)
        y, total, _, _ = reference.ops.add_layer_norm(*args)
        return {"total": total, "y": y}

    return OpCase(
        op="add_layer_norm",
        shape=f"{rows}x{width}",
        inputs=inputs,
        ours=ours,
        plain=simple,
        oracle=oracle,
        kinds={
            "total": "elementwise",
            "y": "normalised",
            "dx": "normalised",
            "dresidual": "normalised",
            # the statistics are of the rounded sum, which float64 does not round: no pure row sum
            "dweight": "product",
            "dbias": "row sum",
        },
    )


def mlp(rows: int, width: int, ratio: int = 4) -> OpCase:
    """Feed-forward half of a block, weights scaled so that the GELU sees a wide range."""

    def inputs(generator: torch.Generator) -> Tensors:
        hidden = ratio * width
        return {
            "x": normal(generator, rows, width),
            "w1": normal(generator, hidden, width) * 1.5 * width**-0.5,
            "b1": normal(generator, hidden) * 0.5,
            "w2": normal(generator, width, hidden) * hidden**-0.5,
            "b2": normal(generator, width) * 0.5,
        }

    def run(function: Callable[..., Tensor]) -> Function:
        return lambda t: {"y": function(t["x"], t["w1"], t["b1"], t["w2"], t["b2"])}

    return OpCase(
        op="mlp",
        shape=f"{rows}x{width}x{ratio * width}",
        inputs=inputs,
        ours=run(ops.mlp),
        plain=run(plain.mlp),
        oracle=run(reference.ops.mlp),
        kinds={
            "y": "product",
            "dx": "product",
            "dw1": "product",
            "db1": "product",
            "dw2": "product",
            "db2": "row sum",
        },
    )


def patch_embed(
    clips: int,
    frames: int,
    width: int,
    patch: tuple[int, int] = (16, 16),
    strides: tuple[int, int] = (10, 10),
) -> OpCase:
    """Overlapping patches of a [clips, frames, 128] spectrogram with two prefix tokens."""
    mels = 128

    def inputs(generator: torch.Generator) -> Tensors:
        f, t = ops.patch_grid(mels, frames, patch, strides)
        area = patch[0] * patch[1]
        return {
            "x": normal(generator, clips, frames, mels) * 0.5,
            "weight": normal(generator, width, 1, *patch) * area**-0.5,
            "bias": normal(generator, width) * 0.1,
            "pos": normal(generator, 2 + f * t, width) * 0.1,
            "prefix": normal(generator, 2, width) * 0.1,
        }

    def run(function: Callable[..., Tensor]) -> Function:
        names = ("x", "weight", "bias", "pos", "prefix")
        return lambda t: {"y": function(*(t[name] for name in names), *strides)}

    return OpCase(
        op="patch_embed",
        shape=f"{clips}x{frames}x{mels} p{patch[0]}x{patch[1]} s{strides[0]}x{strides[1]} C{width}",
        inputs=inputs,
        ours=run(ops.patch_embed),
        plain=run(plain.patch_embed),
        oracle=run(reference.ops.patch_embed),
        kinds={
            "y": "product",
            "dx": "product",
            "dweight": "product",
            "dbias": "row sum",
            "dpos": "row sum",
            "dprefix": "row sum",
        },
    )


_ATTENTION_KINDS: dict[str, Kind] = {
    "o": "attention",
    "dq": "attention gradient",
    "dk": "attention gradient",
    "dv": "attention gradient",
}


def attention(
    clips: int, tokens: int, heads: int, head_dim: int = 64, lengths: list[int] | None = None
) -> OpCase:
    """Attention on separate q, k and v, optionally with a number of valid keys per clip."""

    def inputs(generator: torch.Generator) -> Tensors:
        shape = (clips, tokens, heads, head_dim)
        tensors = {name: normal(generator, *shape) for name in ("q", "k", "v")}
        if lengths is not None:
            tensors["lengths"] = torch.tensor(lengths, dtype=torch.int32)
        return tensors

    def ours(t: Tensors) -> Tensors:
        o = ops.attention(t["q"], t["k"], t["v"], key_lengths=t.get("lengths"))
        assert isinstance(o, Tensor)  # without the log-sum-exp
        return {"o": o}

    scale = head_dim**-0.5
    suffix = "" if lengths is None else " keys " + ",".join(map(str, lengths))
    return OpCase(
        op="attention",
        shape=f"{clips}x{tokens}x{heads}x{head_dim}{suffix}",
        inputs=inputs,
        ours=ours,
        plain=lambda t: {"o": plain.attention(t["q"], t["k"], t["v"], t.get("lengths"))},
        oracle=lambda t: {
            "o": reference.ops.attention(t["q"], t["k"], t["v"], scale, t.get("lengths"))[0]
        },
        kinds=_ATTENTION_KINDS,
    )


def attention_biased(clips: int, tokens: int, heads: int, head_dim: int = 64) -> OpCase:
    """Attention to tokens that stand for up to fifty others, without gradients."""

    def inputs(generator: torch.Generator) -> Tensors:
        shape = (clips, tokens, heads, head_dim)
        tensors = {name: normal(generator, *shape) for name in ("q", "k", "v")}
        sizes = torch.randint(1, 50, (clips, tokens), generator=generator)
        # numbers that every dtype holds: the bias itself is never rounded to 16 bits
        return tensors | {"bias": (sizes.double().log() * 16).round() / 16}

    scale = head_dim**-0.5
    return OpCase(
        op="attention_biased",
        shape=f"{clips}x{tokens}x{heads}x{head_dim}",
        inputs=inputs,
        ours=torch.no_grad()(
            lambda t: {"o": ops.attention_biased(t["q"], t["k"], t["v"], t["bias"])}
        ),
        plain=lambda t: {"o": plain.attention(t["q"], t["k"], t["v"], key_bias=t["bias"])},
        oracle=lambda t: {
            "o": reference.ops.attention(t["q"], t["k"], t["v"], scale, None, t["bias"])[0]
        },
        kinds={"o": "attention"},
        inference=True,
    )


def attention_qkv(clips: int, tokens: int, heads: int, head_dim: int = 64) -> OpCase:
    """Attention on the output of a fused projection, with scores up to about 10."""

    def inputs(generator: torch.Generator) -> Tensors:
        qkv = normal(generator, clips, tokens, 3, heads, head_dim)
        return {"qkv": qkv * torch.tensor([1.5, 1.5, 1.0], dtype=torch.float64)[:, None, None]}

    def oracle(t: Tensors) -> Tensors:
        q, k, v = t["qkv"].unbind(2)
        return {"o": reference.ops.attention(q, k, v, head_dim**-0.5)[0]}

    return OpCase(
        op="attention_qkv",
        shape=f"{clips}x{tokens}x3x{heads}x{head_dim}",
        inputs=inputs,
        ours=lambda t: {"o": ops.attention_qkv(t["qkv"])},
        plain=lambda t: {"o": plain.attention(*t["qkv"].unbind(2))},
        oracle=oracle,
        kinds={"o": "attention", "dqkv": "attention gradient"},
    )


def attention_masked(
    clips: int, grid: tuple[int, int], heads: int, head_dim: int = 64, radius: int | None = None
) -> OpCase:
    """Attention under a mask of the family: factorised, or a window of `radius` columns in time."""
    make = ops.AttentionMask
    mask = make.factorised(*grid) if radius is None else make.time_window(*grid, radius)
    pairs = mask.dense()

    def inputs(generator: torch.Generator) -> Tensors:
        shape = (clips, mask.queries, heads, head_dim)
        return {name: normal(generator, *shape) for name in ("q", "k", "v")}

    def ours(t: Tensors) -> Tensors:
        o = ops.attention_masked(t["q"], t["k"], t["v"], mask)
        assert isinstance(o, Tensor)  # without the log-sum-exp
        return {"o": o}

    scale = head_dim**-0.5
    name = "factorised" if radius is None else f"window {radius}"
    return OpCase(
        op="attention_masked",
        shape=f"{clips}x{mask.queries}x{heads}x{head_dim} {name}",
        inputs=inputs,
        ours=ours,
        plain=lambda t: {
            "o": plain.attention_masked(t["q"], t["k"], t["v"], pairs.to(t["q"].device))
        },
        oracle=lambda t: {
            "o": reference.ops.attention_masked(t["q"], t["k"], t["v"], pairs, scale)[0]
        },
        kinds=_ATTENTION_KINDS,
    )


def attention_varlen(lengths: list[int], heads: int, head_dim: int = 64) -> OpCase:
    """Attention within packed clips of the given lengths."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)

    def inputs(generator: torch.Generator) -> Tensors:
        shape = (starts[-1], heads, head_dim)
        tensors = {name: normal(generator, *shape) for name in ("q", "k", "v")}
        return tensors | {"starts": torch.tensor(starts, dtype=torch.int32)}

    def ours(t: Tensors) -> Tensors:
        cu, longest = t["starts"], max(lengths)
        return {"o": ops.attention_varlen(t["q"], t["k"], t["v"], cu, cu, longest, longest)}

    def oracle(t: Tensors) -> Tensors:
        cu, scale = t["starts"], head_dim**-0.5
        return {"o": reference.ops.attention_varlen(t["q"], t["k"], t["v"], cu, cu, scale)[0]}

    return OpCase(
        op="attention_varlen",
        shape="+".join(map(str, lengths)) + f" x{heads}x{head_dim}",
        inputs=inputs,
        ours=ours,
        plain=lambda t: {"o": plain.attention_varlen(t["q"], t["k"], t["v"], starts)},
        oracle=oracle,
        kinds=_ATTENTION_KINDS,
    )


def op_cases(full: bool) -> Iterator[OpCase]:
    """The recipes' shapes: reduced so that two CPU cores need a minute, or in full.

    Args:
        full: base width, all heads and every recipe's tokens.
    """
    for frames in RECIPE_FRAMES.values():
        f, t = ops.patch_grid(128, frames, (16, 16), (10, 10))
        tokens = 2 + f * t
        clips = 4 if full else (2 if frames == 128 else 1)
        width, heads = (768, 12) if full else (192, 3 if frames == 128 else 1)
        yield layer_norm(clips * tokens, width if full else 768)
        yield add_layer_norm(clips * tokens, width if full else 768)
        yield mlp(clips * tokens, width)
        yield patch_embed(clips, frames, width)
        yield attention_qkv(clips, tokens, heads)
    yield layer_norm(37, 1023)
    yield add_layer_norm(37, 1024)
    yield patch_embed(2, 128, 192, (128, 2), (128, 1))
    yield patch_embed(2, 96, 192, (32, 32), (32, 32))
    for head_dim in (32, 64, 96, 128):
        yield attention(2, 257 if full else 129, 2, head_dim)
        yield attention_biased(2, 257 if full else 129, 2, head_dim)
    heads = 12 if full else 2
    yield attention(3, 602 if full else 146, heads, lengths=[602, 331, 1] if full else [146, 77, 1])
    yield attention_varlen([1214, 602, 146, 1] if full else [146, 74, 1], heads)
    yield attention_masked(2 if full else 1, (12, 101) if full else (12, 12), heads)
    yield attention_masked(1, (12, 50) if full else (12, 12), heads, radius=5)
