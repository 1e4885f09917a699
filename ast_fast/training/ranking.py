"""Figures of a ranking, column by column: average precision and area under the ROC curve, exact with ties.

Counts are whole numbers and their quotients float64, so that a million clips round no worse than ten. Clips of equal
score stand on one step: in whatever order they came, the figure is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def average_precisions(scores: Tensor, truth: Tensor) -> Tensor:  # [C]
    """Mean precision over the steps of recall of each class, float64; NaN without a positive clip.

    Args:
        scores: [N, C], finite.
        truth: [N, C], 1 where a clip has the class.
    """
    return _each(_average_precision, scores, truth)


def roc_areas(scores: Tensor, truth: Tensor) -> Tensor:  # [C]
    """Chance that a clip of the class is ranked above one that is not, ties as half; NaN without both.

    Args:
        scores: [N, C], finite.
        truth: [N, C], 1 where a clip has the class.
    """
    return _each(_roc_area, scores, truth)


def _each(figure, scores: Tensor, truth: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    columns = zip(scores.unbind(1), truth.unbind(1), strict=True)
    return torch.tensor([figure(s, t != 0) for s, t in columns], dtype=torch.float64)


def _steps(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Clips of the class, and all clips, at or above each distinct score, from the best down."""
    values, order = scores.sort(descending=True)
    last = torch.ones(len(values), dtype=torch.bool)
    last[:-1] = values[:-1] != values[1:]
    hits = truth[order].long().cumsum(0)[last]
    return hits, last.nonzero()[:, 0] + 1


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    hits, seen = _steps(scores, truth)
    total = int(truth.sum())
    if not total:
        return math.nan
    gained = hits.diff(prepend=hits.new_zeros(1))
    return float((hits.double() / seen.double() * gained.double()).sum()) / total


def _roc_area(scores: Tensor, truth: Tensor) -> float:
    hits, seen = _steps(scores, truth)
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return math.nan
    # twice the number of pairs in order, in whole numbers: below 2^63 up to 3e9 clips
    misses = seen - hits
    above = misses.diff(prepend=misses.new_zeros(1))
    before = hits - hits.diff(prepend=hits.new_zeros(1))
    twice = int((above * (hits + before)).sum())
    return twice / (2 * positive * negative)
