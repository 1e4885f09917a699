"""Learning rates over a run: a factor of the peak rate, a function of the step alone."""

from __future__ import annotations

import math

from ..config import TrainConfig

_STAIRS = 20


def rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: steps done before this one, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps over which the rate rises in a line; at most a tenth of a short run.
        schedule: "constant", or "cosine" down to 0 at the end.

    >>> rate_factor(0, 100, 10, "cosine"), rate_factor(9, 100, 10, "cosine")
    (0.1, 1.0)
    """
    warmup_steps = min(warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def stairs_factor(
    step: int,
    epoch_steps: int,
    decay_start: int,
    decay_epochs: int,
    decay_factor: float,
    staircase_steps: int = 0,
) -> float:
    """Share of the rate at a step of the original's schedule.

    After `decay_start` epochs, and every `decay_epochs` after that, the rate is multiplied by
    `decay_factor`. A staircase warm-up sets the rate anew at the foot of each of its stairs, whatever
    decay came before: the first stair is at 0, and the last one, at the end of the warm-up, sets the
    full rate (traintest.py of the original AST: `global_step <= 1000 and global_step % 50 == 0`).

    Args:
        step: steps done before this one, from 0.
        epoch_steps: steps of an epoch.
        decay_start: epochs at the full rate.
        decay_epochs: epochs between two decays.
        decay_factor: of each decay.
        staircase_steps: steps of the warm-up, in stairs of a twentieth; 0: none.

    >>> [stairs_factor(s, 100, 2, 1, 0.5) for s in (0, 199, 200, 300)]
    [1.0, 1.0, 0.5, 0.25]
    >>> [stairs_factor(s, 5000, 2, 1, 0.5, 1000) for s in (0, 49, 50, 999, 1000)]
    [0.0, 0.0, 0.05, 0.95, 1.0]
    """
    since, factor = -1, 1.0
    stair = staircase_steps // _STAIRS
    if stair:
        since = min(step // stair, _STAIRS) * stair
        factor = since / (stair * _STAIRS)
    first, last = since // epoch_steps + 1, step // epoch_steps
    decays = sum(
        epoch >= decay_start and (epoch - decay_start) % decay_epochs == 0
        for epoch in range(first, last + 1)
    )
    return factor * decay_factor**decays


def run_factor(config: TrainConfig, step: int, epoch_steps: int) -> float:
    """Share of `config.lr` at a step of a run with so many steps an epoch."""
    staircase = config.warmup_steps if config.warmup == "staircase" else 0
    if config.schedule == "stairs":
        if config.warmup == "linear" and step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        decay = (config.decay_start, config.decay_epochs, config.decay_factor)
        return stairs_factor(step, epoch_steps, *decay, staircase)
    total = config.epochs * epoch_steps
    if staircase:
        if step < staircase:
            return stairs_factor(step, total, total, 1, 1.0, staircase)
        return rate_factor(step - staircase, max(1, total - staircase), 0, config.schedule)
    return rate_factor(step, total, config.warmup_steps, config.schedule)
