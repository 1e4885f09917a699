"""Where a model looks: attention of the class and distillation tokens, back on the spectrogram."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def attention_rollout(model: Any, x: Tensor) -> Tensor:
    """Share of each patch in the class and distillation tokens [B, f, t], by attention rollout.

    Heads are averaged, the residual path counts as half, and the blocks are multiplied (Abnar and
    Zuidema 2020). What the prefix tokens keep to themselves is left out, the rest sums to 1.

    Args:
        model: an `ASTModel`.
        x: [B, S, F] normalised log-mel.
    """
    config = model.config
    total: Tensor | None = None
    for layer in range(config.depth):
        maps = model.attention_maps(x, layer).float().mean(1)  # [B, T, T]
        mixed = 0.5 * maps + 0.5 * torch.eye(maps.shape[-1], device=maps.device)
        total = mixed if total is None else mixed @ total
    assert total is not None
    prefix = config.num_prefix_tokens
    share = total[:, :prefix, prefix:].mean(1)
    share = share / share.sum(1, keepdim=True)
    return share.reshape(len(x), *config.grid)


def spread_patches(values: Tensor, model: Any) -> Tensor:
    """Values of patches [B, f, t] drawn over the cells that they cover: [B, F, S], mean where they overlap.

    Cells that no patch covers hold 0.
    """
    config = model.config
    canvas = torch.zeros(len(values), config.input_fdim, config.input_tdim)
    count = torch.zeros(config.input_fdim, config.input_tdim)
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            top, left = row * config.fstride, column * config.tstride
            place = (
                slice(top, top + config.patch_fdim),
                slice(left, left + config.patch_tdim),
            )
            canvas[(slice(None), *place)] += values[:, row, column].cpu()[:, None, None]
            count[place] += 1
    return canvas / count.clamp(min=1)
