"""Compiles what a piece of code would launch, under the keys that its launches will look for, and launches nothing.

Triton's cache on disk is keyed by what a launch sees: types, alignment and divisibility of every argument. A
description of a kernel made by hand (`ast_fast.kernels._aot`) compiles the same code under another key,
so it proves a kernel but spares a launch nothing. Here the launchers themselves run, on real tensors, and
their kernels come back compiled; outputs hold whatever memory held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Every launch in here compiles its kernel, keeps it in the list, and does not run it."""
    from triton.runtime.jit import JITFunction

    original, found = JITFunction.run, []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *arguments, grid=grid, warmup=True, **options)
        found.append(kernel)
        return kernel

    JITFunction.run = run  # on the class: a backward launches from a thread of its own
    try:
        yield found
    finally:
        JITFunction.run = original


def problems(kernels: list[Any], capability: int) -> list[str]:
    """Why kernels must not be used on a GPU of this capability (90 for 9.0): they spill or do not fit."""
    from ast_fast.kernels import _aot

    known = [arch for arch in _aot.SHARED_LIMIT_BYTES if arch <= capability]
    limit = _aot.SHARED_LIMIT_BYTES[max(known)]
    found = []
    for kernel in {id(kernel): kernel for kernel in kernels}.values():
        name = kernel.metadata.name
        _, stack = _aot._resource_usage(kernel.asm["cubin"])
        if stack:
            found.append(f"{name}: stack is {stack} bytes: registers spill")
        if kernel.metadata.shared > limit:
            shared = f"{name}: shared memory is {kernel.metadata.shared} bytes"
            found.append(f"{shared}, sm_{capability} has {limit}")
    return found
