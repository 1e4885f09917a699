"""Weights inside what training programs save, under names that wrappers changed."""

from __future__ import annotations

import argparse
import logging
import pathlib

import pytest
import torch
from torch import nn

import ast_fast
from ast_fast import hub
from ast_fast.config import ModelConfig

CONFIG = ModelConfig(
    label_dim=5, input_fdim=64, input_tdim=96, embed_dim=64, depth=2, num_heads=1, dead_heads=False
)
SAID = {"strides": (10, 10), "frames": 96, "mel_bins": 64, "heads": 1, "mean": -5.0, "std": 4.0}


def build(seed=0):
    torch.manual_seed(seed)
    return ast_fast.ASTModel.from_config(CONFIG)


def assert_loads(content, file, model):
    torch.save(content, file)
    found = ast_fast.ASTModel.from_pretrained(file, **SAID)
    expected = model.state_dict()
    assert list(found.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    return found


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


@pytest.mark.parametrize(
    "prefix",
    ["net.", "model.", "module.", "_orig_mod.", "module.net._orig_mod.", "a.b.c.", "vit.v.model."],
)
def test_any_common_prefix_is_taken_off(tmp_path, prefix):
    model = build()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    assert_loads(state, tmp_path / "x.pth", model)


@pytest.mark.parametrize("version", [4, 5])
def test_transformers_names_under_a_prefix(version):
    state = hub.to_transformers(build().state_dict(), version)
    wrapped = {f"net.module.{key}": value for key, value in state.items()}
    assert list(hub.to_ours(wrapped)) == list(hub.to_ours(state))
    # without a head there is no base name either
    bare = {k.removeprefix("audio_spectrogram_transformer."): v for k, v in state.items()}
    wrapped = {f"net.{key}": value for key, value in bare.items()}
    assert list(hub.to_ours(wrapped)) == list(hub.to_ours(bare))


def test_wrappers_between_names(tmp_path):
    model = build()
    state = {}
    for key, value in model.state_dict().items():
        _, block, rest = key.partition("v.blocks.")
        if block:
            number, _, rest = rest.partition(".")
            key = f"{block}{number}._orig_mod._checkpoint_wrapped_module.{rest}"
        state[f"_fsdp_wrapped_module.{key}"] = value
    assert_loads(state, tmp_path / "x.pth", model)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module", "net"])
def test_entries_of_training_files(tmp_path, name):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"epoch": 3, name: model.state_dict(), "optimizer": optimizer.state_dict()}
    assert_loads(content, tmp_path / "last.pt", model)
    assert_loads({"trainer": content, "model": content}, tmp_path / "nested.pt", model)
    # a name of one's own, if one entry alone holds an AST
    assert_loads({"my_weights": model.state_dict(), "epoch": 1}, tmp_path / "own.pt", model)


def test_averaged_models(tmp_path, caplog):
    model = build()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert "n_averaged" in averaged.state_dict()
    assert_loads(averaged.state_dict(), tmp_path / "x.pth", model)
    assert_loads({"model": Holder(averaged).state_dict()}, tmp_path / "y.pth", model)
    plain = {key.removeprefix("module."): value for key, value in averaged.state_dict().items()}
    assert_loads(plain, tmp_path / "z.pth", model)
    assert "left out" not in caplog.text


def test_what_is_left_out_is_said(tmp_path, caplog):
    model, other = build(), build(1)
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    state["loss.pos_weight\x1b[2J"] = torch.ones(5)
    with caplog.at_level(logging.WARNING):
        assert_loads(state, tmp_path / "x.pth", model)
        assert r"left out: 'loss.pos_weight\x1b[2J'" in caplog.text and "\x1b" not in caplog.text
        assert_loads(
            {"model": model.state_dict(), "ema": other.state_dict()}, tmp_path / "y.pth", model
        )
        assert "the weights of model are loaded; those of ema are left out" in caplog.text


def test_several_models_are_not_chosen_from(tmp_path):
    model = build()
    state = {
        f"{part}.{k}": v for part in ("student", "teacher") for k, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(hub.CheckpointError, match=r"several models \('student\.', 'teacher\.'\)"):
        hub.read_weights(tmp_path / "x.pth")
    torch.save({"student": model.state_dict(), "teacher": model.state_dict()}, tmp_path / "y.pth")
    with pytest.raises(hub.CheckpointError, match=r"several models \(student, teacher\)"):
        hub.read_weights(tmp_path / "y.pth")


def test_two_names_that_become_one_are_refused(tmp_path):
    state = build().state_dict()
    state["_orig_mod.v.cls_token"] = state["v.cls_token"] + 1
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(hub.CheckpointError, match=r"two tensors are called 'v.cls_token'"):
        hub.read_weights(tmp_path / "x.pth")


def test_objects_beside_the_weights_are_neither_run_nor_in_the_way(tmp_path):
    model = build()
    content = {
        "state_dict": {f"net.{key}": value for key, value in model.state_dict().items()},
        "hyper_parameters": {"args": argparse.Namespace(lr=1e-3), "data": pathlib.Path("/data")},
        "pytorch-lightning_version": "2.5.0",
    }
    assert_loads(content, tmp_path / "last.ckpt", model)
    content["state_dict"]["net.x"] = pathlib.Path("/data")
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(hub.CheckpointError, match=r"more than tensors \('net.x'\)"):
        hub.read_weights(tmp_path / "bad.ckpt")


def test_a_file_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, net, folder):
            super().__init__()
            self.save_hyperparameters(ignore=["net"])
            self.net = net

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Module(build(), tmp_path)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(1, 96, 64)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = ast_fast.ASTModel.from_pretrained(tmp_path / "last.ckpt", **SAID)
    expected = module.net.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_a_checkpoint_of_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128,
        max_length=96, num_mel_bins=64, num_labels=3,
    )  # fmt: skip
    theirs = transformers.ASTForAudioClassification(config)
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_values": torch.randn(96, 64), "labels": 1}] * 2
    transformers.Trainer(theirs, settings, train_dataset=data).train()
    found = ast_fast.ASTModel.from_pretrained(tmp_path / "checkpoint-1", mean=0.0, std=0.5)
    x = torch.randn(2, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(x), theirs.eval()(x).logits, atol=1e-5, rtol=1e-4)
