"""The ops on CPU through the compiled kernels in csrc/: thin adapters from tensors to raw pointers.

Each module holds `unsupported`, `forward` and `backward` for one op; registration, autograd and
the choice of backend are in `ast_fast.ops`. Importing this package never fails: `why_unavailable`
says what is missing when the extension was not built.
"""

from __future__ import annotations

import functools
import importlib


@functools.cache
def why_unavailable() -> str | None:
    """The reason the compiled module cannot be used, or None if it can."""
    import torch  # noqa: F401  (first: it brings the OpenMP runtime that the extension shares)

    try:
        importlib.import_module("ast_fast._C")
    except ImportError as error:
        return (
            f"the C++ extension is not available ({error}); with a C++17 compiler, "
            "`pip install -e .` in the checkout builds it"
        )
    return None


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return why_unavailable() is None


def isa() -> str:
    """The instruction set in use, for example `avx512bf16`; empty without the extension."""
    return str(importlib.import_module("ast_fast._C").isa()) if available() else ""
