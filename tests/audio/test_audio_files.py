"""Bad and unusual audio files: a named error or a counted change."""

import io
import os
import wave as wave_module

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import audio
from ast_fast.config import AudioConfig

RATE = 16000


def tone(seconds=1.0, rate=RATE, hz=440.0, channels=1, scale=0.5):
    time = np.arange(int(seconds * rate)) / rate
    signal = (scale * np.sin(2 * np.pi * hz * time)).astype(np.float32)
    return signal if channels == 1 else np.stack([signal] * channels, axis=1)


def encoded(samples, rate=RATE, format="WAV", subtype=None):
    file = io.BytesIO()
    sf.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "close"),
    [
        ("WAV", "PCM_16", 3.1e-5),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_U8", 8e-3),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("RF64", "PCM_16", 3.1e-5),
        ("FLAC", "PCM_16", 3.1e-5),
        ("AIFF", "PCM_16", 3.1e-5),
        ("OGG", "VORBIS", 5e-2),
        ("MP3", "MPEG_LAYER_III", 5e-2),
    ],
)
def test_formats_decode_to_the_samples_written(format, subtype, close, tmp_path):
    samples = tone()
    path = tmp_path / "clip.bin"  # content decides, not the suffix
    path.write_bytes(encoded(samples, format=format, subtype=subtype))
    clip = audio.load(path)
    assert clip.wave.dtype == torch.float32 and clip.sample_rate_hz == RATE
    assert clip.wave.shape == (RATE,)
    middle = slice(2000, -2000)  # lossy codecs fade at the ends
    assert np.abs(clip.wave.numpy()[middle] - samples[middle]).max() <= close
    assert clip.report.summary() == "1 clips read"


def test_sources_may_be_paths_bytes_and_file_objects(tmp_path):
    content = encoded(tone())
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    waves = [
        audio.load(source).wave
        for source in (path, str(path), content, io.BytesIO(content), path.open("rb"))
    ]
    assert all(torch.equal(wave, waves[0]) for wave in waves)


def test_a_missing_file_is_both_an_audio_error_and_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        audio.load(tmp_path / "nothing.wav")
    assert isinstance(caught.value, audio.AudioError)
    assert "nothing.wav" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", audio.AudioEmptyError, "0 bytes"),
        (bytes(range(256)) * 40, audio.AudioDecodeError, "cannot be decoded"),
        (b"<!DOCTYPE html><html><body>404</body></html>", audio.AudioDecodeError, "web page"),
        (encoded(np.zeros(0, np.float32)), audio.AudioEmptyError, "no samples"),
        (encoded(tone())[:20000], audio.AudioTruncatedError, "promises"),
        (encoded(tone(), format="AIFF")[:20000], audio.AudioTruncatedError, "promises"),
        (encoded(tone(3), format="OGG")[:4000], audio.AudioTruncatedError, "Ogg"),
        (encoded(tone(3), format="FLAC")[:9000], audio.AudioTruncatedError, "promises"),
    ],
    ids=["empty", "random", "html", "header-only", "wav-cut", "aiff-cut", "ogg-cut", "flac-cut"],
)
def test_broken_files_raise_the_named_error(content, error, says, tmp_path):
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(error, match=says) as caught:
        audio.load(path)
    assert "broken.wav" in str(caught.value)


def test_what_is_left_of_a_truncated_file_can_be_kept_and_is_counted():
    content = encoded(tone())[:20044]
    clip = audio.load(content, truncated="keep")
    assert clip.wave.shape == (10000,)
    assert clip.report.truncated == 1 and "truncated and kept" in clip.report.notes[0]


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_field_of_a_streaming_writer_is_not_a_truncation(length):
    content = bytearray(encoded(tone()))
    at = content.index(b"data") + 4
    content[at : at + 4] = length.to_bytes(4, "little")
    assert audio.load(bytes(content)).wave.shape == (RATE,)


@pytest.mark.parametrize(
    ("offset", "value", "size"),
    [(24, 0, 4), (24, 1, 4), (24, 3_000_000_000, 4), (22, 0, 2), (22, 60000, 2), (22, 1000, 2)],
    ids=["rate-0", "rate-1", "rate-3e9", "channels-0", "channels-60000", "channels-1000"],
)
def test_impossible_headers_are_refused(offset, value, size):
    content = bytearray(encoded(tone()))
    content[offset : offset + size] = value.to_bytes(size, "little")
    with pytest.raises(audio.AudioDecodeError):
        audio.load(bytes(content))


def test_nan_and_inf_are_refused_or_zeroed_with_a_count():
    samples = tone()
    samples[[5, 6, 7]] = np.nan, np.inf, -np.inf
    content = encoded(samples, subtype="FLOAT")
    with pytest.raises(audio.AudioNonFiniteError, match="3 of 16000"):
        audio.load(content)
    clip = audio.load(content, non_finite="zero")
    assert clip.wave[5:8].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(clip.wave[8:], torch.from_numpy(samples[8:]))
    assert (clip.report.zeroed_clips, clip.report.zeroed_samples) == (1, 3)


def test_stereo_becomes_the_mean_and_is_counted():
    samples = tone(channels=2)
    samples[:, 1] *= -0.5
    content = encoded(samples, subtype="FLOAT")
    clip = audio.load(content)
    assert clip.report.downmixed == 1
    torch.testing.assert_close(clip.wave, torch.from_numpy(samples.mean(axis=1)))
    first = audio.load(content, channels="first").wave
    assert torch.equal(first, torch.from_numpy(samples[:, 0].copy()))
    with pytest.raises(audio.AudioFormatError, match="2 channels"):
        audio.load(content, channels="error")


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_and_counted(rate):
    content = encoded(tone(rate=rate), rate=rate, subtype="FLOAT")
    clip = audio.load(content)
    assert clip.report.resampled == 1 and clip.sample_rate_hz == RATE
    assert abs(clip.wave.shape[0] - RATE) <= 1
    middle = slice(1000, 15000)
    assert np.abs(clip.wave.numpy()[middle] - tone()[middle]).max() < 2e-3
    with pytest.raises(audio.AudioFormatError, match=f"{rate} Hz"):
        audio.load(content, other_rate="error")
    own = audio.load(content, sample_rate_hz=None)
    assert own.sample_rate_hz == rate and own.report.resampled == 0


def test_short_clips_are_padded_to_one_window_and_counted():
    clip = audio.load(encoded(tone()[:399], subtype="FLOAT"))
    assert clip.wave.shape == (400,) and clip.report.padded == 1
    assert clip.wave[399] == 0.0
    assert audio.load(encoded(tone()[:400])).report.padded == 0


def test_clipping_and_over_scale_are_said_but_left_alone():
    loud = np.clip(tone(scale=3.0), -1.0, 1.0)
    report = audio.load(encoded(loud)).report
    assert report.clipped == 1 and "full scale" in report.notes[0]
    assert audio.load(encoded(loud), dtype="int16").report.clipped == 1
    clip = audio.load(encoded(tone(scale=1.5), subtype="FLOAT"))
    assert clip.report.over_scale == 1
    assert float(clip.wave.max()) > 1.4
    quiet = audio.load(encoded(tone())).report
    assert quiet.clipped == quiet.over_scale == 0


def test_int16_is_exact_for_16_bit_files_and_rounded_otherwise():
    samples = np.arange(-16000, 16000, 2).astype(np.int16)
    assert torch.equal(audio.load(encoded(samples), dtype="int16").wave, torch.from_numpy(samples))
    converted = audio.load(encoded(samples / 32768.0, subtype="FLOAT"), dtype="int16").wave
    assert torch.equal(converted, torch.from_numpy(samples))
    loud = audio.load(encoded(tone(scale=2.0), subtype="FLOAT"), dtype="int16").wave
    assert int(loud.max()) == 32767 and int(loud.min()) == -32768


def test_limits_on_length_and_memory_stop_the_decoding():
    content = encoded(tone(3.0))
    with pytest.raises(audio.AudioTooLargeError, match="max_seconds"):
        audio.load(content, max_seconds=2.0)
    with pytest.raises(audio.AudioTooLargeError, match="max_decoded_bytes"):
        audio.load(content, max_decoded_bytes=100_000)


def test_folders_pipes_and_hostile_names_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for bad in (tmp_path, tmp_path / "pipe.wav", "a\0b.wav", "/dev/null"):
        with pytest.raises(audio.AudioDecodeError):
            audio.load(bad)
    with pytest.raises(audio.AudioError) as caught:
        audio.load(tmp_path / "evil\n\x1b[31m.wav")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="non_finite='maybe'"):
        audio.load(encoded(tone()), non_finite="maybe")
    with pytest.raises(ValueError, match="sample_rate_hz=0"):
        AudioConfig(sample_rate_hz=0)


def test_reports_add_up():
    total = audio.AudioReport()
    total.merge(audio.load(encoded(tone(channels=2))).report)
    total.merge(audio.load(encoded(tone(rate=8000), rate=8000)).report)
    total.skip(audio.AudioEmptyError("'x.wav'", "holds no samples"))
    assert total.summary() == (
        "2 clips read, 1 resampled, 1 mixed down to mono, 1 skipped (AudioEmptyError 1)"
    )
    assert total.to_dict()["skipped"] == {"AudioEmptyError": 1}


def test_errors_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(audio.AudioNotFoundError("'a.wav'", "no such file")))
    assert str(error) == "'a.wav': no such file" and isinstance(error, FileNotFoundError)


def test_torchcodec_reads_what_libsndfile_cannot_where_it_is_installed(monkeypatch):
    class Samples:
        data = torch.ones(2, 800) * 0.25
        sample_rate = RATE

    class Decoder:
        def __init__(self, content):
            assert content == b"\0\0\0\x18ftypM4A payload"

        def get_all_samples(self):
            return Samples()

    module = type("decoders", (), {"AudioDecoder": Decoder})
    monkeypatch.setattr(
        audio, "optional_import", lambda name: module if name == "torchcodec.decoders" else None
    )
    clip = audio.load(b"\0\0\0\x18ftypM4A payload")
    assert clip.wave.shape == (800,) and clip.report.downmixed == 1


def test_stdlib_wave_files_read_back(tmp_path):
    with wave_module.open(str(tmp_path / "a.wav"), "wb") as writer:
        writer.setparams((1, 2, 22050, 0, "NONE", ""))
        writer.writeframes((tone(rate=22050) * 32767).astype("<i2").tobytes())
    assert audio.load(tmp_path / "a.wav").report.resampled == 1
