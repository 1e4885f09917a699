"""A model for 64 mel bins takes 64: neighbours give as many patches, of other bands of frequency."""

from __future__ import annotations

import copy

import pytest
import torch

import ast_fast
from ast_fast import reference
from ast_fast.config import LogMelConfig
from ast_fast.equivalence import EquivalenceMonitor
from ast_fast.hub import CheckpointError
from ast_fast.training.distillation import Teacher
from ast_fast.training.ensembles import mean_of_weights

WRONG = (63, 65, 69)


def build(bins=64):
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "input_fdim": bins, "input_tdim": 64}
    return ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, **sizes).eval()


@pytest.mark.parametrize("bins", WRONG)
def test_every_forward_names_the_bins(bins):
    model, x = build(), torch.randn(2, 64, bins)
    twin = reference.ASTModel.from_model(model, torch.float32)
    for call in (
        model,
        model.forward_features,
        model.frame_logits,
        lambda x: model.attention_maps(x, 0),
        model.v,
        lambda x: model.v(x, prefix_only=True),
        twin,
        twin.forward_features,
        EquivalenceMonitor(model).step,
        ast_fast.optimize_for_inference(build()),
    ):
        with pytest.raises(ValueError, match=rf"\(2, 64, {bins}\).*expected .*64"):
            call(x)


@pytest.mark.parametrize("bins", WRONG)
@pytest.mark.parametrize("labels", [False, True])
def test_an_accelerated_model_of_transformers_names_them(bins, labels):
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_length=64,
        num_mel_bins=64,
    )
    model = ast_fast.accelerate(transformers.ASTForAudioClassification(config)).eval()
    assert model(torch.randn(1, 64, 64)).logits.shape == (1, config.num_labels)
    x = torch.randn(1, 64, bins)
    given = {"labels": torch.zeros(1, dtype=torch.long)} if labels else {}
    for call in (
        lambda: model(x, **given),
        lambda: model(x, output_hidden_states=True, **given),
        lambda: model.audio_spectrogram_transformer(x),
    ):
        with pytest.raises(
            ValueError, match=rf"{bins} mel bins: expected 64 \(config.num_mel_bins\)"
        ):
            call()
    # what was not accelerated stays transformers'
    assert ast_fast.restore(model)(torch.randn(1, 64, 64)).logits.isfinite().all()


def test_a_front_end_of_other_bins_is_refused_where_waveforms_come_in():
    model = build()
    model.frontend_config = LogMelConfig(num_mel_bins=63, num_frames=64)
    for call in (
        lambda: model.forward_waveform(torch.zeros(1, 12000)),
        lambda: ast_fast.predict(torch.zeros(12000), model),
        lambda: list(ast_fast.embed([torch.zeros(12000)], model)),
    ):
        with pytest.raises(ValueError, match=r"63.*expected .*64"):
            call()


def test_means_and_teachers_of_other_bins_are_refused(tmp_path):
    from ast_fast.ensemble_command import average

    for bins in (64, 63):
        build(bins).save_pretrained(tmp_path / str(bins))
    assert {n: t.shape for n, t in build(64).state_dict().items()} == {
        n: t.shape for n, t in build(63).state_dict().items()
    }  # nothing but the settings tells them apart
    with pytest.raises(CheckpointError, match="another config"):
        average([str(tmp_path / "64"), str(tmp_path / "63")], tmp_path / "mean")
    with pytest.raises(ValueError, match=r"distill.teacher hears.*63.*64"):
        Teacher(build(63), build().frontend_config, 3)
    assert mean_of_weights(lambda m: m.state_dict(), [build(), copy.deepcopy(build())])
