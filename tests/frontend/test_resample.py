"""Resampling: the filter that is promised, torchaudio's own when asked for, exact lengths, gradients."""

from __future__ import annotations

import math

import pytest
import torch

import ast_fast
from ast_fast.resample import Resample
from ast_fast.testing import random_tensor

RATES = [
    (44100, 16000), (48000, 16000), (22050, 16000), (11025, 16000), (8000, 16000), (32000, 16000),
    (16000, 48000), (16000, 44100), (16000, 32000),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), RATES)
def test_the_filter_keeps_its_promise(source, target):
    module = Resample(source, target)
    nyquist = 0.5 * min(source, target)
    passed = module.response_db(torch.linspace(0.0, 0.9 * nyquist, 400))
    stopped = module.response_db(torch.linspace(nyquist, 20 * nyquist, 4001))
    assert passed.abs().max() < 1e-4 and stopped.max() < -110.0
    assert module.response_db(torch.tensor([0.95 * nyquist])).item() == pytest.approx(
        -6.02, abs=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("source", "target"), RATES)
def test_tones_pass_or_vanish(source, target, dtype):
    """The same promise on sound: a tone keeps amplitude and phase, one above Nyquist is gone."""
    module, nyquist = Resample(source, target), 0.5 * min(source, target)

    def tone(frequency, rate, count):
        return torch.sin(2 * math.pi * frequency * torch.arange(count, dtype=torch.float64) / rate)

    count = source // 4
    for share in (0.01, 0.3, 0.9):
        got = module(tone(share * nyquist, source, count).to(dtype)[None])[0]
        want = tone(share * nyquist, target, got.shape[0])
        middle = slice(target // 50, -target // 50)
        assert (got - want)[middle].abs().max() < 2e-6
    if target < source:
        for share in (1.0, 1.1, 1.5):
            if share * nyquist < 0.5 * source:
                gone = module(tone(share * nyquist, source, count).to(dtype)[None])[0]
                assert gone[target // 50 : -target // 50].abs().max() < 10 ** (-105 / 20)


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (48000, 16000), (16000, 22050)])
def test_torchaudios_parameters_give_torchaudios_waveform(source, target):
    functional = pytest.importorskip("torchaudio.functional")
    wave = random_tensor(3, 5000, seed=1)
    wide = wave.double()
    for ours, theirs in (
        (("hann", 6, 0.99), {}),
        (
            ("kaiser", 16, 0.94, 14.769656459379492),
            {
                "lowpass_filter_width": 16,
                "rolloff": 0.94,
                "resampling_method": "sinc_interp_kaiser",
                "beta": 14.769656459379492,
            },
        ),
    ):
        module = Resample(source, target, *ours)
        want = functional.resample(wide, source, target, **theirs)
        # torchaudio rounds Kaiser's beta to float32
        assert (module(wide) - want).abs().max() < (1e-12 if not theirs else 1e-6)
        single = functional.resample(wave, source, target, **theirs)
        assert (module(wave) - want).abs().max() <= max(2 * (single - want).abs().max(), 1e-6)


def test_lengths_are_exact():
    for source, target in [*RATES, (3, 7), (7, 3), (16000, 16000)]:
        module = Resample(source, target)
        for samples in (0, 1, 2, 3, 99, 100, 101, 1471):
            want = math.ceil(samples * target / source)
            assert (
                module(torch.zeros(2, samples)).shape
                == (2, want)
                == (2, module.output_length(samples))
            )
        lengths = torch.arange(0, 50_000, 7)
        wanted = [-(-n * target // source) for n in lengths.tolist()]
        assert module.output_lengths(lengths).tolist() == wanted


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (3, 1), (1, 3), (16000, 16000)])
def test_ragged_clips_are_each_clip_alone(source, target):
    module = Resample(source, target)
    wave, lengths = random_tensor(4, 2000, seed=2), torch.tensor([2000, 1234, 1, 0])
    dirty = wave.clone()
    for clip, length in enumerate(lengths.tolist()):
        dirty[clip, length:] = float("nan")
    got = module(dirty, lengths)
    ends = module.output_lengths(lengths).tolist()
    for clip, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True)):
        alone = module(wave[clip : clip + 1, :length])[0]
        assert alone.shape == (end,)
        assert torch.allclose(got[clip, :end], alone, atol=2e-6) and not got[clip, end:].any()


def test_gradients_and_types():
    wave = random_tensor(2, 60, seed=3).double().requires_grad_()
    module = Resample(3, 2, filter_width=8)
    assert torch.autograd.gradcheck(lambda w: module(w, torch.tensor([60, 41])), (wave,))
    samples = (random_tensor(1, 500, seed=4) * 8000).to(torch.int16)
    assert torch.equal(module(samples), module(samples / 32768.0))
    narrow = random_tensor(1, 500, seed=5).bfloat16()
    assert module(narrow).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(narrow.float()), module(narrow))
    assert not list(module.state_dict()) and ast_fast.Resample is Resample
    with torch.inference_mode():
        first = Resample(5, 4)
        first(torch.zeros(1, 50))
    first(torch.zeros(1, 50, requires_grad=True)).sum().backward()


@pytest.mark.filterwarnings("error:Dynamo detected:UserWarning")
def test_compiled_it_is_the_same():
    module = Resample(48000, 16000)
    wave, lengths = random_tensor(2, 3000, seed=6), torch.tensor([3000, 2000])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(wave, lengths), module(wave, lengths), atol=1e-6)


def test_soxr_agrees_in_the_pass_band():
    soxr = pytest.importorskip("soxr")
    hz, shares = torch.tensor([[100.0], [997.0], [3500.0], [7000.0]]).double(), 0.25

    def chord(rate):
        return (shares * torch.sin(2 * math.pi * hz * torch.arange(rate) / rate + hz)).sum(0)

    middle = slice(1000, -1000)
    exact = chord(16000)[middle]
    theirs = torch.from_numpy(soxr.resample(chord(44100).numpy(), 44100, 16000, quality="VHQ"))
    ours = Resample(44100, 16000)(chord(44100)[None])[0]
    assert (ours[middle] - exact).abs().max() < 1e-6
    # soxr loses 0.005 dB at 7 kHz
    assert (theirs[middle] - exact).abs().max() < 2e-4


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"to_hz=0: expected a positive whole rate"):
        Resample(16000, 0)
    with pytest.raises(ValueError, match=r"44099:16000 need .* filter taps"):
        Resample(44099, 16000)(torch.zeros(1, 100))
    with pytest.raises(ValueError, match=r"wave has shape \(100,\)"):
        Resample(2, 1)(torch.zeros(100))
    with pytest.raises(TypeError, match=r"wave is torch\.int32"):
        Resample(2, 1)(torch.zeros(1, 100, dtype=torch.int32))
