"""Where a model looks: attention of the class and distillation tokens, back on the spectrogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import plots
from .config import LogMelConfig
from .frontend import log_mel_features
from .reference.mel import mel_filters, mel_sizes


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


@torch.no_grad()
def attention_picture(
    model: Any,
    wave: Tensor,  # [B, N]
    lengths: Tensor,  # [B]
    titles: Sequence[str],
) -> bytes:
    """Spectrograms of a few clips, and where the model looked, as PNG.

    Args:
        model: an `ASTModel`.
        wave: [B, N], on the model's device.
        lengths: [B] samples.
        titles: one a clip.
    """
    front: LogMelConfig = model.frontend_config
    features = log_mel_features(wave, front, lengths)
    inputs = features.to(next(model.parameters()).dtype)
    # clip by clip: the maps of a long input take much memory
    rollouts = [attention_rollout(model, clip[None]) for clip in inputs]
    weights = spread_patches(torch.cat(rollouts), model)
    energies = (features * (2.0 * front.std) + front.mean).cpu()
    sizes = mel_sizes(**front.framing)
    frames = [min(sizes.num_frames(int(n)), features.shape[1]) for n in lengths]
    longest = min(features.shape[1], max(frames) + 2)
    return plots.attention_overlays(
        energies[:, :longest].transpose(1, 2),
        weights[:, :, :longest],
        titles,
        sizes.hop_samples / front.sample_rate_hz,
        _centres_hz(front),
        frames,
    )


def _centres_hz(front: LogMelConfig) -> list[float]:
    """Where each mel filter peaks, in Hz."""
    n_fft = 1 << 14  # fine enough that every filter has a peak
    filters: Tensor = mel_filters(
        front.num_mel_bins, n_fft, front.sample_rate_hz, front.low_freq_hz, front.high_freq_hz
    )
    return [float(index) * front.sample_rate_hz / n_fft for index in filters.argmax(1)]
