"""Metrics against scikit-learn, and what they do with odd sets."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from ast_fast.training.metrics import Metrics
from ast_fast.training.schedules import rate_factor


def filled(logits, targets, multi_label, parts=3):
    found = Metrics(logits.shape[1], "multi_label" if multi_label else "single_label")
    for a, b in zip(logits.chunk(parts), targets.chunk(parts), strict=True):
        found.update(a, b)
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_auc_match_scikit_learn(ties):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 7, generator=generator)
    logits = (logits * 2).round() / 2 if ties else logits
    targets = (torch.rand(300, 7, generator=generator) < 0.2).float()
    found = filled(logits, targets, True)
    scores, truth = logits.sigmoid().numpy(), targets.numpy()
    figures = found.compute()
    expected = sklearn_metrics.average_precision_score(truth, scores, average="macro")
    assert figures["map"] == pytest.approx(expected, abs=1e-6)
    assert figures["auc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(truth, scores, average="macro"), abs=1e-6
    )
    each = sklearn_metrics.average_precision_score(truth, scores, average=None)
    np.testing.assert_allclose(found.per_class(), each, atol=1e-6)


def test_classes_without_positives_are_left_out_not_counted_as_zero():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(50, 4)
    targets[::2, 0] = 1.0
    targets[:, 1] = 1.0  # always there: precision is 1, area under the curve is undefined
    found = filled(logits, targets, True)
    scores = logits[:, 0].sigmoid().numpy()
    precision = sklearn_metrics.average_precision_score(targets[:, 0].numpy(), scores)
    area = sklearn_metrics.roc_auc_score(targets[:, 0].numpy(), scores)
    figures = found.compute()
    assert figures["map"] == pytest.approx((precision + 1.0) / 2, abs=1e-6)
    assert figures["auc"] == pytest.approx(area, abs=1e-6)
    assert math.isnan(found.per_class()[2])


def test_a_single_class_of_a_multi_label_set_is_measured():
    logits = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(30) % 3 == 0).float()[:, None]
    figures = filled(logits, targets, True).compute()
    area = sklearn_metrics.roc_auc_score(targets[:, 0], logits[:, 0])
    assert figures["auc"] == pytest.approx(area, abs=1e-6)


def test_accuracy_confusion_and_top5_match_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 12, generator=generator)
    targets = torch.randint(0, 11, (400,), generator=generator)  # class 11 never occurs
    found = filled(logits, targets, False)
    predicted = logits.argmax(1).numpy()
    figures = found.compute()
    assert figures["accuracy"] == sklearn_metrics.accuracy_score(targets, predicted)
    recall = sklearn_metrics.recall_score(targets, predicted, average=None, labels=range(11))
    assert figures["macro_accuracy"] == pytest.approx(recall.mean(), abs=1e-6)
    assert figures["top5_accuracy"] == pytest.approx(
        sklearn_metrics.top_k_accuracy_score(targets, logits, k=5, labels=range(12)), abs=1e-12
    )
    expected = sklearn_metrics.confusion_matrix(targets, predicted, labels=range(12))
    assert np.array_equal(found.confusion().numpy(), expected)
    assert math.isnan(found.per_class()[11])


def test_one_clip_is_enough_and_none_is_an_error():
    found = filled(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), False, parts=1)
    assert found.compute()["accuracy"] == 1.0
    with pytest.raises(ValueError, match="no clips were evaluated"):
        Metrics(2).compute()


def test_the_rate_rises_then_falls_to_nothing():
    rates = [rate_factor(step, 200, 20, "cosine") for step in range(200)]
    assert rates[0] == pytest.approx(0.05) and rates[19] == rates[20] == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[110] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert {rate_factor(step, 200, 0, "constant") for step in range(200)} == {1.0}
    # a short run does not spend itself warming up
    assert rate_factor(3, 30, 50, "constant") == 1.0


def hard_set(rows, classes, seed):
    """Scores with many ties, a class of one clip, rare classes, one without and one of nothing but positives."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    logits[:, 0] = (logits[:, 0] * 4).round() / 4  # a few dozen distinct values
    logits[:, 1] = 0.0  # one
    logits[:, 2] *= 30.0  # float32 probabilities of 1 and 0, of unlike logits
    logits[::3, 3] = logits[1, 3]
    shares = torch.tensor([0.3, 0.1, 0.5, 0.02, 1e-4, 1e-3])[torch.arange(classes) % 6]
    targets = (torch.rand(rows, classes, generator=generator) < shares).float()
    targets[:, 4] = 0.0
    targets[rows // 2, 4] = 1.0
    targets[:, -2], targets[:, -1] = 0.0, 1.0
    return logits, targets


def against_scikit_learn(rows, classes, seed):
    logits, targets = hard_set(rows, classes, seed)
    found = filled(logits, targets, True)
    figures, scores, truth = found.compute(), logits.double().sigmoid().numpy(), targets.numpy()
    precisions = [
        sklearn_metrics.average_precision_score(truth[:, c], scores[:, c])
        if truth[:, c].any()
        else math.nan
        for c in range(classes)
    ]
    areas = [
        sklearn_metrics.roc_auc_score(truth[:, c], scores[:, c])
        for c in range(classes)
        if 0 < truth[:, c].sum() < rows
    ]
    np.testing.assert_allclose(found.per_class(), precisions, rtol=0, atol=1e-12)
    assert abs(figures["map"] - np.nanmean(precisions)) <= 1e-12
    assert abs(figures["auc"] - np.mean(areas)) <= 1e-12
    loss = sum(
        np.logaddexp(0.0, logits[:, c].double().numpy()).sum()
        - (truth[:, c] * logits[:, c].double().numpy()).sum()
        for c in range(classes)
    ) / (rows * classes)
    assert abs(figures["loss"] - loss) <= 1e-12 * max(1.0, loss)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_figures_are_scikit_learns_to_the_last_digits(seed):
    against_scikit_learn(3001, 8, seed)


@pytest.mark.slow
def test_ranking_figures_of_a_million_clips_are_scikit_learns():
    against_scikit_learn(10**6, 8, 0)


def single_label_figures(rows, classes):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, classes, generator=generator)
    logits[:, 1] = (logits[:, 1] * 2).round() / 2
    targets = torch.randint(0, classes - 1, (rows,), generator=generator)  # the last never occurs
    targets[: rows // 2] = logits[: rows // 2, : classes - 1].argmax(1)
    figures = filled(logits, targets, False).compute()
    scores, predicted = logits.double().softmax(1).numpy(), logits.argmax(1).numpy()
    assert abs(figures["accuracy"] - sklearn_metrics.accuracy_score(targets, predicted)) <= 1e-12
    recall = sklearn_metrics.recall_score(
        targets, predicted, average="macro", labels=range(classes - 1)
    )
    assert abs(figures["macro_accuracy"] - recall) <= 1e-12
    loss = sklearn_metrics.log_loss(targets, scores, labels=range(classes))
    assert abs(figures["loss"] - loss) <= 1e-12
    areas = [sklearn_metrics.roc_auc_score(targets == c, scores[:, c]) for c in range(classes - 1)]
    assert abs(figures["auc"] - np.mean(areas)) <= 1e-12


def test_figures_of_one_label_a_clip_are_scikit_learns_to_the_last_digits():
    single_label_figures(3001, 6)


@pytest.mark.slow
def test_figures_of_a_million_clips_of_one_label_are_scikit_learns():
    single_label_figures(10**6, 6)
