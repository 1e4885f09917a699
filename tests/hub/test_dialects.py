"""Weights of every dialect in and out, with transformers' and timm's own programs on the other side."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ast_fast
from ast_fast import hub
from ast_fast.config import LogMelConfig, ModelConfig

SIZES = {
    "label_dim": 5,
    "input_fdim": 64,
    "input_tdim": 96,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
}


def build(**changes):
    torch.manual_seed(0)
    return ast_fast.ASTModel.from_config(ModelConfig(**{**SIZES, **changes}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def released(tmp_path):
    """A file as the original's trainer writes it: DataParallel's prefix, named after its strides."""
    model = build(
        input_fdim=128, input_tdim=128, embed_dim=192, num_heads=3, fstride=12, tstride=12
    )
    file = tmp_path / "audioset_12_12_0.4467.pth"
    torch.save(nn.DataParallel(model).state_dict(), file)
    return model, file


@pytest.mark.parametrize("prefix", ["module.", "", "_orig_mod.", "module._orig_mod."])
def test_original_checkpoints_load_with_any_wrapper(released, tmp_path, prefix):
    model, file = released
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, file)
    state, info = hub.read_weights(file)
    assert list(state) == list(model.state_dict()) and info["dialect"] == "original"
    loaded = ast_fast.ASTModel.from_pretrained(file)
    assert loaded.config == model.config and same(loaded, model)
    assert not loaded.training and loaded.v.blocks[0].norm1.weight.requires_grad
    assert not loaded.v.head.weight.requires_grad


@pytest.mark.parametrize(
    ("stride", "frames"), [(s, n) for s in (10, 12, 14, 16) for n in (1024, 512, 128)]
)
def test_layout_of_a_nameless_checkpoint_is_found(tmp_path, stride, frames):
    model = build(input_fdim=128, input_tdim=frames, fstride=stride, tstride=stride)
    torch.save(model.state_dict(), tmp_path / "best_audio_model.pth")
    config = ast_fast.ASTModel.from_pretrained(tmp_path / "best_audio_model.pth").config
    assert (config.fstride, config.tstride, config.input_tdim) == (stride, stride, frames)


def test_state_dict_inside_a_training_file(tmp_path):
    model = build()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    state, _ = hub.read_weights(tmp_path / "last.pt", input_fdim=64)
    assert list(state) == list(model.state_dict())


def test_own_directory_gives_everything_back(tmp_path):
    names = ("dog", "cat", "rain", "sea", "silence")
    front = LogMelConfig(num_mel_bins=64, num_frames=96, mean=-6.5, std=5.5, sample_rate_hz=8000)
    config = ModelConfig(**SIZES, labels=names, eps=1e-7)
    model = ast_fast.ASTModel.from_config(config, front)
    assert model.save_pretrained(tmp_path / "m") == tmp_path / "m"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    for source in (tmp_path / "m", str(tmp_path / "m"), tmp_path / "m" / "model.safetensors"):
        loaded = ast_fast.ASTModel.from_pretrained(source)
        assert loaded.config == config and loaded.frontend_config == front
        assert loaded.labels == names and same(loaded, model)
    assert hub.read_weights(tmp_path / "m")[1]["dialect"] == "ast_fast"


def test_settings_inside_the_weights_count(tmp_path, caplog):
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert ast_fast.ASTModel.from_pretrained(tmp_path).config == ModelConfig(**SIZES)
    build(eps=1e-3).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").rename(tmp_path / "config.json")
    assert ast_fast.ASTModel.from_pretrained(tmp_path).config.eps == 1e-6
    assert "differs from the settings inside the weights" in caplog.text


def test_load_edit_save_on_the_same_path(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = ast_fast.ASTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.mlp_head[1].bias += 1.0
    loaded.save_pretrained(tmp_path)
    again = ast_fast.ASTModel.from_pretrained(tmp_path)
    assert same(again, loaded) and torch.equal(again.mlp_head[1].bias, model.mlp_head[1].bias + 1.0)


def transformers_model(**changes):
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256,
        "max_length": 96, "num_mel_bins": 64, "time_stride": 12,
        "id2label": {0: "a", 1: "b", 2: "c"}, **changes,
    }  # fmt: skip
    torch.manual_seed(1)
    model = transformers.ASTForAudioClassification(transformers.ASTConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write_by_transformers(theirs, folder, style):
    if style == "save_pretrained":
        theirs.save_pretrained(folder)
        return
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    state = hub.to_ours(theirs.state_dict())
    version = 5 if style == "v5" else 4
    state = {k: v.contiguous().clone() for k, v in hub.to_transformers(state, version).items()}
    assert ("layers.1." in " ".join(state)) == (style == "v5")
    if style == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif style == "sharded":
        names = sorted(state)
        files = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in set(files.values()):
            save_file({n: state[n] for n in names if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("style", ["save_pretrained", "v4", "v5", "bin", "sharded"])
def test_transformers_directories_load(tmp_path, style):
    theirs = transformers_model()
    write_by_transformers(theirs, tmp_path / "m", style)
    ours = ast_fast.ASTModel.from_pretrained(tmp_path / "m")
    assert ours.config.eps == ours.config.head_eps == theirs.config.layer_norm_eps == 1e-12
    assert ours.v.norm.eps == ours.mlp_head[0].eps == 1e-12
    assert (ours.config.fstride, ours.config.tstride) == (10, 12) and ours.labels == ("a", "b", "c")
    x = torch.randn(2, 96, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, rtol=1e-5, atol=1e-5)
    q = theirs.state_dict()["audio_spectrogram_transformer.layers.1.attention.q_proj.weight"]
    assert torch.equal(ours.v.blocks[1].attn.qkv.weight[:64], q)


def test_preprocessor_config_becomes_the_front_end(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers_model().save_pretrained(tmp_path)
    assert ast_fast.ASTModel.from_pretrained(tmp_path).frontend_config.mean == -4.2677393
    extractor = transformers.ASTFeatureExtractor(max_length=96, num_mel_bins=64, mean=-6.8, std=5.5)
    extractor.save_pretrained(tmp_path)
    front = ast_fast.ASTModel.from_pretrained(tmp_path).frontend_config
    assert (front.mean, front.std, front.num_frames, front.num_mel_bins) == (-6.8, 5.5, 96, 64)
    transformers.ASTFeatureExtractor(
        max_length=96, num_mel_bins=64, do_normalize=False
    ).save_pretrained(tmp_path)
    front = ast_fast.ASTModel.from_pretrained(tmp_path).frontend_config
    assert (front.mean, 2 * front.std) == (0.0, 1.0)
    transformers.ASTFeatureExtractor(max_length=100, num_mel_bins=64).save_pretrained(tmp_path)
    with pytest.raises(hub.CheckpointError, match=r"num_frames=100 and .* 96: make them equal"):
        ast_fast.ASTModel.from_pretrained(tmp_path)


def test_transformers_loads_what_we_write_and_we_load_it_back(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    names = ("a", "b", "c", "d", "e")
    several = "multi_label_classification"
    model = build(eps=1e-12, head_eps=1e-12, labels=names, fstride=8, problem_type=several)
    settings = model.config.to_dict(), model.frontend_config.to_dict()
    hub.write_transformers(tmp_path, model.state_dict(), *settings)
    theirs, report = transformers.ASTForAudioClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert [theirs.config.id2label[i] for i in range(5)] == list(names)
    assert theirs.config.problem_type == several
    x = torch.randn(2, 96, 64)
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, model(x), rtol=1e-5, atol=1e-5)
    extractor = transformers.ASTFeatureExtractor.from_pretrained(tmp_path)
    assert (extractor.max_length, extractor.num_mel_bins, extractor.std) == (96, 64, 4.5689974)
    theirs.save_pretrained(tmp_path / "again")
    extractor.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        back = ast_fast.ASTModel.from_pretrained(folder)
        assert back.config == model.config.replace(dead_heads=False)
        state = back.state_dict()
        assert all(torch.equal(state[key], model.state_dict()[key]) for key in state)
    assert not caplog.records
    hub.write_transformers(
        tmp_path, model.state_dict(), {**settings[0], "head_eps": 1e-5}, settings[1]
    )
    assert "one LayerNorm epsilon: the head's 1e-05 becomes 1e-12" in caplog.text


def test_what_transformers_cannot_express_is_refused(tmp_path):
    front = LogMelConfig().to_dict()
    for changes, message in (
        ({"num_prefix_tokens": 1}, "always has a distillation token"),
        ({"patch_fdim": 64, "patch_tdim": 2}, "has square ones"),
    ):
        model = build(**changes)
        with pytest.raises(ValueError, match=message):
            hub.write_transformers(
                tmp_path / "x", model.state_dict(), model.config.to_dict(), front
            )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu': only 'gelu' is supported"),
        ({"qkv_bias": False}, "qkv_bias=False: only True is supported"),
        ({"hidden_dropout_prob": 0.1}, "the fast model has no dropout; set it to 0"),
        ({"model_type": "vit"}, "of model_type 'vit': expected 'audio-spectrogram-transformer'"),
        ({"id2label": {"0": "a", "2": "c"}}, "id2label with gaps: expected 0 to 1"),
        ({"id2label": ["a"]}, "unreadable id2label"),
        ({"id2label": {"0": "a", "1": None, "2": "c"}}, "no name for class 1 in its id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "'a' is the name of class 0 and of class 2"),
        ({"hidden_size": "wide"}, "hidden_size='wide': expected a whole number"),
        ({"num_attention_heads": 7}, "does not split into num_heads=7"),
    ],
)
def test_transformers_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    transformers_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(hub.CheckpointError, match=message):
        ast_fast.ASTModel.from_pretrained(tmp_path)


def test_report_lists_missing_unexpected_and_misshaped_keys(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    settings = {"model": model.config.to_dict(), "frontend": None}
    del state["v.norm.bias"]
    state["v.extra"] = torch.zeros(3)
    state["mlp_head.1.weight"] = torch.zeros(4, 64)
    hub.write_pretrained(tmp_path, state, settings)
    with pytest.raises(hub.CheckpointError) as caught:
        ast_fast.ASTModel.from_pretrained(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "missing (1):\n    v.norm.bias (64,)" in text
    assert "unexpected (1):\n    v.extra (3,)" in text
    assert "wrong shape (1):\n    mlp_head.1.weight: got (4, 64), expected (5, 64)" in text


def test_incomplete_qkv_is_named(tmp_path):
    state = hub.to_transformers(build().state_dict())
    del state["audio_spectrogram_transformer.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(
        hub.CheckpointError, match=r"blocks\.1\.attn\.qkv\.bias cannot be put together: k is"
    ):
        hub.to_ours(state)


@pytest.mark.parametrize("version", [4, 5])
def test_key_maps_invert_each_other(version):
    state = build(dead_heads=False).state_dict()
    back = hub.to_ours(hub.to_transformers(state, version))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert hub.dialect_of(hub.to_transformers(state, version)) == "transformers"


def test_fine_tuning_changes_head_and_positions_and_nothing_else(tmp_path):
    model = build(labels=tuple("abcde"), problem_type="single_label_classification")
    model.save_pretrained(tmp_path)
    tuned = ast_fast.ASTModel.from_pretrained(tmp_path, label_dim=3, input_tdim=200, tstride=12)
    assert (
        tuned.labels is None and tuned.config.problem_type is None and tuned.config.grid == (5, 16)
    )
    assert tuned.frontend_config.num_frames == 200
    assert tuned(torch.randn(1, 200, 64)).shape == (1, 3)
    old, new = model.state_dict(), tuned.state_dict()
    changed = {
        key
        for key in old
        if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])
    }
    assert changed == {"v.pos_embed", "mlp_head.1.weight", "mlp_head.1.bias"}
    assert torch.equal(new["v.pos_embed"][:, :2], old["v.pos_embed"][:, :2])
    named = ast_fast.ASTModel.from_pretrained(tmp_path, labels=("x", "y"))
    assert named.labels == ("x", "y") and named.config.label_dim == 2
    with pytest.raises(hub.CheckpointError, match="has no setting colour"):
        ast_fast.ASTModel.from_pretrained(tmp_path, colour="red")
