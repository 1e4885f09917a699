"""Files of bare weights: what they do not tell is known by name, said, guessed and told, or asked for."""

from __future__ import annotations

import logging

import pytest
import torch

import ast_fast
from ast_fast import hub
from ast_fast.config import NORMALISATION, ModelConfig
from ast_fast.hub.published import PUBLISHED, published

SMALL = {"embed_dim": 192, "depth": 1, "num_heads": 3, "label_dim": 5, "dead_heads": False}


def build(**changes):
    torch.manual_seed(0)
    return ast_fast.ASTModel.from_config(ModelConfig(**{**SMALL, **changes}))


def write(tmp_path, name="best_audio_model.pth", **changes):
    model = build(**changes)
    torch.save(model.state_dict(), tmp_path / name)
    return model, tmp_path / name


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def shallow(monkeypatch):
    """Published sizes with one block of width 192: the real ones take seconds to write."""
    monkeypatch.setattr("ast_fast.hub.published._BASE_WIDTH", 192)
    monkeypatch.setattr("ast_fast.hub.published._BASE_DEPTH", 1)
    for found in PUBLISHED.values():
        monkeypatch.setitem(found.model, "num_heads", 3)


@pytest.mark.parametrize("name", [*PUBLISHED, "speechcommands_10_10_0.9812 (1)"])
def test_published_files_are_known_by_name(tmp_path, warnings, shallow, name):
    speech = name.startswith("speech")
    stride = 10 if name == "audioset_0.4593" else int(name.split("_")[-2])
    sizes = {"label_dim": 35 if speech else 527, "input_tdim": 128 if speech else 1024}
    _, file = write(tmp_path, f"{name}.pth", fstride=stride, tstride=stride, **sizes)
    model = ast_fast.ASTModel.from_pretrained(file)
    config, front = model.config, model.frontend_config
    assert (config.fstride, config.tstride, config.input_tdim) == (
        stride,
        stride,
        sizes["input_tdim"],
    )
    expected = NORMALISATION["speechcommands" if speech else "audioset"]
    assert (front.mean, front.std) == expected
    kind = "single_label" if speech else "multi_label"
    assert config.problem_type == f"{kind}_classification"
    assert not warnings.records
    # a head of another task: its own classes, as before
    assert ast_fast.ASTModel.from_pretrained(file, label_dim=4).config.problem_type is None
    with pytest.raises(hub.CheckpointError, match="published checkpoint with input_tdim"):
        ast_fast.ASTModel.from_pretrained(file, frames=512)


def test_a_published_name_on_other_weights_is_no_published_file(tmp_path, warnings, shallow):
    _, file = write(tmp_path, "speechcommands_10_10_0.9812.pth", input_tdim=128, label_dim=36)
    model = ast_fast.ASTModel.from_pretrained(file)
    assert model.frontend_config.mean == NORMALISATION["audioset"][0]
    assert "strides 10 x 10 (of its name)" in warnings.text
    assert "AudioSet's mean and std" in warnings.text


def test_the_real_names_have_the_real_sizes(tmp_path):
    config = ModelConfig(label_dim=35, input_tdim=128)
    with torch.device("meta"):
        state = ast_fast.ASTModel.from_config(config).state_dict()
    found = published("x/speechcommands_10_10_0.9812.pth", state)
    assert found.mean == -6.845978 and found.model["input_tdim"] == 128
    assert published("x/audioset_10_10_0.4593.pth", state) is None
    assert published("x/mine.pth", state) is None


def test_a_guess_is_told_with_all_that_was_guessed(tmp_path, warnings):
    _, file = write(tmp_path, input_tdim=128)
    ast_fast.ASTModel.from_pretrained(file)
    (record,) = warnings.records
    text = record.getMessage()
    for part in (
        str(file), "128 mel bins", "strides 10 x 10 (14 x 16, 16 x 14 would fit too)", "128 frames",
        "AudioSet's mean and std of log-mel energies (-4.26774 and 4.569", "--strides", "--std",
    ):  # fmt: skip
        assert part in text
    assert "heads (" not in text  # of a released width
    warnings.clear()
    write(tmp_path, input_tdim=128, embed_dim=128, num_heads=4)
    ast_fast.ASTModel.from_pretrained(file)
    assert "2 heads (of width 64)" in warnings.text


def test_what_is_said_is_not_guessed(tmp_path, warnings):
    said = {"strides": (16, 10), "frames": 512, "mean": -5.0, "std": 3.0}
    model, file = write(tmp_path, fstride=16, tstride=10, input_tdim=512)
    loaded = ast_fast.ASTModel.from_pretrained(file, **said, mel_bins=128)
    assert loaded.config == model.config and not warnings.records
    front = loaded.frontend_config
    assert (front.mean, front.std, front.num_frames) == (-5.0, 3.0, 512)
    ast_fast.ASTModel.from_pretrained(file, strides=(16, 10), frames=512, mel_bins=128, mean=-5.0)
    assert "AudioSet's std of log-mel energies (-5 and 4.569" in warnings.text
    assert "strides 1" not in warnings.text


@pytest.mark.parametrize(
    ("sizes", "hint"),
    [
        ({"fstride": 16, "tstride": 10, "input_tdim": 512}, "may be strides 16 x 10 at 512 frames"),
        ({"input_fdim": 64, "input_tdim": 512}, "may be strides 12 x 10 at 256 frames"),
        ({"input_fdim": 64, "input_tdim": 1024}, "no layout with 128 mel bins"),
        ({"input_tdim": 300}, "no layout with 128 mel bins, a recipe's length"),
    ],
    ids=str,
)
def test_what_no_one_recipe_fits_is_asked_for(tmp_path, sizes, hint):
    model, file = write(tmp_path, **sizes)
    with pytest.raises(hub.CheckpointError, match=hint) as caught:
        ast_fast.ASTModel.from_pretrained(file)
    assert "strides=(10, 10), frames=1024" in str(caught.value) and "--strides" in str(caught.value)
    config = model.config
    facts = {"strides": (config.fstride, config.tstride), "frames": config.input_tdim}
    loaded = ast_fast.ASTModel.from_pretrained(file, **facts, mel_bins=config.input_fdim)
    assert loaded.config == config
    # sizes that the model shall have are taken as those it has, where they give its patches
    names = ("fstride", "tstride", "input_tdim", "input_fdim")
    loaded = ast_fast.ASTModel.from_pretrained(file, **{n: getattr(config, n) for n in names})
    assert loaded.config == config
    assert torch.equal(loaded.v.pos_embed, model.v.pos_embed)


def test_a_length_alone_still_adapts_what_was_guessed(tmp_path, warnings):
    model, file = write(tmp_path, input_tdim=512)
    loaded = ast_fast.ASTModel.from_pretrained(file, input_tdim=256)
    assert loaded.config.grid == (12, 25) and "512 frames" in warnings.text
    assert torch.equal(loaded.v.pos_embed[:, :2], model.v.pos_embed[:, :2])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"strides": (10,)}, r"strides=\(10,\): expected two"),
        ({"strides": (0, 10)}, "strides="),
        ({"frames": 0}, "frames=0"),
        ({"mel_bins": -1}, "mel_bins=-1"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 5}, "num_heads=5"),
        ({"mean": float("nan")}, "mean=nan"),
        ({"std": 0.0}, "std=0.0"),
        ({"strides": (11, 11)}, "no layout"),
        ({"frames": 777}, "no layout"),
    ],
    ids=str,
)
def test_impossible_facts(tmp_path, facts, message):
    _, file = write(tmp_path, input_tdim=128)
    with pytest.raises(ValueError, match=message):
        ast_fast.ASTModel.from_pretrained(file, **facts)


def test_a_file_that_tells_is_not_talked_over(tmp_path, warnings):
    model = build(input_tdim=128)
    model.save_pretrained(tmp_path)
    with pytest.raises(hub.CheckpointError, match="says fstride=10 itself, and 16 was said"):
        ast_fast.ASTModel.from_pretrained(tmp_path, strides=(16, 16))
    agreed = ast_fast.ASTModel.from_pretrained(tmp_path, strides=(10, 10), frames=128, heads=3)
    assert agreed.config == model.config and not warnings.records
    # a normalisation that was wrong can be put right
    assert ast_fast.ASTModel.from_pretrained(tmp_path, mean=-1.0).frontend_config.mean == -1.0


def test_settings_without_a_normalisation_are_told(tmp_path, warnings):
    model = build(input_tdim=128)
    for front in (None, {"num_mel_bins": 128, "num_frames": 128}):
        hub.write_pretrained(
            tmp_path, model.state_dict(), {"model": model.config.to_dict(), "frontend": front}
        )
        warnings.clear()
        ast_fast.ASTModel.from_pretrained(tmp_path)
        assert "AudioSet's mean and std" in warnings.text
    model = build(input_tdim=128, eps=1e-12, head_eps=1e-12)
    hub.write_transformers(
        tmp_path / "t", model.state_dict(), model.config.to_dict(), model.frontend_config.to_dict()
    )
    warnings.clear()
    ast_fast.ASTModel.from_pretrained(tmp_path / "t")
    assert not warnings.records
    (tmp_path / "t" / "preprocessor_config.json").unlink()
    ast_fast.ASTModel.from_pretrained(tmp_path / "t")
    assert "AudioSet's mean and std" in warnings.text
