"""Every front-end setting against torchaudio and against float64, with torchaudio's own error as yardstick."""

from __future__ import annotations

import math

import pytest
import torch

import ast_fast
from ast_fast import ops, reference
from ast_fast.config import LogMelConfig
from ast_fast.equivalence.budgets import log_mel_budget
from ast_fast.equivalence.measures import measure
from ast_fast.frontend import LogMel
from ast_fast.reference.mel import MEL_SCALES, WINDOWS, mel_filters_in_hz, mel_tables
from ast_fast.testing import assert_within, random_tensor

NAMES = {"hann": "hanning"}


def run(config, wave, lengths=None, backend="reference", **changes):
    with ast_fast.use_backend(backend):
        return LogMel(config, **changes)(wave, lengths)


def hold(got, theirs, exact, unit=1.0):
    """The log-mel budget; `unit` is the size of a nat in the features' unit."""
    plain = measure(theirs / unit, exact / unit)
    worst, mean = log_mel_budget(plain, float(exact.abs().max()), unit, torch.float32)
    # features beyond the 16 nats the floors were made for: one rounding of the largest
    rounding = 2.0**-23 * float(exact.abs().max())
    errors = measure(got, exact)
    assert errors.max_abs <= max(worst, rounding), (errors, worst)
    assert errors.mean_abs <= max(mean, rounding), (errors, mean)


@pytest.mark.parametrize("window", [name for name in WINDOWS if name != "hann_periodic"])
def test_windows_are_kaldis(window, backend):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    wave = random_tensor(1, 8000, seed=1) * 0.1
    config = LogMelConfig(window=window, num_frames=None, num_mel_bins=64, mean=0.0, std=0.5)
    theirs = kaldi.fbank(
        wave, window_type=NAMES.get(window, window), num_mel_bins=64, dither=0.0, use_energy=False
    )
    hold(run(config, wave, backend=backend)[0], theirs, run(config, wave.double())[0])


TORCHAUDIO = [
    {},
    {"n_fft": 512, "win_length": 400, "hop_length": 160, "top_db": 40.0},
    {"power": 1, "n_mels": 64},
    {"sample_rate": 32000, "n_fft": 1024, "win_length": 800, "hop_length": 320, "n_mels": 64},
    {"sample_rate": 48000, "n_fft": 2400, "hop_length": 480, "n_mels": 256, "norm": "slaney"},
    {"sample_rate": 44100, "n_fft": 1200, "win_length": 1103, "hop_length": 441, "pad": "constant"},
    {"sample_rate": 22050, "n_fft": 2048, "hop_length": 512, "mel_scale": "slaney", "f_min": 30.0},
    {"sample_rate": 11025, "n_fft": 300, "hop_length": 110, "n_mels": 40, "f_max": 5000.0},
    {"sample_rate": 8000, "n_fft": 256, "n_mels": 40, "mel_scale": "slaney", "norm": "slaney"},
]
OURS = {"sample_rate": "sample_rate_hz", "norm": "mel_norm", "pad": "padding"}


def both(setting):
    """Our configuration, and torchaudio's modules, of one row of settings."""
    transforms = pytest.importorskip("torchaudio.transforms")
    ours = {OURS.get(name, name): value for name, value in setting.items()}
    ours["padding"] = {"constant": "zeros"}.get(setting.get("pad"), "reflect")
    theirs = {k: v for k, v in setting.items() if k not in ("top_db", "pad")}
    if "power" in theirs:
        theirs["power"] = float(theirs["power"])
    mel = transforms.MelSpectrogram(pad_mode=setting.get("pad", "reflect"), **theirs)
    kind = "magnitude" if setting.get("power") == 1 else "power"
    decibels = transforms.AmplitudeToDB(kind, setting.get("top_db"))

    def features(wave):
        return torch.stack([decibels(mel(clip[None]))[0].T for clip in wave])

    return LogMelConfig.mel_spectrogram(**ours), features


@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
@pytest.mark.parametrize("setting", TORCHAUDIO, ids=str)
def test_mel_spectrogram_in_decibels_is_torchaudios(setting, backend):
    config, features = both(setting)
    rate = config.sample_rate_hz
    time = torch.arange(rate // 2) / rate
    voice = sum(torch.sin(2 * math.pi * 130 * k * time) / k for k in range(1, 20))
    wave = torch.stack([random_tensor(rate // 2, seed=2) * 0.1, 0.2 * voice * torch.sin(6 * time)])
    wave = wave + 1e-4 * random_tensor(2, rate // 2, seed=3)
    theirs, exact = features(wave), run(config, wave.double())
    assert theirs.shape == exact.shape
    unit = (20.0 if config.power == 1 else 10.0) / math.log(10.0)
    hold(run(config, wave, backend=backend), theirs, exact, unit)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
def test_decibels_of_silence_are_the_floor(backend):
    config, features = both({})
    silent = torch.zeros(1, 3000)
    got = run(config, silent, backend=backend)
    # one rounding of 100
    assert torch.allclose(got, features(silent), atol=7.7e-6, rtol=0.0) and got.min() > -100.01


def test_mel_filters_are_torchaudios():
    functional = pytest.importorskip("torchaudio.functional")
    for scale in ("htk", "slaney"):
        for norm in ("none", "slaney"):
            got = mel_filters_in_hz(64, 1024, 32000, 20.0, 0.0, scale, norm)
            want = functional.melscale_fbanks(
                513, 20.0, 16000.0, 64, 32000, None if norm == "none" else norm, scale
            )
            # theirs are float32 corners of float32 bins
            assert (got - want.T).abs().max() < 2e-5 * max(1.0, float(want.max()))


def test_ragged_clips_are_each_clip_alone(backend):
    wave = random_tensor(5, 4000, seed=4) * 0.1
    lengths = torch.tensor([4000, 3001, 250, 201, 200])
    for changes in ({"top_db": 20.0}, {"padding": "zeros"}, {"output": "log", "power": 1}):
        config = LogMelConfig.mel_spectrogram(n_mels=32, mean=-3.0, std=2.0, **changes)
        dirty = wave.clone()
        for clip, length in enumerate(lengths.tolist()):
            dirty[clip, length:] = float("nan")
        got = run(config, dirty, lengths, backend, num_frames=25)
        assert got.shape == (5, 25, 32)
        for clip, length in enumerate(lengths.tolist()):
            alone = run(config, wave[clip : clip + 1, :length], None, backend)
            assert alone.shape[1] == (
                0 if length == 200 and config.padding == "reflect" else 1 + length // 200
            )
            # PyTorch's own products round otherwise in a batch
            slack = 1e-3 if backend == "reference" else 0.0
            assert torch.allclose(got[clip, : alone.shape[1]], alone[0], rtol=0.0, atol=slack)
            assert torch.allclose(got[clip, alone.shape[1] :], torch.tensor(0.75))


def test_top_db_counts_from_all_frames_even_those_cut_off(backend):
    wave = torch.cat(
        (0.001 * random_tensor(1, 3000, seed=5), random_tensor(1, 3000, seed=6)), dim=1
    )
    config = LogMelConfig.mel_spectrogram(top_db=30.0)
    whole = run(config, wave, backend=backend)
    assert torch.equal(run(config, wave, backend=backend, num_frames=10), whole[:, :10])
    assert whole[:, :10].min() == whole.max() - 30.0
    half = run(config, wave, backend=backend, num_frames=10)
    with ast_fast.use_backend(backend):
        narrow = LogMel(config, num_frames=10)(wave, None, torch.bfloat16)
    assert torch.equal(narrow, half.bfloat16())


def test_int16_and_lengths_in_samples(backend):
    samples = (random_tensor(2, 3000, seed=7) * 3000).to(torch.int16)
    config = LogMelConfig.mel_spectrogram(n_mels=40)
    got, want = (run(config, wave, backend=backend) for wave in (samples, samples / 32768.0))
    assert (got - want).abs().max() < 1e-4
    milli = {"window_ms": 25.0, "hop_ms": 10.0, "num_frames": None}
    exact = {"window_samples": 400, "hop_samples": 160, "n_fft": 512, "num_frames": None}
    wave = samples / 32768.0
    assert torch.equal(
        run(LogMelConfig(**milli), wave, backend=backend),
        run(LogMelConfig(**exact), wave, backend=backend),
    )


def test_a_longer_transform_pads_the_window_with_zeros(backend):
    wave = random_tensor(1, 2000, seed=8) * 0.1
    config = LogMelConfig(n_fft=1024, num_frames=None, mean=0.0, std=0.5)
    got = run(config, wave, backend=backend)
    spectrum = torch.fft.rfft(
        reference_frames(wave.double(), 400, 160)
        * torch.hann_window(400, False, dtype=torch.float64),
        n=1024,
    )
    energy = spectrum.abs().square() @ mel_tables(n_fft=1024).filters.T
    want = torch.log(energy.clamp(min=1.1920928955078125e-07))
    assert (got - want).abs().max() < 1e-3 and got.shape == (1, 11, 128)


def reference_frames(wave, window, hop):
    frames = wave.unfold(1, window, hop)
    frames = frames - frames.mean(-1, keepdim=True)
    return frames - 0.97 * torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)


GRADIENTS = [
    {"power": 1},
    {"n_fft": 60, "padding": "reflect", "mel_scale": "htk", "remove_dc": False, "preemphasis": 0.0},
    {"mel_scale": "slaney", "mel_norm": "slaney", "padding": "zeros", "log_offset": 1e-3},
    {"output": "db", "top_db": 15.0, "padding": "reflect", "window": "hamming"},
]
SMALL = {"sample_rate_hz": 2000, "num_mel_bins": 6, "window_samples": 40, "hop_samples": 15}


@pytest.mark.parametrize("setting", GRADIENTS, ids=str)
def test_gradcheck(setting):
    wave = random_tensor(2, 130, seed=9).double().requires_grad_()
    lengths = torch.tensor([130, 95])

    def features(wave):
        return ops.log_mel(wave, lengths, num_frames=10, mean=-2.0, std=1.5, **SMALL, **setting)

    assert torch.autograd.gradcheck(features, (wave,), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("setting", GRADIENTS, ids=str)
def test_gradients_of_the_kernels(setting):
    cpp = pytest.importorskip("ast_fast.cpp")
    if not cpp.available():
        pytest.skip(cpp.why_unavailable())
    lengths = torch.tensor([900, 613, 12])
    grads = []
    for dtype, backend in (
        (torch.float32, "cpp"),
        (torch.float32, "reference"),
        (torch.float64, "reference"),
    ):
        wave = random_tensor(3, 900, seed=10).to(dtype).requires_grad_()
        with ast_fast.use_backend(backend):
            y = ops.log_mel(wave, lengths, **SMALL, **setting)
        y.backward(random_tensor(*y.shape, seed=11).to(dtype))
        grads.append(wave.grad)
    ours, plain, exact = grads
    assert_within(ours, exact, "waveform gradient", plain)
    # 12 samples are no window, but one with zeros around them
    heard = 12 if setting.get("padding") == "zeros" else 0
    assert not ours[2, heard:].any()


def test_the_registered_gradient_of_the_reference_is_autograds():
    from ast_fast.reference import backward

    for setting in ({"power": 1}, {"log_offset": 0.01}, {"power": 1, "n_fft": 60}):
        tables = mel_tables(**SMALL, **setting)
        wave = random_tensor(2, 200, seed=12).double().requires_grad_()
        y = reference.ops.log_mel(wave, None, tables, 11, 0.0, 0.5)
        dy = random_tensor(*y.shape, seed=13).double()
        (want,) = torch.autograd.grad(y, wave, dy)
        assert torch.allclose(
            backward.log_mel(dy, wave.detach(), None, tables, 0.5), want, rtol=1e-9
        )


@pytest.mark.parametrize(
    "n_fft", [2, 8, 12, 20, 40, 48, 60, 100, 120, 180, 240, 300, 400, 500, 540, 720, 960, 1500]
)
def test_transforms_of_every_stage(n_fft):
    log_mel = pytest.importorskip("ast_fast.cpp.log_mel")
    sizes = {"window_samples": n_fft, "hop_samples": 7, "n_fft": n_fft, "preemphasis": 0.0}
    tables = mel_tables(
        num_mel_bins=4,
        mel_scale="htk",
        low_freq_hz=0.0,
        window="rectangular",
        remove_dc=False,
        **sizes,
    )
    wave = random_tensor(1, n_fft + 140, seed=n_fft)
    assert log_mel.unsupported(wave, None, tables.sizes) is None
    frames = tables.num_frames(wave.shape[1])
    got = log_mel.forward(wave, None, tables, frames, 0.0, 0.5, torch.float32)
    want = reference.ops.log_mel(wave.double(), None, tables, frames, 0.0, 0.5)
    assert (got - want).abs().max() < 2e-4


def test_transforms_the_kernels_lack_run_in_plain_pytorch(caplog):
    log_mel = pytest.importorskip("ast_fast.cpp.log_mel")
    assert "got 434" in log_mel.unsupported(torch.zeros(1, 900), None, mel_tables(n_fft=434).sizes)
    config = LogMelConfig.mel_spectrogram(n_fft=434, n_mels=32)
    wave = random_tensor(1, 3000, seed=14)
    assert torch.equal(run(config, wave, backend="auto"), run(config, wave))


def test_settings_travel_and_errors_name_them():
    config = LogMelConfig.mel_spectrogram(top_db=80.0, mel_scale="slaney", mel_norm="slaney")
    assert LogMelConfig.from_dict(config.to_dict()) == config
    old = {
        "sample_rate_hz": 16000,
        "num_mel_bins": 128,
        "mean": -4.0,
        "std": 4.0,
        "window_ms": 25.0,
    }
    assert LogMelConfig.from_dict(old).padding == "none"
    for wrong in (
        {"window": "hanning"}, {"mel_scale": "bark"}, {"power": 3}, {"output": "ln"}, {"padding": "same"},
        {"mel_norm": "slaney"}, {"top_db": 80.0}, {"n_fft": 0}, {"log_floor": 0.0}, {"log_offset": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LogMelConfig(**wrong)
        if next(iter(wrong)) not in ("n_fft", "log_floor", "log_offset"):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                ops.log_mel(torch.zeros(1, 800), **wrong)
    with pytest.raises(ValueError, match="n_fft=300: expected an even number of at least 400"):
        ops.log_mel(torch.zeros(1, 800), n_fft=300)
    assert MEL_SCALES[0] == "kaldi" and WINDOWS[0] == "hann"


def test_tables_made_in_inference_mode_still_give_gradients():
    setting = {"num_mel_bins": 77, "sample_rate_hz": 12000}
    wave = random_tensor(1, 3000, seed=15).double()
    with torch.inference_mode():
        ops.log_mel(wave, **setting)
    wave.requires_grad_()
    ops.log_mel(wave, **setting).sum().backward()
    assert wave.grad.isfinite().all()
