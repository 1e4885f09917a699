"""Losses of the tasks, and the original's own where they differ."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def truncated_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the largest of the targets cut to whole numbers, as the original computes it.

    Of mixed labels nothing is left but zeros: their class becomes the first (`--loss CE` with mixup).

    Args:
        logits: [B, C].
        targets: [B] class indices, or [B, C].
    """
    if targets.dim() == 2:
        targets = targets.long().argmax(1)
    return F.cross_entropy(logits, targets)


def task_loss(config: TrainConfig) -> Loss:
    """The loss of logits [B, C] and targets [B] or [B, C] that a run asks for; mean over the clips."""
    if "truncated_labels" in config.reproduce:
        return truncated_cross_entropy
    losses: dict[str, Loss] = {
        "cross_entropy": functools.partial(F.cross_entropy, label_smoothing=config.label_smoothing),
        "binary_cross_entropy": F.binary_cross_entropy_with_logits,
        "mean_squared_error": F.mse_loss,
    }
    return losses[config.loss]


def of_rows(loss: Loss) -> Loss:
    """The loss for as many targets as there are, in the dtype of the logits.

    A process without clips in a step takes part in it with a zero.
    """
    return functools.partial(_of_rows, loss)


def _of_rows(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    rows = targets[: len(logits)]
    if not len(rows):
        return logits.sum() * 0.0
    return loss(logits, rows.to(logits.dtype) if rows.is_floating_point() else rows)
