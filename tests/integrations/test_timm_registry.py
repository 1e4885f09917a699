"""AST among timm's models, by timm's own factory, optimisers, schedulers and loaders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ast_fast
from ast_fast.hub import CheckpointError

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.scheduler")

import ast_fast.integrations.timm as integration  # noqa: E402

SMALL = {"input_tdim": 64, "input_fdim": 64, "depth": 2}


def make(classes=5, **settings):
    torch.manual_seed(0)
    return timm.create_model("ast_tiny_p16_s10", num_classes=classes, **{**SMALL, **settings})


def test_every_model_of_ours_is_one_of_timms():
    assert sorted(timm.list_models("ast_*")) == ast_fast.list_models("ast_*")
    assert timm.is_model("ast_base_p16_s10")
    with torch.device("meta"):
        model = timm.create_model("ast_base_p16_s10", num_classes=10, pretrained=False)
    assert model.num_classes == 10 and model.num_features == 768


def test_shapes_heads_and_features():
    model = make().eval()
    x = torch.randn(2, 64, 64)
    logits = model(x)
    assert logits.shape == (2, 5) and model.num_classes == 5
    assert torch.equal(model(x[:, None]), logits)  # timm's tools make images of input_size
    features = model.forward_features(x)
    assert features.shape == (2, 27, 192)
    torch.testing.assert_close(model.forward_head(features), logits, atol=1e-5, rtol=1e-4)
    embedded = model.forward_head(features, pre_logits=True)
    assert embedded.shape == (2, 192) == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(embedded), logits, atol=1e-5, rtol=1e-4)
    state = model.state_dict()
    ours = ast_fast.create_model("ast_tiny_p16_s10", num_classes=5, **SMALL).eval()
    ours.load_state_dict(state)
    assert torch.equal(ours(x), logits)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), embedded, atol=1e-5, rtol=1e-4)
    model.double().reset_classifier(9)
    assert model.num_classes == model.config.label_dim == 9
    assert model.get_classifier().weight.dtype == torch.float64
    assert make(0)(x).shape == (2, 192)


def test_timms_description_is_complete():
    model = make()
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (1, 64, 64)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg and cfg["num_classes"] == 5
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]) is model.v.patch_embed.proj


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_training_run_with_timms_optimiser_and_scheduler(decay):
    model = make().train()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=decay
    )
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    undecayed = {
        id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]
    }
    assert id(model.v.pos_embed) in undecayed and id(model.v.norm.weight) in undecayed
    assert id(model.v.blocks[0].attn.qkv.weight) not in undecayed
    if decay:
        scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
        rates = [
            scales[id(p)]
            for p in (
                model.v.patch_embed.proj.weight, model.v.blocks[0].mlp.fc1.weight,
                model.v.blocks[1].mlp.fc1.weight, model.mlp_head[1].weight,
            )
        ]  # fmt: skip
        assert rates == sorted(rates) and rates[0] < rates[1] < rates[2] < rates[3] == 1.0
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 64, 64, generator=generator)
    y = torch.arange(10) % 5
    losses = []
    for step in range(8):
        scheduler.step(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_from_files(tmp_path):
    model = make().eval()
    x = torch.randn(1, 64, 64)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    again = make(checkpoint_path=str(tmp_path / "plain.pth")).eval()
    assert torch.equal(again(x), model(x))
    model.save_pretrained(tmp_path / "saved")
    overlay = {"file": str(tmp_path / "saved")}
    loaded = timm.create_model("ast_tiny_p16_s10", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.eval()(x), model(x)) and loaded.default_cfg["num_classes"] == 5
    other = timm.create_model(
        "ast_tiny_p16_s10",
        pretrained=True,
        num_classes=2,
        input_tdim=96,
        pretrained_cfg_overlay=overlay,
    )
    assert other(torch.randn(1, 96, 64)).shape == (1, 2)
    assert torch.equal(other.v.norm.weight, model.v.norm.weight)


def test_what_an_ast_has_not_is_refused():
    with pytest.raises(CheckpointError, match="no published weights of ast_tiny_p16_s10"):
        make(pretrained=True)
    with pytest.raises(ValueError, match="in_chans=3: an AST takes 1 only"):
        make(in_chans=3)
    with pytest.raises(ValueError, match=r"drop_rate=0\.1"):
        make(drop_rate=0.1)
    with pytest.raises(ValueError, match="global_pool='avg'"):
        make().reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="num_classes=-1"):
        make().reset_classifier(-1)
    with pytest.raises(ValueError, match="no setting"):
        make(no_such_setting=1)
    make(drop_rate=0.0, drop_path_rate=0.0, in_chans=1, global_pool="token")
    assert integration.register() == []  # once is enough
