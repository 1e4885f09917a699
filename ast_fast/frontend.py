"""The front end: waveform to normalised log-mel, and the augmentations of the original recipes.

Augmentations work on batches, on the device of their input, and draw from a `torch.Generator`
(PyTorch's global one if None). The original's order is: mix waveforms, log-mel, pad or cut, mask,
normalise, add noise, roll.
Dimensions: B clips, N samples, S frames, F mel bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import LogMelConfig


def log_mel_features(
    wave: Tensor,  # [B, N]
    config: LogMelConfig,
    lengths: Tensor | None = None,  # [B]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, S, F]
    """Normalised log-mel of waveforms as `config` says; see `ops.log_mel` for the arguments."""
    return ops.log_mel(
        wave,
        lengths,
        sample_rate_hz=config.sample_rate_hz,
        num_mel_bins=config.num_mel_bins,
        num_frames=config.num_frames,
        window_ms=config.window_ms,
        hop_ms=config.hop_ms,
        low_freq_hz=config.low_freq_hz,
        high_freq_hz=config.high_freq_hz,
        preemphasis=config.preemphasis,
        remove_dc=config.remove_dc,
        log_floor=config.log_floor,
        mean=config.mean,
        std=config.std,
        out_dtype=out_dtype,
        n_fft=config.n_fft,
        window_samples=config.window_samples,
        hop_samples=config.hop_samples,
        window=config.window,
        mel_scale=config.mel_scale,
        mel_norm=config.mel_norm,
        power=config.power,
        padding=config.padding,
        output=config.output,
        log_offset=config.log_offset,
        top_db=config.top_db,
    )


class LogMel(nn.Module):
    """Waveforms [B, N] to normalised log-mel [B, S, F], on whatever device they are.

    Args:
        config: settings; AudioSet's by default.
        overrides: settings to change, by name.

    >>> LogMel(num_frames=100)(torch.zeros(2, 16000)).shape
    torch.Size([2, 100, 128])
    """

    def __init__(self, config: LogMelConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = (config or LogMelConfig()).replace(**overrides)

    def forward(
        self, wave: Tensor, lengths: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Features [B, S, F] of waveforms [B, N]; samples from `lengths` on are ignored."""
        return log_mel_features(wave, self.config, lengths, out_dtype)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        c = self.config
        return f"{c.sample_rate_hz} Hz, {c.num_mel_bins} mel bins, {c.num_frames} frames"


def _draw(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    # drawn where the generator lives, so that a CPU seed gives the same clips on every device
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(like.device)


def _mask_axis(
    x: Tensor, size: int, dim: int, widest: int, value: float, generator: torch.Generator | None
) -> Tensor:
    # torchaudio's draw: width floor(U widest), start floor(U (size - U widest)); one mask a clip
    widths = _draw((x.shape[0],), generator, x) * widest
    starts = (_draw((x.shape[0],), generator, x) * (size - widths)).floor()
    index = torch.arange(size, device=x.device)
    inside = (index >= starts[:, None]) & (index < (starts + widths.floor())[:, None])
    shape = [x.shape[0], 1, 1]
    shape[dim] = size
    return x.masked_fill(inside.view(shape), value)


def mask_value(mean: float, std: float) -> float:
    """The value of a raw 0 after normalisation: what padding and masks hold (louder than average)."""
    return (0.0 - mean) / (2.0 * std)


def spec_augment(
    features: Tensor,  # [B, S, F]
    freq_mask_bins: int = 0,
    time_mask_frames: int = 0,
    value: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, S, F]
    """SpecAugment (Park et al. 2019) as the original applies it: one mask a clip and axis.

    Args:
        features: [B, S, F].
        freq_mask_bins: widest mask over mel bins, exclusive; 0 for none.
        time_mask_frames: widest mask over frames, exclusive; 0 for none.
        value: put into the masks. The original masks raw energies with 0 and normalises afterwards:
            on normalised features that is `mask_value(mean, std)`.
        generator: source of the draws; frequency first, widths before starts.

    Raises:
        ValueError: a mask is wider than its axis.
    """
    _, frames, bins = features.shape
    for name, widest, size in (
        ("freq_mask_bins", freq_mask_bins, bins),
        ("time_mask_frames", time_mask_frames, frames),
    ):
        if not 0 <= widest <= size:
            raise ValueError(f"{name}={widest}: expected 0 to {size}, the size of that axis")
    if freq_mask_bins:
        features = _mask_axis(features, bins, 2, freq_mask_bins, value, generator)
    if time_mask_frames:
        features = _mask_axis(features, frames, 1, time_mask_frames, value, generator)
    return features


def add_noise(features: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise on normalised features [B, S, F]: U[0, 1) a value, scaled by U[0, 0.1) a clip."""
    scale = _draw((features.shape[0], 1, 1), generator, features) / 10.0
    noise = _draw(tuple(features.shape), generator, features) * scale
    return features + noise.to(features.dtype)


def roll_frames(
    features: Tensor, max_shift: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Shift each clip of [B, S, F] in time, circularly, by -max_shift to max_shift - 1 frames."""
    if max_shift <= 0:
        return features
    draws = _draw((features.shape[0],), generator, features)
    shifts = (draws * (2 * max_shift)).floor().long().clamp(max=2 * max_shift - 1) - max_shift
    frames = features.shape[1]
    index = (torch.arange(frames, device=features.device) - shifts[:, None]) % frames
    return features.gather(1, index[:, :, None].expand_as(features))


def draw_mixup(
    num_clips: int, probability: float, generator: torch.Generator, alpha: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Draw who is mixed with whom: partner index [B] and weight of the clip itself [B].

    Args:
        num_clips: B.
        probability: that a clip is mixed at all; its weight is 1 otherwise.
        generator: a CPU generator.
        alpha: weights follow Beta(alpha, alpha); the original has 10.
    """
    partners = torch.randint(num_clips, (num_clips,), generator=generator)
    # a Beta(a, a) variable is G1 / (G1 + G2) with two Gamma(a, 1) variables
    concentration = torch.full((2, num_clips), alpha, dtype=torch.float64)
    gammas = torch._standard_gamma(concentration, generator=generator)
    weights = gammas[0] / gammas.sum(0)
    mixed = torch.rand(num_clips, generator=generator) < probability
    return partners, torch.where(mixed, weights, torch.ones_like(weights)).float()


def mixup_waveforms(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    partners: Tensor,  # [B]
    weights: Tensor,  # [B]
) -> Tensor:  # [B, N]
    """Mix each clip with its partner, as the original: means removed before and after.

    The partner is cut or padded with zeros to the clip's own length. Clips of weight 1 only lose
    their mean, which the front end would remove anyway.

    Args:
        wave: [B, N] float.
        lengths: [B] valid samples a clip; all if None.
        partners: index of each clip's partner.
        weights: of the clip itself; the partner has 1 - weight.
    """
    if not wave.is_floating_point():
        raise TypeError(f"wave is {wave.dtype}: expected float32; divide int16 by 32768 first")
    partners, weights = partners.to(wave.device), weights.to(wave)[:, None]
    if lengths is None:
        inside = torch.ones_like(wave, dtype=torch.bool)
    else:
        inside = torch.arange(wave.shape[1], device=wave.device) < lengths.to(wave.device)[:, None]
    centred = _centre(wave, inside)
    mixed = weights * centred + (1.0 - weights) * centred[partners]
    return _centre(mixed, inside)


def _centre(wave: Tensor, inside: Tensor) -> Tensor:
    # what lies outside may hold anything, NaN included
    wave = torch.where(inside, wave, torch.zeros_like(wave))
    count = inside.sum(1, keepdim=True).clamp(min=1)
    mean = wave.sum(1, keepdim=True) / count
    return torch.where(inside, wave - mean, torch.zeros_like(wave))


def mixup_targets(targets: Tensor, partners: Tensor, weights: Tensor) -> Tensor:
    """Targets [B, classes] of mixed clips: weight times the own plus the rest times the partner's."""
    partners, weights = partners.to(targets.device), weights.to(targets)[:, None]
    return weights * targets + (1.0 - weights) * targets[partners]
