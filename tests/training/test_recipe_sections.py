"""A section of a recipe that names some settings leaves the others as they were."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ast_fast import create_model
from ast_fast.config import LogMelConfig, MfccConfig
from ast_fast.models.ast import ASTModel
from ast_fast.train_command import _build
from ast_fast.training import RunConfig
from ast_fast.training.recipe import read_config

DATA = SimpleNamespace(classes=("a", "b"))
FRONT = LogMelConfig(
    num_mel_bins=64,
    num_frames=64,
    sample_rate_hz=8000,
    mean=-6.5,
    std=5.5,
    output="db",
    top_db=60.0,
)


def built(recipe, overrides):
    torch.manual_seed(0)
    # as a run does: through the JSON that it is resumed from
    settings = read_config(recipe, overrides).to_dict()
    model, audio = _build(RunConfig.from_dict(json.loads(json.dumps(settings))), DATA, {})
    return model, audio


def test_a_length_alone_leaves_the_bins_of_a_named_model():
    model, _ = built(None, ["frontend.num_frames=96"])
    assert (model.config.input_fdim, model.config.input_tdim) == (64, 96)
    assert model.frontend_config == LogMelConfig(num_mel_bins=64, num_frames=96)


def test_what_is_not_said_comes_from_a_pretrained_model(tmp_path):
    kept = create_model("ast_mini_p16_s10", num_classes=3, frontend_config=FRONT)
    kept.save_pretrained(tmp_path / "kept")
    model, audio = built(None, [f"model={tmp_path / 'kept'}", "frontend.num_frames=96"])
    assert isinstance(model, ASTModel) and model.config.input_tdim == 96
    assert model.frontend_config == FRONT.replace(num_frames=96)
    assert audio.sample_rate_hz == 8000
    # a value that only the model's own settings allow
    model, _ = built(None, [f"model={tmp_path / 'kept'}", "frontend.top_db=80.0"])
    assert model.frontend_config == FRONT.replace(top_db=80.0)


def test_a_file_and_the_command_line_share_a_section(tmp_path):
    recipe = tmp_path / "own.toml"
    recipe.write_text("[frontend]\nnum_frames = 96\nmean = -5.0\n")
    model, _ = built(str(recipe), ["frontend.std=2.0"])
    assert model.frontend_config == LogMelConfig(num_mel_bins=64, num_frames=96, mean=-5.0, std=2.0)


def test_a_whole_front_end_names_everything():
    front = FRONT.replace(num_frames=32, num_mel_bins=32)
    model, _ = _build(RunConfig(frontend=front), DATA, {})
    assert model.frontend_config == front and model.config.input_fdim == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frontend.std=0", "std=0: expected a positive value"),
        ("frontend.window=box", "window='box': expected one of hann"),
        ("frontend.colour=1", "LogMelConfig has no setting colour"),
        ("frontend=7", "frontend=7: expected a section"),
    ],
)
def test_a_wrong_front_end_is_refused_before_the_data_are_read(override, message):
    with pytest.raises(ValueError, match=message):
        read_config(None, [override])


def test_a_nested_section_keeps_the_defaults_of_its_owner():
    # cepstra are made of energies that are not normalised, by Povey's window
    made = MfccConfig.from_dict({"log_mel": {"num_mel_bins": 40}})
    assert made.log_mel == MfccConfig().log_mel.replace(num_mel_bins=40)


def test_sizes_are_those_of_the_model_that_is_built():
    model, _ = built(None, ["sizes.depth=2", "sizes.tstride=8", "frontend.num_frames=48"])
    assert (model.config.depth, model.config.tstride, model.config.embed_dim) == (2, 8, 128)
    assert model.config.input_tdim == model.frontend_config.num_frames == 48


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sizes.colour=1"], "ModelConfig has no setting colour"),
        (["sizes.input_tdim=64"], "sizes.input_tdim: follows from the data or the front end"),
        (["sizes.depth=2.5"], "depth=2.5: expected a whole number"),
        (["sizes=3"], "sizes=3: expected a section"),
        (["sizes.depth=2", "model=some/folder"], "named by its architecture"),
        (["sizes.depth=2", "weights=imagenet"], "that starts from random weights"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_the_data_are_read(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_config(None, overrides)
