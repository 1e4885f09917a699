"""One name in Triton's disk cache for a kernel, whatever its process compiled before.

Triton names a cache entry by a hash over the kernel and over the functions and constants that it uses. Up
to 3.6 a kernel takes over the constants of a function it calls only if that function's own hash was
computed earlier: the name then depends on the order of launches, and a process does not find what
another one compiled. So every file of kernels has its functions hashed at import, callees first.
"""

from __future__ import annotations

import ast
from typing import Any

from triton.runtime.jit import JITFunction

_settled: set[int] = set()


def settle(namespace: dict[str, Any]) -> None:
    """Hash the kernels of a file, given its globals(); interpreted functions have no hash."""
    for value in list(namespace.values()):
        if isinstance(value, JITFunction):
            _settle(value)


def _settle(fn: Any) -> None:
    # a JITFunction in a set would be hashed by its place in it
    if id(fn) in _settled:
        return
    _settled.add(id(fn))
    for name in {node.id for node in ast.walk(fn.parse()) if isinstance(node, ast.Name)}:
        callee = fn.__globals__.get(name)
        if isinstance(callee, JITFunction):
            _settle(callee)
    # one that was computed too early is computed again
    fn.hash = None
    _ = fn.cache_key
