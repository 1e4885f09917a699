"""How good logits are: accuracy and confusion for one label a clip, average precision for several."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .._optional import require_package


class Metrics:
    """Collects logits and targets, then computes; exact, ranking figures by torchmetrics.

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
        logits, targets = self._gathered()
        if self.multi_label:
            truth = targets.long()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
            result = {"loss": float(loss)}
            # undefined without a positive clip; the area also without a negative one
            some, mixed = truth.any(dim=0), truth.any(dim=0) & ~truth.all(dim=0)
            for name, kept in (("map", some), ("auc", mixed)):
                if kept.any():
                    result[name] = float(self._each(name)[kept].double().mean())
            return result
        shares = torch.tensor(self.per_class(), dtype=torch.float64)
        result = {
            "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
            "accuracy": float((logits.argmax(1) == targets).double().mean()),
            "macro_accuracy": float(shares.nanmean()),
        }
        if self.num_classes > 10:
            top5 = logits.topk(5, dim=1).indices == targets[:, None]
            result["top5_accuracy"] = float(top5.any(1).double().mean())
        return result

    def _each(self, name: str) -> Tensor:
        """Average precision ("map") or area under the curve ("auc") of each class."""
        package = require_package(
            "torchmetrics.functional.classification", "evaluation of several labels", "train"
        )
        logits, targets = self._gathered()
        scores, truth = logits.sigmoid(), targets.long()
        stem = {"map": "average_precision", "auc": "auroc"}[name]
        with warnings.catch_warnings():
            # classes for which a figure is undefined are left out afterwards
            warnings.simplefilter("ignore", UserWarning)
            if self.num_classes == 1:
                single: Tensor = getattr(package, f"binary_{stem}")(scores[:, 0], truth[:, 0])
                return single.reshape(1)
            values: Tensor = getattr(package, f"multilabel_{stem}")(
                scores, truth, num_labels=self.num_classes, average="none"
            )
            return values

    def per_class(self) -> list[float]:
        """Average precision of each class for several labels, accuracy for one; NaN if absent."""
        _, targets = self._gathered()
        if self.multi_label:
            present = targets.bool().any(dim=0)
            values = torch.where(present, self._each("map"), torch.nan)
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
