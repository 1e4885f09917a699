"""Train and run the Audio Spectrogram Transformer and its family, fast, with the same numbers.

Names are loaded when first used, so that `import ast_fast` stays cheap and needs only PyTorch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# a checkout keeps the kernels in the sibling folder kernels/; an installed copy has them inside
_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "ast_fast" / "kernels").is_dir() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"

_HOMES = {
    "ASTFeatureExtractor": "integrations.feature_extractor",
    "ASTModel": "models.ast",
    "LogMel": "frontend",
    "MFCC": "frontend",
    "Resample": "resample",
    "StreamingLogMel": "streaming",
    "StreamingTagger": "streaming",
    "accelerate": "integrations.transformers",
    "check_equivalence": "equivalence",
    "create_model": "models.registry",
    "embed": "inference",
    "list_models": "models.registry",
    "optimize_for_inference": "optimized",
    "refresh_packed": "optimized",
    "predict": "inference",
    "restore": "integrations.transformers",
    "tag": "inference",
    "use_backend": "backend",
}
_MODULES = (
    "audio",
    "augment",
    "backend",
    "config",
    "data",
    "equivalence",
    "frontend",
    "hub",
    "inference",
    "integrations",
    "models",
    "ops",
    "reference",
    "resample",
    "seeding",
    "streaming",
    "training",
)

if TYPE_CHECKING:
    from . import (
        audio,
        augment,
        backend,
        config,
        data,
        equivalence,
        frontend,
        hub,
        inference,
        integrations,
        models,
        ops,
        reference,
        resample,
        seeding,
        streaming,
        training,
    )
    from .backend import use_backend
    from .equivalence import check_equivalence
    from .frontend import MFCC, LogMel
    from .inference import embed, predict, tag
    from .integrations.feature_extractor import ASTFeatureExtractor
    from .integrations.transformers import accelerate, restore
    from .models.ast import ASTModel
    from .models.registry import create_model, list_models
    from .optimized import optimize_for_inference, refresh_packed
    from .resample import Resample
    from .streaming import StreamingLogMel, StreamingTagger

__all__ = [
    "MFCC",
    "ASTFeatureExtractor",
    "ASTModel",
    "LogMel",
    "Resample",
    "StreamingLogMel",
    "StreamingTagger",
    "__version__",
    "accelerate",
    "audio",
    "augment",
    "backend",
    "check_equivalence",
    "config",
    "create_model",
    "data",
    "embed",
    "equivalence",
    "frontend",
    "hub",
    "inference",
    "integrations",
    "list_models",
    "models",
    "ops",
    "optimize_for_inference",
    "predict",
    "reference",
    "refresh_packed",
    "resample",
    "restore",
    "seeding",
    "streaming",
    "tag",
    "training",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
