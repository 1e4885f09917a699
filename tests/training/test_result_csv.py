"""`result.csv`: the original's columns, by the original's formulas with scikit-learn and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as oracle

from ast_fast import create_model
from ast_fast.config import AverageConfig, LogMelConfig, TrainConfig
from ast_fast.data import WaveformDataset
from ast_fast.training import Trainer, TrainingInterrupted
from ast_fast.training.evaluation import evaluate
from ast_fast.training.logs import read_log
from ast_fast.training.metrics import Metrics
from ast_fast.training.result_csv import middle_of_curve, original_figures

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}
FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)


def old_curve(truth, scores):
    """The curve as scikit-learn 0.24 gave it: newer ones go on below the threshold that finds all."""
    precision, recall, _ = oracle.precision_recall_curve(truth, scores)
    first = int(np.flatnonzero(recall == 1.0)[-1])
    return precision[first:], recall[first:]


def by_the_original(truth, scores):
    """Main metric but accuracy, AUC, precision, recall and d' of [N, C], as `calculate_stats` and after."""
    found = []
    for column in range(truth.shape[1]):
        one, two = truth[:, column], scores[:, column]
        precision, recall = (curve[0::1000] for curve in old_curve(one, two))
        found.append(
            (
                oracle.average_precision_score(one, two),
                oracle.roc_auc_score(one, two),
                precision[int(len(precision) / 2)],
                recall[int(len(recall) / 2)],
            )
        )
    mean = np.mean(found, axis=0)
    return (*mean, math.sqrt(2) * stats.norm().ppf(mean[1]))


@pytest.mark.parametrize("count", [1, 2, 7, 300, 999, 1001, 6001])
@pytest.mark.parametrize("ties", [False, True])
def test_the_middle_of_a_curve_is_the_originals(count, ties):
    draw = torch.Generator().manual_seed(count)
    for share in (0.02, 0.5, 1.0):
        scores = torch.randn(count, generator=draw).sigmoid()
        scores = (scores * 8).round() / 8 if ties else scores
        truth = torch.rand(count, generator=draw) < share
        truth[0] = True
        precision, recall = (c[0::1000] for c in old_curve(truth.numpy(), scores.numpy()))
        expected = (precision[int(len(precision) / 2)], recall[int(len(recall) / 2)])
        assert middle_of_curve(scores, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", ["multi_label", "single_label", "binary"])
def test_figures_are_those_of_scikit_learn(task):
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(2500, 4, generator=draw)
    if task == "multi_label":
        targets = (torch.rand(2500, 4, generator=draw) < 0.6).float()
        truth = targets.numpy()
    else:
        targets = torch.randint(4, (2500,), generator=draw)
        truth = np.eye(4)[targets.numpy()]
    kind = "multi_label" if task == "multi_label" else "single_label"
    metrics = Metrics(4, kind, binary=task == "binary")
    metrics.update(logits, targets)
    found = original_figures(metrics, metrics.compute())
    ap, auc, precision, recall, _ = by_the_original(truth, logits.sigmoid().numpy())
    main = ap if kind == "multi_label" else (logits.argmax(1) == targets).double().mean().item()
    for name, value in {"main": main, "auc": auc, "precision": precision, "recall": recall}.items():
        assert found[name] == pytest.approx(value, abs=2e-6), name
    assert 0.3 < found["recall"] < 1.0  # several thousand points: a middle that is not the end


def test_a_class_without_a_clip_is_left_out():
    metrics = Metrics(3, "multi_label")
    metrics.update(torch.randn(50, 3), torch.eye(3)[torch.arange(50) % 2])
    found = original_figures(metrics, metrics.compute())
    assert all(math.isfinite(value) for value in found.values())


def clips(count=28, several=False):
    draw = torch.Generator().manual_seed(0)
    waves = [0.3 * torch.randn(4000 + 90 * i, generator=draw) for i in range(count)]
    labels = [(i % 3,) if not several or i % 4 else (i % 3, (i + 1) % 3) for i in range(count)]
    return WaveformDataset(waves, labels, ("a", "b", "c"))


def trained(folder, config, data, **options):
    torch.manual_seed(1)
    model = create_model("ast_mini_p16_s10", num_classes=3, frontend_config=FRONT, **TINY)
    run = Trainer(model, data, config, folder, eval_set=data, progress=False, **options)
    return run, run.fit()


def test_the_file_of_a_run_has_its_lines_columns_and_figures(tmp_path):
    data = clips(several=True)
    config = TrainConfig(
        epochs=3,
        batch_size=8,
        lr=1e-3,
        log_every=1,
        loss="binary_cross_entropy",
        average=AverageConfig(first_epoch=2, last_epoch=3, cumulative=True),
    )
    run, last = trained(tmp_path, config, data)
    result = np.loadtxt(tmp_path / "result.csv", delimiter=",")
    assert result.shape == (3, 10)
    rows = read_log(tmp_path / "log.jsonl")
    evals = [row for row in rows if row["kind"] == "eval"]
    for epoch, (line, row) in enumerate(zip(result, evals, strict=True)):
        steps = [r for r in rows if r["kind"] == "step" and r["epoch"] == epoch]
        sizes = np.array([8, 8, 8, 4])
        mean = np.average([r["loss"] for r in steps], weights=sizes)
        assert line[5] == pytest.approx(mean) and line[6] == pytest.approx(row["loss"])
        assert line[[0, 1]] == pytest.approx([row["map"], row["auc"]])
        assert line[4] == pytest.approx(row["dprime"])
        assert line[[7, 8]] == pytest.approx([row["cumulative_map"], row["cumulative_auc"]])
        assert line[9] == steps[-1]["lr"]
    # the means of weights are evaluated last
    logits, targets = last.metrics.gathered()
    expected = by_the_original(targets.numpy(), logits.sigmoid().numpy())
    averaged = np.loadtxt(tmp_path / "wa_result.csv", delimiter=",")
    assert averaged == pytest.approx(expected, abs=1e-5)
    assert run.task == "multi_label"


def test_one_label_a_clip_has_accuracy_first_and_no_cumulative_figures(tmp_path):
    data = clips()
    config = TrainConfig(epochs=2, batch_size=8, lr=1e-3, log_every=1)
    run, _ = trained(tmp_path, config, data)
    result = np.loadtxt(tmp_path / "result.csv", delimiter=",")
    again = evaluate(run.model, data, batch_size=16)
    logits, targets = again.metrics.gathered()
    truth = np.eye(3)[targets.numpy()]
    _, auc, precision, recall, dprime = by_the_original(truth, logits.sigmoid().numpy())
    accuracy = float((logits.argmax(1) == targets).double().mean())
    assert result[1, :5] == pytest.approx([accuracy, auc, precision, recall, dprime], abs=1e-5)
    assert np.isnan(result[:, 7:9]).all() and not (tmp_path / "wa_result.csv").exists()


def test_a_resumed_run_writes_the_same_file(tmp_path):
    data = clips()
    config = TrainConfig(epochs=3, batch_size=8, lr=1e-3, log_every=1, checkpoint_every=1)
    trained(tmp_path / "whole", config, data)
    torch.manual_seed(1)
    model = create_model("ast_mini_p16_s10", num_classes=3, frontend_config=FRONT, **TINY)
    part = Trainer(model, data, config, tmp_path / "part", eval_set=data, progress=False)
    step = part._train_step

    def stopping(*arguments):
        if part.step == 5:
            part._request_stop()
        return step(*arguments)

    part._train_step = stopping
    with pytest.raises(TrainingInterrupted):
        part.fit()
    half = np.loadtxt(tmp_path / "part" / "result.csv", delimiter=",")
    assert half[0].any() and not half[1:].any()  # zeros for epochs to come
    trained(tmp_path / "part", config, data, resume=True)
    files = [(tmp_path / name / "result.csv").read_text() for name in ("whole", "part")]
    assert files[0] == files[1]


def test_numbers_to_predict_have_no_such_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(28, 3)).astype(np.float32)
    plain = clips()
    data = WaveformDataset(plain.waves, [()] * 28, plain.classes, values=values)
    trained(tmp_path, TrainConfig(epochs=1, batch_size=8, loss="mean_squared_error"), data)
    assert not (tmp_path / "result.csv").exists()
