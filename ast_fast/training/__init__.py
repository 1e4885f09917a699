"""Training: a short loop on Lightning Fabric, exact checkpoints, metrics and logs."""

from .checkpoints import CheckpointStore, CheckpointWriteError
from .errors import (
    NonFiniteLossError,
    StepOutOfMemoryError,
    TrainingError,
    TrainingInterrupted,
)
from .evaluate import Evaluation, evaluate
from .loop import Trainer
from .master import MasterWeights
from .recipe import RunConfig
from .step import GraphedStep, TrainingStep

__all__ = [
    "CheckpointStore",
    "CheckpointWriteError",
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
]
