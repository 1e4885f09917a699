"""The augmentations of a step: in their places, from one seed."""

import pytest
import torch

from ast_fast.config import AugmentConfig, LogMelConfig
from ast_fast.training.augment import augment_features, mixup

FRONT = LogMelConfig(num_mel_bins=32, num_frames=40)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_nothing_asked_for_changes_nothing():
    x = torch.randn(3, 40, 32)
    assert torch.equal(augment_features(x, AugmentConfig(), FRONT, seeded()), x)


def test_masks_hold_raw_zero_and_the_rest_is_untouched():
    x = torch.randn(64, 40, 32, generator=seeded(1))
    settings = AugmentConfig(freq_mask_bins=8, time_mask_frames=10)
    y = augment_features(x, settings, FRONT, seeded())
    changed = y != x
    blank = -FRONT.mean / (2 * FRONT.std)
    assert changed.any() and torch.all(y[changed] == torch.tensor(blank))
    whole_bins = changed.all(1).sum(1)  # masked mel bins of each clip
    assert int(whole_bins.max()) <= 7 and len(whole_bins.unique()) > 3


def test_noise_and_roll_follow_the_seed():
    x = torch.randn(4, 40, 32, generator=seeded(1))
    settings = AugmentConfig(noise=True, roll_frames=5, freq_mask_bins=4)
    one, two, other = (augment_features(x, settings, FRONT, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert (
        0 < float((augment_features(x, AugmentConfig(noise=True), FRONT, seeded()) - x).max()) < 0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_mixup_mixes_waveforms_and_labels_alike(dtype):
    wave = torch.zeros(3, 600)
    wave[0, :600:2], wave[1, :500:3], wave[2, :400:5] = 0.5, 0.25, -0.5
    lengths = torch.tensor([600, 500, 400])
    given = (wave * 32768).to(torch.int16) if dtype == torch.int16 else wave
    targets = torch.tensor([0, 1, 2])
    mixed, labels = mixup(given, lengths, targets, 1.0, 3, seeded(2))
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
    _, labels = mixup(wave, torch.full((4,), 500), torch.tensor([0, 1, 1, 0]), 0.0, 2, seeded())
    assert labels.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    empty = mixup(torch.zeros(0, 0), torch.zeros(0).long(), torch.zeros(0).long(), 1.0, 2, seeded())
    assert empty[1].shape == (0, 2)
