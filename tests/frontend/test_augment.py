"""Augmentations against torchaudio and against the original recipe written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ast_fast
from ast_fast.config import NORMALISATION, LogMelConfig
from ast_fast.frontend import (
    LogMel,
    add_noise,
    draw_mixup,
    mask_value,
    mixup_targets,
    mixup_waveforms,
    roll_frames,
    spec_augment,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_those_of_torchaudio_for_the_same_draws(seed):
    transforms = pytest.importorskip("torchaudio.transforms")
    raw = torch.randn(1, 120, 64)
    torch.manual_seed(seed)
    want = transforms.FrequencyMasking(24)(raw.transpose(1, 2))
    want = transforms.TimeMasking(50)(want).transpose(1, 2)
    got = spec_augment(raw, 24, 50, generator=seeded(seed))
    assert torch.equal(got, want)


def test_masking_after_normalisation_equals_masking_before():
    mean, std = NORMALISATION["esc50"]
    raw = torch.randn(4, 80, 32)
    before = (spec_augment(raw, 8, 20, generator=seeded(1)) - mean) / (2 * std)
    after = spec_augment((raw - mean) / (2 * std), 8, 20, mask_value(mean, std), seeded(1))
    assert torch.allclose(before, after, atol=1e-6)
    assert mask_value(*NORMALISATION["audioset"]) == pytest.approx(0.4670, abs=1e-4)
    assert mask_value(*NORMALISATION["esc50"]) == pytest.approx(0.6183, abs=1e-4)
    assert mask_value(*NORMALISATION["speechcommands"]) == pytest.approx(0.6150, abs=1e-4)


def test_masks_differ_between_clips_and_stay_below_their_width():
    x = torch.ones(200, 60, 40)
    masked = spec_augment(x, 10, 15, 0.0, seeded(2)) == 0
    bins, frames = masked.all(1).sum(1), masked.all(2).sum(1)
    assert bins.max() == 9 and frames.max() == 14 and bins.min() == frames.min() == 0
    assert len({tuple(row.tolist()) for row in masked.all(1)}) > 100
    # a mask is one run of neighbours
    edges = masked.all(1).int().diff(dim=1).abs().sum(1)
    assert edges.max() <= 2


def test_masks_follow_the_generator_only():
    x = torch.randn(3, 50, 20)
    a, b = (spec_augment(x, 5, 9, 0.0, seeded(3)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, spec_augment(x, 5, 9, 0.0, seeded(4)))
    before = torch.get_rng_state()
    spec_augment(x, 5, 9, 0.0, seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    assert spec_augment(x) is x
    with pytest.raises(ValueError, match="time_mask_frames=51: expected 0 to 50"):
        spec_augment(x, 0, 51)
    with pytest.raises(ValueError, match="freq_mask_bins=-1: expected 0 to 20"):
        spec_augment(x, -1, 0)


def test_noise_is_uniform_and_scaled_per_clip():
    noise = add_noise(torch.zeros(500, 40, 30), seeded(5))
    assert noise.min() >= 0 and noise.max() < 0.1
    scale = noise.amax((1, 2))
    assert scale.min() < 0.005 and scale.max() > 0.095
    assert torch.allclose(noise.mean((1, 2)) / scale, torch.full((500,), 0.5), atol=0.05)
    assert add_noise(torch.zeros(1, 2, 2, dtype=torch.bfloat16), seeded(5)).dtype == torch.bfloat16


def test_roll_is_circular_and_spans_minus_ten_to_nine():
    x = torch.arange(50.0).view(1, 50, 1).expand(4000, 50, 3)
    rolled = roll_frames(x, 10, seeded(6))
    shifts = (50 - rolled[:, 0, 0]).long() % 50
    shifts = torch.where(shifts > 25, shifts - 50, shifts)
    assert set(shifts.tolist()) == set(range(-10, 10))
    for clip in range(20):
        assert torch.equal(rolled[clip], torch.roll(x[clip], int(shifts[clip]), 0))
    assert roll_frames(x, 0) is x


def original_mixup(a, b, weight):
    """The recipe of the original loader, one pair at a time."""
    a, b = a - a.mean(), b - b.mean()
    if len(b) < len(a):
        b = np.concatenate((b, np.zeros(len(a) - len(b))))
    mixed = weight * a + (1 - weight) * b[: len(a)]
    return mixed - mixed.mean()


def test_mixed_waveforms_follow_the_original():
    rng = np.random.default_rng(0)
    lengths = [400, 250, 330]
    clips = [rng.normal(0.2, 1.0, n) for n in lengths]
    wave = torch.full((3, 400), float("nan"), dtype=torch.float64)
    for row, clip in zip(wave, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    partners, weights = torch.tensor([1, 0, 2]), torch.tensor([0.3, 0.6, 0.5])
    got = mixup_waveforms(wave, torch.tensor(lengths), partners, weights)
    for clip in range(3):
        weight = float(weights[clip].double())
        want = original_mixup(clips[clip], clips[partners[clip]], weight)
        np.testing.assert_allclose(got[clip, : lengths[clip]].numpy(), want, atol=1e-12)
        assert (got[clip, lengths[clip] :] == 0).all()


def test_weight_one_only_removes_the_mean():
    wave = torch.randn(2, 300) + 0.5
    got = mixup_waveforms(wave, None, torch.tensor([1, 0]), torch.ones(2))
    assert torch.allclose(got, wave - wave.mean(1, keepdim=True), atol=1e-6)
    with pytest.raises(TypeError, match=r"wave is torch\.int16: expected float32"):
        mixup_waveforms(wave.to(torch.int16), None, torch.tensor([1, 0]), torch.ones(2))


def test_mixed_targets_add_up():
    targets = torch.tensor([[1.0, 0, 1], [1, 1, 0]])
    got = mixup_targets(targets, torch.tensor([1, 0]), torch.tensor([0.3, 1.0]))
    assert torch.allclose(got, torch.tensor([[1.0, 0.7, 0.3], [1, 1, 0]]))


def test_mixup_draws_beta_10_10_with_the_probability_asked_for():
    partners, weights = draw_mixup(20_000, 0.4, seeded(7))
    assert partners.min() == 0 and partners.max() == 19_999
    mixed = weights != 1
    assert mixed.float().mean().item() == pytest.approx(0.4, abs=0.02)
    drawn = weights[mixed]
    # Beta(10, 10): mean 1/2, variance 1/84
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / 84, rel=0.06)
    again = draw_mixup(20_000, 0.4, seeded(7))
    assert torch.equal(again[0], partners) and torch.equal(again[1], weights)
    assert (draw_mixup(100, 0.0, seeded(1))[1] == 1).all()


def test_log_mel_module_is_torchaudios_fbank_normalised_and_padded():
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    wave = torch.randn(2, 8000, generator=seeded(8)) * 0.1
    mean, std = NORMALISATION["audioset"]
    got = LogMel(num_frames=60)(wave)
    assert got.shape == (2, 60, 128)
    for clip in range(2):
        raw = kaldi.fbank(
            wave[clip : clip + 1], htk_compat=True, sample_frequency=16000, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
        )  # fmt: skip
        assert raw.shape == (48, 128)
        assert torch.allclose(got[clip, :48], (raw - mean) / (2 * std), atol=2e-3)
    assert torch.allclose(got[:, 48:], torch.tensor(mask_value(mean, std)), atol=1e-6)


def test_log_mel_module_has_no_weights_and_knows_its_settings():
    front = ast_fast.LogMel(LogMelConfig(num_mel_bins=64), num_frames=20, sample_rate_hz=8000)
    assert not list(front.state_dict()) and "8000 Hz, 64 mel bins, 20 frames" in repr(front)
    wave = torch.randn(1, 3000)
    assert front(wave, torch.tensor([1600]), torch.bfloat16).dtype == torch.bfloat16
    short = front(wave, torch.tensor([1600]))
    assert torch.equal(short[:, :18], front(wave[:, :1600])[:, :18])
    with pytest.raises(TypeError, match="colour"):
        LogMel(colour="red")
