"""Log-mel of clips of 400 to 480,000 samples at 8 to 48 kHz in 16 bits, against torchaudio's own error."""

from __future__ import annotations

import math

import pytest
import torch

import ast_fast
from ast_fast.config import LogMelConfig
from ast_fast.data.syllables import read_syllables
from ast_fast.equivalence import run_log_mel as signals
from ast_fast.equivalence.budgets import log_mel_budget
from ast_fast.equivalence.log_mel_clips import FEW_FRAMES, exact_log_mel, torchaudio_errors
from ast_fast.equivalence.measures import measure
from ast_fast.reference.mel import mel_tables

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")
RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000)
# where one run of torchaudio is 2.3 to 5 times closer than ours: one frame of noise, ten, and speech
LUCKY = (27, 184, 256)


def tones(generator, n, rate):
    time = torch.arange(n, dtype=torch.float64) / rate
    wave = torch.zeros(n, dtype=torch.float64)
    for _ in range(int(torch.randint(1, 6, (1,), generator=generator))):
        hz, size, phase = torch.rand(3, generator=generator, dtype=torch.float64)
        wave += 0.2 * size * torch.sin(2 * math.pi * 0.5 * rate * hz * time + 6 * phase)
    return wave


def fading(generator, n, rate):
    return signals.noise(generator, n, rate) * torch.linspace(1, 0, n, dtype=torch.float64) ** 4


def speech(generator, n, rate):
    soxr = pytest.importorskip("soxr")
    whole = torch.cat(read_syllables().waves)
    start = int(torch.randint(len(whole) - 1000, (1,), generator=generator))
    needed = n * 16000 // rate + 2000
    part = torch.cat([whole[start:], *[whole] * (1 + needed // len(whole))])[:needed]
    wave = part.float().numpy() / 32768.0
    return torch.from_numpy(soxr.resample(wave, 16000, rate))[:n].double()


KINDS = (
    *(signals.noise, signals.chirp, signals.voice, signals.clicks_and_silence),
    *(tones, fading, speech, speech),
)


def drawn(seed, most=480_000):
    """A clip of 16 bits, its rate and mel bins; lengths are even on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)
    rate = RATES[int(torch.randint(len(RATES), (1,), generator=generator))]
    share = float(torch.rand(1, generator=generator))
    n = int(math.exp(share * math.log(most / 400) + math.log(400)))
    kind = KINDS[int(torch.randint(len(KINDS), (1,), generator=generator))]
    n = max(n, mel_tables(rate, 64).window_samples)
    wave = (kind(generator, n, rate) * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return wave, rate, 128 if rate >= 16000 else 64


def errors_of(wave, rate, bins):
    """Ours and torchaudio's, the frames checked to the last."""
    config = LogMelConfig(
        sample_rate_hz=rate, num_mel_bins=bins, num_frames=None, mean=0.0, std=0.5
    )
    ours = ast_fast.LogMel(config)(wave[None])[0]
    window, hop = int(rate * 0.025), int(rate * 0.010)
    assert ours.shape == (1 + (len(wave) - window) // hop, bins) and ours.isfinite().all()
    floats = wave.float() / 32768.0
    return measure(ours, exact_log_mel(floats, rate, bins)), torchaudio_errors(floats, rate, bins)


def hold(seeds, most):
    short = []
    for seed in seeds:
        wave, rate, bins = drawn(seed, most)
        ours, theirs = errors_of(wave, rate, bins)
        worst, mean = log_mel_budget(theirs, 16.0, 1.0, torch.float32)
        what = (seed, rate, len(wave), ours, theirs)
        assert ours.max_abs <= worst, what
        frames = mel_tables(rate, bins).num_frames(len(wave))
        if frames >= FEW_FRAMES:
            assert ours.mean_abs <= mean, what
        else:
            short.append((ours.mean_abs, mean))
    if short:
        ours_mean, allowed = (sum(column) / len(short) for column in zip(*short, strict=True))
        assert ours_mean <= allowed, (ours_mean, allowed)


def test_clips_of_every_rate_keep_twice_torchaudios_own_error():
    hold(range(1000, 1016), 8000)


@pytest.mark.slow
def test_two_hundred_clips_of_every_length_and_rate_keep_twice_torchaudios_own_error():
    hold((*LUCKY, *range(200)), 480_000)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["silence", "constant", "tone", "click", "full scale"])
def test_plain_signals_at_every_rate(name, rate):
    time = torch.arange(rate // 5)
    wave = {
        "silence": torch.zeros(len(time)),
        "constant": torch.full((len(time),), 20000.0),
        "tone": 16000 * torch.sin(2 * math.pi * 440.0 * time / rate),
        "click": 32767.0 * (time == 1000),
        "full scale": torch.where(time % (rate // 200) < rate // 400, 32767.0, -32768.0),
    }[name]
    bins = 128 if rate >= 16000 else 64
    ours, theirs = errors_of(wave.round().to(torch.int16), rate, bins)
    worst, mean = log_mel_budget(theirs, 16.0, 1.0, torch.float32)
    assert ours.max_abs <= worst and ours.mean_abs <= mean, (ours, theirs)


def test_one_run_of_torchaudio_is_a_lottery_on_short_clips():
    """Why the gains: at some of them the same clip is several times further off, for torchaudio alone."""
    from ast_fast.equivalence.plain import kaldi_fbank

    ratios = []
    for seed in range(1000, 1012):
        wave, rate, bins = drawn(seed, 2000)
        floats = wave.float() / 32768.0
        made = kaldi_fbank(floats[None], sample_rate_hz=rate, num_mel_bins=bins, mean=0.0, std=0.5)[
            0
        ]
        once = measure(made, exact_log_mel(floats, rate, bins)).max_abs
        ratios.append(torchaudio_errors(floats, rate, bins).max_abs / max(once, 1e-30))
    assert min(ratios) >= 1.0 and max(ratios) > 3.0
