"""Training: a short loop on Lightning Fabric, exact checkpoints, metrics and logs.

Names are imported when first used: a step of one's own needs none of the packages that the loop does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import CheckpointStore, CheckpointWriteError
    from .errors import (
        DivergedError,
        NonFiniteLossError,
        StepOutOfMemoryError,
        TrainingError,
        TrainingInterrupted,
    )
    from .evaluation import Evaluation, evaluate
    from .loop import Trainer
    from .master import MasterWeights
    from .modes import GraphedStep
    from .recipe import RunConfig
    from .step import TrainingStep, run_step

_HOMES = {
    "CheckpointStore": "checkpoints",
    "CheckpointWriteError": "checkpoints",
    "DivergedError": "errors",
    "Evaluation": "evaluation",
    "GraphedStep": "modes",
    "MasterWeights": "master",
    "NonFiniteLossError": "errors",
    "RunConfig": "recipe",
    "StepOutOfMemoryError": "errors",
    "Trainer": "loop",
    "TrainingError": "errors",
    "TrainingInterrupted": "errors",
    "TrainingStep": "step",
    "evaluate": "evaluation",
    "run_step": "step",
}

__all__ = [
    "CheckpointStore",
    "CheckpointWriteError",
    "DivergedError",
    "Evaluation",
    "GraphedStep",
    "MasterWeights",
    "NonFiniteLossError",
    "RunConfig",
    "StepOutOfMemoryError",
    "Trainer",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingStep",
    "evaluate",
    "run_step",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = found
    return found
