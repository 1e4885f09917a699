"""Several models as one: the mean of what they predict, and the mean of their weights.

The AST paper's Ensemble-S has one setting and several seeds, its Ensemble-M several patch splits too:
both are the mean of the predictions of whatever models they are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hub import CheckpointError
from ..hub.safety import refuse_not_finite
from .evaluation import Evaluation


@dataclasses.dataclass(frozen=True, slots=True)
class Ensemble:
    """Figures of each model and of the mean of their predictions.

    Attributes:
        each: figures of the models, in the order given.
        figures: of the mean; without a loss.
        predictions: [N, C] float64, the mean itself.
    """

    each: list[dict[str, float]]
    figures: dict[str, float]
    predictions: Tensor


def ensemble(evaluations: Iterator[Evaluation]) -> Ensemble:
    """Evaluate models on one set, and then the mean of their predictions.

    Args:
        evaluations: one a model, made as they are asked for: only one model need be in memory.

    Raises:
        ValueError: there is none, or they saw different clips.
    """
    each: list[dict[str, float]] = []
    total: Tensor | None = None
    first: Evaluation | None = None
    for found in evaluations:
        scores = found.metrics.scores().double()
        if first is None or total is None:
            first, total = found, torch.zeros_like(scores)
        elif not torch.equal(found.metrics.gathered()[1], first.metrics.gathered()[1]):
            raise ValueError(
                f"model {len(each) + 1} was evaluated on {found.num_clips} clips, the first on "
                f"{first.num_clips}, or their labels differ: expected the same clips of the same "
                "classes"
            )
        total = total + scores
        each.append(found.figures)
    if first is None or total is None:
        raise ValueError("no models: expected at least one")
    mean = total / len(each)
    return Ensemble(each, first.metrics.figures(mean), mean)


def mean_of_weights(
    read: Callable[[Any], Mapping[str, Tensor]], sources: Sequence[Any]
) -> dict[str, Tensor]:
    """The plain mean of every tensor of some models, computed in float64.

    Args:
        read: gives a model's tensors by name.
        sources: where the models lie; one is read at a time.

    Raises:
        CheckpointError: names or shapes of the tensors differ, or values are NaN or infinite.
    """
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for source in sources:
        state = read(source)
        refuse_not_finite(state, str(source))
        if not total:
            total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in state.items()}
            kinds = {name: t.dtype for name, t in state.items()}
        unlike = sorted(
            name
            for name in total.keys() | state.keys()
            if name not in total or name not in state or total[name].shape != state[name].shape
        )
        if unlike:
            raise CheckpointError(
                f"{source} is of another shape than {sources[0]}: {', '.join(unlike[:5])} differ; "
                "expected models of one architecture and one number of classes"
            )
        for name, value in state.items():
            total[name] += value.double()
    return {name: (mean / len(sources)).to(kinds[name]) for name, mean in total.items()}
