"""Loader of the committed tables of kernel configurations, `tuned/<op>.json`.

A table has one entry a family of GPUs, and says where its numbers come from ("origin"). The family
is chosen by compute capability alone:

1. a GPU listed under "architectures" takes the family named there;
2. any other takes the family of the newest listed architecture that is not newer than the GPU
   (8.7 takes that of 8.6, 10.3 that of 10.0, 12.1 that of 12.0);
3. a GPU older than every listed architecture is not supported.

Nothing is tuned at run time, so the same machine always runs the same code.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import triton

# Read when a kernel is decorated, so it holds for the whole process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# The interpreter has no device: it runs what this architecture would run.
_INTERPRETED_CAPABILITY = 80
_INTERPRETED_SM_COUNT = 4


@functools.cache
def table(op: str) -> dict[str, Any]:
    """The whole committed table of `op`."""
    path = Path(__file__).parent / "tuned" / f"{op}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def family(op: str, capability: int) -> str | None:
    """Name of the table entry for a GPU of `capability` (90 for 9.0); None when it is too old."""
    known = {int(arch): name for arch, name in table(op)["architectures"].items()}
    older = [arch for arch in known if arch <= capability]
    return known[max(older)] if older else None


@functools.cache
def configs(op: str, capability: int) -> dict[str, Any]:
    """The configurations of `op` for a GPU of `capability`, as the table spells them."""
    name = family(op, capability)
    if name is None:
        raise ValueError(
            f"{op}: no Triton configuration for compute capability {capability / 10:.1f}; "
            f"the oldest supported is {min(map(int, table(op)['architectures'])) / 10:.1f}; "
            "use another backend"
        )
    return table(op)["families"][name]


def capability(device: torch.device) -> int:
    """Compute capability of `device` as major * 10 + minor."""
    if INTERPRETED:
        return _INTERPRETED_CAPABILITY
    return _device_facts(_index(device))[0]


def sm_count(device: torch.device) -> int:
    """Number of streaming multiprocessors of `device`."""
    if INTERPRETED:
        return _INTERPRETED_SM_COUNT
    return _device_facts(_index(device))[1]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _device_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
