"""Learning rates over a run: a factor of the peak rate, a function of the step alone."""

from __future__ import annotations

import math


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
