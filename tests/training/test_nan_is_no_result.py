"""NaN is refused by name wherever numbers are given out or weights taken in, and never written as JSON."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import ast_fast
from ast_fast import hub
from ast_fast.cli import main
from ast_fast.config import LogMelConfig, MonitorConfig
from ast_fast.data import WaveformDataset
from ast_fast.equivalence import EquivalenceMonitor
from ast_fast.equivalence.monitor import EquivalenceError
from ast_fast.finite import NotFiniteError, count_not_finite
from ast_fast.inference import Failure
from ast_fast.integrations import hear
from ast_fast.integrations.export import export_model
from ast_fast.streaming import StreamingTagger
from ast_fast.training import evaluate
from ast_fast.training.distillation import Teacher
from ast_fast.training.ensembles import mean_of_weights
from ast_fast.training.logs import RunLog
from ast_fast.training.metrics import Metrics

NAN = float("nan")
WEIGHT = "v.blocks.0.attn.qkv.weight"
SAID = rf"'{WEIGHT}' \(1 of \d+ values\)"


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
    model = ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, **sizes)
    model.config = model.config.replace(labels=("a", "b", "c"))
    return model.eval()


@pytest.fixture(scope="module")
def bad(good):
    model = copy.deepcopy(good)
    with torch.no_grad():
        model.get_parameter(WEIGHT)[3, 5] = NAN
    return model


@pytest.fixture
def bad_folder(good, bad, tmp_path):
    """A checkpoint as another program, or an older version of ours, would have written it."""
    from safetensors.torch import load_file, save_file

    good.save_pretrained(tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[WEIGHT][3, 5] = NAN
    save_file(tensors, file, metadata=metadata)
    return tmp_path / "bad"


def wave(seed=0, count=12000):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_metrics_refuse_logits_that_are_not_finite(task, value):
    found = Metrics(3, task)
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    targets = torch.zeros(4, dtype=torch.long) if task == "single_label" else torch.zeros(4, 3)
    with pytest.raises(
        NotFiniteError, match="logits are NaN or infinite for 1 of 4 clips, first for number 2"
    ):
        found.update(logits, targets)
    with pytest.raises(ValueError, match=r"logits have shape \(4, 2\)"):
        found.update(logits[:, :2], targets)


def test_metrics_refuse_scores_and_targets_that_are_not_finite():
    found = Metrics(3, "regression")
    with pytest.raises(NotFiniteError, match="targets"):
        found.update(torch.zeros(2, 3), torch.full((2, 3), NAN))
    found.update(torch.zeros(2, 3), torch.rand(2, 3))
    with pytest.raises(NotFiniteError, match="scores"):
        found.figures(torch.full((2, 3), NAN))


def test_evaluation_names_the_weight(good, bad):
    waves = [(wave(s) * 32768).to(torch.int16) for s in range(4)]
    data = WaveformDataset(waves, [(0,), (1,), (2,), (0,)], ("a", "b", "c"), 16000)
    evaluate(good, data)
    with pytest.raises(NotFiniteError, match=SAID):
        evaluate(bad, data)


def test_inference_and_embeddings_name_the_weight(bad):
    for call in (
        lambda: ast_fast.predict(wave(), bad),
        lambda: ast_fast.predict([wave(), wave(1)], bad, frames=True),
        lambda: list(ast_fast.embed([wave()], bad)),
        lambda: StreamingTagger(bad, hop_s=0.5).push(wave()),
        lambda: hear.get_scene_embeddings(wave()[None], hear.load_model(bad)),
        lambda: hear.get_timestamp_embeddings(wave()[None], hear.load_model(bad)),
    ):
        with pytest.raises(NotFiniteError, match=SAID):
            call()


def test_a_clip_for_which_a_sound_model_gives_nan_is_a_failure_of_its_own(good, monkeypatch):
    model = copy.deepcopy(good)
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda x: forward(x) * torch.where(x.mean((1, 2)) > 0.5, NAN, 1.0)[:, None],
    )
    loud, quiet = wave() * 10, wave() * 1e-3
    first, second, third = ast_fast.predict([quiet, loud, quiet], model)
    assert isinstance(second, Failure) and "NaN or infinite values for 2 of 2" in str(second.error)
    assert torch.equal(first.probabilities, third.probabilities)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ast_fast.predict(loud, model)


def test_weights_that_are_nan_are_neither_loaded_nor_written(good, bad, bad_folder, tmp_path):
    with pytest.raises(hub.CheckpointError, match=SAID):
        ast_fast.ASTModel.from_pretrained(bad_folder)
    torch.save(bad.state_dict(), tmp_path / "bad.pth")
    with pytest.raises(hub.CheckpointError, match=SAID):
        hub.read_weights(tmp_path / "bad.pth", strides=(10, 10), heads=2)
    for write in (
        lambda: bad.save_pretrained(tmp_path / "out"),
        lambda: hub.write_transformers(
            tmp_path / "out", bad.state_dict(), bad.config.to_dict(), bad.frontend_config.to_dict()
        ),
        lambda: mean_of_weights(lambda m: m.state_dict(), [good, bad]),
    ):
        with pytest.raises(hub.CheckpointError, match=SAID):
            write()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=SAID):
        export_model(bad, tmp_path / "out.pt2")
    with pytest.raises(ValueError, match="distill.teacher has weights.*" + SAID):
        Teacher(bad, bad.frontend_config, 3)


def test_the_commands_say_it_and_end_with_an_error(bad_folder, tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", wave().numpy(), 16000)
    model, clip = str(bad_folder), str(tmp_path / "a.wav")
    for line in (
        ["tag", clip, "--model", model, "--json"],
        ["embed", clip, "--model", model, "--out", str(tmp_path / "e.npy")],
        ["convert", model, str(tmp_path / "c")],
        ["export", model, str(tmp_path / "x.pt2")],
        ["average", model, model, "--out", str(tmp_path / "m")],
    ):
        assert main(line) != 0, line
        out, said = capsys.readouterr()
        assert WEIGHT in said and "NaN" not in out, line


def test_the_monitor_does_not_take_nan_beside_nan_for_agreement(bad):
    monitor = EquivalenceMonitor(bad, MonitorConfig(stop=False))
    with pytest.raises(EquivalenceError, match="reference's logits are NaN"):
        monitor.step(torch.randn(2, 64, 64), gradients=False)


def test_logs_hold_null_where_json_has_no_number(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write("step", 1, loss=NAN, each=[1.0, float("inf")])
    log.close()

    def refuse(text):
        raise AssertionError(text)

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row["loss"] is None and row["each"] == [1.0, None]


def test_counting_is_right_where_sums_overflow():
    assert count_not_finite(torch.full((10,), 3e38)) == 0
    assert count_not_finite(torch.full((10,), 6e4, dtype=torch.float16)) == 0
    assert count_not_finite(torch.tensor([float("inf"), -float("inf"), NAN, 1.0])) == 3
    assert count_not_finite(torch.arange(3)) == 0


def test_front_ends_of_the_hub_refuse_nan_and_lists_of_whole_samples():
    pytest.importorskip("transformers")
    from ast_fast.integrations.feature_extractor import ASTFeatureExtractor

    extractor = ASTFeatureExtractor(max_length=64)
    floats = wave()
    floats[7] = NAN
    with pytest.raises(ValueError, match="clip 0: 1 of 12000 samples are NaN"):
        extractor(floats, sampling_rate=16000)
    whole = (wave() * 32768).round().to(torch.int64).tolist()
    with pytest.raises(TypeError, match=r"int64.*32768"):
        extractor(whole, sampling_rate=16000)
    made = extractor([0, 1] * 400, sampling_rate=16000, return_tensors="np")["input_values"]
    assert np.isfinite(made).all()
    assert LogMelConfig().num_mel_bins == made.shape[2]
