"""The scale of a float16 loss: as large as gradients bear, decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000


class LossScaler:
    """What `torch.amp.GradScaler` does, without waiting for the device: a step can be recorded.

    The loss is multiplied by `scale`. Where a gradient then overflows, the step is skipped and the
    scale halved; after 2000 good steps in a row it is doubled. Defaults are GradScaler's.

    Args:
        device: of the weights.
        interval: good steps between two doublings.

    Attributes:
        scale: float32 scalar on the device.
        good_steps: int32 scalar, steps since the last change.
    """

    def __init__(self, device: torch.device, interval: int = INTERVAL) -> None:
        self.scale = torch.full((), FIRST, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._interval = interval

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """Note a step: `overflow` is 1.0 where its gradients were not finite, else 0.0."""
        bad = overflow.bool()
        steps = torch.where(bad, 0, self.good_steps + 1)
        grown = steps >= self._interval
        factor = torch.where(bad, BACKOFF, torch.where(grown, GROWTH, 1.0))
        # beyond float32 there is nothing to gain, below 1 nothing to lose but the run
        self.scale.mul_(factor).clamp_(1.0, 2.0**120)
        self.good_steps.copy_(torch.where(grown, 0, steps))

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from saved tensors."""
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])
