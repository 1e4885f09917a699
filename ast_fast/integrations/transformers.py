"""transformers on our ops: a loaded AST switched in place, and an attention implementation.

    model = ast_fast.accelerate(ASTForAudioClassification.from_pretrained(...))

Importing this module registers `attn_implementation="ast_fast"`.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from .._optional import require_package
from ._hf_attention import attention_forward, mask_function

Model = TypeVar("Model", bound=nn.Module)
NAME = "ast_fast"
_OLDEST = (4, 57)


def _require() -> Any:
    transformers = require_package("transformers", "ast_fast.integrations.transformers", "hf")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ImportError(
            f"transformers {transformers.__version__} is installed: expected 4.57 or newer; "
            "pip install -U transformers"
        )
    return transformers


@functools.cache
def register() -> None:
    """Make `attn_implementation="ast_fast"` known to transformers; importing this module does it.

    Raises:
        ImportError: transformers is absent or older than 4.57.

    >>> from ast_fast.integrations.transformers import register
    >>> register()
    """
    _require()
    from transformers import AttentionInterface, masking_utils

    AttentionInterface.register(NAME, attention_forward)
    make = mask_function(
        getattr(masking_utils, "bidirectional_mask_function", None), masking_utils.sdpa_mask
    )
    masking_utils.AttentionMaskInterface.register(NAME, make)


def accelerate(model: Model) -> Model:
    """Run a loaded transformers AST on our ops, in place; returns the model.

    Its Parameters stay the only ones, under the same names: saving, loading, training, PEFT and pipelines go
    on as before, and what is hooked or replaced keeps its own forward. `restore` undoes it; a second call
    does nothing.

    Args:
        model: transformers' `ASTModel` or `ASTForAudioClassification` (4.57 or newer), or any module that
            holds one, such as a `PeftModel`.

    Raises:
        TypeError: there is no AST of transformers in it.

    >>> from transformers import ASTConfig, ASTForAudioClassification
    >>> config = ASTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, max_length=64)
    >>> model = accelerate(ASTForAudioClassification(config))
    """
    register()
    from ._hf_modules import SWITCHED

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a loaded ASTModel or ASTForAudioClassification "
            "of transformers (a pipeline's is pipeline.model)"
        )
    found = [module for module in model.modules() if type(module) in SWITCHED]
    if not found and not any(type(module) in SWITCHED.values() for module in model.modules()):
        raise TypeError(_not_an_ast(model))
    for module in found:
        _switch(module, SWITCHED[type(module)])
    return model


def _switch(module: nn.Module, to: type) -> None:
    """Give a module another class; a forward of its own that is only its old class's goes with that."""
    own = module.__dict__.get("forward")
    # transformers 4 leaves one behind after it has recorded hidden states
    if getattr(own, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
    module.__class__ = to


def _not_an_ast(model: nn.Module) -> str:
    name = f"{type(model).__module__.split('.')[0]}'s {type(model).__name__}"
    if any(type(module).__module__.startswith("ast_fast.") for module in model.modules()):
        return f"model is {name}, which runs on the fast ops by itself: expected transformers' AST"
    return (
        f"model is {name}, which holds no AST of transformers: expected ASTModel or "
        "ASTForAudioClassification (other architectures can take attn_implementation='ast_fast')"
    )


def is_accelerated(model: nn.Module) -> bool:
    """Whether any part of a model was switched by `accelerate`."""
    register()
    from ._hf_modules import SWITCHED

    ours = set(SWITCHED.values())
    return any(type(module) in ours for module in model.modules())


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that was not accelerated stays as it is. Returns the model."""
    register()
    from ._hf_modules import SWITCHED

    back = {ours: theirs for theirs, ours in SWITCHED.items()}
    for module in model.modules():
        if type(module) in back:
            _switch(module, back[type(module)])
    return model


register()
