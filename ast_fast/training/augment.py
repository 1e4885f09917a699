"""Augmentation on the device, seeded: SpecAugment, mixup, noise and roll as the original recipes.

Every function draws from the generator it is given and from nothing else. Masks hold raw log-mel 0,
as the original's do: after normalisation that is -mean / (2 std).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import AugmentConfig, LogMelConfig


def augment_features(
    x: Tensor, settings: AugmentConfig, front: LogMelConfig, generator: torch.Generator
) -> Tensor:
    """Masks, then noise and roll, on normalised features [B, S, F].

    Args:
        x: [B, S, F].
        settings: which, and how strong.
        front: mean and std of the normalisation.
        generator: on the device of x.
    """
    blank = -front.mean / (2.0 * front.std)
    if settings.freq_mask_bins:
        x = x.masked_fill(_mask(x, 2, settings.freq_mask_bins, generator)[:, None, :], blank)
    if settings.time_mask_frames:
        x = x.masked_fill(_mask(x, 1, settings.time_mask_frames, generator)[:, :, None], blank)
    if settings.noise:
        level = torch.rand(len(x), 1, 1, generator=generator, device=x.device) / 10.0
        x = x + level * torch.rand(x.shape, generator=generator, device=x.device)
    if settings.roll_frames:
        # -r to r - 1 frames, the end wrapping to the start
        far = settings.roll_frames
        shift = torch.randint(-far, far, (len(x), 1), generator=generator, device=x.device)
        frames = (torch.arange(x.shape[1], device=x.device)[None, :] - shift) % x.shape[1]
        x = x.gather(1, frames[:, :, None].expand_as(x))
    return x


def _mask(x: Tensor, dim: int, widest: int, generator: torch.Generator) -> Tensor:
    """[B, size of dim] bool, one band a clip: floor(U widest) wide, anywhere it fits."""
    size = x.shape[dim]
    draws = torch.rand(2, len(x), 1, generator=generator, device=x.device)
    width = draws[0] * min(widest, size)
    start = (draws[1] * (size - width)).floor()
    place = torch.arange(size, device=x.device)[None, :]
    return (place >= start) & (place < start + width.floor())


def mixup(
    wave: Tensor,
    lengths: Tensor,
    targets: Tensor,
    probability: float,
    num_classes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix some clips with others of the batch: waveforms and labels, lambda ~ Beta(10, 10).

    The original draws partners from the whole set; here they come from the batch, which costs no
    reading. A mixed clip keeps its length.

    Args:
        wave: [B, N] float32 or int16, zeros after each clip's end.
        lengths: [B] samples.
        targets: [B] class indices or [B, C] vectors.
        probability: share of clips that are mixed.
        num_classes: C.
        generator: on the device of wave.

    Returns:
        wave [B, N] float32, lengths [B], targets [B, C].
    """
    count, device = len(wave), wave.device
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets, num_classes).float()
    if wave.dtype == torch.int16:
        wave = wave.float() / 32768.0
    draws = torch.rand(2, count, generator=generator, device=device)
    partner = (draws[1] * count).long().clamp(max=max(0, count - 1))
    # the tenth smallest of nineteen uniform draws is distributed as Beta(10, 10)
    share = torch.rand(count, 19, generator=generator, device=device).kthvalue(10, dim=1).values
    share = torch.where(draws[0] < probability, share, 1.0)[:, None]
    centred = _centre(wave, lengths)
    mixed = _centre(share * centred + (1.0 - share) * centred[partner], lengths)
    return mixed, lengths, share * targets + (1.0 - share) * targets[partner]


def _centre(wave: Tensor, lengths: Tensor) -> Tensor:
    """Each clip without its mean, zero after its end."""
    inside = torch.arange(wave.shape[1], device=wave.device)[None, :] < lengths[:, None]
    wave = wave * inside
    return (wave - wave.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]) * inside
