"""Recorded speech and synthetic extremes against torchaudio, kaldi-native-fbank and transformers.

All are measured against float64: ours within the log-mel budget, theirs close enough to show that it is
the same function.
"""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast import reference
from ast_fast.config import LogMelConfig
from ast_fast.data.syllables import read_syllables
from ast_fast.equivalence.budgets import log_mel_budget
from ast_fast.equivalence.measures import measure
from ast_fast.frontend import LogMel
from ast_fast.reference.mel import mel_tables
from ast_fast.testing import random_tensor

FLOOR = float(torch.tensor(reference.mel.LOG_FLOOR).log())
RATES = [8000, 11025, 16000, 22050, 32000, 44100, 48000]


@pytest.fixture(scope="module")
def speech():
    """Ten seconds of recorded syllables, int16 at 16 kHz."""
    pytest.importorskip("soundfile")
    return torch.cat(read_syllables().waves[:40])[:160_000]


def at_rate(speech, rate):
    if rate == 16000:
        return speech
    soxr = pytest.importorskip("soxr")
    return torch.from_numpy(soxr.resample(speech.numpy(), 16000, rate))


def raw(config_rate, backend, wave, bins=128):
    """Raw energies [S, F] of one clip, ours and in float64."""
    config = LogMelConfig(
        sample_rate_hz=config_rate, num_mel_bins=bins, num_frames=None, mean=0.0, std=0.5
    )
    with ast_fast.use_backend(backend):
        ours = LogMel(config)(wave[None])[0]
    wide = wave.double() / 32768 if wave.dtype == torch.int16 else wave.double()
    tables = mel_tables(config_rate, bins)
    exact = reference.ops.log_mel(wide[None], None, tables, ours.shape[0], 0.0, 0.5)[0]
    return ours, exact


def torchaudios(wave, rate, bins=128):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    return kaldi.fbank(
        (wave / 32768.0 if wave.dtype == torch.int16 else wave)[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=bins,
        dither=0.0,
        frame_shift=10,
    )


def hold(ours, theirs, exact):
    worst, mean = log_mel_budget(measure(theirs, exact), 16.0, 1.0, torch.float32)
    errors = measure(ours, exact)
    assert errors.max_abs <= worst and errors.mean_abs <= mean, (errors, worst, mean)


@pytest.mark.parametrize("rate", RATES)
def test_speech_at_every_rate_is_torchaudios(speech, rate, backend):
    wave = at_rate(speech, rate)
    bins = 128 if rate >= 16000 else 64
    ours, exact = raw(rate, backend, wave, bins)
    theirs = torchaudios(wave, rate, bins)
    assert ours.shape == theirs.shape == exact.shape
    hold(ours, theirs, exact)


def test_speech_is_kaldi_native_fbanks(speech, backend):
    native = pytest.importorskip("kaldi_native_fbank")
    options = native.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = 16000, 0.0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = 128
    options.use_energy, options.htk_compat = False, True
    extractor = native.OnlineFbank(options)
    extractor.accept_waveform(16000, (speech / 32768.0).numpy())
    extractor.input_finished()
    theirs = torch.stack(
        [torch.from_numpy(extractor.get_frame(i)) for i in range(extractor.num_frames_ready)]
    )
    ours, exact = raw(16000, backend, speech)
    assert theirs.shape == ours.shape
    plain = measure(theirs, exact)
    assert plain.mean_abs < 1e-4
    errors = measure(ours, exact)
    assert errors.max_abs <= 2.0 * plain.max_abs and errors.mean_abs <= plain.mean_abs


def test_speech_is_what_transformers_extractor_gives(speech, backend):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.ASTFeatureExtractor()
    floats = speech / 32768.0
    clips = [floats, floats[:48_000], floats[5000:7000]]
    theirs = extractor([clip.numpy() for clip in clips], 16000, return_tensors="pt").input_values
    wave = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    lengths = torch.tensor([len(clip) for clip in clips])
    config = LogMelConfig()
    with ast_fast.use_backend(backend):
        ours = LogMel(config)(wave, lengths)
    with ast_fast.use_backend("reference"):
        exact = LogMel(config)(wave.double(), lengths)
    assert ours.shape == theirs.shape == (3, 1024, 128)
    scale = 1.0 / (2.0 * config.std)
    plain = measure(theirs / scale, exact / scale)
    worst, mean = log_mel_budget(plain, 2.0, scale, torch.float32)
    errors = measure(ours, exact)
    assert plain.max_abs < 0.05 and errors.max_abs <= worst and errors.mean_abs <= mean


def extreme(name, count=16_000):
    """float32 in [-1, 1]."""
    time = torch.arange(count)
    if name == "full-scale square":
        return torch.where(time % 80 < 40, 32767, -32768) / 32768
    if name == "one click":
        return (time == 7000).float()
    if name == "denormals":
        return 1e-40 * random_tensor(count, seed=1)
    if name == "constant":
        return torch.full((count,), 0.75)
    assert name == "noise of one bit"
    return torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(2)) / 32768


@pytest.mark.parametrize("form", ["float32", "int16"])
@pytest.mark.parametrize(
    "name",
    ["full-scale square", "one click", "denormals", "constant", "noise of one bit"],
)
def test_extremes_stay_within_the_budget(name, form, backend):
    wave = extreme(name)
    if form == "int16":
        wave = (wave * 32768).round().clamp(-32768, 32767).to(torch.int16)
    ours, exact = raw(16000, backend, wave)
    assert ours.isfinite().all()
    hold(ours, torchaudios(wave, 16000), exact)
    if name in ("denormals", "constant"):
        assert torch.equal(ours, torch.full_like(ours, FLOOR))
    if name == "one click":
        heard = (ours > FLOOR).any(1).nonzero().flatten().tolist()
        assert heard == [s for s in range(98) if 160 * s <= 7000 < 160 * s + 400]
