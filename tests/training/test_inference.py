"""Predict and tag: names, scores, long clips, bad files."""

import copy

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import create_model, predict, tag
from ast_fast.audio import AudioError
from ast_fast.config import LogMelConfig
from ast_fast.inference import Failure, split_windows
from ast_fast.saliency import attention_rollout, spread_patches

FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)
NAMES = ("cat", "dog", "rain")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        "ast_mini_p16_s10",
        num_classes=3,
        labels=NAMES,
        embed_dim=32,
        depth=2,
        num_heads=1,
        input_fdim=32,
        input_tdim=32,
        frontend_config=FRONT,
    )


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, 5000), 16000)
    return path


def test_a_prediction_is_the_models_own_probabilities_by_name(model, clip):
    found = predict(clip, model, top_k=2)
    wave = torch.from_numpy(sf.read(clip, dtype="float32")[0])[None]
    with torch.no_grad():
        expected = model.eval().forward_waveform(wave).softmax(1)[0]
    torch.testing.assert_close(found.probabilities, expected)
    best = expected.argsort(descending=True)[:2].tolist()
    assert [name for name, _ in found.labels] == [NAMES[index] for index in best]
    assert found.labels[0][1] == pytest.approx(float(expected.max()))
    assert found.windows == 1 and found.path == str(clip)


def test_waveforms_bytes_and_saved_models_give_the_same(model, clip, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    wave = torch.from_numpy(sf.read(clip, dtype="float32")[0])
    first = predict(clip, model).probabilities
    for source, network in (
        (wave, model),
        (clip.read_bytes(), model),
        (str(clip), tmp_path / "saved"),
    ):
        torch.testing.assert_close(predict(source, network).probabilities, first)


def test_batches_of_clips_of_different_length_equal_single_clips(model, tmp_path):
    rng = np.random.default_rng(1)
    paths = []
    for index, length in enumerate((300, 900, 5000, 12000, 2500)):
        paths.append(tmp_path / f"{index}.wav")
        sf.write(paths[-1], rng.normal(0, 0.1, length), 16000)
    together = list(tag(paths, model, batch_size=3))
    for path, result in zip(paths, together, strict=True):
        assert result.path == str(path)
        torch.testing.assert_close(
            result.probabilities, predict(path, model).probabilities, rtol=1e-4, atol=1e-6
        )
    assert together[0].report.padded == 1
    assert [result.windows for result in together] == [1, 1, 1, 3, 1]


def test_every_sample_of_a_long_clip_is_in_some_window():
    step = 32 * 160
    most = 400 + step - 1
    for length in (1, most, most + 1, 2 * step, 2 * step + 100, 2 * step + 3000, 5 * step + 511):
        wave = torch.arange(float(length))
        windows = split_windows(wave, FRONT)
        assert all(0 < len(window) <= most for window in windows)
        assert torch.equal(torch.cat(windows).unique(), wave)
        if length > most:
            assert min(map(len, windows)) >= step // 10  # none is mostly padding


def test_a_long_clip_has_the_mean_over_its_windows(model):
    wave = 0.1 * torch.randn(3 * 32 * 160, generator=torch.Generator().manual_seed(0))
    found = predict(wave, model)
    with torch.no_grad():
        each = [
            model.forward_waveform(part[None]).softmax(1)[0] for part in split_windows(wave, FRONT)
        ]
    assert found.windows == len(each) == 3
    torch.testing.assert_close(found.probabilities, torch.stack(each).mean(0))


def test_bad_files_are_results_and_the_rest_goes_on(model, clip, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio")
    results = list(tag([bad, clip, tmp_path / "absent.wav", clip], model))
    assert [isinstance(result, Failure) for result in results] == [True, False, True, False]
    assert "bad.wav" in str(results[0].error)
    with pytest.raises(AudioError):
        predict(bad, model)


def test_folders_are_searched_in_order(model, clip, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.wav").write_bytes(clip.read_bytes())
    (tmp_path / "notes.txt").write_text("no sound")
    found = [result.path for result in tag([tmp_path], model)]
    assert found == [str(clip), str(tmp_path / "deep" / "b.wav")]


def test_names_and_activation_can_be_chosen(model, clip):
    found = predict(clip, model, labels=("a", "b", "c"), activation="sigmoid")
    assert {name for name, _ in found.labels} == {"a", "b", "c"}
    logit = torch.logit(found.probabilities)
    torch.testing.assert_close(predict(clip, model).probabilities, logit.softmax(0))
    several = copy.copy(model)
    several.config = model.config.replace(problem_type="multi_label_classification")
    torch.testing.assert_close(predict(clip, several).probabilities, logit.sigmoid())
    with pytest.raises(ValueError, match="got 2 names: expected 3"):
        predict(clip, model, labels=("a", "b"))
    with pytest.raises(ValueError, match="activation='relu'"):
        predict(clip, model, activation="relu")
    with pytest.raises(ValueError, match="top_k=0"):
        predict(clip, model, top_k=0)
    with pytest.raises(ValueError, match="waveform"):
        predict(torch.zeros(1, 400), model)


def test_rollout_sums_to_one_and_follows_a_hand_computation(model):
    x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    rollout = attention_rollout(model, x)
    assert rollout.shape == (2, 2, 2)
    torch.testing.assert_close(rollout.sum((1, 2)), torch.ones(2))
    with torch.no_grad():
        first, second = (model.attention_maps(x, layer).mean(1) for layer in (0, 1))
    eye = torch.eye(first.shape[-1])
    total = (0.5 * second + 0.5 * eye) @ (0.5 * first + 0.5 * eye)
    share = total[:, :2, 2:].mean(1)
    torch.testing.assert_close(rollout.flatten(1), share / share.sum(1, keepdim=True))


def test_patches_are_drawn_where_they_lie_frequency_by_time(model):
    values = torch.zeros(1, 2, 2)
    values[0, 1, 0] = 1.0  # second row of patches in frequency, first in time
    drawn = spread_patches(values, model)[0]
    assert drawn.shape == (32, 32)
    assert drawn[20, 5] == 1.0 and drawn[5, 20] == 0.0
    assert drawn[12, 5] == 0.5  # covered by two patches
    assert drawn[30, 5] == 0.0  # covered by none
