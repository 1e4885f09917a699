"""The equivalence monitor in a run, on one process or with the weights of several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from .augment import seek_patchout
from .weights import Weights


class Checks:
    """Runs the equivalence monitor in the first process.

    Sharded weights are gathered into a whole twin of the model for it, which lies on the CPU between
    checks: what is checked are the same kernels with the same weights on the same clips.

    Args:
        model: of the run, before its weights are sharded.
        config: of the run.
        autocast: what the run computes in, if not in float32 alone.
        first: whether this is the first process.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, autocast: torch.dtype | None, first: bool
    ) -> None:
        self._every = config.monitor.check_every
        self._sharded = config.strategy == "fsdp2"
        self._monitor: Any = None
        self._twin: Any = None
        if not self._every or not first:
            return
        from ..equivalence import EquivalenceMonitor

        if self._sharded:
            self._twin = model = copy.deepcopy(model).cpu().train()
            if config.precision == "bfloat16-master":
                for parameter in model.parameters():
                    parameter.data = parameter.data.bfloat16()
        self._monitor = EquivalenceMonitor(model, config.monitor, autocast)

    def step(
        self,
        step: int,
        weights: Weights,
        features: Tensor,
        loss: Callable[[Tensor], Tensor],
    ) -> dict[str, Any] | None:
        """Check the features [B, S, F] of a step if one is due; gives a row of the log.

        Raises:
            EquivalenceError: over budget, and the settings say to stop.
        """
        if not self._every or step % self._every:
            return None
        whole = weights.whole_of(weights.here()) if self._sharded else {}
        if self._monitor is None or not len(features):
            return None
        if self._twin is None:
            found: dict[str, Any] = self._monitor.step(features, loss, step=step).to_dict()
            return found
        self._twin.load_state_dict(whole)
        self._twin.to(features.device)
        seek_patchout(self._twin, step)
        try:
            dtype = next(self._twin.parameters()).dtype
            found = self._monitor.step(features.to(dtype), loss, step=step).to_dict()
        finally:
            self._twin.cpu()
        return found
