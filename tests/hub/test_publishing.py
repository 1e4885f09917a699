"""Publishing and pinning, up to the boundary of huggingface_hub: its own signatures, no network."""

from __future__ import annotations

import importlib
from pathlib import Path
from unittest import mock

import pytest
import torch

import ast_fast
from ast_fast import hub
from ast_fast.hub import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ast_fast.create_model(
        "ast_mini_p16_s10", num_classes=3, labels=("a|b", "c\nd", "e"),
        problem_type="single_label_classification",
    )  # fmt: skip


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A hub that keeps what is uploaded; calls must fit the real client's signatures."""
    made = mock.create_autospec(huggingface_hub.HfApi, instance=True)

    def keep(*, folder_path, **kwargs):
        for file in Path(folder_path).iterdir():
            (tmp_path / "kept").mkdir(exist_ok=True)
            (tmp_path / "kept" / file.name).write_bytes(file.read_bytes())
        return mock.Mock(oid="0123abcd")

    made.upload_folder.side_effect = keep
    cls = mock.create_autospec(huggingface_hub.HfApi, return_value=made)
    monkeypatch.setattr(huggingface_hub, "HfApi", cls)
    made.cls = cls
    return made


def test_push_writes_weights_settings_and_a_card_in_one_commit(model, api, tmp_path):
    commit = model.push_to_hub(
        "me/tones", licence="cc-by-4.0", figures={"accuracy": 0.98765}, datasets=("a/b: c",),
        text="Trained on\nspeech.", revision="v1", private=True, token="t", message="first",
    )  # fmt: skip
    assert commit == "0123abcd"
    api.cls.assert_called_once_with(token="t")
    api.create_repo.assert_called_once_with("me/tones", private=True, exist_ok=True)
    api.create_branch.assert_called_once_with("me/tones", branch="v1", exist_ok=True)
    call = api.upload_folder.call_args.kwargs
    assert call["repo_id"] == "me/tones" and call["revision"] == "v1"
    assert call["commit_message"] == "first" and call["create_pr"] is False
    kept = tmp_path / "kept"
    assert {p.name for p in kept.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    again = ast_fast.ASTModel.from_pretrained(kept)
    assert again.labels == model.labels
    assert torch.equal(again.mlp_head[1].weight, model.mlp_head[1].weight)
    # the hub's own reader of cards
    card = huggingface_hub.ModelCard.load(kept / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "ast-fast"
    assert card.data.pipeline_tag == "audio-classification" and card.data.datasets == ["a/b: c"]
    assert 'from_pretrained("me/tones")' in card.text and "| accuracy | 0.9877 |" in card.text
    assert "0. a\\|b\n1. c d\n2. e" in card.text and "single label classification" in card.text


def test_push_for_transformers_is_loaded_by_transformers(request, tmp_path):
    # before the hub is a stand-in: transformers takes its client's type when it is imported
    transformers = pytest.importorskip("transformers")
    importlib.import_module("transformers.utils.hub")
    request.getfixturevalue("api")
    model = ast_fast.create_model(
        "ast_tiny_p16_s10", num_classes=3, input_tdim=64, depth=1, eps=1e-12, head_eps=1e-12
    ).eval()
    model.push_to_hub("me/tones", licence="mit", to="transformers")
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "kept").eval()
    x = torch.randn(1, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-5, rtol=1e-4)
    card = huggingface_hub.ModelCard.load(tmp_path / "kept" / "README.md")
    assert card.data.library_name == "transformers"


def test_what_cannot_be_published_is_named(model, api):
    with pytest.raises(ValueError, match="licence='my own': expected an identifier"):
        model.push_to_hub("me/tones", licence="my own")
    with pytest.raises(ValueError, match="repo_id='tones': expected owner/name"):
        model.push_to_hub("tones", licence="mit")
    with pytest.raises(ValueError, match="to='keras'"):
        model.push_to_hub("me/tones", licence="mit", to="keras")
    api.upload_folder.assert_not_called()
    api.create_repo.side_effect = OSError("no network here")
    with pytest.raises(
        CheckpointError, match=r"'me/tones' could not be uploaded \(OSError: no net"
    ):
        model.push_to_hub("me/tones", licence="mit")


def test_a_revision_pins_what_is_loaded(model, monkeypatch, tmp_path):
    model.save_pretrained(tmp_path / "snapshot")
    fetch = mock.create_autospec(
        huggingface_hub.snapshot_download, return_value=str(tmp_path / "snapshot")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = ast_fast.ASTModel.from_pretrained("me/tones", revision="0123abcd", label_dim=5)
    assert fetch.call_args.args == ("me/tones",)
    assert fetch.call_args.kwargs["revision"] == "0123abcd" and loaded.config.label_dim == 5
    fetch.side_effect = OSError("not found")
    with pytest.raises(CheckpointError, match="at revision 'gone'"):
        hub.locate("me/tones", "gone")
    with pytest.raises(CheckpointError, match="local path"):
        ast_fast.ASTModel.from_pretrained(tmp_path / "snapshot", revision="v1")
