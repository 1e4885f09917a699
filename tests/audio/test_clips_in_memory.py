"""Clips in memory are held to what files are held to, whichever entrance they take."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import ast_fast
from ast_fast import audio
from ast_fast.audio_memory import check_batch, load_clip
from ast_fast.config import AudioConfig, LogMelConfig
from ast_fast.inference import Failure

AT_16K = AudioConfig(sample_rate_hz=16000, dtype="auto")
RATE = 16000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
    return ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, **sizes).eval()


def samples(count=12000, seed=0):
    wave = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.1
    return (wave * 32768).round().clamp(-32768, 32767).to(torch.int16)


def as_file(wave, rate=RATE, subtype="PCM_16"):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.asarray(wave), rate, format="WAV", subtype=subtype)
    return file.getvalue()


def forms_of(wave):
    """The same int16 clip in every form it may come in."""
    floats = wave.float() / 32768
    return {
        "file": as_file(wave),
        "int16 tensor": wave,
        "int16 array": wave.numpy(),
        "float tensor": floats,
        "float64 tensor": floats.double(),
        "float64 array": floats.double().numpy(),
        "strided array": np.stack([floats.numpy()] * 2, 1)[:, 0],
        "pipeline's": {"raw": floats.numpy(), "sampling_rate": RATE},
        "datasets'": {"path": None, "array": floats.double().numpy(), "sampling_rate": RATE},
        "list": {"array": floats.tolist(), "sampling_rate": np.int64(RATE)},
        "bytes": {"bytes": as_file(wave), "path": "some.wav"},
    }


def test_every_form_of_a_clip_gives_what_its_file_gives(model):
    forms = forms_of(samples())
    want = ast_fast.predict(forms["file"], model).probabilities
    vector = next(iter(ast_fast.embed([forms["file"]], model))).vector
    for name, form in forms.items():
        found = ast_fast.predict(form, model)
        assert torch.equal(found.probabilities, want), name
        (embedded,) = ast_fast.embed([form], model)
        assert torch.equal(embedded.vector, vector), name
    together = ast_fast.predict(list(forms.values()), model)
    assert all(torch.allclose(each.probabilities, want, atol=1e-6) for each in together)


def test_another_rate_is_resampled_as_a_files_is_and_counted():
    wave = samples()
    pytest.importorskip("soxr")
    want = load_clip(as_file(wave, 8000), AT_16K)
    for given in (wave.numpy(), wave / 32768.0):
        found = load_clip({"array": given, "sampling_rate": 8000}, AT_16K)
        assert torch.equal(found.wave, want.wave) and found.report.resampled == 1
    with pytest.raises(audio.AudioFormatError, match="has 8000 Hz: expected 16000"):
        load_clip({"raw": wave, "sampling_rate": 8000}, AT_16K.replace(other_rate="error"))


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_integers_of_no_known_scale_are_refused_by_name(model, dtype):
    wave = samples().to(dtype)
    name = str(dtype).removeprefix("torch.")
    for given in (wave, wave.numpy(), {"array": wave, "sampling_rate": RATE}):
        with pytest.raises(audio.AudioFormatError, match=rf"\[12000\] of {name}: expected floats"):
            ast_fast.predict(given, model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_samples_that_are_not_finite_are_refused_or_counted_as_in_files(model, bad):
    wave = samples() / 32768.0
    wave[100] = bad
    for given in (wave, wave.double(), wave.numpy(), {"raw": wave, "sampling_rate": RATE}):
        with pytest.raises(audio.AudioNonFiniteError, match="1 of 12000 samples"):
            ast_fast.predict(given, model)
        found = load_clip(given, AT_16K.replace(non_finite="zero"))
        assert found.report.zeroed_samples == 1 and found.wave.isfinite().all()
    good = samples(seed=1)
    first, second = ast_fast.predict([wave, good], model)
    assert isinstance(first, Failure)
    assert second.probabilities.isfinite().all()


def test_a_clip_under_a_window_is_padded_with_the_note_that_a_file_gets(model):
    wave = samples(399)
    for given in (wave, wave / 32768.0, {"raw": wave.numpy(), "sampling_rate": RATE}):
        found = ast_fast.predict(given, model)
        assert found.report.padded == 1
        assert "399 samples, padded with zeros to 400" in found.report.notes[0]
        want = ast_fast.predict(torch.cat((wave, wave.new_zeros(1))), model)
        assert torch.equal(found.probabilities, want.probabilities)
    with pytest.raises(audio.AudioEmptyError, match="holds no samples"):
        ast_fast.predict(torch.zeros(0), model)


def test_a_clip_under_a_longer_window_is_padded_too():
    front = LogMelConfig(num_mel_bins=64, num_frames=64, window_ms=64.0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
    made = ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, frontend_config=front, **sizes)
    wave = samples(600)
    for given in (wave, as_file(wave)):
        found = ast_fast.predict(given, made)
        assert "600 samples, padded with zeros to 1024" in found.report.notes[0]


def test_what_is_no_clip_is_named(model):
    wave = samples()
    rows = torch.stack([wave, wave])
    with pytest.raises(
        audio.AudioFormatError, match=r"a tensor \[2, 12000\] of int16.*list\(batch\)"
    ):
        ast_fast.predict(rows, model)
    assert len(ast_fast.predict(list(rows), model)) == 2
    for given, said in (
        (rows, r"paths is a tensor \[2, 12000\] of int16.*list\(batch\)"),
        (wave.numpy(), r"paths is an array \[12000\] of int16.*\[waveform\]"),
        ({"array": wave, "sampling_rate": RATE}, "paths is a dict of 'array', 'sampling_rate'"),
        (7, "paths is 7, of type int"),
    ):
        with pytest.raises(TypeError, match=said):
            ast_fast.tag(given, model)
        with pytest.raises(TypeError, match=said):
            ast_fast.embed(given, model)
    with pytest.raises(TypeError, match=r"source 1 is 0.25, of type float: expected a path"):
        ast_fast.predict([wave, 0.25], model)
    with pytest.raises(TypeError, match="source is 7, of type int"):
        ast_fast.predict(7, model)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"array": 1}, "sampling_rate=None: expected the rate"),
        ({"array": 1, "sampling_rate": 16000.5}, "sampling_rate=16000.5"),
        (
            {"array": 1, "raw": 1, "sampling_rate": RATE},
            "a dict of 'array', 'raw', 'sampling_rate'",
        ),
        ({"waveform": 1, "sampling_rate": RATE}, "a dict of 'waveform', 'sampling_rate'"),
        ({"sampling_rate": RATE}, "a dict of 'sampling_rate'"),
        ({}, "a dict of nothing"),
        ({"array": 1, "sampling_rate": 0}, "claims 0 Hz"),
    ],
)
def test_a_dict_that_does_not_tell_its_samples_and_rate_is_refused(model, keys, said):
    wave = samples()
    given = {key: wave if value == 1 else value for key, value in keys.items()}
    with pytest.raises(audio.AudioError, match=said):
        ast_fast.predict(given, model)


def test_an_array_of_paths_is_a_list_of_files(model, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(as_file(samples()))
    (found,) = ast_fast.predict(np.array([str(path)]), model)
    assert found.path == str(path)


def test_batches_for_embeddings_are_held_to_the_same():
    good = samples()[None] / 32768.0
    assert torch.equal(check_batch(good), good)
    assert torch.equal(check_batch(good.numpy()), good)
    bad = torch.cat((good, good))
    bad[1, 5] = float("nan")
    with pytest.raises(audio.AudioNonFiniteError, match="sound 1: 1 of 12000"):
        check_batch(bad)
