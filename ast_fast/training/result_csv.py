"""`result.csv`: a run's epochs in the columns of the original AST's training, which people's scripts read.

A line an epoch, zeros for those to come: mAP (accuracy where clips have one label), mean AUC, "average
precision", "average recall", d', training loss, validation loss, mAP (accuracy) and mean AUC of the mean of all epochs'
predictions (NaN unless the run computes it), learning rate. All figures are of sigmoids, whatever the loss.

The third and fourth are no averages of curves: of each class's precision-recall curve every 1000th
point is kept, and of these the middle one; the column is the mean over classes. They are kept for the scripts' sake.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .logs import read_log
from .metrics import MAIN_FIGURE, Metrics

RESULT, AVERAGED = "result.csv", "wa_result.csv"
_EVERY = 1000  # points of a curve of which one is kept


def original_figures(metrics: Metrics, figures: dict[str, float]) -> dict[str, float]:
    """What the original calls main metric, AUC, precision and recall, of the clips of an evaluation.

    Classes without a positive clip, which end the original, are left out. NaN where nothing is defined.

    Args:
        metrics: the clips.
        figures: what `metrics.compute()` gave.
    """
    scores = metrics.gathered()[0].sigmoid()
    if not metrics.binary:  # else the figures are of sigmoids already
        figures = metrics.figures(scores)
    truth = metrics.vectors().bool()
    middles = [
        middle_of_curve(scores[:, place], truth[:, place])
        for place in truth.any(0).nonzero()[:, 0].tolist()
    ]
    precision, recall = np.mean(middles, axis=0).tolist() if middles else (math.nan, math.nan)
    return {
        "main": figures.get(MAIN_FIGURE[metrics.task], math.nan),
        "auc": figures.get("auc", math.nan),
        "precision": precision,
        "recall": recall,
    }


def middle_of_curve(
    scores: Tensor,  # [N]
    truth: Tensor,  # [N] bool, one of them at least
) -> tuple[float, float]:
    """Precision and recall at the middle of the points that the original keeps of a class's curve.

    The curve is that of scikit-learn 0.24, which the original pins: from the highest threshold that
    finds every positive clip up, and the point (1, 0) last.
    """
    ordered, order = scores.double().sort(descending=True, stable=True)
    ends = torch.ones(len(order), dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]  # clips of one score are found together
    found = truth[order].double().cumsum(0)[ends]
    taken = torch.arange(1, len(order) + 1, dtype=torch.float64)[ends]
    needed = int(torch.searchsorted(found, found[-1:])[0]) + 1
    precision = torch.cat([(found / taken)[:needed].flip(0), torch.ones(1, dtype=torch.float64)])
    recall = torch.cat([(found / found[-1])[:needed].flip(0), torch.zeros(1, dtype=torch.float64)])
    kept = torch.arange(0, len(precision), _EVERY)
    middle = int(kept[len(kept) // 2])
    return float(precision[middle]), float(recall[middle])


def write_result(folder: Path, epochs: int) -> None:
    """Write `result.csv`, and `wa_result.csv` if weights were averaged, from the log of a run with classes.

    Args:
        folder: of the run.
        epochs: of the whole run, lines of the file.
    """
    rows = [row for row in read_log(folder / "log.jsonl") if "original" in row]
    if not rows:
        return
    lines = np.zeros((epochs, 10))
    for row in rows:
        told = {name: _number(value) for name, value in row["original"].items()}
        known = [told["main"], told["auc"], told["precision"], told["recall"], _dprime(told["auc"])]
        if row["kind"] == "average":
            _write(folder / AVERAGED, np.asarray(known))
        elif row["epoch"] < epochs:
            together = [
                _first(row, "cumulative_map", "cumulative_accuracy"),
                _first(row, "cumulative_auc"),
            ]
            losses = [told["train_loss"], _number(row["loss"])]
            lines[row["epoch"]] = [*known, *losses, *together, told["lr"]]
    _write(folder / RESULT, lines)


def _first(row: dict[str, Any], *names: str) -> float:
    return next((_number(row[name]) for name in names if name in row), math.nan)


def _number(value: float | None) -> float:
    """What JSON has no number for is null in a log: nan."""
    return math.nan if value is None else float(value)


def _dprime(auc: float) -> float:
    """Of the mean area, as the original has it; infinite for 0 and 1."""
    return math.sqrt(2.0) * float(torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)))


def _write(path: Path, lines: np.ndarray) -> None:
    text = io.StringIO()
    np.savetxt(text, lines, delimiter=",")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.getvalue(), encoding="ascii")
    partial.replace(path)
