"""A model made ready to run: where it runs, its class names, and what its logits mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ACTIVATION_OF, ModelFacts
from ..optimized import Precision, optimize_for_inference, why_not

Activation = Literal["auto", "softmax", "sigmoid", "none"]
AUDIOSET_CLASSES = 527


def load_model(model: Any, facts: ModelFacts | None = None) -> Any:
    """The model itself, or the one that a path or hub id names, in evaluation mode.

    Args:
        model: a model, or what `ASTModel.from_pretrained` takes.
        facts: what a file of bare weights does not tell of its model.
    """
    if isinstance(model, (str, os.PathLike)):
        from ..models.ast import ASTModel

        known = {} if facts is None else facts.to_dict()
        model = ASTModel.from_pretrained(model, **known)
    return model.eval()


def load_for_inference(
    model: Any,
    precision: Precision = "exact",
    device: torch.device | None = None,
    facts: ModelFacts | None = None,
) -> Any:
    """What `load_model` gives, on the GPU if there is one, else with packed weights where they can be had.

    Args:
        model: a model, or what `ASTModel.from_pretrained` takes.
        precision: see `optimize_for_inference`; only "exact" on a GPU.
        device: where to run; the first GPU, or the CPU, by default.
        facts: what a file of bare weights does not tell of its model.

    Raises:
        ValueError: another precision than "exact" is not to be had here; says why.
    """
    network = load_model(model, facts)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cpu":
        if precision != "exact":
            raise ValueError(
                f"precision={precision!r} is for CPUs: on a GPU only exact is to be had"
            )
        return network.to(device)
    if precision == "exact" and why_not(precision) is not None:
        return network
    return optimize_for_inference(network, precision)


def class_names(model: Any, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Names for the classes of a model: those given, its own, or "class 0" and so on.

    Raises:
        ValueError: the number of names is wrong.
    """
    count = int(model.config.label_dim)
    names = labels if labels is not None else model.labels
    if names is None:
        return tuple(f"class {index}" for index in range(count))
    if len(names) != count:
        raise ValueError(f"labels: got {len(names)} names: expected {count}, the model's classes")
    return tuple(names)


def resolve_activation(activation: Activation, model: Any) -> Activation:
    """Softmax, sigmoid or none; "auto" goes by `config.problem_type`, else by the number of classes.

    Raises:
        ValueError: it is no activation.
    """
    if activation not in ("auto", "softmax", "sigmoid", "none"):
        raise ValueError(f"activation={activation!r}: expected auto, softmax, sigmoid or none")
    if activation != "auto":
        return activation
    if model.config.problem_type is not None:
        return ACTIVATION_OF[model.config.problem_type]
    return "sigmoid" if model.config.label_dim == AUDIOSET_CLASSES else "softmax"


def activate(logits: Tensor, activation: Activation) -> Tensor:
    """Probabilities [..., classes] in float32; `activation` as `resolve_activation` gives it."""
    logits = logits.float()
    if activation == "none":
        return logits
    return logits.softmax(-1) if activation == "softmax" else logits.sigmoid()


def class_probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """What `activate` gives, on the CPU."""
    return activate(logits.float().cpu(), activation)


def best_labels(
    probabilities: Tensor,  # [classes]
    names: Sequence[str],
    top_k: int,
) -> tuple[tuple[str, float], ...]:
    """Name and probability of the most probable classes, best first."""
    best = probabilities.topk(min(top_k, len(names)))
    return tuple(
        (names[index], value)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
