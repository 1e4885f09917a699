"""The optimiser of a run: which weights it updates, at which rate, with which decay."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig, TuneConfig

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_HEAD = "mlp_head."


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Take the gradient from parameters whose names match a pattern; returns their names.

    Args:
        model: any module.
        patterns: as of file names: "v.*" is all but the head, "v.blocks.?.*" the first ten blocks.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = []
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(
                f"freeze: {pattern!r} matches no parameter: expected patterns of names such as "
                f"{names[0]!r}"
            )
        frozen += matching
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={patterns!r} leaves nothing to train: expected less")
    return frozen


def depth_for_rates(names: Iterable[str], depth: int | None, tune: TuneConfig) -> int:
    """How many blocks the rates of a run count from.

    Args:
        names: of all of the model's parameters, frozen ones too.
        depth: blocks of the model, if it says so; else its names do.
        tune: `layer_decay` and `head_rate`.

    Raises:
        ValueError: rates differ by layer, and the names do not tell the layers or the head. A layer decay
            from a depth that is too small is growth.
    """
    names = list(names)
    blocks = [int(found.group(1)) for found in map(_BLOCK.search, names) if found]
    seen = max(blocks, default=-1) + 1
    asked = [
        f"tune.{name}={value:g}"
        for name, value in (("layer_decay", tune.layer_decay), ("head_rate", tune.head_rate))
        if value != 1.0
    ]
    if not asked:
        return depth or seen
    if not any(name.startswith(_HEAD) for name in names):
        raise ValueError(
            f"{' and '.join(asked)}: no parameter of this model is called {_HEAD}*, so its head is not known: "
            "leave it at 1"
        )
    if tune.layer_decay == 1.0:
        return depth or seen
    if not blocks or (depth is not None and depth < seen):
        what = f"the model says depth={depth}" if blocks else "no parameter is called *blocks.N.*"
        raise ValueError(
            f"layer_decay={tune.layer_decay:g}: the layers of this model are not known ({what}, and its names "
            f"tell of {seen} blocks): leave it at 1"
        )
    return depth or seen


def rate_of(name: str, depth: int, tune: TuneConfig) -> float:
    """Rate of a parameter in units of the run's: layer-wise decay (BEiT) and the head's own factor.

    The head and the final norm count as the layer after the last block, embeddings as the one before
    the first.

    Args:
        name: of the parameter, as `v.blocks.3.attn.qkv.weight`.
        depth: blocks of the model.
        tune: `layer_decay` and `head_rate`.

    Raises:
        ValueError: the block is beyond the depth: its rate would grow rather than decay.
    """
    if name.startswith(_HEAD):
        return tune.head_rate
    block = _BLOCK.search(name)
    if block is not None:
        layer = int(block.group(1)) + 1
        if layer > depth and tune.layer_decay != 1.0:
            raise ValueError(
                f"depth={depth}: {name} is of block {layer}; expected the model's blocks"
            )
    else:
        layer = depth + 1 if ".norm." in f".{name}" else 0
    return tune.layer_decay ** (depth + 1 - layer)


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, depth: int
) -> list[dict[str, Any]]:
    """Groups of parameters with one rate and one decay each.

    AdamW decays matrices and kernels alone; Adam, as the original uses it, adds the decay to the
    gradient of all. `rate` is each group's factor, which `TrainingStep.set_lr` applies.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = config.optimizer == "adam" or parameter.dim() in (2, 4)
        key = rate_of(name, depth, config.tune), config.weight_decay if decays else 0.0
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "rate": rate}
        for (rate, decay), members in groups.items()
    ]


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, depth: int, capturable: bool
) -> torch.optim.Optimizer:
    """AdamW, or Adam with L2 decay, fused, over the groups of a run."""
    kind: Any = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(
        parameter_groups(parameters, config, depth),
        lr=config.lr,
        betas=config.betas,
        fused=True,
        capturable=capturable,
    )
    return optimizer
