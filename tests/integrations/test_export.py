"""Exported models run in other libraries, at any batch size, with the same logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import ast_fast
from ast_fast.cli import main
from ast_fast.integrations import export
from ast_fast.integrations.export import ExportError, Portable, export_model

SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
NAMES = ("a", "b", "c")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = ast_fast.create_model(
        "ast_tiny_p16_s10", num_classes=3, labels=NAMES, problem_type="multi_label_classification",
        **SIZES,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made.eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_torch_export_needs_nothing_of_ours_to_run(model, saved, tmp_path, capsys):
    out = tmp_path / "served" / "model"
    assert main(["export", saved, str(out), "--input", "waveform"]) == 0
    said = capsys.readouterr().out
    assert "within budget" in said and "batch" in said
    wave = torch.randn(4, 10480, generator=torch.Generator().manual_seed(2)) * 0.1
    lengths = torch.tensor([10480, 5000, 400, 300])
    want = model.forward_waveform(wave, lengths)
    torch.save((wave, lengths), tmp_path / "inputs.pt")
    # another process, from elsewhere, in which ast_fast cannot be imported
    code = (
        "import sys, json, torch; sys.modules['ast_fast'] = None\n"
        "extra = {'ast_fast.json': ''}\n"
        f"program = torch.export.load({str(out) + '.pt2'!r}, extra_files=extra)\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        "print(json.dumps([program.module()(*inputs).tolist(), json.loads(extra['ast_fast.json'])]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    logits, description = json.loads(ran.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(logits), want, atol=1e-4, rtol=1e-4)
    assert description == json.loads((tmp_path / "served" / "model.pt2.json").read_text())
    assert description["labels"] == list(NAMES) and description["activation"] == "sigmoid"
    assert description["inputs"] == {"waveform": ["batch", 10480], "lengths": ["batch"]}
    assert description["frontend"]["sample_rate_hz"] == 16000


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "none"),
        (None, None),
    ],
)
def test_what_to_do_with_the_logits_is_written_down(model, tmp_path, problem_type, activation):
    model.config = model.config.replace(problem_type=problem_type)
    report = export_model(model, tmp_path / "model.pt2", check=False)
    description = json.loads((tmp_path / "model.pt2.json").read_text())
    assert description["activation"] == activation and not report.batches


@pytest.mark.parametrize("kind", ["features", "waveform"])
def test_onnx_runs_in_onnxruntime_at_any_batch_size(model, tmp_path, kind):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    report = export_model(model, path, "onnx", kind)
    assert [row.batch_size for row in report.batches] == [1, 2, 5]
    assert all(row.ok for row in report.batches)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]
    stored = onnx.load(path)
    onnx.checker.check_model(stored)
    assert {op.domain for op in stored.opset_import} <= {"", "pkg.torch.onnx"}
    meta = {entry.key: entry.value for entry in stored.metadata_props}
    assert json.loads(meta["ast_fast"])["labels"] == list(NAMES)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 4, 7):
        generator = torch.Generator().manual_seed(batch)
        if kind == "features":
            given = {"features": torch.randn(batch, 64, 64, generator=generator)}
            want = model(given["features"])
        else:
            wave = torch.randn(batch, 10480, generator=generator) * 0.1
            given = {"waveform": wave, "lengths": torch.randint(0, 10481, (batch,))}
            want = model.forward_waveform(wave, given["lengths"])
        (got,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        assert got.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(got), want.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["features", "waveform"])
def test_aotinductor_packages_run_at_any_batch_size(model, saved, tmp_path, kind):
    path = tmp_path / "model.pt2"
    assert main(["export", saved, str(path), "--format", "aoti", "--input", kind]) == 0
    served = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 4):
        portable = Portable(model, kind)
        arguments = portable.example(batch, seed=9)
        call = model if kind == "features" else model.forward_waveform
        torch.testing.assert_close(served(*arguments), call(*arguments), atol=1e-4, rtol=1e-4)


def test_a_whole_base_model_of_the_recipes_is_portable():
    torch.manual_seed(0)
    model = ast_fast.create_model("ast_base_p16_s10", num_classes=35, input_tdim=128, depth=1)
    portable = Portable(model, "features")
    x = torch.randn(2, 128, 128)
    torch.testing.assert_close(portable(x), model(x), atol=2e-5, rtol=1e-4)
    assert not any("v.head" in name for name in portable.state_dict())
    shared = portable.network.v.pos_embed.data_ptr()
    assert shared == model.v.pos_embed.data_ptr()  # no copy of the weights
    assert model.v.pos_embed.requires_grad  # and the model is as it was


def test_a_file_with_other_numbers_gets_no_name(model, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("what was there before")
    real = export._WRITERS["torch"]

    def spoilt(portable, target):
        with torch.no_grad():
            portable.network.mlp_head[1].bias += 0.01
            real(portable, target)
            portable.network.mlp_head[1].bias -= 0.01

    monkeypatch.setitem(export._WRITERS, "torch", spoilt)
    with pytest.raises(ExportError, match=r"over its budget at batch size 1, 2, 5"):
        export_model(model, path)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]

    monkeypatch.setitem(export._WRITERS, "torch", lambda portable, target: target.write_bytes(b"?"))
    with pytest.raises(ExportError, match=r"does not run \(torch\)"):
        export_model(model, path)

    def broken(portable, target):
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setitem(export._WRITERS, "torch", broken)
    with pytest.raises(
        ExportError, match=r"torch from features\): RuntimeError: no such operator$"
    ):
        export_model(model, path)


def test_bad_arguments_are_named(model, saved, tmp_path, capsys):
    for arguments, said in (
        ((model, tmp_path / "m.onnx", "torch"), "ends in '.onnx': expected .pt2"),
        ((model, tmp_path / "m.pt2", "tflite"), "format='tflite': expected torch, onnx, aoti"),
        ((model, tmp_path / "m.pt2", "torch", "mel"), "input='mel'"),
        ((torch.nn.Linear(2, 2), tmp_path / "m.pt2"), "is a Linear: expected an ast_fast.ASTModel"),
        ((model.bfloat16(), tmp_path / "m.pt2"), "is torch.bfloat16: expected float32"),
    ):
        with pytest.raises(ValueError, match=said):
            export_model(*arguments)
    merging = ast_fast.ASTModel.from_pretrained(saved)
    merging.set_token_merging(2)
    with pytest.raises(ValueError, match=r"set_token_merging\(0\)"):
        export_model(merging, tmp_path / "m.pt2")
    assert main(["export", saved, str(tmp_path / "m"), "--device", "cuda"]) == 2
    assert "only aoti" in capsys.readouterr().err
    assert main(["export", saved, str(tmp_path / "unchecked" / "m"), "--no-check"]) == 0
    assert "not checked" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "m")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*.pt2"))
