"""The HEAR interface: its attributes, shapes and times, for sounds of any length."""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast.integrations import hear


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
    return hear.load_model(ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, **sizes))


def sound(samples, seed=0):
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_the_attributes_that_hear_asks_for(model, tmp_path):
    assert model.sample_rate == 16000
    assert model.scene_embedding_size == model.timestamp_embedding_size == 64
    assert isinstance(model, torch.nn.Module) and not model.training
    model.ast.save_pretrained(tmp_path)
    loaded = hear.load_model(str(tmp_path))
    audio = sound(16000)
    torch.testing.assert_close(loaded(audio), hear.get_scene_embeddings(audio, model))
    with pytest.raises(ValueError, match="model_file_path is empty"):
        hear.load_model()


@pytest.mark.parametrize("samples", [400, 2600, 10480, 10880, 16000, 100000])
def test_shapes_and_times_for_any_length(model, samples):
    audio = sound(samples)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    scenes = hear.get_scene_embeddings(audio, model)
    frames = 1 + (samples - 400) // 160
    count = max(1, (frames - 16) // 10 + 1)
    assert embeddings.shape == (2, count, 64) and times.shape == (2, count)
    assert scenes.shape == (2, 64) and embeddings.dtype == times.dtype == torch.float32
    assert not embeddings.requires_grad and embeddings.isfinite().all()
    # 16 frames of 10 ms and the rest of the last window: 175 ms; a patch every 100 ms
    torch.testing.assert_close(times[0], 87.5 + 100.0 * torch.arange(count))
    assert torch.equal(times[0], times[1])


def test_a_sound_of_one_window_is_the_models_own(model):
    audio = sound(10480)
    x = ast_fast.LogMel(model.ast.frontend_config)(audio)
    tokens = model.ast.forward_features(x)
    embeddings, _ = hear.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(embeddings, tokens[:, 2:].unflatten(1, (5, 5)).mean(1))
    torch.testing.assert_close(
        hear.get_scene_embeddings(audio, model), (tokens[:, 0] + tokens[:, 1]) / 2
    )


def test_long_sounds_are_cut_where_patches_end(model, monkeypatch):
    audio = sound(60000)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    scene = hear.get_scene_embeddings(audio, model)
    # the second piece begins 5 patches of 10 frames later: cut the sound there by hand
    rest, _ = hear.get_timestamp_embeddings(audio[:, 50 * 160 :], model)
    torch.testing.assert_close(embeddings[:, 5:], rest)
    pieces = [audio[:, s * 8000 :] for s in range(8)]
    scenes = [hear.get_scene_embeddings(piece[:, :10480], model) for piece in pieces]
    frames = 1 + (60000 - 400) // 160
    shares = [min(frames - 50 * s, 50) / frames for s in range(-(-times.shape[1] // 5))]
    want = sum(share * each for share, each in zip(shares, scenes, strict=False))
    torch.testing.assert_close(scene, want, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(hear, "_WINDOWS", 1)  # one piece at a time gives the same
    alone, _ = hear.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(alone, embeddings, atol=1e-5, rtol=1e-4)


def test_sounds_do_not_depend_on_their_batch(model):
    audio = sound(30000)
    both, _ = hear.get_timestamp_embeddings(audio, model)
    one, _ = hear.get_timestamp_embeddings(audio[1:], model)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-4)


def test_bad_audio_is_named(model):
    for audio, said in (
        (
            torch.zeros(16000),
            r"audio: is \(16000,\): expected a tensor or array \[sounds, samples\]",
        ),
        (torch.zeros(1, 399), "399 samples a sound: expected at least 400"),
        (torch.zeros(0, 16000), "no sounds"),
        (torch.zeros(1, 16000, dtype=torch.int32), "int32.*32768"),
        (
            torch.tensor([[0.0] * 16000, [float("nan")] * 16000]),
            "sound 1: 16000 of 16000 samples are NaN",
        ),
        ([[0.0]], "audio: is list"),
    ):
        with pytest.raises(ValueError, match=said):
            hear.get_timestamp_embeddings(audio, model)
