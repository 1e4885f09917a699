"""The drop-in surface: signature, attributes, checkpoint keys, errors, prints and seeds."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import ast_fast
from ast_fast.config import LogMelConfig, ModelConfig


def build(*args, **kwargs):
    settings = {"imagenet_pretrain": False, "verbose": False, "model_size": "tiny224"}
    return ast_fast.ASTModel(*args, **{**settings, **kwargs})


@pytest.fixture(scope="module")
def tiny():
    return build(35, input_tdim=128)


def test_signature_is_the_originals_and_the_rest_is_keyword_only():
    parameters = list(inspect.signature(ast_fast.ASTModel).parameters.values())
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        ("label_dim", 527),
        ("fstride", 10),
        ("tstride", 10),
        ("input_fdim", 128),
        ("input_tdim", 1024),
        ("imagenet_pretrain", True),
        ("audioset_pretrain", False),
        ("model_size", "base384"),
        ("verbose", True),
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(positional) :])


def test_state_dict_has_the_originals_keys_in_its_order():
    with torch.device("meta"):
        model = build(model_size="base384")
    block = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
        "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    expected = ["v.cls_token", "v.pos_embed", "v.dist_token"]
    expected += ["v.patch_embed.proj.weight", "v.patch_embed.proj.bias"]
    expected += [f"v.blocks.{i}.{name}" for i in range(12) for name in block]
    expected += ["v.norm.weight", "v.norm.bias", "v.head.weight", "v.head.bias"]
    expected += ["v.head_dist.weight", "v.head_dist.bias", "mlp_head.0.weight", "mlp_head.0.bias"]
    expected += ["mlp_head.1.weight", "mlp_head.1.bias"]
    state = model.state_dict()
    assert list(state) == expected and len(expected) == 159
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["v.cls_token"] == shapes["v.dist_token"] == (1, 1, 768)
    assert shapes["v.pos_embed"] == (1, 1214, 768)
    assert shapes["v.patch_embed.proj.weight"] == (768, 1, 16, 16)
    assert shapes["v.blocks.11.attn.qkv.weight"] == (2304, 768)
    assert shapes["v.blocks.0.mlp.fc1.weight"] == (3072, 768)
    assert shapes["v.head.weight"] == shapes["v.head_dist.weight"] == (1000, 768)
    assert shapes["mlp_head.1.weight"] == (527, 768)


@pytest.mark.parametrize(
    ("size", "frames", "stride", "classes", "millions"),
    [
        ("base384", 1024, 10, 527, 88.132),
        ("base384", 512, 10, 527, 87.662),
        ("base384", 1024, 16, 527, 87.594),
        ("base384", 128, 10, 35, 86.933),
        ("base384", 512, 10, 50, 87.295),
        ("base224", 128, 10, 527, 87.312),
        ("small224", 1024, 10, 527, 22.834),
        ("small224", 512, 10, 527, 22.599),
        ("tiny224", 1024, 10, 527, 6.110),
        ("tiny224", 128, 10, 527, 5.905),
        ("tiny224", 1024, 16, 527, 5.975),
    ],
)
def test_parameter_counts_are_the_originals(size, frames, stride, classes, millions):
    with torch.device("meta"):
        model = build(classes, stride, stride, 128, frames, model_size=size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_dead_heads_are_kept_and_take_no_gradient(tiny):
    tiny(torch.randn(1, 128, 128)).sum().backward()
    without = {name for name, p in tiny.named_parameters() if p.grad is None}
    assert without == {"v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias"}
    assert not any(tiny.get_parameter(name).requires_grad for name in without)
    tiny.zero_grad()


def test_attributes_that_other_code_touches(tiny):
    assert tiny.original_num_patches == 196 and tiny.oringal_hw == 14
    assert tiny.original_embedding_dim == 192
    assert tiny.v.patch_embed.num_patches == 144
    assert isinstance(tiny.mlp_head[0], nn.LayerNorm) and isinstance(tiny.mlp_head[1], nn.Linear)
    assert (tiny.v.norm.eps, tiny.v.blocks[0].norm1.eps, tiny.mlp_head[0].eps) == (1e-6, 1e-6, 1e-5)
    assert isinstance(tiny.v.blocks[3].mlp.act, nn.GELU)


@pytest.mark.parametrize(
    ("frames", "stride", "grid"),
    [
        (1024, 10, (12, 101)), (1024, 12, (10, 85)), (1024, 14, (9, 73)), (1024, 16, (8, 64)),
        (512, 10, (12, 50)), (128, 16, (8, 8)), (100, 10, (12, 9)), (998, 10, (12, 99)),
        (2048, 10, (12, 204)),
    ],
)  # fmt: skip
def test_get_shape_is_the_grid_and_draws_nothing(tiny, frames, stride, grid):
    before = torch.get_rng_state()
    assert tiny.get_shape(stride, stride, 128, frames) == grid
    assert torch.equal(before, torch.get_rng_state())
    assert tiny.get_shape(10, 10) == (12, 101)


def test_errors_have_the_originals_texts():
    with pytest.raises(
        Exception, match=r"^Model size must be one of tiny224, small224, base224, base384\.$"
    ):
        ast_fast.ASTModel(model_size="huge", verbose=False)
    with pytest.raises(ValueError, match=r"^currently model pretrained on only audioset is not supported, "
                       r"please set imagenet_pretrain = True to use audioset pretrained model\."):  # fmt: skip
        ast_fast.ASTModel(imagenet_pretrain=False, audioset_pretrain=True, verbose=False)
    with pytest.raises(
        ValueError, match=r"^currently only has base384 AudioSet pretrained model\.$"
    ):
        ast_fast.ASTModel(audioset_pretrain=True, model_size="small224", verbose=False)


def test_prints_only_when_verbose(capsys):
    build()
    assert capsys.readouterr().out == ""
    build(verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "ImageNet pretraining: False, AudioSet pretraining: False",
        "frequncey stride=10, time stride=10",
        "number of patches=1212",
    ]


def test_a_seed_gives_the_weights_of_the_original_with_timm_0_4_5():
    # last two entries of tensors made by timm 0.4.5 and the original's order of construction
    golden = {
        "v.cls_token": [-0.0110385139, 0.0410184935],
        "v.dist_token": [0.0125725158, 0.00933209062],
        "v.pos_embed": [0.000131108289, 0.00876392145],
        "v.patch_embed.proj.weight": [0.00225160271, -0.027875483],
        "v.blocks.0.attn.qkv.weight": [0.0304378588, 0.00734461565],
        "v.blocks.11.mlp.fc2.weight": [0.00947609358, 0.00393806631],
        "v.head.weight": [-0.011002155, -0.0119920047],
        "v.head_dist.weight": [-0.0317948647, -0.00111118902],
        "mlp_head.1.weight": [-0.0350869969, -0.0583072975],
        "mlp_head.1.bias": [0.068866536, 0.0198090076],
    }
    torch.manual_seed(7)
    state = build(35, input_tdim=128).state_dict()
    assert torch.rand(1).item() == pytest.approx(0.6228, abs=5e-5)
    for key, values in golden.items():
        assert state[key].flatten()[-2:].tolist() == pytest.approx(values, rel=1e-5), key


@pytest.mark.parametrize(
    ("patch", "stride", "grid"),
    [((128, 2), (128, 2), (1, 64)), ((32, 32), (32, 32), (4, 4)), ((16, 16), (10, 16), (12, 8))],
)
def test_patches_of_the_papers_table_6(patch, stride, grid):
    model = build(5, *stride, 128, 128, patch_shape=patch)
    assert model.config.grid == grid
    assert model.v.patch_embed.proj.kernel_size == patch
    assert model(torch.randn(2, 128, 128)).shape == (2, 5)


def test_from_config_labels_and_front_end():
    config = ModelConfig(
        label_dim=2,
        input_tdim=64,
        input_fdim=64,
        embed_dim=64,
        depth=1,
        num_heads=2,
        labels=("a", "b"),
    )
    model = ast_fast.ASTModel.from_config(config)
    assert model.labels == ("a", "b") and model.config is config
    assert (model.frontend_config.num_frames, model.frontend_config.num_mel_bins) == (64, 64)
    with pytest.raises(
        ValueError, match="frontend_config gives 1024 frames of 128 mel bins: expected 64"
    ):
        ast_fast.ASTModel.from_config(config, LogMelConfig())
    with pytest.raises(ValueError, match="labels has 1 names: expected label_dim=2"):
        build(2, labels=("a",))


def test_a_copy_computes_the_same(tiny):
    x = torch.randn(1, 128, 128)
    assert torch.equal(copy.deepcopy(tiny)(x), tiny(x))


def test_registry_lists_creates_and_refuses():
    names = ast_fast.list_models("ast_*")
    assert {"ast_tiny_p16_s10", "ast_small_p16_s10", "ast_base_p128x2", "ast_base_p32"} <= set(
        names
    )
    assert {f"ast_base_p16_s{s}" for s in (10, 12, 14, 16)} <= set(names)
    with torch.device("meta"):
        grids = {name: ast_fast.create_model(name).config.grid for name in names}
    assert grids["ast_base_p16_s10"] == (12, 101) and grids["ast_base_p16_s14"] == (9, 73)
    assert grids["ast_base_p128x2"] == (1, 512) and grids["ast_base_p32"] == (4, 32)
    model = ast_fast.create_model("ast_mini_p16_s10", num_classes=3, input_tdim=100)
    assert model(torch.randn(2, 100, 64)).shape == (2, 3)
    with pytest.raises(ValueError, match="did you mean ast_base_p16_s1"):
        ast_fast.create_model("ast_base_p16_s1")
    with pytest.raises(ValueError, match="has no setting colour"):
        ast_fast.create_model("ast_mini_p16_s10", colour="red")
