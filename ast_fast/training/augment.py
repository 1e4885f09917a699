"""The augmentations of one training step in the original's order, from one generator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import frontend
from ..config import AugmentConfig, LogMelConfig


def augment_features(
    x: Tensor, settings: AugmentConfig, front: LogMelConfig, generator: torch.Generator
) -> Tensor:
    """Masks, noise and roll on normalised features [B, S, F].

    Args:
        x: [B, S, F].
        settings: which, and how strong.
        front: mean and std of the normalisation; masks hold raw 0.
        generator: source of every draw.
    """
    x = frontend.spec_augment(
        x,
        settings.freq_mask_bins,
        settings.time_mask_frames,
        frontend.mask_value(front.mean, front.std),
        generator,
    )
    if settings.noise:
        x = frontend.add_noise(x, generator)
    return frontend.roll_frames(x, settings.roll_frames, generator)


def mixup(
    wave: Tensor,
    lengths: Tensor,
    targets: Tensor,
    probability: float,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix some clips with others of the batch; a mixed clip keeps its length.

    The original draws partners from the whole set; from the batch they cost no reading.

    Args:
        wave: [B, N] float32 or int16.
        lengths: [B] samples.
        targets: [B] class indices or [B, C] vectors.
        probability: that a clip is mixed.
        num_classes: C.
        generator: on the CPU.

    Returns:
        wave [B, N] float32 and targets [B, C].
    """
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets, num_classes).float()
    if wave.dtype == torch.int16:
        wave = wave.float() / 32768.0
    if not len(wave):
        return wave, targets
    partners, weights = frontend.draw_mixup(len(wave), probability, generator)
    mixed = frontend.mixup_waveforms(wave, lengths, partners, weights)
    return mixed, frontend.mixup_targets(targets, partners, weights)
