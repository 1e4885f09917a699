"""Starting weights: image models and the AudioSet checkpoint, from files with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ast_fast
from ast_fast.config import ModelConfig
from ast_fast.hub import CheckpointError
from ast_fast.models import pretrained
from ast_fast.positions import adapt_positions

TINY_FILE = "deit_tiny_distilled_patch16_224-b40b3cf7.pth"


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """Only the test's own folder is looked into, and nothing can be downloaded."""
    monkeypatch.setenv("AST_FAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()

    def offline(*args, **kwargs):
        raise OSError("no network here")

    try:
        import huggingface_hub
        import timm
    except ImportError:
        return
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **kw: offline() if pretrained else create(name, **kw),
    )


SMALL = {"embed_dim": 64, "depth": 1, "num_heads": 1}


def image_weights(name, seed=5, **sizes):
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    model = timm.create_model(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.state_dict()


@pytest.fixture
def narrow(monkeypatch):
    """Makes image models of one narrow block, so that the tests are quick."""

    def make(name):
        monkeypatch.setitem(pretrained._SOURCES, name, pretrained._SOURCES[name]._replace(**SMALL))

    return make


def test_nothing_is_touched_unless_weights_were_asked_for(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("looked for weights")

    for name in ("load_image", "load_audioset", "_find"):
        monkeypatch.setattr(pretrained, name, fail)
    ast_fast.ASTModel(imagenet_pretrain=False, model_size="tiny224", verbose=False)
    with pytest.raises(AssertionError, match="looked for weights"):
        ast_fast.ASTModel(model_size="tiny224", verbose=False)


def test_deit_weights_from_a_file_follow_the_originals_rule(tmp_path):
    image = image_weights("deit_tiny_distilled_patch16_224")
    torch.save({"model": image}, tmp_path / "home" / TINY_FILE)  # as its authors published it
    model = ast_fast.ASTModel(20, 10, 10, 128, 512, model_size="tiny224", verbose=False)
    state = model.state_dict()
    summed = image["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(state["v.patch_embed.proj.weight"], summed)
    want = adapt_positions(image["pos_embed"], (14, 14), (12, 50))
    assert torch.equal(state["v.pos_embed"], want)
    for key, value in image.items():
        if key not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(state[f"v.{key}"], value), key
    assert not model.v.head.weight.requires_grad and model.v.pos_embed.requires_grad


def test_deit_weights_through_timm(monkeypatch, narrow):
    narrow("deit_tiny_distilled_patch16_224")
    timm = pytest.importorskip("timm")
    image = image_weights("deit_tiny_distilled_patch16_224", **SMALL)
    asked = []

    def create(name, pretrained=False):
        asked.append((name, pretrained))
        torch.rand(1000)  # timm draws weights of its own
        model = nn.Module()
        model.state_dict = lambda: image
        return model

    monkeypatch.setattr(timm, "create_model", create)
    torch.manual_seed(0)
    model = ast_fast.ASTModel(20, model_size="tiny224", verbose=False)
    after = torch.rand(1)
    assert asked == [("deit_tiny_distilled_patch16_224", True)]
    assert torch.equal(model.v.blocks[0].attn.qkv.weight, image["blocks.0.attn.qkv.weight"])
    torch.manual_seed(0)
    other = ast_fast.ASTModel(20, imagenet_pretrain=False, model_size="tiny224", verbose=False)
    # the head is drawn as without image weights: only the position table's own draw is missing
    assert torch.equal(model.mlp_head[1].weight, other.mlp_head[1].weight)
    torch.manual_seed(0)
    ast_fast.ASTModel(20, model_size="tiny224", verbose=False)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("rule", ["bilinear", "nearest", "reinitialise"])
def test_position_rule_of_table_4(tmp_path, rule, narrow):
    narrow("deit_tiny_distilled_patch16_224")
    image = image_weights("deit_tiny_distilled_patch16_224", **SMALL)
    torch.save(image, tmp_path / "home" / TINY_FILE)
    model = ast_fast.ASTModel(20, model_size="tiny224", verbose=False, position_rule=rule)
    pos = model.v.pos_embed.detach()
    if rule == "reinitialise":
        assert pos.std().item() == pytest.approx(0.02, rel=0.02)
    else:
        assert torch.equal(pos, adapt_positions(image["pos_embed"], (14, 14), (12, 101), 2, rule))


@pytest.mark.parametrize(
    ("name", "patch", "grid"),
    [("vit_base_patch16_224", 16, (14, 14)), ("vit_base_patch32_384", 32, (12, 12))],
)
def test_vit_with_one_token(tmp_path, narrow, name, patch, grid):
    narrow(name)
    image = image_weights(name, **SMALL)
    torch.save(image, tmp_path / "home" / f"{name}.pth")
    model = ast_fast.ASTModel(
        5, 10, 10, 128, 256, verbose=False, init_source=name, patch_shape=(patch, patch)
    )
    assert model.config.num_prefix_tokens == 1 and "v.dist_token" not in model.state_dict()
    want = adapt_positions(image["pos_embed"], grid, model.config.grid, 1)
    assert torch.equal(model.v.pos_embed.detach(), want)
    assert torch.equal(
        model.v.patch_embed.proj.weight.detach(),
        image["patch_embed.proj.weight"].sum(1, keepdim=True),
    )
    assert model(torch.randn(1, 256, 128)).shape == (1, 5)


def test_sizes_of_vit_large_come_with_its_name():
    with torch.device("meta"):
        model = ast_fast.ASTModel(
            imagenet_pretrain=False, verbose=False, init_source="vit_large_patch16_384"
        )
    c = model.config
    assert (c.embed_dim, c.depth, c.num_heads, c.num_prefix_tokens) == (1024, 24, 16, 1)
    with pytest.raises(
        ValueError, match="init_source='resnet' is unknown: expected one of deit_tiny"
    ):
        ast_fast.ASTModel(init_source="resnet", verbose=False)


def test_another_patch_shape_keeps_a_fresh_projection_and_says_so(tmp_path, caplog, narrow):
    narrow("deit_tiny_distilled_patch16_224")
    image = image_weights("deit_tiny_distilled_patch16_224", **SMALL)
    torch.save(image, tmp_path / "home" / TINY_FILE)
    model = ast_fast.ASTModel(
        5, 128, 2, 128, 128, model_size="tiny224", verbose=False, patch_shape=(128, 2)
    )
    assert "projection keeps its random weights" in caplog.text
    want = adapt_positions(image["pos_embed"], (14, 14), (1, 64))
    assert torch.equal(model.v.pos_embed.detach(), want)
    assert torch.equal(model.v.blocks[0].mlp.fc1.weight, image["blocks.0.mlp.fc1.weight"])


@pytest.fixture
def audioset(tmp_path):
    """A checkpoint like the released one, but narrow."""
    torch.manual_seed(2)
    config = ModelConfig(**SMALL)
    model = ast_fast.ASTModel.from_config(config)
    file = tmp_path / "home" / "audioset_10_10_0.4593.pth"
    torch.save(nn.DataParallel(model).state_dict(), file)
    return model


@pytest.fixture
def narrow_base(narrow):
    narrow("deit_base_distilled_patch16_384")


@pytest.mark.parametrize(
    ("stride", "frames", "bins"), [(10, 1024, 128), (10, 512, 128), (16, 1024, 128), (12, 100, 140)]
)
def test_audioset_weights_at_any_stride(audioset, narrow_base, stride, frames, bins):
    model = ast_fast.ASTModel(
        50, stride, stride, bins, frames, audioset_pretrain=True, verbose=False
    )
    old, new = audioset.state_dict(), model.state_dict()
    want = adapt_positions(old["v.pos_embed"], (12, 101), model.config.grid)
    assert torch.equal(new["v.pos_embed"], want)
    if (stride, frames, bins) == (10, 1024, 128):
        assert torch.equal(new["v.pos_embed"], old["v.pos_embed"])
    for key, value in old.items():
        if key.startswith("v.") and key != "v.pos_embed":
            assert torch.equal(new[key], value), key
    assert model.v.patch_embed.proj.stride == (stride, stride)
    assert model(torch.randn(1, frames, bins)).shape == (1, 50)


def test_audioset_head_is_kept_for_527_classes_only(audioset, narrow_base):
    kept = ast_fast.ASTModel(audioset_pretrain=True, verbose=False)
    assert torch.equal(kept.mlp_head[1].weight, audioset.mlp_head[1].weight)
    x = torch.randn(1, 1024, 128)
    assert torch.allclose(kept(x), audioset(x), atol=1e-6)
    fresh = ast_fast.ASTModel(35, audioset_pretrain=True, verbose=False)
    assert fresh.mlp_head[1].weight.shape == (35, 64)


def test_missing_weights_say_what_to_download_and_where_to_put_it(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ast_fast.ASTModel(verbose=False)
    text = str(caught.value)
    assert (
        "https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_384-d0272ac0.pth" in text
    )
    assert (
        "'deit_base_distilled_patch16_384-d0272ac0.pth'" in text and str(tmp_path / "home") in text
    )
    assert "AST_FAST_HOME" in text and "no network here" in text
    assert "imagenet_pretrain=False" in text
    with pytest.raises(CheckpointError) as caught:
        ast_fast.ASTModel(audioset_pretrain=True, verbose=False)
    text = str(caught.value)
    assert "https://www.dropbox.com/s/cv4knew8mvbrnvq/audioset_0.4593.pth?dl=1" in text
    assert "'audioset_10_10_0.4593.pth'" in text and str(tmp_path / "home") in text


def test_without_timm_the_error_names_it_and_the_file(monkeypatch):
    monkeypatch.setattr(pretrained, "optional_import", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r"ast-fast\[timm\].*deit_tiny_distilled_patch16_224-b40b3cf7"
    ):
        ast_fast.ASTModel(model_size="tiny224", verbose=False)


def test_weights_of_another_architecture_are_reported(tmp_path):
    image = image_weights("deit_small_distilled_patch16_224")
    torch.save(image, tmp_path / "home" / TINY_FILE)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        ast_fast.ASTModel(5, model_size="tiny224", verbose=False)


def test_an_image_model_is_no_ast(tmp_path):
    torch.save(image_weights("deit_tiny_distilled_patch16_224"), tmp_path / "deit.pth")
    with pytest.raises(CheckpointError, match="holds an image model, not an AST"):
        ast_fast.ASTModel.from_pretrained(tmp_path / "deit.pth")
