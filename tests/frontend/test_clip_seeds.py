"""Draws that belong to a clip: the same in any batch, well distributed, and what each augmentation does."""

from __future__ import annotations

import math

import pytest
import torch

from ast_fast.augment import (
    add_noise,
    add_noise_at_snr,
    draw_mixup,
    random_gain,
    roll_frames,
    roll_waveforms,
    spec_augment,
)
from ast_fast.seeding import ClipSeeds, beta_quantile
from ast_fast.testing import random_tensor

MANY = 4000
# worked out in Python's integers, from the published mixing function
PINNED = ["c2ad83329064ca26", "6bd48cff5e937466", "c7d74a5a031d7d01"]


def seeds(clips, seed=1, step=2):
    return ClipSeeds(seed, step, torch.as_tensor(clips))


def every(source):
    """Each augmentation on clips of its own, by name."""
    keys = source.bits("what the clip sounds like", 1)[:, 0]
    base = (keys[:, None] >> torch.arange(40)).bitwise_and(255).float() / 64.0 - 2.0  # [B, 40]
    wave, frames = base.repeat(1, 10), base[:, :, None] * torch.ones(6)
    lengths = 100 + (keys % 101).abs()
    return {
        "masks": spec_augment(frames, 5, 20, 9.0, source),
        "noise": add_noise(frames, source),
        "roll frames": roll_frames(frames, 10, source),
        "gain": random_gain(wave, 12.0, source),
        "roll waveforms": roll_waveforms(wave, lengths, source),
        "snr": add_noise_at_snr(wave, lengths, 0.0, 20.0, source),
        "mixup": torch.stack([part.float() for part in draw_mixup(1000, 0.5, source)], 1),
        "normal": source.normal("n", 7),
    }


def test_the_batch_around_a_clip_changes_nothing():
    clips = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:64]
    whole = every(seeds(clips))
    for places in (torch.arange(63, -1, -1), torch.tensor([17]), torch.arange(3, 60, 7)):
        part = every(seeds(clips[places]))
        for name, values in part.items():
            # sums over samples are vectorised otherwise in another shape
            slack = 1e-6 if name == "snr" else 0.0
            torch.testing.assert_close(values, whole[name][places], rtol=slack, atol=slack)
    assert torch.equal(every(seeds(clips))["snr"], whole["snr"])


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}])
def test_another_seed_or_step_draws_anew(change):
    clips = torch.arange(200)
    one, other = seeds(clips).uniform("gain", 4), seeds(clips, **change).uniform("gain", 4)
    assert (one != other).float().mean() > 0.99
    # and what follows is unrelated: the correlation of 800 pairs is within 4 / sqrt(800)
    assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 0.15


def test_bits_are_splitmix64s():
    """The published generator, in Python's integers."""

    def mixed(z):
        word = (1 << 64) - 1
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    source = seeds(torch.tensor([5, -3, 2**62]))
    state = source._stream("any")
    bits = source.bits("any", 5)
    for clip in range(3):
        for k in range(5):
            word = (int(state[clip]) + (k + 1) * 0x9E3779B97F4A7C15) % (1 << 64)
            assert int(bits[clip, k]) % (1 << 64) == mixed(word)
    # the first output of the reference implementation seeded with 0
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_the_numbers_stay_what_they_are():
    # a resumed run, another machine and a GPU have to draw these
    source = ClipSeeds(3, 14, torch.tensor([0, 1, 1_000_000]))
    bits = [f"{int(value) % (1 << 64):016x}" for value in source.bits("gain")[:, 0]]
    assert bits == PINNED
    assert torch.equal(source.uniform("gain")[:0], torch.empty(0))
    moved = source.to("cpu")
    assert torch.equal(moved.bits("gain"), source.bits("gain")) and len(moved) == 3
    assert not torch.equal(source.fork("second").bits("gain"), source.bits("gain"))


def test_uniform_numbers_are_uniform_and_independent_between_neighbours():
    for draws in (
        seeds(torch.arange(MANY)).uniform("a"),  # clip after clip
        seeds([7]).uniform("a", MANY)[0],  # within one
        torch.cat([seeds([7], step=step).uniform("a") for step in range(1000)]),  # step after step
    ):
        n = len(draws)
        assert draws.min() >= 0.0 and draws.max() < 1.0
        ranks = (torch.arange(n) + 0.5) / n
        # Kolmogorov and Smirnov's distance: above this once in 10,000
        assert (draws.sort().values - ranks).abs().max() < 2.2 / math.sqrt(n)
        pairs = torch.corrcoef(torch.stack((draws[1:], draws[:-1])))
        assert abs(pairs[0, 1]) < 4.0 / math.sqrt(n)


def test_normal_numbers_are_normal():
    draws = seeds(torch.arange(20)).normal("n", 5001).flatten().double()
    n = len(draws)
    assert abs(draws.mean()) < 4 / math.sqrt(n) and abs(draws.var() - 1) < 6 / math.sqrt(n)
    share = 0.5 * (1.0 + torch.special.erf(draws.sort().values / math.sqrt(2.0)))
    assert (share - (torch.arange(n) + 0.5) / n).abs().max() < 2.2 / math.sqrt(n)
    odd = seeds([3]).normal("n", 1)
    assert odd.shape == (1, 1) and odd[0, 0] == seeds([3]).normal("n", 8)[0, 0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_mixing_weights_follow_the_beta_distribution(alpha):
    grid = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)[:-1]
    weights = beta_quantile(grid, alpha)
    assert (weights.diff() > 0).all() and weights[0] == 0.0
    assert torch.allclose(weights[1:], 1.0 - weights.flip(0)[: len(weights) - 1], atol=1e-6)
    # moments by the midpoint rule over the probability
    middle = beta_quantile((torch.arange(100_000).double() + 0.5) / 100_000, alpha)
    assert middle.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert middle.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=1e-3)
    with pytest.raises(ValueError, match="alpha=0: expected a positive number"):
        beta_quantile(grid, 0)


def test_mixup_by_clip_has_its_probability_and_spans_the_set():
    partners, weights = draw_mixup(MANY, 0.4, seeds(torch.arange(MANY)))
    assert partners.min() >= 0 and partners.max() < MANY and len(partners.unique()) > 0.6 * MANY
    mixed = weights != 1.0
    assert mixed.float().mean().item() == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / MANY))
    assert weights[mixed].var().item() == pytest.approx(1 / 84, rel=0.15)


def test_masks_by_clip_have_torchaudios_distribution():
    x = torch.ones(MANY, 40, 24)
    masked = spec_augment(x, 10, 15, 0.0, seeds(torch.arange(MANY))) == 0
    bins, frames = masked.all(1).sum(1).double(), masked.all(2).sum(1).double()
    # widths are uniform over 0 ... widest - 1
    for widths, widest in ((bins, 10), (frames, 15)):
        assert set(widths.long().tolist()) == set(range(widest))
        spread = math.sqrt((widest**2 - 1) / 12 / MANY)
        assert abs(widths.mean() - 0.5 * (widest - 1)) < 4 * spread
    # width and start of a mask are unrelated to those of the other axis
    assert abs(torch.corrcoef(torch.stack((bins, frames)))[0, 1]) < 4 / math.sqrt(MANY)


def test_gain_is_even_in_decibels():
    wave = torch.ones(MANY, 2)
    decibels = 20 * torch.log10(random_gain(wave, 6.0, seeds(torch.arange(MANY))))
    assert torch.equal(decibels[:, 0], decibels[:, 1])
    assert decibels.abs().max() <= 6.0 + 1e-4 and abs(decibels.mean()) < 4 * 3.46 / math.sqrt(MANY)
    assert decibels[:, 0].sort().values[MANY // 4].item() == pytest.approx(-3.0, abs=0.4)
    assert random_gain(wave.bfloat16(), 6.0, seeds(range(MANY))).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"wave is torch\.int16"):
        random_gain(wave.short(), 6.0)


def test_rolled_waveforms_are_rotations_of_their_own_length():
    lengths = torch.tensor([30, 7, 1, 0, 12])
    wave = torch.arange(30.0).repeat(5, 1)
    for clip, length in enumerate(lengths.tolist()):
        wave[clip, length:] = float("nan")
    seen = set()
    for step in range(300):
        rolled = roll_waveforms(wave, lengths, seeds(torch.arange(5), step=step))
        for clip, length in enumerate(lengths.tolist()):
            assert not rolled[clip, length:].any()
            if length:
                start = int(rolled[clip, 0])
                assert torch.equal(rolled[clip, :length], torch.roll(wave[clip, :length], -start))
        seen.add(int(rolled[1, 0]))
    assert seen == set(range(7))
    assert roll_waveforms(torch.zeros(2, 0)).shape == (2, 0)


def test_noise_has_the_ratio_drawn():
    wave, count = 0.1 * random_tensor(600, 2000, seed=3), 1500
    lengths = torch.full((600,), count)
    for low, high in ((10.0, 10.0), (0.0, 30.0)):
        noisy = add_noise_at_snr(wave, lengths, low, high, seeds(torch.arange(600)))
        assert not noisy[:, count:].any()
        noise = (noisy - wave)[:, :count]
        ratio = 10 * torch.log10(wave[:, :count].square().mean(1) / noise.square().mean(1))
        # the power of 1500 samples of noise is within 0.65 dB, four of its deviations
        assert ratio.min() > low - 0.7 and ratio.max() < high + 0.7
        assert ratio.mean().item() == pytest.approx(0.5 * (low + high), abs=1.5)
    silent = add_noise_at_snr(torch.zeros(2, 50), None, generator=seeds([1, 2]))
    assert not silent.any()
    with pytest.raises(ValueError, match="low_db=5 is above high_db=4"):
        add_noise_at_snr(wave, None, 5.0, 4.0)


def test_a_generator_does_as_well_as_seeds():
    wave, lengths = random_tensor(3, 50, seed=4), torch.tensor([50, 20, 10])
    for function in (
        lambda g: random_gain(wave, 6.0, g),
        lambda g: roll_waveforms(wave, lengths, g),
        lambda g: add_noise_at_snr(wave, lengths, generator=g),
    ):
        one, two, other = (function(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, two) and not torch.equal(one, other)


def test_no_clips_and_wrong_clips():
    none = seeds(torch.empty(0, dtype=torch.long))
    assert spec_augment(torch.zeros(0, 9, 8), 3, 3, generator=none).shape == (0, 9, 8)
    assert random_gain(torch.zeros(0, 5), generator=none).shape == (0, 5)
    assert draw_mixup(0, 1.0, none)[0].shape == (0,)
    with pytest.raises(ValueError, match="draws for 2 clips: expected the batch's 3"):
        random_gain(torch.zeros(3, 5), generator=seeds([1, 2]))
    with pytest.raises(ValueError, match=r"clips has shape \(2,\) and torch.float32"):
        ClipSeeds(0, 0, torch.zeros(2))


def test_counted_bits_are_those_of_the_published_mixing_in_integers():
    from ast_fast.seeding import counted_bits, draw_numbers, stream_key

    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mixed(value):
        value &= word
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & word
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & word
        return value ^ (value >> 31)

    key, step = stream_key(7, "rows"), 12
    bits = counted_bits(key, torch.tensor([step]), draw_numbers(4))
    start = mixed(mixed(step * golden) ^ (key & word))
    assert [b & word for b in bits.tolist()] == [mixed(start + i * golden) for i in range(1, 5)]
    assert stream_key(7, "rows") != stream_key(8, "rows") != stream_key(8, "columns")
