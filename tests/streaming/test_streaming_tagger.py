"""StreamingTagger: every window gives what the model gives for its samples, at exact times."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_fast import StreamingTagger, cpp, create_model, predict, use_backend
from ast_fast.audio import resample
from ast_fast.config import LogMelConfig

NAMES = ("cat", "dog", "rain")


def tiny(num_classes=3, labels=NAMES, **front):
    """A model of 32 frames of 32 mel bins: 5360 samples at 16 kHz."""
    torch.manual_seed(0)
    return create_model(
        "ast_mini_p16_s10",
        num_classes=num_classes,
        labels=labels,
        embed_dim=32,
        depth=1,
        num_heads=1,
        input_fdim=32,
        input_tdim=32,
        frontend_config=LogMelConfig(num_mel_bins=32, num_frames=32, **front),
    ).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # louder and softer by turns, so that windows differ
    wave = 0.2 * torch.randn(count, generator=generator)
    wave *= 1.1 + torch.sin(torch.arange(count) / 3000)
    if dtype == torch.int16:
        return (wave * 32768).round().clamp(-32768, 32767).to(dtype)
    return wave


def run(tagger, wave, sizes=(1 << 30,)):
    """Everything that a stream gives, pushed in chunks of these sizes, and flushed."""
    results, position, turn = [], 0, 0
    while position < len(wave):
        size = sizes[turn % len(sizes)]
        turn += 1
        results += tagger.push(wave[position : position + size])
        position += size
    return results + tagger.flush()


def offline(model, wave, result, rate=16000):
    """The model on the samples of a result alone."""
    part = wave[round(result.start_s * rate) : round(result.end_s * rate)]
    with torch.no_grad():
        return model.forward_waveform(part[None]).softmax(1)[0]


chunkings = st.lists(
    st.one_of(st.sampled_from([0, 1]), st.integers(2, 900), st.integers(900, 20000)),
    min_size=1,
    max_size=8,
).filter(lambda sizes: sum(sizes) >= 50)


@given(
    sizes=chunkings,
    num_samples=st.integers(0, 16000),
    hop_s=st.sampled_from([0.1, 0.25, 1 / 3, 0.05037]),
    dtype=st.sampled_from([torch.float32, torch.int16]),
)
def test_every_window_of_every_chunking_is_the_models_own_output(
    model, sizes, num_samples, hop_s, dtype
):
    wave = noise(num_samples, dtype=dtype)
    results = run(StreamingTagger(model, hop_s=hop_s), wave, sizes)
    # bitwise where frames are: the C++ front end
    tolerance = 0.0 if cpp.available() else 1e-6
    for result in results:
        expected = offline(model, wave, result)
        torch.testing.assert_close(result.probabilities, expected, rtol=0, atol=tolerance)
        assert result.labels[0] == (NAMES[int(expected.argmax())], float(expected.max()))
    once = run(StreamingTagger(model, hop_s=hop_s), wave)
    assert [r.end_s for r in results] == [r.end_s for r in once]
    torch.testing.assert_close(
        [r.probabilities for r in results],
        [r.probabilities for r in once],
        rtol=0,
        atol=tolerance,
    )


def test_a_full_window_is_what_predict_says_of_the_same_samples(model):
    wave = noise(16000, dtype=torch.int16)
    results = run(StreamingTagger(model, hop_s=0.2, top_k=2), wave, (700,))
    full = [result for result in results if result.filled == 1.0]
    assert len(full) == 4
    for result in full:
        part = wave[round(result.start_s * 16000) : round(result.end_s * 16000)]
        expected = predict(part, model, top_k=2)
        assert expected.windows == 1 and expected.labels == result.labels
        assert torch.equal(expected.probabilities, result.probabilities)
    assert not torch.equal(full[0].probabilities, full[-1].probabilities)


def test_times_and_filling_follow_the_frames(model):
    results = run(StreamingTagger(model, hop_s=0.1), noise(9000))
    assert [result.end_s for result in results] == [0.1, 0.2, 0.3, 0.4, 0.5, 9000 / 16000]
    # 8, 18, 28, 38, 48 and 54 whole frames; the window holds the last 32
    assert [result.filled for result in results] == [8 / 32, 18 / 32, 28 / 32, 1.0, 1.0, 1.0]
    assert [round(result.start_s * 100) for result in results] == [0, 0, 0, 6, 16, 22]


@pytest.mark.parametrize(("hop_s", "rate"), [(0.1, 16000), (1 / 3, 16000), (0.7, 22050)])
def test_results_do_not_drift_over_hours(hop_s, rate):
    model = tiny(sample_rate_hz=rate)
    tagger = StreamingTagger(model, hop_s=hop_s)
    hop = Fraction(hop_s).limit_denominator(1000) * rate
    # ten hours in, as if all of it had been pushed
    hours = 36_000 * rate
    tagger._mel._num_samples = hours
    tagger._hops = int(hours / hop)
    tagger._mel._tail = torch.zeros(1, hours - tagger._mel.num_frames * int(rate * 0.01))
    results = tagger.push(noise(3 * rate))
    first = int(hours / hop) + 1
    due = [int((first + index) * hop) for index in range(len(results))]
    assert len(results) == int(3 / hop_s) and due[-1] <= hours + 3 * rate
    assert [result.end_s for result in results] == [sample / rate for sample in due]


def test_no_frame_is_computed_twice(model, monkeypatch):
    from ast_fast.streaming import log_mel

    computed = []

    def count(*arguments, **options):
        frames = original(*arguments, **options)
        computed.append(frames.shape[1])
        return frames

    original = log_mel.log_mel_features
    monkeypatch.setattr(log_mel, "log_mel_features", count)
    tagger = StreamingTagger(model, hop_s=0.05)
    results = run(tagger, noise(16000), (130,))
    assert len(results) == 20 and sum(computed) == 98


def test_memory_does_not_grow_with_the_stream(model):
    tagger = StreamingTagger(model, hop_s=0.25)
    tagger.push(noise(16000))
    before = tagger._ring._buffer.data_ptr()
    for turn in range(30):
        tagger.push(noise(3333, seed=turn))
        assert tagger._ring._buffer.shape == (64, 32) and tagger._mel.pending_samples < 400
    assert tagger._ring._buffer.data_ptr() == before


def test_a_shorter_window_is_heard_alone(model):
    tagger = StreamingTagger(model, window_s=0.1, hop_s=0.1)
    wave = noise(6400)
    results = run(tagger, wave)
    assert tagger.window_s == pytest.approx(0.095)
    assert [result.filled for result in results] == [1.0] * 4
    assert results[2].start_s == pytest.approx(0.2)
    for result in results:
        torch.testing.assert_close(result.probabilities, offline(model, wave, result))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_another_rate_is_resampled_as_files_are(model, rate):
    pytest.importorskip("soxr")
    wave = noise(rate, dtype=torch.int16)
    tagger = StreamingTagger(model, hop_s=0.3, source_rate_hz=rate)
    results = run(tagger, wave, (1, 0, 441, 7000, 160))
    at_once = resample(wave / 32768.0, rate, 16000)
    assert [result.end_s for result in results] == [0.3, 0.6, 0.9, 1.0]
    assert tagger.seconds == 1.0
    for result in results:
        expected = offline(model, at_once, result)
        torch.testing.assert_close(result.probabilities, expected, rtol=0, atol=1e-5)


def test_the_delay_of_resampling_is_bounded(model):
    pytest.importorskip("soxr")
    tagger = StreamingTagger(model, hop_s=0.1, source_rate_hz=44100)
    late = []
    for turn in range(300):
        for result in tagger.push(noise(441, seed=turn)):
            late.append((turn + 1) * 0.01 - result.end_s)
    assert len(late) >= 28 and 0.0 < max(late) < 0.08


def test_flush_gives_the_rest_once_and_ends_the_stream(model):
    tagger = StreamingTagger(model, hop_s=0.5)
    wave = noise(10000)
    assert [r.end_s for r in tagger.push(wave)] == [0.5]
    rest = tagger.flush()
    assert [r.end_s for r in rest] == [0.625] and tagger.num_results == 2
    assert tagger.flush() == []
    with pytest.raises(ValueError, match=r"was flushed: call reset\(\)"):
        tagger.push(wave)
    tagger.reset()
    again = run(tagger, wave)
    torch.testing.assert_close(
        [r.probabilities for r in again][-1], rest[0].probabilities, rtol=0, atol=0
    )


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_after_a_reset_nothing_of_the_stream_before_is_left(model, rate, flushed):
    if rate != 16000:
        pytest.importorskip("soxr")
    options = {"hop_s": 0.1, "smoothing": 0.5, "source_rate_hz": rate}
    used, fresh = (StreamingTagger(model, **options) for _ in range(2))
    used.push(noise(rate // 2 + 77, seed=1, dtype=torch.int16))
    if flushed:
        used.flush()
    used.reset()
    assert (used.seconds, used.num_results, used.zeroed_samples) == (0.0, 0, 0)
    found, expected = (run(tagger, noise(rate // 2, seed=2)) for tagger in (used, fresh))
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.end_s, ours.filled) == (theirs.end_s, theirs.filled)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, 399])
def test_less_than_a_frame_gives_nothing(model, count):
    assert run(StreamingTagger(model), noise(count)) == []


def test_nothing_new_since_the_last_result_adds_none(model):
    # 120 samples past the hop complete no frame
    assert len(run(StreamingTagger(model, hop_s=0.5), noise(8000 + 39))) == 1
    assert len(run(StreamingTagger(model, hop_s=0.5), noise(8000 + 80))) == 2


def test_smoothing_mixes_with_the_results_before(model):
    wave = noise(16000)
    plain = [r.probabilities for r in run(StreamingTagger(model, hop_s=0.2), wave)]
    smooth = [r.probabilities for r in run(StreamingTagger(model, hop_s=0.2, smoothing=0.7), wave)]
    mixed = plain[0]
    for fresh, found in zip(plain, smooth, strict=True):
        mixed = 0.7 * mixed + 0.3 * fresh
        torch.testing.assert_close(found, mixed)
    assert not torch.allclose(plain[-1], smooth[-1], atol=1e-6)


def test_what_is_not_finite_is_refused_or_zeroed_and_counted(model):
    wave = noise(8000)
    wave[100], wave[200] = torch.nan, torch.inf
    tagger = StreamingTagger(model, hop_s=0.25)
    with pytest.raises(ValueError, match="2 of 8000 samples are NaN or infinite"):
        tagger.push(wave)
    assert tagger.seconds == 0.0
    tagger = StreamingTagger(model, hop_s=0.25, non_finite="zero")
    found = tagger.push(wave)
    assert tagger.zeroed_samples == 2
    expected = StreamingTagger(model, hop_s=0.25).push(wave.nan_to_num(0.0, 0.0, 0.0))
    torch.testing.assert_close(
        [r.probabilities for r in found], [r.probabilities for r in expected], rtol=0, atol=0
    )


def test_dtype_of_the_model_and_activation_are_honoured():
    model = tiny(labels=None).to(torch.bfloat16)
    result = StreamingTagger(model, activation="sigmoid", top_k=9).push(noise(16000))[0]
    with torch.no_grad():
        part = noise(16000)[round(result.start_s * 16000) :]
        expected = model.forward_waveform(part[None]).float().sigmoid()[0]
    torch.testing.assert_close(result.probabilities, expected)
    assert len(result.labels) == 3 and result.labels[0][0].startswith("class ")


def test_plain_pytorch_gives_the_same_within_rounding(model):
    wave = noise(12000)
    with use_backend("reference"):
        results = run(StreamingTagger(model, hop_s=0.25), wave, (777,))
        for result in results:
            expected = offline(model, wave, result)
            torch.testing.assert_close(result.probabilities, expected, rtol=0, atol=1e-6)
    assert len(results) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop_s": 0.001}, "hop_s=0.001: expected at least 0.01 s"),
        ({"hop_s": 0.0}, "hop_s=0.0: expected a positive"),
        ({"hop_s": float("nan")}, "hop_s=nan: expected a positive"),
        ({"window_s": 0.01}, r"window_s=0.01: expected 0.025 s \(one frame\) to 0.335 s"),
        ({"window_s": 0.4}, r"window_s=0.4: expected 0.025 s \(one frame\) to 0.335 s"),
        ({"top_k": 0}, "top_k=0"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"labels": ("a",)}, "got 1 names: expected 3"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"non_finite": "keep"}, "non_finite='keep'"),
        ({"source_rate_hz": 10}, "source_rate_hz=10: expected 2000 to"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        StreamingTagger(model, **options)


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (torch.zeros(5).short(), TypeError, "torch.int16: expected torch.float32 as before"),
        (np.zeros(5), TypeError, "torch.float64: expected float32"),
        (torch.zeros(1, 5), ValueError, r"\(1, 5\): expected \[N\]"),
    ],
)
@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_chunk_that_does_not_fit_is_refused(model, chunk, error, message, rate):
    if rate != 16000:
        pytest.importorskip("soxr")
    tagger = StreamingTagger(model, source_rate_hz=rate)
    tagger.push(torch.zeros(5))
    with pytest.raises(error, match=message):
        tagger.push(chunk)


def test_a_saved_model_is_taken_by_its_path(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tagger = StreamingTagger(tmp_path / "saved", hop_s=0.5)
    assert not tagger.model.training and tagger.names == NAMES
    wave = noise(8000)
    found, expected = (t.push(wave)[0] for t in (tagger, StreamingTagger(model, hop_s=0.5)))
    torch.testing.assert_close(found.probabilities, expected.probabilities)


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_fed_there(model):
    on_gpu = copy.deepcopy(model).cuda()
    wave = noise(16000, dtype=torch.int16)
    for result in run(StreamingTagger(on_gpu, hop_s=0.25), wave, (160,)):
        part = wave[round(result.start_s * 16000) : round(result.end_s * 16000)]
        with torch.no_grad():
            expected = on_gpu.forward_waveform(part[None].cuda()).softmax(1)[0].cpu()
        torch.testing.assert_close(result.probabilities, expected, rtol=1e-4, atol=1e-6)
