"""The assembler of an installed CUDA toolkit, beside the one that Triton brings.

A GPU machine may be told to use its own ptxas (TRITON_PTXAS_PATH), and ptxas versions differ in what they make
of the same PTX, in registers and, on Hopper, in results. So where AST_FAST_PTXAS names one, the gate
assembles the PTX of every case for sm_90 with that one as well, and holds it to the same limits.
The PTX is the one that Triton has in its cache: Triton would change no more than its version line.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia.compiler import CUDABackend

# The one architecture that is assembled twice: the others would double a run that finds the same.
ARCHITECTURE = 90


class Usage(NamedTuple):
    """What one kernel takes a thread."""

    registers: int
    stack: int  # bytes


def path() -> str | None:
    """The assembler that AST_FAST_PTXAS names; None when it is not set."""
    return os.environ.get("AST_FAST_PTXAS") or None


@functools.cache
def version(ptxas: str) -> str:
    """Its version, 13.0.88.

    Raises:
        ValueError: `ptxas` does not answer as NVIDIA's assembler does.
    """
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"AST_FAST_PTXAS is {ptxas!r}, expected the path of NVIDIA's ptxas: {error}; "
            "unset it, or point it at one, for example /usr/local/cuda/bin/ptxas"
        ) from error
    found = re.search(r"release [\d.]+, V([\d.]+)", said.stdout)
    if found is None:
        raise ValueError(
            f"AST_FAST_PTXAS is {ptxas!r}, which says no version of ptxas: {said.stdout!r}"
        )
    return found.group(1)


def assemble(ptx: str, arch: int, ptxas: str) -> Usage:
    """Registers and stack of the one kernel in `ptx`, with the options that Triton gives.

    Raises:
        RuntimeError: it does not assemble; the message is the assembler's.
    """
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [ptxas, "-lineinfo", "-v", *_options(), f"--gpu-name={target}", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas {version(ptxas)}: {done.stderr.strip()[-1000:]}")
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    stack = re.findall(r"(\d+) bytes stack frame", done.stderr)
    if len(registers) != 1 or len(stack) != 1:
        raise RuntimeError(f"ptxas described {len(registers)} kernels, expected 1: {done.stderr}")
    return Usage(int(registers[0]), int(stack[0]))


@functools.cache
def _options() -> tuple[str, ...]:
    """What the installed Triton adds of its own."""
    text = inspect.getsource(CUDABackend.make_cubin)
    return tuple(re.findall(r"'(--regAllocOptLevel=\d)'", text))
