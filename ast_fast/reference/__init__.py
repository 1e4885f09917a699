"""The oracle: every op and the whole model in plain PyTorch, in any dtype up to float64.

Nothing here imports the rest of the package, so that a mistake in the fast path cannot hide in
shared code.
"""

from typing import TYPE_CHECKING

from . import mel, ops

if TYPE_CHECKING:
    from .model import ASTModel

__all__ = ["ASTModel", "mel", "ops"]


def __getattr__(name: str) -> object:
    if name == "ASTModel":
        from .model import ASTModel

        return ASTModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
