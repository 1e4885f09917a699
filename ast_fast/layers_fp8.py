"""Blocks whose four matrix products run in FP8, with the norms between them fused into the products.

`ASTModel.set_precision("fp8")` marks attention and MLP modules; the first and last layers of the model
(patch embedding and head) stay exact. Where a run of blocks is plain, every residual addition and
LayerNorm goes straight to FP8 with the layer that reads it; a block that carries hooks, or whose parts
were replaced, runs through its modules, each of which still uses FP8 where it can.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from . import ops

ModelPrecision = Literal["exact", "fp8"]


def set_precision(blocks: Any, precision: ModelPrecision) -> None:
    """Mark the attention and MLP modules of blocks.

    Raises:
        ValueError: the precision is unknown.
    """
    if precision not in ("exact", "fp8"):
        raise ValueError(f"precision={precision!r}: expected 'exact' or 'fp8'")
    for block in blocks:
        block.attn.fp8 = block.mlp.fp8 = precision == "fp8"


def uses_fp8(block: Any) -> bool:
    """Whether a part of a block, which may be anybody's module, was marked."""
    parts = (getattr(block, name, None) for name in ("attn", "mlp"))
    return any(getattr(part, "fp8", False) for part in parts)


def can_fuse(block: Any) -> bool:
    """Whether a plain block may run here: marked, untouched, and nobody looks at what it leaves out."""
    marked: bool = block.attn.fp8 and block.mlp.fp8
    return marked and block.can_leave_out_parts


def run(stream: Tensor, blocks: list[Any], keep: int | None) -> tuple[Tensor, Tensor]:
    """The last block's update, not yet added, and the stream it belongs to.

    `set_activation_memory("less")` changes nothing here: backward keeps what a norm gives in FP8, as the
    operand that the product read, and there is no wide output to compute again.

    Args:
        stream: [B, T, C].
        blocks: for which `can_fuse` holds, at least one.
        keep: the last block computes the first tokens only.
    """
    update = None
    for index, block in enumerate(blocks):
        short = keep if index + 1 == len(blocks) else None
        update, stream = _attend(block, update, stream, short)
        norm, mlp = block.norm2, block.mlp
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        update, stream = ops.add_norm_mlp_fp8(
            update, stream, norm.weight, norm.bias, norm.eps, *weights
        )
    assert update is not None
    return update, stream


def _attend(
    block: Any, update: Tensor | None, stream: Tensor, keep: int | None
) -> tuple[Tensor, Tensor]:
    """Attention's output of a block, and the stream with the update before it added."""
    attn, norm = block.attn, block.norm1
    if keep is not None or update is None:
        if update is None:
            normed = norm(stream)
        else:
            normed, stream = norm.after_add(update, stream)
        if keep is None:
            return attn(normed), stream
        return attn.first(normed, keep), stream[:, :keep]
    qkv, stream = ops.add_norm_linear_fp8(
        update, stream, norm.weight, norm.bias, norm.eps, attn.qkv.weight, attn.qkv.bias
    )
    qkv = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim))
    o = ops.attention_qkv(qkv, attn.scale, deterministic=attn.deterministic)
    return ops.linear_fp8(o.flatten(2), attn.proj.weight, attn.proj.bias), stream
