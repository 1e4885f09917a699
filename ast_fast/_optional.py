"""Optional packages, imported where they are needed and with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

# a package that is present but broken raises more than ImportError: torchaudio built for another
# CUDA raises OSError or RuntimeError
_FAILURES = (ImportError, OSError, RuntimeError)


class MissingPackageError(ImportError):
    """A feature needs a package that is not installed or does not import."""


def optional_import(name: str) -> ModuleType | None:
    """The module, or None if it is absent or broken."""
    try:
        return importlib.import_module(name)
    except _FAILURES:
        return None


def require_package(name: str, purpose: str, extra: str) -> ModuleType:
    """The module, or an error that says what needs it and how to get it.

    Args:
        name: module to import.
        purpose: what it is needed for, as the subject of a sentence.
        extra: extra of this package that installs it.

    Raises:
        MissingPackageError: the module is absent or broken; the cause is chained.
    """
    try:
        return importlib.import_module(name)
    except _FAILURES as error:
        raise MissingPackageError(
            f"{purpose} needs the package {name!r}, which does not import "
            f"({type(error).__name__}: {error}): pip install 'ast-fast[{extra}]'"
        ) from error
