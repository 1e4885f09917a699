"""Training: a short loop on Lightning Fabric, exact checkpoints, metrics and logs."""

from .checkpoints import CheckpointStore, CheckpointWriteError
from .evaluate import Evaluation, evaluate
from .loop import NonFiniteLossError, Trainer, TrainingError, TrainingInterrupted
from .recipe import RunConfig

__all__ = [
    "CheckpointStore",
    "CheckpointWriteError",
    "Evaluation",
    "NonFiniteLossError",
    "RunConfig",
    "Trainer",
    "TrainingError",
    "TrainingInterrupted",
    "evaluate",
]
