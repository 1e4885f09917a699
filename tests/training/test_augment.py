"""The augmentations of a step: in their places, from one seed."""

import pytest
import torch

from ast_fast.config import AugmentConfig, LogMelConfig
from ast_fast.seeding import ClipSeeds
from ast_fast.training.augment import augment_features, augment_waveforms, clip_seeds, mixup

FRONT = LogMelConfig(num_mel_bins=32, num_frames=40)


EVERYTHING = AugmentConfig(
    freq_mask_bins=8, time_mask_frames=9, noise=True, roll_frames=5, roll_waveforms=True, gain_db=6.0,
    snr_db=(5.0, 30.0),
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(count, seed=0):
    return ClipSeeds(seed, 0, torch.arange(count))


def test_nothing_asked_for_changes_nothing():
    x = torch.randn(3, 40, 32)
    assert torch.equal(augment_features(x, AugmentConfig(), FRONT, clips(3)), x)
    wave = torch.zeros(3, 500, dtype=torch.int16)
    assert augment_waveforms(wave, torch.full((3,), 500), AugmentConfig(), clips(3)) is wave


def test_masks_hold_raw_zero_and_the_rest_is_untouched():
    x = torch.randn(64, 40, 32, generator=seeded(1))
    settings = AugmentConfig(freq_mask_bins=8, time_mask_frames=10)
    y = augment_features(x, settings, FRONT, clips(64))
    changed = y != x
    blank = -FRONT.mean / (2 * FRONT.std)
    assert changed.any() and torch.all(y[changed] == torch.tensor(blank))
    whole_bins = changed.all(1).sum(1)  # masked mel bins of each clip
    assert int(whole_bins.max()) <= 7 and len(whole_bins.unique()) > 3


def test_noise_and_roll_follow_the_seed():
    x = torch.randn(4, 40, 32, generator=seeded(1))
    settings = AugmentConfig(noise=True, roll_frames=5, freq_mask_bins=4)
    one, two, other = (augment_features(x, settings, FRONT, clips(4, s)) for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    noisy = augment_features(x, AugmentConfig(noise=True), FRONT, clips(4))
    assert 0 < float((noisy - x).max()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_mixup_mixes_waveforms_and_labels_alike(dtype):
    wave = torch.zeros(3, 600)
    wave[0, :600:2], wave[1, :500:3], wave[2, :400:5] = 0.5, 0.25, -0.5
    lengths = torch.tensor([600, 500, 400])
    given = (wave * 32768).to(torch.int16) if dtype == torch.int16 else wave
    targets = torch.tensor([0, 1, 2])
    mixed, labels = mixup(given, lengths, targets, 1.0, 3, clips(3, 2))
    assert mixed.dtype == torch.float32 and mixed.shape == wave.shape
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    centred = torch.zeros_like(wave)
    for row, length in enumerate(lengths.tolist()):
        centred[row, :length] = wave[row, :length] - wave[row, :length].mean()
    for row, length in enumerate(lengths.tolist()):
        expected = (labels[row][:, None] * centred).sum(0)[:length]  # label j is clip j
        torch.testing.assert_close(
            mixed[row, :length], expected - expected.mean(), rtol=1e-4, atol=1e-5
        )
        assert not mixed[row, length:].any()


def test_without_mixing_labels_stay_whole_and_empty_batches_pass():
    wave = torch.randn(4, 500)
    _, labels = mixup(wave, torch.full((4,), 500), torch.tensor([0, 1, 1, 0]), 0.0, 2, clips(4))
    assert labels.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    empty = mixup(torch.zeros(0, 0), torch.zeros(0).long(), torch.zeros(0).long(), 1.0, 2, clips(0))
    assert empty[1].shape == (0, 2)


def test_a_clip_is_augmented_alike_in_any_batch():
    wave = 0.1 * torch.randn(6, 700, generator=seeded(1))
    lengths = torch.tensor([700, 650, 333, 700, 512, 90])
    indices = torch.tensor([3, 41, 0, 7, 12, 40])

    def augmented(places, step=4):
        seeds = clip_seeds(9, step, indices[places], 50)
        samples = augment_waveforms(wave[places], lengths[places], EVERYTHING, seeds)
        x = samples[:, :640].unfold(
            1, 32, 16
        )  # stands for features: what counts is that it follows
        return samples, augment_features(x, EVERYTHING, FRONT, seeds)

    whole = augmented(torch.arange(6))
    for places in (torch.tensor([4, 2, 0]), torch.tensor([5]), torch.arange(5, -1, -1)):
        for part, all_ in zip(augmented(places), whole, strict=True):
            torch.testing.assert_close(part, all_[places], rtol=1e-6, atol=1e-7)
    other = augmented(torch.arange(6), step=5)
    assert all(
        not torch.equal(a[clip], b[clip])
        for a, b in zip(whole, other, strict=True)
        for clip in range(6)
    )


def test_a_clip_drawn_twice_is_not_augmented_twice_alike():
    seeds = clip_seeds(0, 3, torch.tensor([5, 2, 5, 5]), 10)
    draws = seeds.uniform("gain").tolist()
    assert len(set(draws)) == 4
    assert draws[:2] == clip_seeds(0, 3, torch.tensor([5, 2]), 10).uniform("gain").tolist()


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="gain_db=-1: expected 0"):
        AugmentConfig(gain_db=-1.0)
    with pytest.raises(
        ValueError, match=r"snr_db=\(9.0, 3.0\): expected the lowest and the highest"
    ):
        AugmentConfig(snr_db=(9.0, 3.0))
    assert AugmentConfig.from_dict({"snr_db": [3.0, 9.0]}).snr_db == (3.0, 9.0)


def test_short_clips_are_placed_anywhere_in_their_window_and_whole():
    x = torch.randn(200, 40, 32, generator=seeded(1))
    # 25 ms windows every 10 ms: 3120 samples are 18 frames, 7000 more than the window holds
    lengths = torch.tensor([3120, 7000] * 100)
    x[::2, 18:] = 7.0  # padding
    settings = AugmentConfig(place=True)
    y = augment_features(x, settings, FRONT, clips(200), lengths)
    assert torch.equal(y[1::2], x[1::2])
    starts = [int((row != 7.0).all(1).nonzero()[0]) for row in y[::2]]
    assert min(starts) == 0 and max(starts) == 22 and len(set(starts)) > 15
    for before, after, start in zip(x[::2], y[::2], starts, strict=True):
        assert torch.equal(after[start : start + 18], before[:18])
        assert int((after == 7.0).all(1).sum()) == 22
    assert torch.equal(augment_features(x, settings, FRONT, clips(200)), x)  # lengths are not known
