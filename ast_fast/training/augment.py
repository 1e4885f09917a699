"""The augmentations of one training step in the original's order, drawn for each clip of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import augment
from ..config import AugmentConfig, LogMelConfig
from ..reference.mel import mel_sizes
from ..seeding import ClipSeeds, clip_seeds

__all__ = [
    "as_float",
    "as_vectors",
    "augment_features",
    "augment_waveforms",
    "clip_seeds",
    "mixup",
    "seek_patchout",
    "set_patchout",
]


def set_patchout(model: Any, settings: AugmentConfig, seed: int) -> None:
    """Switch on the patchout that is asked for; a model's own stays if none is.

    Raises:
        ValueError: it leaves no patch.
    """
    dropped = (settings.patchout_time, settings.patchout_frequency, settings.patchout_patches)
    if any(dropped):
        model.set_patchout(*dropped, seed=seed)


def seek_patchout(model: Any, step: int) -> None:
    """Make the draw that follows that of a step, so that a resumed run repeats it."""
    patchout = getattr(model, "patchout", None)
    if patchout is not None:
        patchout.seek(step)


def augment_waveforms(
    wave: Tensor, lengths: Tensor, settings: AugmentConfig, seeds: ClipSeeds
) -> Tensor:
    """Roll, gain and noise on waveforms [B, N]; float32 if any is asked for.

    Args:
        wave: [B, N] float32 or int16 (scaled by 1/32768).
        lengths: [B] samples.
        settings: which, and how strong.
        seeds: source of every draw.
    """
    if not (settings.roll_waveforms or settings.gain_db or settings.snr_db):
        return wave
    wave = as_float(wave)
    if settings.roll_waveforms:
        wave = augment.roll_waveforms(wave, lengths, seeds)
    if settings.gain_db:
        wave = augment.random_gain(wave, settings.gain_db, seeds)
    if settings.snr_db:
        wave = augment.add_noise_at_snr(wave, lengths, *settings.snr_db, seeds)
    return wave


def augment_features(
    x: Tensor,
    settings: AugmentConfig,
    front: LogMelConfig,
    seeds: ClipSeeds,
    lengths: Tensor | None = None,
) -> Tensor:
    """Place, masks, noise and roll on normalised features [B, S, F].

    Args:
        x: [B, S, F].
        settings: which, and how strong.
        front: mean and std of the normalisation; masks hold raw 0.
        seeds: source of every draw.
        lengths: [B] samples of the clips, for `place`; of all the window if None.
    """
    if settings.place and lengths is not None:
        counts = mel_sizes(**front.framing).frames_of(lengths)
        x = augment.place_frames(x, counts, seeds)
    x = augment.spec_augment(
        x,
        settings.freq_mask_bins,
        settings.time_mask_frames,
        augment.mask_value(front.mean, front.std),
        seeds,
    )
    if settings.noise:
        x = augment.add_noise(x, seeds)
    return augment.roll_frames(x, settings.roll_frames, seeds)


def mixup(
    wave: Tensor,
    lengths: Tensor,
    targets: Tensor,
    probability: float,
    num_classes: int,
    seeds: ClipSeeds,
) -> tuple[Tensor, Tensor]:
    """Mix some clips with others of the batch; a mixed clip keeps its length.

    The original draws partners from the whole set; from the batch they cost no reading. Whether a
    clip is mixed, and how much, is the clip's own draw; who its partner is, the batch's too.

    Args:
        wave: [B, N] float32 or int16.
        lengths: [B] samples.
        targets: [B] class indices or [B, C] vectors.
        probability: that a clip is mixed.
        num_classes: C.
        seeds: on the CPU, so that no step waits for the device.

    Returns:
        wave [B, N] float32 and targets [B, C].
    """
    targets = as_vectors(targets, num_classes)
    wave = as_float(wave)
    if not len(wave):
        return wave, targets
    partners, weights = augment.draw_mixup(len(wave), probability, seeds)
    mixed = augment.mixup_waveforms(wave, lengths, partners, weights)
    return mixed, augment.mixup_targets(targets, partners, weights)


def as_vectors(targets: Tensor, num_classes: int) -> Tensor:
    """Class indices [B] as vectors [B, C] of ones and zeros; others as they are."""
    if targets.dim() == 2:
        return targets
    return torch.nn.functional.one_hot(targets, num_classes).float()


def as_float(wave: Tensor) -> Tensor:
    """Waveforms in [-1, 1]: int16 scaled by 1/32768, others as they are."""
    return wave.float() / 32768.0 if wave.dtype == torch.int16 else wave
