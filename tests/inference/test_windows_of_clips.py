"""Windows, spans and what comes out in order: the same whatever reads and however it is batched."""

import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import audio_spans, embed, predict, tag
from ast_fast.audio import AudioDecodeError, AudioTruncatedError, load
from ast_fast.audio_spans import read_span
from ast_fast.config import AudioConfig
from ast_fast.data.workers import AudioCrashError
from ast_fast.frontend import log_mel_features
from ast_fast.graphs import GraphedForward
from ast_fast.inference import Engine, Failure, Wanted, WindowPlan, span_reader
from ast_fast.inference.reader import Window, WindowReader
from ast_fast.inference.sources import units_of

FULL, MOST = 32 * 160, 400 + 32 * 160 - 1


def run(model, sources, wanted=None, activation="softmax", **options):
    engine = Engine(model, activation, wanted or Wanted(scores=True, windows=True), **options)
    return list(engine.run(units_of(sources)))


@pytest.mark.parametrize("hop", [160, 1000, 2560, 4700, 5000, FULL])
def test_windows_overlap_by_the_hop_and_leave_nothing_out(tiny_model, hop):
    plan = WindowPlan.of(tiny_model.frontend_config, hop / 16000)
    assert (plan.hop, plan.most, plan.full) == (hop, MOST, FULL)
    for length in (
        1,
        399,
        400,
        MOST,
        MOST + 1,
        MOST + 300,
        2 * FULL,
        2 * FULL + 511,
        9 * FULL + 77,
    ):
        starts = plan.starts(length)
        heard = np.zeros(length, bool)
        for start in starts:
            heard[start : plan.end(start, length)] = True
        assert heard.all()
        assert starts == sorted(set(starts)) and starts[0] == 0
        assert {b - a for a, b in itertools.pairwise(starts[:-1])} <= {hop}
        # no window begins where the one before has heard everything
        assert len(starts) == 1 or starts[-2] + FULL < length
        if length > MOST:
            assert all(plan.end(start, length) - start >= FULL // 10 for start in starts)
    assert plan.starts(0) == []


@pytest.mark.parametrize("hop", [0.0, -1.0, float("nan"), 0.001, 0.33, 10.0])
def test_a_hop_that_leaves_audio_out_or_is_shorter_than_a_frame_is_refused(tiny_model, hop):
    with pytest.raises(ValueError, match=r"hop=.* expected 0.01 s .* to 0.32 s"):
        WindowPlan.of(tiny_model.frontend_config, hop)


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate", "channels"),
    [
        ("wav", "PCM_16", 16000, 1),
        ("flac", "PCM_16", 16000, 1),
        ("flac", "PCM_24", 44100, 2),
        ("ogg", "VORBIS", 22050, 1),
        ("ogg", "OPUS", 48000, 1),
        ("mp3", None, 32000, 2),
        ("wav", "FLOAT", 8000, 1),
        ("wav", "PCM_16", 44099, 1),
    ],
)
def test_spans_are_the_samples_of_the_whole_file(tmp_path, voice, suffix, subtype, rate, channels):
    path = tmp_path / f"long.{suffix}"
    sound = voice[: 8 * 16000].float().numpy() / 32768
    with sf.SoundFile(path, "w", rate, channels, subtype) as file:
        for start in range(0, len(sound), 4000):
            block = sound[start : start + 4000]
            file.write(np.stack([block] * channels, 1) if channels > 1 else block)
    config = AudioConfig(dtype="auto")
    whole = load(path, config)
    for start in (0, 7, 20011, 40000):
        span = read_span(path, start, 16000, config)
        assert span.total == len(whole.wave) and span.wave.dtype == whole.wave.dtype
        assert span.report.resampled == whole.report.resampled
        expected = whole.wave[start : start + 16000]
        assert len(span.wave) == len(expected)
        # resampled samples differ in their last bits; others are the same
        error = (span.wave.float() - expected.float()).abs().max()
        assert error <= (2e-6 if rate != 16000 or suffix in ("ogg", "mp3") else 0.0)
    assert torch.equal(read_span(path, 0, 10**7, config).wave, whole.wave)
    assert len(read_span(path, len(whole.wave), 100, config).wave) == 0


def test_a_long_file_gives_the_same_in_spans_as_whole(tiny_model, voice, tmp_path):
    path = tmp_path / "long.wav"
    sf.write(path, voice.numpy(), 16000, subtype="PCM_16")
    wanted = Wanted(scores=True, windows=True, frames=True, embedding=True)
    (whole,) = run(tiny_model, [path], wanted)
    assert len(whole.spans_s) == -(-len(voice) // FULL)
    for options in (
        {"span_seconds": 1.0, "batch_size": 7},
        {"span_seconds": 0.1, "batch_size": 1000, "max_bytes": 1},
        {"span_seconds": 2.5, "num_workers": 2},
    ):
        (cut,) = run(tiny_model, [path], wanted, **options)
        assert cut.spans_s == whole.spans_s and cut.seconds == whole.seconds
        for name in ("scores", "window_scores", "embedding", "frame_scores", "frame_times_s"):
            torch.testing.assert_close(
                getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-5
            )
    # and the windows are those of the waveform
    with torch.no_grad():
        start, end = 5 * FULL, 5 * FULL + MOST
        logits = tiny_model.forward_waveform(voice[None, start:end])
    torch.testing.assert_close(whole.window_scores[5], logits.softmax(1)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_mix_clips_and_results_keep_their_order(tiny_model, clips, num_workers):
    alone = {path: predict(path, tiny_model) for path in sorted(clips.glob("0?.*"))}
    results = list(tag([clips], tiny_model, batch_size=5, num_workers=num_workers))
    assert [Path(r.path).name for r in results] == sorted(p.name for p in clips.iterdir())
    failed = [r for r in results if isinstance(r, Failure)]
    assert [Path(f.path).name for f in failed] == ["05b.wav", "11.flac"]
    assert "0 bytes" in str(failed[1].error) and [f.number for f in failed] == [6, 11]
    good = [r for r in results if not isinstance(r, Failure)]
    for result, expected in zip(good, alone.values(), strict=True):
        assert result.path == expected.path and result.windows == expected.windows
        torch.testing.assert_close(
            result.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6
        )


def test_every_batch_but_the_last_is_full_and_a_long_file_lies_in_many(tiny_model, clips, voice):
    plan = WindowPlan.of(tiny_model.frontend_config)
    sources = [*sorted(clips.glob("0?.*")), voice]
    reader = WindowReader(units_of(sources), plan, AudioConfig(dtype="auto"))
    batches = [[e for e in events if isinstance(e, Window)] for events in reader.batches(8)]
    assert {len(batch) for batch in batches[:-1]} == {8} and 0 < len(batches[-1]) <= 8
    numbers = [{window.number for window in batch} for batch in batches]
    assert any(len(found) > 1 for found in numbers)
    assert sum(10 in found for found in numbers) > 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_hour_of_sound_is_never_in_memory(tiny_model, tmp_path, num_workers):
    path = tmp_path / "hour.wav"
    size = 2 * 16000 * 3600
    chunk = struct.pack(
        "<4sI8sIHHIIHH4sI",
        b"RIFF",
        36 + size,
        b"WAVEfmt ",
        16,
        1,
        1,
        16000,
        32000,
        2,
        16,
        b"data",
        size,
    )
    with path.open("wb") as file:
        file.write(chunk)
        file.truncate(len(chunk) + size)  # silence, and no blocks on the disk
    plan = WindowPlan.of(tiny_model.frontend_config)
    reader = WindowReader(
        units_of([path]),
        plan,
        AudioConfig(dtype="auto", max_seconds=100),  # the limit is of what is held at a time
        num_workers=num_workers,
        max_bytes=12 << 20,
    )
    windows = sum(sum(isinstance(e, Window) for e in events) for events in reader.batches(64))
    assert windows == 3600 * 16000 // FULL
    assert 0 < reader.peak_bytes <= 12 << 20


def test_a_file_that_breaks_in_the_middle_is_a_failure_and_the_rest_goes_on(
    tiny_model, voice, tmp_path
):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.flac"
    sf.write(good, voice.numpy(), 16000, subtype="PCM_16")
    sf.write(bad, voice.numpy(), 16000, subtype="PCM_16")
    content = bytearray(bad.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 3000] = bytes(3000)
    bad.write_bytes(content)
    for num_workers in (0, 2):
        results = run(tiny_model, [bad, good, bad, good], span_seconds=2.0, num_workers=num_workers)
        kinds = [isinstance(result, Failure) for result in results]
        assert kinds == [True, False, True, False]
        assert isinstance(results[0].error, AudioDecodeError)
        assert torch.equal(results[1].scores, results[3].scores)


def test_files_with_less_audio_than_promised_are_refused_or_kept(tiny_model, voice, tmp_path):
    path = tmp_path / "short.wav"
    sf.write(path, voice.numpy(), 16000, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: 44 + 2 * 100000])
    (result,) = run(tiny_model, [path], span_seconds=2.0)
    assert isinstance(result.error, AudioTruncatedError)
    (kept,) = run(tiny_model, [path], span_seconds=2.0, audio=AudioConfig(truncated="keep"))
    assert kept.seconds == 100000 / 16000 and kept.report.truncated == 1
    (whole,) = run(tiny_model, [voice[:100000]])
    torch.testing.assert_close(kept.window_scores, whole.window_scores, rtol=1e-4, atol=1e-6)


def test_a_file_that_ends_the_process_is_named_and_the_others_are_read(
    tiny_model, clips, monkeypatch
):
    def read(path, *arguments):
        if path.endswith("03.flac"):
            os._exit(1)
        return audio_spans.read_span(path, *arguments)

    monkeypatch.setattr(span_reader, "read_span", read)
    results = run(tiny_model, [clips], num_workers=1)
    failed = {Path(r.path).name: r.error for r in results if isinstance(r, Failure)}
    assert set(failed) == {"03.flac", "05b.wav", "11.flac"}
    assert isinstance(failed["03.flac"], AudioCrashError)


def test_curves_are_the_models_own_and_follow_the_clip(tiny_model, voice):
    short = voice[:MOST]
    found = predict(short, tiny_model, frames=True)
    with torch.no_grad():
        features = log_mel_features(short[None], tiny_model.frontend_config)
        expected = tiny_model.frame_logits(features).softmax(-1)[0]
    torch.testing.assert_close(found.frames.probabilities, expected, rtol=1e-4, atol=1e-6)
    # patches of 16 frames every 10: their middles
    assert found.frames.times_s.tolist() == pytest.approx([0.0875, 0.1875])
    for hop in (None, 0.1, 0.25):
        curve = predict(voice[:50000], tiny_model, frames=True, hop_s=hop).frames
        steps = curve.times_s.diff()
        assert len(curve.times_s) == len(curve.probabilities)
        assert steps.min() > 0 and steps.max() < 0.25
        assert curve.times_s[-1] > 50000 / 16000 - 0.3
    # a short clip has no points in its padding
    assert len(predict(voice[:1600], tiny_model, frames=True).frames.times_s) == 1


def test_embeddings_are_the_mean_of_the_prefix_tokens(tiny_model, voice):
    long = voice[: 3 * FULL]
    (one,) = embed([long], tiny_model, windows=True)
    with torch.no_grad():
        parts = torch.stack([long[i * FULL : i * FULL + MOST] for i in range(2)])
        features = log_mel_features(parts, tiny_model.frontend_config)
        tokens = tiny_model.forward_features(features)[:, :2].mean(1)
    torch.testing.assert_close(one.window_vectors[:2], tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.vector, one.window_vectors.mean(0))
    assert one.windows == 3 and one.spans_s[0] == (0.0, MOST / 16000)


def test_one_engine_runs_several_sources_at_a_time(tiny_model, clips, voice):
    engine = Engine(tiny_model, "softmax", Wanted(scores=True), batch_size=3)
    sources = [[clips], [voice, *sorted(clips.glob("0?.*"))]]
    alone = [list(engine.run(units_of(each))) for each in sources]
    both = list(zip(*(engine.run(units_of(each)) for each in sources), strict=False))
    for place, results in enumerate(zip(*both, strict=True)):
        for mine, other in zip(results, alone[place], strict=False):
            assert isinstance(mine, Failure) or torch.equal(mine.scores, other.scores)


def test_pooling_is_the_mean_or_the_most_over_windows(tiny_model, voice):
    for pooling, expected in (("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))):
        found = predict(voice[:40000], tiny_model, pooling=pooling, windows=True)
        each = torch.stack([part.probabilities for part in found.parts])
        torch.testing.assert_close(found.probabilities, expected(each))
        assert found.parts[1].start_s == FULL / 16000 and found.windows == len(each)


def test_wrong_arguments_are_named(tiny_model, clips):
    for settings, says in (
        ({"topk": 3}, "no setting topk: expected some of top_k"),
        ({"top_k": 0}, "top_k=0"),
        ({"pooling": "median"}, "pooling='median'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"hop_s": 5.0}, "hop=5"),
        ({"activation": "tanh"}, "activation='tanh'"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            predict([clips / "00.wav"], tiny_model, **settings)
    with pytest.raises(TypeError, match="expected several"):
        tag(str(clips), tiny_model)
    with pytest.raises(ValueError, match="is a folder"):
        predict(clips, tiny_model)
    results = predict([clips], tiny_model, top_k=1)
    assert isinstance(results, list) and len(results) == 12


def test_a_generator_of_paths_is_read_as_results_are_taken(tiny_model, clips):
    asked = []

    def paths():
        for _ in range(10**9):
            asked.append(1)
            yield clips / "03.flac"

    results = tag(paths(), tiny_model, batch_size=4)
    first = [next(results) for _ in range(20)]
    assert len({float(r.probabilities[0]) for r in first}) < 20 and len(asked) < 60
    results.close()


class Recorded:
    """Records and replays Python calls as CUDA graphs do kernels: into one result, overwritten each time."""

    def __init__(self):
        self.replayed = 0

    def warm_up(self, function):
        return function()

    def capture(self, function):
        result = torch.full_like(function(), float("nan"))

        def replay():
            self.replayed += 1
            result.copy_(function())

        return result, replay


def test_recorded_heads_and_a_batch_in_flight_give_the_same(tiny_model, clips, voice):
    wanted = Wanted(scores=True, windows=True, frames=True, embedding=True)
    expected = run(tiny_model, [clips, voice], wanted, batch_size=4)
    engine = Engine(tiny_model, "softmax", wanted, batch_size=4)
    engine._call = GraphedForward(engine._heads, graphs=Recorded())
    engine._depth = 1  # as on a GPU
    found = list(engine.run(units_of([clips, voice])))
    assert engine._call._graphs.replayed > 10
    for mine, other in zip(found, expected, strict=True):
        if not isinstance(mine, Failure):
            for name in ("scores", "window_scores", "embedding", "frame_scores"):
                assert torch.equal(getattr(mine, name), getattr(other, name))
