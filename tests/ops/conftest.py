"""Guard zones for every test of ops: what the C++ kernels read, write and allocate lies between canaries."""

import importlib

import pytest

from ast_fast.cpp import why_unavailable
from ast_fast.testing import Guarded

OPS = (
    "add_layer_norm",
    "attention",
    "attention_biased",
    "attention_masked",
    "attention_varlen",
    "layer_norm",
    "log_mel",
    "mlp",
    "patch_embed",
)


@pytest.fixture(autouse=True)
def guard_zones(monkeypatch):
    """The adapters of all ops, guarded, by op and direction; the kernels call nothing else."""
    found = {}
    if why_unavailable() is None:
        for op in OPS:
            module = importlib.import_module(f"ast_fast.cpp.{op}")
            for name in ("forward", "backward"):
                if hasattr(module, name):
                    guarded = Guarded(getattr(module, name), ("dq", "dk", "dv"))
                    monkeypatch.setattr(module, name, guarded)
                    found[op, name] = guarded
    return found
