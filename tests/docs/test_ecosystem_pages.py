"""Every block of docs/transformers.md, docs/ecosystem.md and docs/serving.md runs, in the order of the page."""

import contextlib
import io
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import ast_fast
from ast_fast import cli

PAGES = Path(__file__).resolve().parents[2] / "docs"
COMPILES = "<!-- a compiler runs here -->\n"
pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(page, compiled):
    text = (PAGES / page).read_text()
    assert text.count("```") % 2 == 0
    for mark, kind, block in re.findall(r"^(<!--.*-->\n)?```(\w+)\n(.*?)^```", text, re.M | re.S):
        if compiled or mark != COMPILES:
            yield kind, block


def run(page, names, compiled=False):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, block in blocks_of(page, compiled):
            if kind == "python":
                exec(compile(block, page, "exec"), names)
                continue
            assert kind == "sh"
            for line in block.splitlines():
                words = shlex.split(line)
                assert words[0] == "ast-fast" and cli.main(words[1:]) == 0, line
    return said.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "input_fdim": 32, "input_tdim": 32}
    model = ast_fast.create_model(
        "ast_tiny_p16_s10", num_classes=3, labels=("cat", "dog", "rain"), **sizes
    )
    model.save_pretrained("model")
    return tmp_path


def test_the_page_on_transformers(place):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    if transformers.__version__.startswith("4."):
        pytest.skip("the page has the layers' names of transformers 5")
    model = ast_fast.ASTModel.from_pretrained("model")
    ast_fast.hub.write_transformers(
        "checkpoint", model.state_dict(), model.config.to_dict(), model.frontend_config.to_dict()
    )
    rows = [{"input_values": torch.randn(32, 32), "labels": index % 3} for index in range(4)]
    names = {"waves": [torch.randn(8000) * 0.1, torch.randn(5000) * 0.1], "rows": rows}
    said = run("transformers.md", names)
    assert "'label'" in said and names["logits"].shape == (2, 3)
    assert names["frames"].shape == (2, 2, 3)
    assert names["model"].config._attn_implementation == "ast_fast"
    assert any(
        "lora" in name for name, p in names["adapted"].named_parameters() if p.grad is not None
    )
    again = transformers.ASTForAudioClassification.from_pretrained("runs/fine-tuned/model")
    assert again.num_labels == 3


def test_the_page_on_the_ecosystem(place, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("lightning")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:  # the hub itself is not to be had: tests/hub has its boundary
        def __init__(self, token=None): ...
        def create_repo(self, *a, **k): ...
        def upload_folder(self, *, folder_path, **k):
            shutil.copytree(folder_path, place / "hub")
            return type("Commit", (), {"oid": "0123abcd"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision, **k: place / "hub"
    )
    names = {"ast_fast": ast_fast}
    run("ecosystem.md", names)
    assert (
        names["moments"].shape[::2] == (2, 64)
        and names["times"].shape == names["moments"].shape[:2]
    )
    assert names["again"].hparams.num_classes == 4
    assert names["pinned"].labels == ("cat", "dog", "rain")
    assert "license: cc-by-4.0" in (place / "hub" / "README.md").read_text()


def test_the_page_on_serving(place):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    names = {"ast_fast": ast_fast}
    said = run("serving.md", names)
    assert said.count("within budget") == 2 and names["logits"].shape == (3, 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_page_on_serving_with_what_it_compiles(place):
    names = {"ast_fast": ast_fast}
    run("serving.md", names, compiled=True)
    assert names["logits"].shape == (2, 3)
