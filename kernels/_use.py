"""Which implementation runs each direction of an op, as a measurement decided: the key `use` of a family.

    "families": {"hopper": {..., "use": {OP: {DIRECTION: CHOICE}}}}

OP is an op that the table serves (attention.json serves four). DIRECTION is "forward", "backward" or
"backward_any_order" (callers with deterministic=False). CHOICE is a name out of `NAMES[OP]`; for the ops
of `ATTENTION` it may also be a tree, any level of which may be a name for everything below it:

    {ARITHMETIC: {WIDTH: {GRID: NAME}}}    e.g. {"16bit": {"64": {"full": "sdpa-cudnn", "small": "triton"}}}

ARITHMETIC is "16bit", "tf32" or "f32", WIDTH the head width as text, GRID "full" where tiles of 128 queries
fill the GPU's multiprocessors and "small" where they do not. What is not said is "triton". gemm.json has a
boolean "use" beside each configuration instead, with its own meaning (gemm.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from . import _tuned

DEFAULT = "triton"
DIRECTIONS = ("forward", "backward", "backward_any_order")
ARITHMETIC = ("16bit", "tf32", "f32")
GRIDS = ("full", "small")
GRID_ROWS = 128  # queries of the tiles that "full" counts

# The table that serves each op.
TABLES = {
    "attention": "attention",
    "attention_biased": "attention",
    "attention_varlen": "attention",
    "attention_masked": "attention_masked",
    "layer_norm": "layer_norm",
    "add_layer_norm": "add_layer_norm",
    "mlp": "mlp",
    "patch_embed": "patch_embed",
    "log_mel": "log_mel",
    "linear_fp8": "fp8",
    "mlp_fp8": "fp8",
}

# What may be named: ours, PyTorch's fused attentions, PyTorch's own op, or the plain reference where that is
# what PyTorch would run. The reference of attention stores the scores, so no table may name it.
NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("triton", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"),
    "attention_biased": ("triton", "sdpa-efficient"),
    "attention_varlen": ("triton", "sdpa-flash", "sdpa-efficient"),
    "attention_masked": ("triton", "sdpa-efficient"),
    "layer_norm": ("triton", "torch"),
    "add_layer_norm": ("triton", "torch"),
    "mlp": ("triton", "torch"),
    "patch_embed": ("triton", "reference"),
    "log_mel": ("triton", "reference"),
    "linear_fp8": ("triton", "reference"),
    "mlp_fp8": ("triton", "reference"),
}
ATTENTION = ("attention", "attention_biased", "attention_varlen", "attention_masked")
_LEVELS: tuple[tuple[str, ...] | None, ...] = (ARITHMETIC, None, GRIDS)  # None: a head width

# Set by `force`; a plain dict, because a backward runs on another thread than its forward.
_forced: dict[tuple[str, str], str] = {}


def grid(rows: int, pairs: int, sms: int) -> str:
    """Size of a grid over `rows` queries of `pairs` pairs of head and clip, a name of `GRIDS`.

    A packed batch counts all its rows, and its heads as pairs.
    """
    return "full" if -(-rows // GRID_ROWS) * pairs >= sms else "small"


def implementation(
    op: str,
    direction: str,
    device: torch.device,
    arithmetic: str = "",
    width: int = 0,
    rows: int = 0,
    pairs: int = 0,
) -> str:
    """The name that the table of the GPU's family gives; the last four are for the ops of `ATTENTION`."""
    forced = _forced.get((op, direction))
    if forced is not None:
        return forced
    capability = _tuned.capability(device)
    choice = _choice(op, direction, capability)
    if isinstance(choice, str):
        return choice
    return look_up(choice, arithmetic, width, grid(rows, pairs, _tuned.sm_count(device)))


def says_nothing(op: str, direction: str, device: torch.device) -> bool:
    """Whether the table leaves this direction to Triton whatever the call."""
    if (op, direction) in _forced:
        return False
    return _choice(op, direction, _tuned.capability(device)) == DEFAULT


@functools.cache
def _choice(op: str, direction: str, capability: int) -> Any:
    table = TABLES[op]
    # a GPU older than the table has no family, and nothing measured
    if _tuned.family(table, capability) is None:
        return DEFAULT
    uses = _tuned.configs(table, capability).get("use", {})
    return uses.get(op, {}).get(direction, DEFAULT)


def look_up(choice: str | Mapping[str, Any], arithmetic: str, width: int, size: str) -> str:
    """The name in a choice for one arithmetic, head width and size of grid."""
    for key in (arithmetic, str(width), size):
        if isinstance(choice, str):
            return choice
        choice = choice.get(key, DEFAULT)
    if not isinstance(choice, str):
        raise ValueError(f"use: {choice!r} lies below the size of the grid; expected a name")
    return choice


def summary(op: str, device: torch.device) -> str:
    """What the table of this GPU names instead of Triton, by direction, in one line; often nothing."""
    capability = _tuned.capability(device)
    said = {direction: _choice(op, direction, capability) for direction in DIRECTIONS}
    said |= {direction: name for (of, direction), name in _forced.items() if of == op}
    return ", ".join(
        f"{direction} {choice if isinstance(choice, str) else json.dumps(choice)}"
        for direction, choice in said.items()
        if choice != DEFAULT
    )


def forget() -> None:
    """Read the tables' `use` again; for whoever changes them in a running process."""
    _choice.cache_clear()


@contextmanager
def force(choices: Mapping[tuple[str, str], str]) -> Iterator[None]:
    """Take these names for (op, direction) whatever the tables say, in all threads: for measurements.

    A name that cannot run a call falls back as a measured one does: see `ops/_common.py`.
    """
    for (op, direction), name in choices.items():
        _require_name(op, direction, name)
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def set_use(
    table: dict[str, Any],
    family: str,
    op: str,
    direction: str,
    name: str,
    arithmetic: str | None = None,
    width: int | None = None,
    size: str | None = None,
) -> None:
    """Write a choice into a table in memory; finer ones below a coarser one keep what it said.

    Args:
        table: the whole table, as `json.load` gives it; the caller writes the file and its "origin".
        family: a name under "families".
        op: an op that the table serves.
        direction: one of `DIRECTIONS`.
        name: one of `NAMES[op]`.
        arithmetic: one of `ARITHMETIC`, or None for all; for the ops of `ATTENTION` alone, as the rest.
        width: head width, or None for all; needs `arithmetic`.
        size: one of `GRIDS`, or None for both; needs `width`.

    Raises:
        ValueError: a name is unknown, or a finer key stands below one that is missing.
    """
    _require_name(op, direction, name)
    if family not in table["families"]:
        known = ", ".join(table["families"])
        raise ValueError(f"family {family!r} is not in the table: expected one of {known}")
    path = [arithmetic, None if width is None else str(width), size]
    keys = [key for key in path if key is not None]
    if path[: len(keys)] != keys:
        raise ValueError(f"use: arithmetic, width, size are {path}: give the former ones too")
    node = table["families"][family].setdefault("use", {}).setdefault(op, {})
    above: Any = DEFAULT
    for key, below in zip((direction, *keys), (*keys, None), strict=True):
        if below is None:
            node[key] = name
            break
        above = node.get(key, above)
        if isinstance(above, str):  # what held for all of them goes on holding for the others
            level = _LEVELS[keys.index(below)]
            others = ("32", "64", "96", "128") if level is None else level
            node[key] = dict.fromkeys(others, above) if above != DEFAULT else {}
            above = DEFAULT if above == DEFAULT else above
        node = node[key]
    found = problems(table["families"][family]["use"])
    if found:
        raise ValueError("; ".join(found))


def problems(uses: Any) -> list[str]:
    """What is wrong with the `use` of a family, in words; empty when nothing is."""
    if not isinstance(uses, dict):
        return [f"use is {uses!r}: expected {{op: {{direction: choice}}}}"]
    found = []
    for op, directions in uses.items():
        if op not in TABLES:
            found.append(f"use.{op}: no such op; expected one of {', '.join(TABLES)}")
        elif not isinstance(directions, dict):
            found.append(f"use.{op} is {directions!r}: expected {{direction: choice}}")
        else:
            for direction, choice in directions.items():
                if direction not in DIRECTIONS:
                    found.append(f"use.{op}.{direction}: expected one of {', '.join(DIRECTIONS)}")
                else:
                    levels = _LEVELS if op in ATTENTION else ()
                    found += _problems(choice, op, f"use.{op}.{direction}", levels)
    return found


def _problems(
    choice: Any, op: str, where: str, levels: tuple[tuple[str, ...] | None, ...]
) -> list[str]:
    if isinstance(choice, str):
        known = choice in NAMES[op]
        return [] if known else [f"{where} is {choice!r}: expected one of {', '.join(NAMES[op])}"]
    if not isinstance(choice, dict) or not levels:
        return [f"{where} is {choice!r}: expected one of {', '.join(NAMES[op])}"]
    found = []
    for key, below in choice.items():
        if not (key.isdigit() if levels[0] is None else key in levels[0]):
            expected = "a head width" if levels[0] is None else f"one of {', '.join(levels[0])}"
            found.append(f"{where}.{key}: expected {expected}")
        else:
            found += _problems(below, op, f"{where}.{key}", levels[1:])
    return found


def _require_name(op: str, direction: str, name: str) -> None:
    found = problems({op: {direction: name}})
    if found:
        raise ValueError("; ".join(found))
