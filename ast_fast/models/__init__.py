"""The model family: one member a file, found by name through `create_model`."""

from .ast import ASTModel
from .registry import create_model, list_models, register_model

__all__ = ["ASTModel", "create_model", "list_models", "register_model"]
