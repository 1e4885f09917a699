"""Do the probabilities mean what they say: reliability by bins, and the expected calibration error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Reliability:
    """Predictions gathered by their confidence, in bins of equal width.

    Attributes:
        edges: [bins + 1], from 0 to 1.
        counts: [bins] predictions.
        confidence: [bins] mean of what was said; NaN in an empty bin.
        share_right: [bins] share of what came true; NaN in an empty bin.
        error: expected calibration error: the mean distance of the two, each bin by its count.
        largest: the largest distance.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    share_right: Tensor
    error: float
    largest: float


def reliability(confidence: Tensor, right: Tensor, bins: int = 15) -> Reliability:
    """Compare what was said with what came true (Naeini 2015, Guo 2017).

    Args:
        confidence: [N] probabilities.
        right: [N] whether it came true.
        bins: how many.

    Raises:
        ValueError: there is nothing to compare, or a probability is none.
    """
    said, true = confidence.double().flatten(), right.double().flatten()
    if not said.numel() or said.shape != true.shape:
        raise ValueError(
            f"confidence has {said.numel()} values and right {true.numel()}: expected as many, and some"
        )
    if not ((said >= 0) & (said <= 1)).all():
        raise ValueError("confidence: expected probabilities from 0 to 1")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # a bin holds its upper edge
    place = torch.bucketize(said, edges[1:-1])
    counts = torch.bincount(place, minlength=bins).double()
    mean_said = torch.bincount(place, said, bins) / counts
    mean_true = torch.bincount(place, true, bins) / counts
    distance = (mean_said - mean_true).abs().nan_to_num()
    error = float((distance * counts).sum() / counts.sum())
    return Reliability(edges, counts.long(), mean_said, mean_true, error, float(distance.max()))


def of_classes(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and truth of predictions, for `reliability`.

    For one label a clip ([N, C] and class indices [N]) the most probable class counts; for several
    ([N, C] and vectors [N, C]) every class of every clip does.
    """
    if targets.dim() == 2:
        return probabilities.flatten(), targets.flatten() > 0.5
    confidence, said = probabilities.max(1)
    return confidence, said == targets
