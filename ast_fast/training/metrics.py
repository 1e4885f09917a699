"""How good logits are: accuracy and confusion, average precision, or distances, as the task asks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Task
from ..finite import check_results
from .ranking import average_precisions, roc_areas

# the figure that says which epoch is best; all of them grow with quality
MAIN_FIGURE: dict[Task, str] = {
    "single_label": "accuracy",
    "multi_label": "map",
    "regression": "r2",
}


class Metrics:
    """Collects logits and targets, then computes in float64: scikit-learn's figures to 1e-12.

    Logits that are NaN or infinite are refused: sorted, they would pass for a ranking.

    Args:
        num_classes: C, classes or values.
        task: what the targets are: "single_label" class indices [B] (or [B, C] vectors with one 1),
            "multi_label" [B, C] vectors, "regression" [B, C] numbers.
        binary: one label a clip was trained with binary cross-entropy, which is then the loss.
        on_sigmoids: compute the loss on sigmoids rather than on logits, as the original's validation
            does: its value then hardly moves, 0.69 to 0.72 for most sets.

    Attributes:
        binary: scores are sigmoids of the logits.
    """

    def __init__(
        self,
        num_classes: int,
        task: Task = "single_label",
        *,
        binary: bool = False,
        on_sigmoids: bool = False,
    ) -> None:
        self.num_classes, self.task = num_classes, task
        self.binary, self._on_sigmoids = binary or task == "multi_label", on_sigmoids
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits [B, C] and targets [B] or [B, C].

        Raises:
            NotFiniteError: logits or targets are NaN or infinite.
            ValueError: the logits are not of as many clips and classes.
        """
        if logits.dim() != 2 or logits.shape != (len(targets), self.num_classes):
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}: expected "
                f"[{len(targets)}, {self.num_classes}], one row a clip"
            )
        logits = logits.detach().float().cpu()
        check_results(logits, "logits")
        check_results(targets, "targets")
        self._logits.append(logits)
        self._targets.append(targets.detach().cpu())

    @property
    def num_clips(self) -> int:
        """Clips added so far."""
        return sum(len(targets) for targets in self._targets)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and targets of all clips.

        Raises:
            ValueError: there are none.
        """
        if not self.num_clips:
            raise ValueError("no clips were evaluated: every file was skipped, or the set is empty")
        return torch.cat(self._logits), torch.cat(self._targets)

    def scores(self) -> Tensor:
        """Probabilities [N, C] of all clips, float64; the values themselves in regression."""
        # in float32 unlike logits become equal probabilities, which a ranking takes for ties
        logits = self.gathered()[0].double()
        if self.task == "regression":
            return logits
        return logits.sigmoid() if self.binary else logits.softmax(1)

    def compute(self) -> dict[str, float]:
        """The figures by name.

        One label: `loss`, `accuracy`, `macro_accuracy` (mean over classes), `auc` (one class against
        the rest) and `top5_accuracy` beyond ten classes. Several: `loss`, `map` and `auc`, means over
        the classes that have a positive clip (and, for `auc`, a negative one). Both: `dprime`, from the
        mean `auc`. Regression: `loss`, `r2`, `rmse` and `mae`, means over the values.
        """
        return {"loss": self._loss()} | self.figures(self.scores())

    def _loss(self) -> float:
        logits, targets = self.gathered()
        logits = logits.double()
        if self.task == "regression":
            return float(F.mse_loss(logits, targets.double()))
        values = logits.sigmoid() if self._on_sigmoids else logits
        if self.binary:
            return float(F.binary_cross_entropy_with_logits(values, self.vectors().double()))
        return float(F.cross_entropy(values, self._indices()))

    def figures(self, scores: Tensor) -> dict[str, float]:
        """Figures of scores [N, C] for the clips that were added, without a loss: see `compute`.

        Raises:
            NotFiniteError: scores are NaN or infinite.
        """
        check_results(scores, "scores")
        if self.task == "regression":
            return _distances(scores, self.gathered()[1])
        result = {}
        if self.task == "single_label":
            result = self._hits(scores)
        vectors = self.vectors()
        # undefined without a positive clip; the area also without a negative one
        some, mixed = vectors.any(dim=0), vectors.any(dim=0) & ~vectors.all(dim=0)
        if self.task == "multi_label" and some.any():
            result["map"] = float(average_precisions(scores, vectors)[some].mean())
        if mixed.any():
            auc = float(roc_areas(scores, vectors)[mixed].mean())
            result["auc"] = auc
            if 0.0 < auc < 1.0:
                # of the mean area, as the original has it, not the mean of each class's
                result["dprime"] = math.sqrt(2.0) * float(
                    torch.special.ndtri(torch.tensor(auc, dtype=torch.float64))
                )
        return result

    def _hits(self, scores: Tensor) -> dict[str, float]:
        truth = self._indices()
        shares = torch.tensor(self._shares(scores), dtype=torch.float64)
        result = {
            "accuracy": float((scores.argmax(1) == truth).double().mean()),
            "macro_accuracy": float(shares.nanmean()),
        }
        if self.num_classes > 10:
            top5 = scores.topk(5, dim=1).indices == truth[:, None]
            result["top5_accuracy"] = float(top5.any(1).double().mean())
        return result

    def _indices(self) -> Tensor:
        _, targets = self.gathered()
        return targets.argmax(1) if targets.dim() == 2 else targets

    def vectors(self) -> Tensor:
        """Which classes each clip has, [N, C] int64."""
        _, targets = self.gathered()
        return targets.long() if targets.dim() == 2 else F.one_hot(targets, self.num_classes)

    def per_class(self) -> list[float]:
        """Average precision of each class for several labels, accuracy for one; NaN if absent.

        In regression the R2 of each value.
        """
        if self.task == "multi_label":
            vectors = self.vectors()
            return average_precisions(self.scores(), vectors).tolist()
        if self.task == "regression":
            logits, targets = self.gathered()
            columns = zip(logits.t(), targets.t(), strict=True)
            return [_distances(a[:, None], b[:, None]).get("r2", math.nan) for a, b in columns]
        return self._shares(self.scores())

    def _shares(self, scores: Tensor) -> list[float]:
        matrix = self._counts(scores).double()
        return [float(value) for value in matrix.diagonal() / matrix.sum(1)]

    def confusion(self) -> Tensor:
        """[C, C] counts: rows are the truth, columns what was predicted (one label a clip)."""
        if self.task != "single_label":
            raise ValueError(f"confusion is for one label a clip: this task is {self.task}")
        return self._counts(self.scores())

    def _counts(self, scores: Tensor) -> Tensor:
        flat = self._indices() * self.num_classes + scores.argmax(1)
        counts = torch.bincount(flat, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)


def _distances(values: Tensor, targets: Tensor) -> dict[str, float]:
    """R2, root of the mean squared error, and mean absolute error: means over the columns [N, K].

    R2 is left out where a column's targets are all the same.
    """
    values, targets = values.double(), targets.double()
    squares = (values - targets).square()
    spread = (targets - targets.mean(0)).square().sum(0)
    result = {
        "rmse": float(squares.mean(0).sqrt().mean()),
        "mae": float((values - targets).abs().mean()),
    }
    if bool((spread > 0).all()):
        result["r2"] = float((1.0 - squares.sum(0) / spread).mean())
    return result
