"""Models by name: `create_model("ast_base_p16_s10", num_classes=50)`, `list_models("ast_*")`."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """Make a function that builds a model known under its own name.

    The function takes `num_classes` and keyword settings of its model. A name is registered once.
    """
    name = builder.__name__
    if name in _builders and _builders[name] is not builder:
        raise ValueError(f"a model named {name!r} is registered already: choose another name")
    _builders[name] = builder
    return builder


def _load_family() -> None:
    # a family member registers itself when imported, so that a new file in this folder is enough
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, sorted.

    >>> "ast_base_p16_s10" in list_models("ast_base_*")
    True
    """
    _load_family()
    return sorted(fnmatch.filter(_builders, pattern))


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Build a model by name, with random weights unless its settings ask for others.

    Args:
        name: one of `list_models()`.
        num_classes: width of the head; the model's own default (527 for AST) if None.
        overrides: settings to change, such as input_tdim=512.

    Raises:
        ValueError: the name or a setting is unknown.

    >>> create_model("ast_mini_p16_s10", num_classes=10).config.label_dim
    10
    """
    _load_family()
    if name not in _builders:
        near = difflib.get_close_matches(name, _builders, n=3)
        hint = (
            f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(_builders))}"
        )
        raise ValueError(f"model {name!r} is unknown: {hint}")
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return _builders[name](**overrides)
