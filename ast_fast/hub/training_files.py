"""The weights inside what training programs save: under one of many names, beside other things.

Which entry holds them is told by what lies in it, the names of an AST's tensors; what is left out is said.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._text import named
from .errors import CheckpointError
from .keys import State, is_ast

_log = logging.getLogger("ast_fast.hub")

# Lightning, plain loops, timm, DeepSpeed, Fabric; in the order in which they are taken
_NAMES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
)
_DEPTH = 4  # {"state": {"model": {...}}}


def weights_in(loaded: Any, file: Path) -> State:
    """The state dict in what `torch.load` gave.

    Raises:
        CheckpointError: there is none.
    """
    found = loaded
    for _ in range(_DEPTH):
        if not isinstance(found, Mapping) or not found:
            break
        inner = _inner(found, file)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(
            f"{str(file)!r} holds a {type(found).__name__}: expected a state dict, names to tensors"
        )
    others = [
        key
        for key, value in found.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(
            f"{str(file)!r} holds more than tensors ({', '.join(map(repr, others[:5]))}): expected a state dict"
        )
    return dict(found)


def _inner(outer: Mapping[Any, Any], file: Path) -> Mapping[Any, Any] | None:
    """The entry with the weights, if they are in one."""
    states = {
        key: value
        for key, value in outer.items()
        if isinstance(key, str) and isinstance(value, Mapping) and value
    }
    usual = [name for name in _NAMES if name in states]
    holding = [name for name in states if _leads_to_ast(states[name])]
    chosen = next((name for name in usual if name in holding), None)
    if chosen is None and len(holding) == 1:
        chosen = holding[0]
    if chosen is None and holding:
        raise CheckpointError(
            f"{str(file)!r} holds several models ({', '.join(map(named, holding))}): save the one that is "
            "meant alone"
        )
    if chosen is None:
        return states[usual[0]] if usual else None
    left = [name for name in holding if name != chosen]
    if left:
        _log.warning(
            "%r: the weights of %s are loaded; those of %s are left out",
            str(file),
            chosen,
            ", ".join(map(named, left)),
        )
    return states[chosen]


def _leads_to_ast(value: Mapping[Any, Any], depth: int = _DEPTH) -> bool:
    if is_ast(value):
        return True
    return depth > 0 and any(
        _leads_to_ast(inner, depth - 1)
        for key, inner in value.items()
        if key in _NAMES and isinstance(inner, Mapping)
    )
