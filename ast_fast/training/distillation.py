"""Learning from a teacher's logits beside the labels (Hinton et al., 2015)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DistillConfig, LogMelConfig, Task
from ..finite import check_state


class Teacher:
    """A model that says what it thinks of the features that the student gets.

    Args:
        model: with `config.label_dim` and `frontend_config`; put into evaluation, never trained.
        front: the student's front end, which the teacher's has to equal.
        num_classes: of the student.

    Raises:
        ValueError: teacher and student see or say different things, or weights of the teacher are NaN.
    """

    def __init__(self, model: Any, front: LogMelConfig, num_classes: int) -> None:
        theirs = model.frontend_config
        if model.config.label_dim != num_classes:
            raise ValueError(
                f"distill.teacher has {model.config.label_dim} classes: expected the student's "
                f"{num_classes}"
            )
        if theirs != front:
            raise ValueError(
                f"distill.teacher hears {theirs.to_dict()}: expected the student's front end "
                f"{front.to_dict()}"
            )
        # one that says NaN would show as a loss that is NaN, and nobody would look here
        check_state(model.state_dict(), "distill.teacher")
        self._model: nn.Module = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Teacher:
        """Move to the student's device."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Logits [B, C] float32 for features [B, S, F]."""
        dtype = next(self._model.parameters()).dtype
        made: Tensor = self._model(features.to(dtype))
        return made.float()


def with_teacher(targets: Tensor, said: Tensor) -> Tensor:
    """Targets [B] or [B, C] and a teacher's logits [B, C] as one tensor [B, 2 C]."""
    if targets.dim() == 1:
        targets = F.one_hot(targets, said.shape[1])
    return torch.cat((targets.float(), said), dim=1)


class DistillationLoss:
    """The task's loss and the teacher's, weighed.

    Several labels: binary cross-entropy with the teacher's probabilities. One label: the divergence of
    the two distributions. Both at the temperature, times its square, which keeps gradients as large as
    they are at 1. Regression: the squared distance of the two.

    Args:
        loss: of logits and targets [B, C].
        task: decides the teacher's loss.
        config: weight and temperature.
    """

    def __init__(self, loss: Any, task: Task, config: DistillConfig) -> None:
        self._loss, self._task, self._config = loss, task, config

    def __call__(self, logits: Tensor, packed: Tensor) -> Tensor:
        """Loss of logits [B, C] for what `with_teacher` made, [B, 2 C]."""
        targets, said = packed.chunk(2, dim=1)
        own: Tensor = self._loss(logits, targets)
        weight, heat = self._config.weight, self._config.temperature
        return (1.0 - weight) * own + weight * heat**2 * self._distance(logits / heat, said / heat)

    def _distance(self, logits: Tensor, said: Tensor) -> Tensor:
        if self._task == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, said.sigmoid())
        if self._task == "regression":
            return F.mse_loss(logits, said)
        theirs = said.log_softmax(1)
        return F.kl_div(logits.log_softmax(1), theirs, reduction="batchmean", log_target=True)
