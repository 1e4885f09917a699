"""Log-mel kernels in the Triton interpreter, against float64 with torchaudio's error as yardstick."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast.equivalence.budgets import log_mel_budget
from ast_fast.equivalence.measures import measure
from ast_fast.kernels import _tuned, log_mel, log_mel_backward, log_mel_tables
from ast_fast.reference import ops as reference
from ast_fast.reference.mel import LOG_FLOOR, mel_tables
from ast_fast.testing import LAYOUTS, assert_same, assert_within, random_tensor

pytestmark = pytest.mark.interpret

MEAN, STD = -4.2677393, 4.5689974
RATES = [8000, 16000, 22050, 32000, 44100, 48000]
# a small setting: 100 samples a window, 40 a hop, 128 in the transform
SMALL = {"sample_rate_hz": 4000, "num_mel_bins": 20}


def features(wave, lengths, tables, frames, dtype=torch.float32, mean=MEAN, std=STD):
    return log_mel.forward(wave, lengths, tables, frames, mean, std, dtype)


def oracle(wave, lengths, tables, frames, mean=MEAN, std=STD):
    wide = wave.double() / 32768 if wave.dtype == torch.int16 else wave.double()
    return reference.log_mel(wide, lengths, tables, frames, mean, std)


def to_int16(wave):
    return (wave * 32768).round().clamp(-32768, 32767).to(torch.int16)


def torchaudio_features(wave, tables):
    """Raw log-mel energies of torchaudio, in float32."""
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    return kaldi.fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=tables.sample_rate_hz,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=tables.num_mel_bins,
        dither=0.0,
        frame_shift=10,
    )


def signals(count, rate):
    """Signals of amplitude one or less, float64 [count]."""
    time = torch.arange(count, dtype=torch.float64) / rate
    noise = random_tensor(count, seed=1).double()
    phase = 2 * math.pi * (120 * time + 10 * torch.sin(3 * time))
    voice = sum(torch.sin(k * phase) / k for k in range(1, 25))
    sweep = math.pi * (0.5 * rate / float(time[-1])) * time.square()
    spectrum = torch.fft.rfft(noise)
    spectrum[len(spectrum) // 4 :] *= 1e-4
    return {
        "noise": 0.2 * noise.clamp(-4, 4),
        "voice": 0.3 * voice + 1e-4 * noise,
        "sine440": torch.sin(2 * math.pi * 440 * time),
        "chirp": torch.sin(sweep),
        "quiet": torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(2)) / 32768,
        "square": torch.where(torch.sin(2 * math.pi * 200 * time) >= 0, 1.0, -1.0).double(),
        "offset": 0.5 + 1e-3 * noise,
        "lowpass": 0.2 * torch.fft.irfft(spectrum, n=count),
    }


SIGNALS = sorted(signals(1000, 16000))


@pytest.mark.parametrize("form", ["f32", "int16"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_errors_stay_below_torchaudios_own(arena, signal, form):
    tables = mel_tables()
    wave = signals(160 * 30 + 240, 16000)[signal].float()
    if form == "int16":
        wave = to_int16(wave)
    frames = tables.num_frames(len(wave))
    exact = oracle(wave[None], None, tables, frames, 0.0, 0.5)[0]
    ours = measure(
        features(arena.put(wave[None]), None, tables, frames, mean=0.0, std=0.5)[0], exact
    )
    single = wave / 32768 if form == "int16" else wave
    plain = measure(torchaudio_features(single, tables), exact)
    worst, mean = log_mel_budget(plain, 16.0, 1.0, torch.float32)
    assert ours.max_abs <= worst, f"worst {ours.max_abs:.1e}, torchaudio {plain.max_abs:.1e}"
    assert ours.mean_abs <= mean, f"mean {ours.mean_abs:.1e}, torchaudio {plain.mean_abs:.1e}"


def test_products_of_coarse_pieces_are_exact_sums_of_integers():
    # the claim that makes the large sum independent of the tensor core's order and rounding
    for rate in (8000, 16000, 48000):
        op = log_mel_tables.build_operator(mel_tables(rate))
        coarse = op.half_pieces[0].double()
        steps = coarse / 32
        assert torch.equal(steps, steps.round()) and steps.abs().max() <= 256
        assert torch.equal(coarse, op.single_pieces[0].double())
        # the largest coarse sample is 2^7 steps of 2^8
        assert float(steps.abs().sum(0).max()) * 2**7 < 2**24
        scale = 1 / op.unscale
        exact = torch.view_as_real(log_mel_tables.fold(mel_tables(rate))).flatten(1) * scale
        first, last = log_mel_tables.used_bins(mel_tables(rate).filters)
        exact = exact[:, 2 * first : 2 * last]
        pieces = op.half_pieces.double().sum(0)[: exact.shape[0], : exact.shape[1]]
        assert float((pieces - exact).abs().max()) <= 2.0**-18


def test_filters_survive_as_runs_of_bins_and_of_filters():
    for setting in (mel_tables(), mel_tables(8000, 16), mel_tables(48000, 256)):
        op = log_mel_tables.build_operator(setting)
        first, last = log_mel_tables.used_bins(setting.filters)
        want = setting.filters[:, first:last].float()
        by_mel, by_bin = torch.zeros_like(want), torch.zeros_like(want)
        for tap, weights in enumerate(op.bin_weights):
            for mel, weight in enumerate(weights.tolist()):
                if weight:
                    by_mel[mel, int(op.first_bin[mel]) + tap] += weight
        for tap, weights in enumerate(op.mel_weights):
            for bin_, weight in enumerate(weights.tolist()):
                if weight:
                    by_bin[int(op.first_mel[bin_]) + tap, bin_] += weight
        assert torch.equal(by_mel, want) and torch.equal(by_bin, want)


@pytest.fixture
def quick_tiles(monkeypatch):
    """Few frames and many bins a tile: the interpreter's float16 products are slow."""
    real = dict(_tuned.configs("log_mel", 80))

    def patch(tables, pieces):
        bins = log_mel_tables.operator(tables, torch.device("cpu")).dense.shape[1] // 2
        tile = {"frames": 4, "samples": 32, "bins": bins & -bins, "pieces": pieces}
        patched = real | {name: real[name] | tile for name in ("power", "spectrum")}
        patched["mel"] = real["mel"] | {"frames": 4}
        patched["frame_gradient"] = real["frame_gradient"] | {"samples": 512, "bins": 128}
        monkeypatch.setattr(_tuned, "configs", lambda op, capability: patched)

    return patch


@pytest.mark.parametrize(
    ("rate", "mels"), [*((rate, 128) for rate in RATES), (8000, 16), (48000, 16), (48000, 256)]
)
def test_every_sample_rate(arena, quick_tiles, rate, mels):
    tables = mel_tables(rate, mels)
    samples = tables.window_samples + 2 * tables.hop_samples + 7
    wave = arena.put(0.1 * random_tensor(1, samples, seed=rate))
    forms = [("float32", wave), ("float32", to_int16(wave))]
    if mels == 128:
        forms.append(("float16", wave))
    for pieces, form in forms:
        quick_tiles(tables, pieces)
        ours, exact = features(form, None, tables, 4), oracle(form, None, tables, 4)
        assert float((ours - exact).abs().max()) < 3e-6
    quick_tiles(tables, "float32")
    check_gradient(arena.put(random_tensor(1, 4, mels, seed=1)), wave, None, tables)


def wave_gradient(dy, wave, lengths, tables, dtype=torch.float64):
    leaf = wave.detach().to(dtype, copy=True).requires_grad_()
    frames = dy.shape[1]
    reference.log_mel(leaf, lengths, tables, frames, MEAN, STD).backward(dy.to(dtype))
    return leaf.grad


def check_gradient(dy, wave, lengths, tables):
    ours = log_mel.backward(dy, wave, lengths, tables, MEAN, STD)
    assert ours.dtype == torch.float32 and ours.shape == wave.shape and ours.is_contiguous()
    exact = wave_gradient(dy, wave, lengths, tables)
    plain = wave_gradient(dy, wave, lengths, tables, torch.float32)
    assert_within(ours, exact, "waveform gradient", plain)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_waveform_gradient_matches_fp64_on_ragged_clips(arena, dtype):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(5, 700, seed=0))
    lengths = torch.tensor([700, 99, 100, 0, 431])
    dy = arena.put(random_tensor(5, 18, 20, seed=1, dtype=dtype))
    ours = check_gradient(dy, wave, lengths, tables)
    assert not ours[1].any() and not ours[3].any() and not ours[4, 420:].any()
    assert ours[2, :100].any() and not ours[2, 100:].any()
    assert_same(check_gradient(dy, wave, None, tables)[0], ours[0])
    # fewer frames than the clip holds, and more
    check_gradient(dy[:, :4], wave, lengths, tables)
    check_gradient(arena.put(random_tensor(5, 40, 20, seed=2)), wave, lengths, tables)


def test_the_gradient_is_zero_where_energy_is_at_the_floor(arena):
    tables = mel_tables(**SMALL)
    wave = arena.put(torch.zeros(2, 300))
    wave[1] = 1e-6 * random_tensor(300, seed=3)
    dy = arena.put(random_tensor(2, 6, 20, seed=1))
    assert not log_mel.backward(dy, wave, None, tables, MEAN, STD).any()


def test_without_dc_removal_and_without_preemphasis(arena):
    for setting in ({"remove_dc": False}, {"preemphasis": 0.0}, {"log_floor": 1e-3}):
        tables = mel_tables(**SMALL, **setting)
        wave = arena.put(0.3 + 0.1 * random_tensor(2, 400, seed=0))
        ours, exact = features(wave, None, tables, 8), oracle(wave, None, tables, 8)
        assert float((ours - exact).abs().max()) < 3e-6
        check_gradient(arena.put(random_tensor(2, 8, 20, seed=1)), wave, None, tables)


def test_frames_are_padded_with_raw_zeros_and_cut(arena):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(4, 500, seed=0))
    lengths = torch.tensor([500, 99, 100, 260])
    counts = [11, 0, 1, 5]
    out = features(wave, lengths, tables, 16)
    pad = torch.tensor((0.0 - MEAN) / (2 * STD))
    for clip, count in enumerate(counts):
        assert torch.allclose(out[clip, count:], pad, rtol=1e-6)
        assert torch.isclose(out[clip, :count], pad, rtol=1e-6).sum() <= 1
    assert_same(features(wave, lengths, tables, 3), out[:, :3].contiguous())
    longer = features(wave, torch.tensor([9999, 99, 100, 260]), tables, 16)
    assert_same(longer, out, "a length past the buffer is the buffer's")


def test_an_empty_filter_and_silence_give_the_floor_exactly(arena):
    tables = mel_tables()
    assert not tables.filters[3].any()
    wave = arena.put(0.1 * random_tensor(1, 720, seed=0))
    floor = torch.tensor(LOG_FLOOR).log()
    out = features(wave, None, tables, 3, mean=0.0, std=0.5)
    assert torch.equal(out[0, :, 3], floor.expand(3)) and (out[0, :, 4] > floor).all()
    for level in (0.0, 0.25, 1.0, -32768.0, 3e-39):
        quiet = arena.put(torch.full((1, 720), level))
        assert torch.equal(
            features(quiet, None, tables, 3, mean=0.0, std=0.5), floor.expand(1, 3, 128)
        )
    loudest = arena.put(torch.full((1, 720), -32768, dtype=torch.int16))
    assert torch.equal(
        features(loudest, None, tables, 3, mean=0.0, std=0.5), floor.expand(1, 3, 128)
    )


@pytest.mark.parametrize("scale", [1e-4, 3e4, 1e15])
def test_any_amplitude(arena, scale):
    tables = mel_tables(**SMALL)
    wave = arena.put(scale * random_tensor(1, 400, seed=0))
    ours, exact = features(wave, None, tables, 8), oracle(wave, None, tables, 8)
    assert float((ours - exact).abs().max()) < 3e-6


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_bad_sample_stays_in_the_frames_that_cover_it(arena, poison):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(2, 500, seed=0))
    dy = arena.put(random_tensor(2, 11, 20, seed=1))
    clean = features(wave, None, tables, 11)
    clean_grad = log_mel.backward(dy, wave, None, tables, MEAN, STD)
    wave[1, 205] = poison
    out = features(wave, None, tables, 11)
    hit = torch.zeros(2, 11, dtype=torch.bool)
    hit[1, 3:6] = True
    assert out[hit].isnan().all() and torch.equal(out[~hit], clean[~hit])
    grad = log_mel.backward(dy, wave, None, tables, MEAN, STD)
    assert_same(grad[0], clean_grad[0])
    assert_same(grad[1, :120], clean_grad[1, :120])
    assert_same(grad[1, 300:], clean_grad[1, 300:])


def test_what_lies_beyond_a_clips_length_is_never_read(arena):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(2, 500, seed=0))
    lengths = torch.tensor([500, 230])
    dy = arena.put(random_tensor(2, 14, 20, seed=1))
    clean = (
        features(wave, lengths, tables, 14),
        log_mel.backward(dy, wave, lengths, tables, MEAN, STD),
    )
    wave[1, 230:] = math.nan
    dy[1, 4:] = math.nan
    dy[0, 11:] = math.inf
    assert_same(features(wave, lengths, tables, 14), clean[0])
    assert_same(log_mel.backward(dy, wave, lengths, tables, MEAN, STD), clean[1])


def tuned_families():
    """One GPU of every family in the table."""
    seen = {_tuned.family("log_mel", arch): arch for arch in (120, 100, 90, 86, 80, 75)}
    return [pytest.param(arch, id=name) for name, arch in seen.items()]


@pytest.mark.parametrize("form", ["f32", "int16"])
@pytest.mark.parametrize("capability", tuned_families())
def test_every_tuned_configuration(arena, monkeypatch, capability, form):
    monkeypatch.setattr(_tuned, "capability", lambda device: capability)
    tables = mel_tables()
    wave = signals(160 * 4 + 400, 16000)["sine440"].float().repeat(2, 1)
    wave[1] = signals(wave.shape[1], 16000)["voice"]
    wave = arena.put(to_int16(wave) if form == "int16" else wave)
    frames = 6
    exact = oracle(wave, None, tables, frames)
    plain = oracle(wave.float() / 32768 if form == "int16" else wave, None, tables, frames)
    single = reference.log_mel(
        wave / 32768 if form == "int16" else wave, None, tables, frames, MEAN, STD
    )
    assert plain.shape == exact.shape
    ours = measure(features(wave, None, tables, frames), exact)
    budget = log_mel_budget(measure(single, exact), 2.0, 1.0, torch.float32)
    assert ours.max_abs <= budget[0] and ours.mean_abs <= budget[1]
    if form == "f32":
        noise = arena.put(0.1 * random_tensor(2, wave.shape[1], seed=5))
        check_gradient(arena.put(random_tensor(2, frames, 128, seed=1)), noise, None, tables)


def test_clips_in_chunks_give_the_same_numbers(arena, monkeypatch):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(5, 400, seed=0))
    lengths = torch.tensor([400, 130, 90, 300, 222])
    dy = arena.put(random_tensor(5, 8, 20, seed=1))
    whole = (
        features(wave, lengths, tables, 8),
        log_mel.backward(dy, wave, lengths, tables, MEAN, STD),
    )
    monkeypatch.setattr(log_mel, "_POWER_BYTES", 2 * 4 * 8 * 64)
    monkeypatch.setattr(log_mel_backward, "_SCRATCH_BYTES", 2 * 4 * 8 * (128 + 128 + 20))
    assert_same(features(wave, lengths, tables, 8), whole[0])
    # tiles of the frame gradient run across clips, and NumPy sums other tiles in another order
    again = log_mel.backward(dy, wave, lengths, tables, MEAN, STD)
    assert_within(again, whole[1].double(), "waveform gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_a_contiguous_copy(arena, layout):
    tables = mel_tables(**SMALL)
    move = LAYOUTS[layout]
    wave = arena.put(0.1 * random_tensor(3, 300, seed=0))
    lengths = torch.tensor([300, 200, 120])
    dy = arena.put(random_tensor(3, 6, 20, seed=1))
    assert_same(features(move(wave), move(lengths), tables, 6), features(wave, lengths, tables, 6))
    assert_same(
        features(move(to_int16(wave)), None, tables, 6), features(to_int16(wave), None, tables, 6)
    )
    assert_same(
        log_mel.backward(move(dy), move(wave), lengths, tables, MEAN, STD),
        log_mel.backward(dy, wave, lengths, tables, MEAN, STD),
    )
    for expanded in (dy[:1].expand_as(dy), dy[:1, :1, :1].expand_as(dy)):
        check_gradient(expanded, wave, lengths, tables)


def test_half_precision_output_is_the_rounded_float32_output(arena):
    tables = mel_tables(**SMALL)
    wave = arena.put(0.1 * random_tensor(2, 300, seed=0))
    out = features(wave, None, tables, 8)
    assert_same(features(wave, None, tables, 8, torch.float16), out.half())


def test_nothing_in_gives_nothing_or_padding_out():
    tables = mel_tables(**SMALL)
    assert features(torch.zeros(0, 300), None, tables, 8).shape == (0, 8, 20)
    assert features(torch.zeros(2, 300), None, tables, 0).shape == (2, 0, 20)
    pad = (0.0 - MEAN) / (2 * STD)
    for samples in (0, 99):
        out = features(torch.zeros(2, samples), None, tables, 3)
        assert torch.allclose(out, torch.tensor(pad), rtol=1e-6)
        grad = log_mel.backward(out, torch.zeros(2, samples), None, tables, MEAN, STD)
        assert grad.shape == (2, samples) and not grad.any()
    assert log_mel.backward(
        torch.zeros(0, 8, 20), torch.zeros(0, 300), None, tables, MEAN, STD
    ).shape == (0, 300)


def test_addresses_past_two_to_the_31_elements():
    # untouched pages of a large allocation cost no memory
    tables = mel_tables(**SMALL)
    wave = to_int16(0.1 * random_tensor(5, 300, seed=0))
    stride = 2**29 + 16
    far = torch.empty(4 * stride + 300, dtype=torch.int16).as_strided((5, 300), (stride, 1))
    far.copy_(wave)
    assert_same(features(far, None, tables, 6), features(wave, None, tables, 6))


def test_tables_live_as_long_as_their_setting(monkeypatch):
    mel_tables.cache_clear()
    tables = mel_tables(**SMALL)
    built = []
    real = log_mel_tables.build_operator
    monkeypatch.setattr(
        log_mel_tables, "build_operator", lambda setting: built.append(1) or real(setting)
    )
    for _ in range(3):
        features(torch.zeros(1, 300), None, tables, 3)
    assert built == [1] and tables in log_mel_tables._cache
    mel_tables.cache_clear()
    count = len(log_mel_tables._cache)
    del tables
    assert len(log_mel_tables._cache) == count - 1


def test_unsupported_names_what_is_wrong():
    tables = mel_tables(**SMALL)
    assert log_mel.unsupported(torch.zeros(1, 300), None, tables) is None
    assert log_mel.unsupported(torch.zeros(1, 300, dtype=torch.int16), None, tables) is None
    assert "float64" in log_mel.unsupported(torch.zeros(1, 300).double(), None, tables)
    assert "2400" in log_mel.unsupported(torch.zeros(1, 300), None, mel_tables(96000))


@given(
    clips=st.integers(1, 4),
    samples=st.integers(1, 600),
    frames=st.integers(1, 16),
    ragged=st.booleans(),
    form=st.sampled_from(["f32", "int16"]),
    scale=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_length_and_number_of_frames(arena, clips, samples, frames, ragged, form, scale, seed):
    tables = mel_tables(**SMALL)
    wave = scale * random_tensor(clips, samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, samples + 1, (clips,), generator=generator) if ragged else None
    form_wave = arena.put(to_int16(wave) if form == "int16" else wave)
    ours, exact = (f(form_wave, lengths, tables, frames) for f in (features, oracle))
    assert float((ours - exact).abs().max()) < 1e-5
    if form == "f32":
        dy = arena.put(random_tensor(clips, frames, 20, seed=seed + 1))
        grad = log_mel.backward(dy, form_wave, lengths, tables, MEAN, STD)
        want = wave_gradient(dy, form_wave, lengths, tables)
        assert float((grad - want).norm()) <= 1e-4 * float(want.norm())
