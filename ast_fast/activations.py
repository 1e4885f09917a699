"""What autograd keeps for backward: LayerNorm outputs may be computed again instead.

A block's two LayerNorm outputs are kept by the matrix products that read them, although what they were
made from, the residual stream, is kept anyway. `recomputed_norm` lets those products keep a recipe: one
more read and write of [T, C] each in backward, for a sixth of a block's activation memory. Whatever reads
the output (a linear layer, an adapter, a quantised one) profits without knowing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops


@dataclasses.dataclass(slots=True)
class _Recipe:
    """A view of a LayerNorm's output, as it is made again."""

    total: Tensor
    norm: Any
    versions: tuple[int, ...]
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        if _versions(self.total, self.norm) != self.versions:
            raise RuntimeError(
                "a LayerNorm's weights or input were changed in place between forward and backward: "
                "expected them unchanged; call set_activation_memory('fast') or change them afterwards"
            )
        norm = self.norm
        with torch.no_grad(), torch.autocast(self.total.device.type, enabled=False):
            y = ops.layer_norm(self.total, norm.weight, norm.bias, norm.eps, self.dtype)
        return y.as_strided(self.shape, self.stride, self.offset)


def _versions(total: Tensor, norm: Any) -> tuple[int, ...]:
    return tuple(each._version for each in (total, norm.weight, norm.bias))


def recomputed_norm(
    normed: Tensor, total: Tensor, norm: nn.LayerNorm, enabled: bool = True
) -> AbstractContextManager[object]:
    """Within it, autograd keeps `total` and `norm` where it would keep `normed = norm(total)`.

    Under a compiler, which decides for itself what to keep, nothing changes.

    Args:
        normed: output of the LayerNorm.
        total: what it was made from; kept for backward by the LayerNorm in any case.
        norm: the module that made it, computed by `ops.layer_norm`.
        enabled: False: do nothing.
    """
    if (
        not enabled
        or not torch.is_grad_enabled()
        or not normed.requires_grad
        or torch.compiler.is_compiling()
    ):
        return contextlib.nullcontext()
    # the innermost hooks alone are called: what is not ours goes on to those around us (offloading,
    # checkpoints)
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    storage, dtype, kept = normed.untyped_storage().data_ptr(), normed.dtype, total.detach()

    def pack(saved: Tensor) -> Any:
        if saved.dtype != dtype or saved.untyped_storage().data_ptr() != storage:
            return saved if outer is None else outer[0](saved)
        versions, offset = _versions(kept, norm), int(saved.storage_offset())
        return _Recipe(kept, norm, versions, dtype, saved.shape, saved.stride(), offset)

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, _Recipe):
            return saved.make()
        found: Tensor = saved if outer is None else outer[1](saved)
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
