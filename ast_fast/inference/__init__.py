"""Inference: labels, curves and embeddings of clips of any length, from one file to millions.

`predict`, `tag` and `embed` are for programs; `run_job` writes results to files, may be killed at any
moment and goes on where it stood, on one process or many.
"""

from .api import Curves, Embedding, Prediction, WindowLabels, embed, predict, tag
from .engine import Engine
from .loading import (
    Activation,
    best_labels,
    class_names,
    class_probabilities,
    load_for_inference,
    load_model,
    resolve_activation,
)
from .outputs import ClipOutput, Failure, Pooling, Wanted
from .windows import WindowPlan, split_windows

__all__ = [
    "Activation",
    "ClipOutput",
    "Curves",
    "Embedding",
    "Engine",
    "Failure",
    "Pooling",
    "Prediction",
    "Wanted",
    "WindowLabels",
    "WindowPlan",
    "best_labels",
    "class_names",
    "class_probabilities",
    "embed",
    "load_for_inference",
    "load_model",
    "predict",
    "resolve_activation",
    "split_windows",
    "tag",
]
