"""The FP8 layers against float64, beside an ordinary FP8 implementation: cases with budgets of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .. import ops, reference
from . import cases, plain_fp8
from .cases import BLOCK_EPS, OpCase, Tensors, normal


def linear_fp8(rows: int, width: int, out: int) -> OpCase:
    """A linear layer."""

    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "x": normal(generator, rows, width),
            "weight": normal(generator, out, width) * width**-0.5,
            "bias": normal(generator, out) * 0.5,
        }

    return OpCase(
        op="linear_fp8",
        shape=f"{rows}x{width}x{out}",
        inputs=inputs,
        ours=lambda t: {"y": ops.linear_fp8(t["x"], t["weight"], t["bias"])},
        plain=lambda t: {"y": plain_fp8.linear(t["x"], t["weight"], t["bias"])},
        oracle=lambda t: {"y": F.linear(t["x"], t["weight"], t["bias"])},
        kinds={"y": "product", "dx": "product", "dweight": "product", "dbias": "row sum"},
        precision="fp8",
    )


def add_norm_linear_fp8(rows: int, width: int, out: int) -> OpCase:
    """Residual addition, LayerNorm and a linear layer, with a gradient arriving at both results."""

    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "x": normal(generator, rows, width),
            "residual": normal(generator, rows, width) * 2.0,
            "norm_weight": 1.0 + 0.1 * normal(generator, width),
            "norm_bias": 0.1 * normal(generator, width),
            "weight": normal(generator, out, width) * width**-0.5,
            "bias": normal(generator, out) * 0.5,
        }

    def ours(t: Tensors) -> Tensors:
        norm = t["x"], t["residual"], t["norm_weight"], t["norm_bias"]
        y, total = ops.add_norm_linear_fp8(*norm, BLOCK_EPS, t["weight"], t["bias"])
        return {"total": total, "y": y}

    def simple(t: Tensors) -> Tensors:
        total = t["x"] + t["residual"]
        normed = F.layer_norm(total, (width,), t["norm_weight"], t["norm_bias"], BLOCK_EPS)
        return {"total": total, "y": plain_fp8.linear(normed, t["weight"], t["bias"])}

    def oracle(t: Tensors) -> Tensors:
        norm = t["x"], t["residual"], t["norm_weight"], t["norm_bias"]
        y, total, _, _ = reference.ops.add_layer_norm(*norm, BLOCK_EPS)
        return {"total": total, "y": F.linear(y, t["weight"], t["bias"])}

    products = ("y", "dx", "dresidual", "dnorm_weight", "dnorm_bias", "dweight")
    return OpCase(
        op="add_norm_linear_fp8",
        shape=f"{rows}x{width}x{out}",
        inputs=inputs,
        ours=ours,
        plain=simple,
        oracle=oracle,
        kinds={**dict.fromkeys(products, "product"), "dbias": "row sum"},
        precision="fp8",
    )


def mlp_fp8(rows: int, width: int) -> OpCase:
    """The feed-forward block."""
    exact = cases.mlp(rows, width)
    names = ("x", "w1", "b1", "w2", "b2")
    return dataclasses.replace(
        exact,
        op="mlp_fp8",
        ours=lambda t: {"y": ops.mlp_fp8(*(t[name] for name in names))},
        plain=lambda t: {"y": plain_fp8.mlp(*(t[name] for name in names))},
        precision="fp8",
    )


def fp8_cases(full: bool) -> Iterator[OpCase]:
    """The model's layers; `full` takes a whole clip of AST-base."""
    rows, width = (1214, 768) if full else (202, 192)
    yield linear_fp8(rows, width, width)
    yield add_norm_linear_fp8(rows, width, 3 * width)
    yield mlp_fp8(rows, width)
