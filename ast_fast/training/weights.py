"""Who holds the weights of a run: the model itself, float32 masters, or all processes together.

`Weights` is the first two: every process has everything. `ShardedWeights` (`sharding.py`) is the third.
The loop, checkpoints and averages ask either of them and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .master import MasterWeights, OptimizerFactory

Norm = Callable[[list[Tensor]], Tensor]


class Masters(Protocol):
    """What stands between a model's gradients and an optimiser of other tensors."""

    def gather(self) -> list[Tensor]:
        """Give the optimiser's tensors their gradients; returns those."""

    def scatter(self) -> None:
        """Bring an update into the model; the same again if repeated."""

    def zero_grad(self) -> None:
        """Drop the gradients of both."""


class Weights:
    """Weights that every process holds whole.

    Args:
        model: on its device.
        optimizer_factory: makes the optimiser from what learns, by name.
        masters: bfloat16 weights that compute, with float32 masters that learn.

    Attributes:
        masters: if there are any.
        trainable: what the optimiser updates, by the model's names.
        optimizer: of those.
    """

    def __init__(
        self, model: nn.Module, optimizer_factory: OptimizerFactory, masters: bool = False
    ) -> None:
        self._model = model
        self.masters: MasterWeights | None = None
        self.trainable: dict[str, nn.Parameter]
        if masters:
            self.masters = MasterWeights(model, optimizer_factory)
            self.trainable, self.optimizer = self.masters.trainable, self.masters.optimizer
        else:
            self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
            self.optimizer = optimizer_factory(self.trainable)

    def share(self) -> None:
        """Give every process what the first one has, beyond what a wrapper of the model sees to."""
        if self.masters is not None:
            self.masters.broadcast()

    def for_step(self) -> dict[str, Any]:
        """What a `TrainingStep` has to know of these weights."""
        return {"masters": self.masters}

    def here(self) -> dict[str, Tensor]:
        """What this process holds, in the precision that learns, by the model's names; buffers too."""
        if self.masters is not None:
            return self.masters.model_state_dict()
        state: dict[str, Tensor] = self._model.state_dict()
        return state

    def floats(self) -> dict[str, Tensor]:
        """`here` without counters: what can be averaged."""
        return {name: value for name, value in self.here().items() if value.is_floating_point()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take whole weights, by the model's names.

        Raises:
            RuntimeError: names or shapes differ.
        """
        if self.masters is None:
            self._model.load_state_dict(state, strict=True)
        else:
            self.masters.load_model_state_dict(state)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process keeps of a tensor that belongs to a weight: here all of it."""
        return whole

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A tensor that belongs to a weight, from what all processes keep of it.

        All processes call it, in one order; only the first has to get the whole.
        """
        return part

    def whole_of(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`whole` of tensors by the names of their weights."""
        return {name: self.whole(name, part) for name, part in parts.items()}


def total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients as one vector, float32; 0 if there are none."""
    return nn.utils.get_total_norm(grads).to(torch.float32)


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; all of it if it is not sharded."""
    found: Any = tensor.detach()
    with torch.no_grad():
        held: Tensor = found.to_local() if is_part(found) else found
    return held


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over several processes (a DTensor, whose import is not cheap)."""
    return hasattr(tensor, "to_local")


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward of the model needs all processes."""
    return any(map(is_part, model.parameters()))
