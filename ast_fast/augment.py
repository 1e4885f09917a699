"""Augmentations of batches, on the device of their input, without a loop over clips.

Each draws from a `torch.Generator` (PyTorch's global one if None) or from `seeding.ClipSeeds`, whose
draws belong to a clip, whatever batch and device it is on. The original's order is: mix waveforms,
log-mel, pad or cut, mask, normalise, add noise, roll.
Dimensions: B clips, N samples, S frames, F mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data.dataset import Mix
from .seeding import ClipSeeds, draw_partners

Source = torch.Generator | ClipSeeds | None


def _draw(shape: tuple[int, ...], source: Source, like: Tensor, stream: str) -> Tensor:
    if isinstance(source, ClipSeeds):
        _check_clips(source, shape[0])
        return source.uniform(stream, *shape[1:]).to(like.device)
    # drawn where the generator lives, so that a CPU seed gives the same clips on every device
    device = like.device if source is None else source.device
    return torch.rand(shape, generator=source, device=device).to(like.device)


def _check_clips(seeds: ClipSeeds, clips: int) -> None:
    if len(seeds) != clips:
        raise ValueError(f"generator draws for {len(seeds)} clips: expected the batch's {clips}")


def _check_floating(wave: Tensor) -> None:
    if not wave.is_floating_point():
        raise TypeError(f"wave is {wave.dtype}: expected float32; divide int16 by 32768 first")


def _inside(wave: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples a clip as [B, 1], and which samples those are, [B, N]."""
    _check_floating(wave)
    b, n = wave.shape
    index = torch.arange(n, device=wave.device)
    if lengths is None:
        return torch.full((b, 1), n, device=wave.device), torch.ones_like(wave, dtype=torch.bool)
    lengths = lengths.to(wave.device)[:, None].clamp(0, n)
    return lengths, index < lengths


def _mask_axis(x: Tensor, size: int, dim: int, widest: int, value: float, source: Source) -> Tensor:
    # torchaudio's draw: width floor(U widest), start floor(U (size - U widest)); one mask a clip
    widths = _draw((x.shape[0],), source, x, f"mask width {dim}") * widest
    starts = (_draw((x.shape[0],), source, x, f"mask start {dim}") * (size - widths)).floor()
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
    generator: Source = None,
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


def add_noise(features: Tensor, generator: Source = None) -> Tensor:
    """Uniform noise on normalised features [B, S, F]: U[0, 1) a value, scaled by U[0, 0.1) a clip."""
    scale = _draw((features.shape[0], 1, 1), generator, features, "noise scale") / 10.0
    noise = _draw(tuple(features.shape), generator, features, "noise") * scale
    return features + noise.to(features.dtype)


def roll_frames(features: Tensor, max_shift: int = 10, generator: Source = None) -> Tensor:
    """Shift each clip of [B, S, F] in time, circularly, by -max_shift to max_shift - 1 frames."""
    if max_shift <= 0:
        return features
    draws = _draw((features.shape[0],), generator, features, "roll frames")
    shifts = (draws * (2 * max_shift)).floor().long().clamp(max=2 * max_shift - 1) - max_shift
    frames = features.shape[1]
    index = (torch.arange(frames, device=features.device) - shifts[:, None]) % frames
    return features.gather(1, index[:, :, None].expand_as(features))


def place_frames(
    features: Tensor,  # [B, S, F]
    num_frames: Tensor,  # [B]
    generator: Source = None,
) -> Tensor:  # [B, S, F]
    """Let each clip that is shorter than its window begin anywhere in it; padding comes on both sides.

    Nothing of a clip is lost or wraps around. Clips that fill the window stay where they are.

    Args:
        features: [B, S, F], clips at their beginning.
        num_frames: frames of each clip before padding.
        generator: source of the draws.
    """
    frames = features.shape[1]
    room = (frames - num_frames.to(features.device)).clamp(min=0)
    draws = _draw((features.shape[0],), generator, features, "place frames")
    shifts = torch.minimum((draws * (room + 1)).floor().long(), room)
    index = (torch.arange(frames, device=features.device) - shifts[:, None]) % frames
    return features.gather(1, index[:, :, None].expand_as(features))


def draw_mixup(
    num_clips: int,
    probability: float,
    generator: torch.Generator | ClipSeeds,
    alpha: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Draw who is mixed with whom: partner index [B] and weight of the clip itself [B], on the CPU.

    Args:
        num_clips: partners are drawn from this many; with a generator B itself. With `ClipSeeds` it
            may be the size of the dataset, and partners are then the same in every batch.
        probability: that a clip is mixed at all; its weight is 1 otherwise.
        generator: a CPU generator, or the clips' seeds.
        alpha: weights follow Beta(alpha, alpha); the original has 10.
    """
    if isinstance(generator, ClipSeeds):
        return draw_partners(generator, num_clips, probability, alpha)
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

    Raises:
        TypeError: wave is not floating.
    """
    _, inside = _inside(wave, lengths)
    partners, weights = partners.to(wave.device), weights.to(wave)[:, None]
    centred = _centre(wave, inside)
    mixed = weights * centred + (1.0 - weights) * centred[partners]
    return _centre(mixed, inside)


def mixup_pairs(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None,  # [B]
    targets: Tensor,  # [B, classes]
    mix: Mix,
) -> tuple[Tensor, Tensor]:  # [B, N], [B, classes]
    """Mix clips with partners that the feeder read from the whole set; the others stay as they are.

    The same arithmetic as `mixup_waveforms` and `mixup_targets`: a clip of weight 1 loses its mean.

    Args:
        wave: [B, N] float.
        lengths: [B] valid samples a clip; all if None.
        targets: [B, classes] float.
        mix: from `Batch.mix`; its waveforms may be int16 (scaled by 1/32768), and its targets class
            indices, if `targets` are vectors of ones and zeros.

    Raises:
        TypeError: wave or targets are not floating.
    """
    if not targets.is_floating_point():
        raise TypeError(f"targets are {targets.dtype}: expected vectors [B, classes] of floats")
    _, inside = _inside(wave, lengths)
    centred = _centre(wave, inside)
    others = mix.wave.to(wave.dtype)
    if not mix.wave.is_floating_point():
        others = others * (1.0 / 32768.0)
    others = _centre(others, _inside(others, mix.lengths)[1])
    # cut or padded to the batch's width; a clip's own length cuts it below
    others = torch.nn.functional.pad(others, (0, wave.shape[1] - others.shape[1]))
    other_targets = mix.targets
    if not other_targets.is_floating_point():
        other_targets = torch.nn.functional.one_hot(other_targets, targets.shape[1])
    weights = mix.weights[:, None]
    mixed = weights.to(wave) * centred[mix.rows] + (1.0 - weights.to(wave)) * others
    centred = centred.index_copy(0, mix.rows, mixed)
    weights = weights.to(targets)
    mixed = weights * targets[mix.rows] + (1.0 - weights) * other_targets.to(targets)
    return _centre(centred, inside), targets.index_copy(0, mix.rows, mixed)


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


def random_gain(wave: Tensor, max_db: float = 6.0, generator: Source = None) -> Tensor:
    """Louder or softer waveforms [B, N]: each clip by -max_db to max_db decibels, evenly drawn.

    Raises:
        TypeError: wave is not floating.
    """
    _check_floating(wave)
    draws = _draw((wave.shape[0], 1), generator, wave, "gain")
    return wave * torch.pow(10.0, (2.0 * draws - 1.0) * (max_db / 20.0)).to(wave.dtype)


def roll_waveforms(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    generator: Source = None,
) -> Tensor:  # [B, N]
    """Start each clip at a sample drawn evenly from it and continue at its beginning; zeros behind.

    Args:
        wave: [B, N] float.
        lengths: [B] valid samples a clip; all if None.
        generator: source of the draws.

    Raises:
        TypeError: wave is not floating.
    """
    count, inside = _inside(wave, lengths)
    draws = _draw((wave.shape[0], 1), generator, wave, "roll waveforms")
    shifts = (draws.double() * count).long()
    index = torch.arange(wave.shape[1], device=wave.device) + shifts
    # below twice the length, so that a difference does for a remainder
    index = torch.where(index >= count, index - count, index).clamp(0, max(wave.shape[1] - 1, 0))
    return torch.where(inside, wave.gather(1, index), torch.zeros_like(wave))


def add_noise_at_snr(
    wave: Tensor,  # [B, N]
    lengths: Tensor | None = None,  # [B]
    low_db: float = 10.0,
    high_db: float = 40.0,
    generator: Source = None,
) -> Tensor:  # [B, N]
    """Add white Gaussian noise at a signal-to-noise ratio drawn evenly between two, in decibels.

    A clip's power is the mean square of its samples; a silent clip stays silent. Samples behind a
    clip are zero in the result.

    Args:
        wave: [B, N] float.
        lengths: [B] valid samples a clip; all if None.
        low_db: smallest ratio.
        high_db: largest ratio.
        generator: source of the draws.

    Raises:
        ValueError: low_db is above high_db.
        TypeError: wave is not floating.
    """
    if low_db > high_db:
        raise ValueError(f"low_db={low_db:g} is above high_db={high_db:g}: expected low to high")
    count, inside = _inside(wave, lengths)
    wave = torch.where(inside, wave, torch.zeros_like(wave))
    if isinstance(generator, ClipSeeds):
        _check_clips(generator, wave.shape[0])
        noise = generator.normal("snr noise", wave.shape[1]).to(wave)
    else:
        device = wave.device if generator is None else generator.device
        noise = torch.randn(wave.shape, generator=generator, device=device).to(wave)
    ratio_db = low_db + (high_db - low_db) * _draw((wave.shape[0], 1), generator, wave, "snr")
    power = wave.square().sum(1, keepdim=True) / count.clamp(min=1)
    scale = (power * torch.pow(10.0, -0.1 * ratio_db)).sqrt().to(wave.dtype)
    return torch.where(inside, wave + scale * noise, wave)
