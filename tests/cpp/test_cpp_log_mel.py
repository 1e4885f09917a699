"""Log-mel of the C++ backend against the float64 reference, with torchaudio's own error as the budget."""

import dataclasses

import pytest
import torch

from ast_fast import reference
from ast_fast.cpp import log_mel
from ast_fast.reference.mel import mel_tables

F32, BF16 = torch.float32, torch.bfloat16
MEAN, STD = -4.2677393, 4.5689974


def signal(name, count, rate=16000):
    time = torch.arange(count, dtype=torch.float64) / rate
    if name == "noise":
        return (torch.rand(count) * 2 - 1).float()
    if name == "sine":
        return torch.sin(2 * torch.pi * 440 * time).float()
    if name == "chirp":
        return torch.sin(2 * torch.pi * (50 * time + 390 * time**2)).float()
    if name == "quiet":
        return torch.randint(-1, 2, (count,)).float() / 32768
    if name == "silence":
        return torch.zeros(count)
    if name == "offset":
        return torch.rand(count) * 0.1 + 0.3
    # harmonics under a slow envelope with a little noise
    voice = sum(torch.sin(2 * torch.pi * 120 * k * time) / k for k in range(1, 20))
    return (0.1 * voice * torch.sin(6 * time) ** 2 + 1e-4 * torch.randn(count)).float()


def kaldi(wave, tables):
    """torchaudio's fbank, or where it does not import the reference in float32: the budget's yardstick."""
    try:
        from torchaudio.compliance.kaldi import fbank
    except (ImportError, OSError, RuntimeError):
        return reference.ops.log_mel(wave[None], None, tables, 10**6, 0.0, 0.5)[0]
    return fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=tables.sample_rate_hz,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=tables.num_mel_bins,
        dither=0.0,
        frame_shift=10,
    )


@pytest.mark.parametrize("name", ["noise", "voice", "sine", "chirp", "quiet", "silence", "offset"])
def test_errors_stay_within_twice_torchaudios_maximum_and_its_mean(name):
    tables = mel_tables()
    wave = signal(name, 48000)
    theirs = kaldi(wave, tables)
    frames = tables.num_frames(48000)
    exact = reference.ops.log_mel(wave.double()[None], None, tables, frames, 0.0, 0.5)[0]
    ours = log_mel.forward(wave[None], None, tables, frames, 0.0, 0.5, F32)[0]
    error, budget = (ours - exact).abs(), (theirs[:frames] - exact).abs()
    # one rounding of a value near 16 is 1e-6: below that the budget would ask for the impossible
    assert error.max() <= max(2 * budget.max().item(), 2e-6)
    assert error.mean() <= max(budget.mean().item(), 1e-6)


@pytest.mark.parametrize(
    ("rate", "bins"),
    [(8000, 40), (16000, 16), (16000, 256), (22050, 64), (32000, 128), (44100, 80), (48000, 128)],
)
def test_other_rates_and_filter_counts(rate, bins):
    tables = mel_tables(sample_rate_hz=rate, num_mel_bins=bins)
    wave = torch.stack([signal("noise", rate // 2, rate), signal("voice", rate // 2, rate)])
    frames = tables.num_frames(rate // 2)
    exact = reference.ops.log_mel(wave.double(), None, tables, frames, MEAN, STD)
    ours = log_mel.forward(wave, None, tables, frames, MEAN, STD, F32)
    assert (ours - exact).abs().max() < 1e-3 and (ours - exact).abs().mean() < 3e-6


def test_an_empty_filter_gives_the_floor_exactly():
    tables = mel_tables()
    ours = log_mel.forward(signal("noise", 16000)[None], None, tables, 98, 0.0, 0.5, F32)
    floor = torch.log(torch.tensor(1.1920928955078125e-07))
    assert (ours[0, :, 3] == floor).all()
    silent = log_mel.forward(torch.zeros(1, 16000), None, tables, 98, 0.0, 0.5, F32)
    assert (silent == floor).all()


@pytest.mark.parametrize("out_dtype", [F32, BF16, torch.float16])
def test_ragged_lengths_padding_and_cutting(out_dtype):
    tables = mel_tables()
    wave = torch.rand(5, 4000) - 0.5
    wave[4] = float("nan")  # never read: its clip has no samples
    lengths = torch.tensor([4000, 399, 400, 2345, 0])
    for num_frames in (1, 7, 23, 40):
        ours = log_mel.forward(wave, lengths, tables, num_frames, MEAN, STD, out_dtype)
        assert ours.dtype == out_dtype
        for clip, length in enumerate(lengths.tolist()):
            alone = wave[clip : clip + 1, :length].double()
            exact = reference.ops.log_mel(alone, None, tables, num_frames, MEAN, STD)
            tolerance = 2e-4 if out_dtype == F32 else 2e-2
            assert (ours[clip] - exact[0]).abs().max() < tolerance
    padding = -MEAN / (2 * STD)
    assert torch.allclose(ours[1].double(), torch.tensor(padding).double(), atol=2e-3)


def test_int16_is_the_float_waveform_divided_by_32768():
    tables = mel_tables()
    samples = torch.randint(-32768, 32768, (2, 5000), dtype=torch.int16)
    ours = log_mel.forward(samples, None, tables, 30, MEAN, STD, F32)
    same = log_mel.forward(samples.float() / 32768, None, tables, 30, MEAN, STD, F32)
    assert (ours - same).abs().max() < 2e-5


def test_strided_waveforms_and_samples_past_the_end_of_a_row(guarded):
    tables = mel_tables()
    big = torch.rand(6, 3000) - 0.5
    view = big[::2, 100:2500]
    assert torch.equal(
        log_mel.forward(view, None, tables, 14, MEAN, STD, F32),
        log_mel.forward(view.contiguous(), None, tables, 14, MEAN, STD, F32),
    )
    step = big[:, ::2]
    assert torch.equal(
        log_mel.forward(step, None, tables, 14, MEAN, STD, F32),
        log_mel.forward(step.contiguous(), None, tables, 14, MEAN, STD, F32),
    )
    wave = guarded((1, 551))
    wave.copy_(torch.rand(1, 551))
    tight = mel_tables(sample_rate_hz=22050)
    assert log_mel.forward(wave, None, tight, 1, 0.0, 0.5, F32).isfinite().all()


def test_one_bad_sample_poisons_the_frames_that_hold_it_and_no_other():
    tables = mel_tables()
    wave = torch.rand(2, 16000) - 0.5
    wave[0, 8000] = float("nan")
    ours = log_mel.forward(wave, None, tables, 98, 0.0, 0.5, F32)
    bad = ours.isnan().any(-1)
    covering = [s for s in range(98) if s * 160 <= 8000 < s * 160 + 400]
    assert bad[0].nonzero().flatten().tolist() == covering and not bad[1].any()


@pytest.mark.parametrize(
    "setting",
    [{}, {"sample_rate_hz": 22050, "num_mel_bins": 40}, {"preemphasis": 0.0}, {"remove_dc": False}],
)
def test_gradients_are_the_exact_adjoint(setting, within):
    tables = mel_tables(**setting)
    hop, window = tables.hop_samples, tables.window_samples
    lengths = torch.tensor([window + 20 * hop + 3, window, window - 1])
    wave = torch.rand(3, int(lengths.max())) - 0.5
    dy = torch.randn(3, 25, tables.num_mel_bins)
    exact = wave.double().requires_grad_()
    reference.ops.log_mel(exact, lengths, tables, 25, MEAN, STD).backward(dy.double())
    theirs = wave.clone().requires_grad_()
    reference.ops.log_mel(theirs, lengths, tables, 25, MEAN, STD).backward(dy)
    ours = log_mel.backward(dy, wave, lengths, tables, MEAN, STD)
    within(ours, theirs.grad, exact.grad, 1e-5, "dwave")
    assert not ours[2].any() and not ours[1, window:].any()


def test_silence_has_zero_gradient_and_empty_inputs_have_shapes():
    tables = mel_tables()
    silent = torch.zeros(1, 4000)
    assert not log_mel.backward(torch.randn(1, 23, 128), silent, None, tables, MEAN, STD).any()
    assert log_mel.forward(torch.empty(0, 4000), None, tables, 23, MEAN, STD, F32).shape == (
        0,
        23,
        128,
    )
    assert log_mel.forward(silent, None, tables, 0, MEAN, STD, F32).shape == (1, 0, 128)
    short = log_mel.forward(torch.empty(2, 0), None, tables, 2, MEAN, STD, F32)
    assert torch.allclose(short, torch.tensor(-MEAN / (2 * STD)))
    assert log_mel.backward(
        torch.randn(2, 2, 128), torch.empty(2, 0), None, tables, MEAN, STD
    ).shape == (2, 0)


def bands(*ranges, **changes):
    """Tables of a rectangular window whose filters weigh bins first .. last with 1, 2, 3 ..."""
    tables = mel_tables()
    filters = torch.zeros(len(ranges), tables.n_fft // 2 + 1, dtype=torch.float64)
    for row, (first, last) in zip(filters, ranges, strict=True):
        row[first : last + 1] = torch.arange(1.0, last - first + 2)
    window = torch.ones_like(tables.window)
    return dataclasses.replace(
        tables, num_mel_bins=len(ranges), filters=filters, window=window, **changes
    )


@pytest.mark.parametrize("magnitude", [False, True])
def test_windows_that_do_not_start_at_zero_and_filters_up_to_the_last_bin(magnitude, within):
    # the first sample is its own predecessor, and the last bin lies apart from the others
    tables = bands((0, 9), (250, 255), (250, 256), (256, 256), (0, 256), magnitude=magnitude)
    wave = 0.3 + 0.1 * torch.rand(2, 4000)
    exact, theirs = wave.double().requires_grad_(), wave.clone().requires_grad_()
    dy = torch.randn(2, 20, 5)
    want = reference.ops.log_mel(exact, None, tables, 20, 0.0, 0.5)
    plain = reference.ops.log_mel(theirs, None, tables, 20, 0.0, 0.5)
    ours = log_mel.forward(wave, None, tables, 20, 0.0, 0.5, F32)
    within(ours, plain.detach(), want.detach(), 1e-6, "features")
    want.backward(dy.double())
    plain.backward(dy)
    within(
        log_mel.backward(dy, wave, None, tables, 0.0, 0.5), theirs.grad, exact.grad, 1e-5, "dwave"
    )


def test_magnitudes_of_nothing_have_zero_gradient():
    # an offset keeps the energy of silence above the floor, where the root of 0 has no slope
    tables = bands((0, 20), (200, 256), magnitude=True, log_offset=1e-3)
    grad = log_mel.backward(torch.randn(1, 23, 2), torch.zeros(1, 4000), None, tables, 0.0, 0.5)
    assert grad.shape == (1, 4000) and not grad.any()
