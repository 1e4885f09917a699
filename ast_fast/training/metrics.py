"""How good logits are: accuracy and confusion for one label a clip, average precision for several."""

from __future__ import annotations

import torch
from torch import Tensor

from .._optional import require_package


class Metrics:
    """Collects logits and targets, then computes; exact, by torchmetrics.

    Args:
        num_classes: C.
        multi_label: targets are [B, C] vectors rather than class indices.
    """

    def __init__(self, num_classes: int, multi_label: bool) -> None:
        self.num_classes = num_classes
        self.multi_label = multi_label
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits [B, C] and targets [B] or [B, C]."""
        self._logits.append(logits.detach().float().cpu())
        self._targets.append(targets.detach().cpu())

    @property
    def num_clips(self) -> int:
        """Clips added so far."""
        return sum(len(targets) for targets in self._targets)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        if not self.num_clips:
            raise ValueError("no clips were evaluated: every file was skipped, or the set is empty")
        return torch.cat(self._logits), torch.cat(self._targets)

    def compute(self) -> dict[str, float]:
        """The figures by name.

        One label: `loss`, `accuracy`, `macro_accuracy` (mean over classes) and `top5_accuracy`
        beyond ten classes. Several: `loss`, `map` and `auc`, means over the classes that have a
        positive clip (and, for `auc`, a negative one).
        """
        functional = require_package("torchmetrics.functional", "evaluation", "train")
        logits, targets = self._gathered()
        if self.multi_label:
            scores, truth = logits.sigmoid(), targets.long()
            some, mixed = truth.any(dim=0), truth.any(dim=0) & ~truth.all(dim=0)
            result = {
                "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits, targets))
            }
            for name, function, kept in (
                ("map", functional.classification.multilabel_average_precision, some),
                ("auc", functional.classification.multilabel_auroc, mixed),
            ):
                count = int(kept.sum())
                if count:
                    value = function(
                        scores[:, kept], truth[:, kept], num_labels=count, average="macro"
                    )
                    result[name] = float(value)
            return result
        accuracy = functional.classification.multiclass_accuracy
        result = {
            "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
            "accuracy": float((logits.argmax(1) == targets).double().mean()),
            "macro_accuracy": float(
                accuracy(logits, targets, num_classes=self.num_classes, average="macro")
            ),
        }
        if self.num_classes > 10:
            top5 = logits.topk(5, dim=1).indices == targets[:, None]
            result["top5_accuracy"] = float(top5.any(1).double().mean())
        return result

    def per_class(self) -> list[float]:
        """Average precision of each class for several labels, accuracy for one; NaN if absent."""
        functional = require_package("torchmetrics.functional", "evaluation", "train")
        logits, targets = self._gathered()
        if self.multi_label:
            truth = targets.long()
            values = functional.classification.multilabel_average_precision(
                logits.sigmoid(), truth, num_labels=self.num_classes, average="none"
            )
            values = torch.where(truth.any(dim=0), values, torch.nan)
        else:
            matrix = self.confusion().double()
            values = matrix.diagonal() / matrix.sum(1)
        return [float(value) for value in values]

    def confusion(self) -> Tensor:
        """[C, C] counts: rows are the truth, columns what was predicted (one label a clip)."""
        if self.multi_label:
            raise ValueError("confusion is for one label a clip: this set has several")
        logits, targets = self._gathered()
        flat = targets * self.num_classes + logits.argmax(1)
        counts = torch.bincount(flat, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)
