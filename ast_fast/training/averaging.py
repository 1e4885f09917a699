"""Averages over a run: of weights after epochs or steps, and of what epochs predict.

Both kinds of averaged weights are float32 whatever the model computes in, lie beside the model on its
device, and are part of a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config import AverageConfig
from .weights import part_of


class WeightAverage:
    """Mean of a model's weights: plain over epochs, or exponential over steps.

    The plain mean is the original's weight averaging, of every tensor of the model after each epoch of
    a range. The exponential one starts fast, with a decay of (1 + n) / (10 + n) after n steps until that
    of the settings is reached, so that early weights are forgotten.

    Args:
        config: which of the two, if any.

    Attributes:
        count: weights that the mean has seen.
    """

    def __init__(self, config: AverageConfig) -> None:
        self._config = config
        self._mean: dict[str, Tensor] = {}
        self.count = 0

    @property
    def ready(self) -> bool:
        """Whether there is a mean already."""
        return self.count > 0

    @torch.no_grad()
    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """Note weights after a step."""
        if not self._config.ema:
            return
        if self._fresh(weights):
            return
        decay = min(self._config.ema, (1 + self.count) / (10 + self.count))
        self._move(weights, 1.0 - decay)

    @torch.no_grad()
    def after_epoch(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        """Note weights after an epoch, counted from 1."""
        first, last = self._config.first_epoch, self._config.last_epoch
        if not first or epoch < first or (last and epoch > last):
            return
        if not self._fresh(weights):
            self._move(weights, 1.0 / (self.count + 1))

    def _fresh(self, weights: Mapping[str, Tensor]) -> bool:
        """Begin with the first weights; whether these are those."""
        if self.count:
            return False
        self._mean = {n: w.detach().to(torch.float32, copy=True) for n, w in weights.items()}
        self.count = 1
        return True

    def _move(self, weights: Mapping[str, Tensor], share: float) -> None:
        names = list(self._mean)
        wide = [weights[name].detach().to(torch.float32) for name in names]
        torch._foreach_lerp_([self._mean[name] for name in names], wide, share)
        self.count += 1

    def weights(self) -> dict[str, Tensor]:
        """The mean by name, float32."""
        return dict(self._mean)

    def load(self, weights: Mapping[str, Tensor], count: int, device: torch.device) -> None:
        """Go on from weights of a checkpoint, by name."""
        self._mean = {name: value.to(device) for name, value in weights.items()}
        self.count = count


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other weights for a while; its own come back to the bit, at the same addresses.

    Args:
        model: any module.
        weights: by name; rounded to the dtype of each. Of a sharded model, this process's parts.
    """
    state = {name: part_of(each) for name, each in model.state_dict(keep_vars=True).items()}
    kept = {name: state[name].clone() for name in weights}
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                state[name].copy_(value)


class PredictionMean:
    """Mean of the predictions of all epochs so far on one set: the original's cumulative ensemble.

    Attributes:
        count: epochs that went in.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [N, C] float64
        self.count = 0

    def add(self, predictions: Tensor) -> Tensor:
        """Add an epoch's predictions [N, C], and give the mean of all so far, float64.

        Raises:
            ValueError: the set is another one: it has more or fewer clips.
        """
        wide = predictions.double()
        if self._sum is not None and self._sum.shape != wide.shape:
            raise ValueError(
                f"{len(wide)} clips were evaluated, {len(self._sum)} in the epochs before: expected the "
                "same; were files added or lost meanwhile?"
            )
        self._sum = wide.clone() if self._sum is None else self._sum + wide
        self.count += 1
        return self._sum / self.count

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self._sum is None else {"cumulative.predictions": self._sum}

    def load(self, tensors: Mapping[str, Tensor], count: int) -> None:
        """Go on from a checkpoint."""
        self._sum, self.count = tensors.get("cumulative.predictions"), count
