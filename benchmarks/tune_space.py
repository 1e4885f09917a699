"""Candidates for a kernel's configuration, the pick among the measured, and the table with the pick in it.

Plain values only: nothing here needs a GPU, so all of it is tested without one.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Entry = dict[str, Any]

# an entry for small grids must beat the one for large grids by this factor to earn its place
_WORTH = 1.03


class Place(NamedTuple):
    """Where in the table of one GPU family a list of configurations is."""

    kernel: str  # forward | dq | dkv | one_pass
    arithmetic: str  # 16bit | tf32 | f32
    width: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.arithmetic} d{self.width}"


class Timing(NamedTuple):
    """One configuration's times over the committed one's, on a grid that fills the GPU and on one clip."""

    entry: Entry
    large: float
    small: float


def candidates(place: Place, capability: int) -> list[Entry]:
    """What is worth compiling for one kernel on a GPU of this capability (90 for 9.0).

    Tiles below 64 queries or 32 keys leave tensor cores idle; above 128 x 128 every head width spills.
    """
    if place.arithmetic == "f32":
        # without tensor cores every thread holds whole rows: small tiles, and scores by chunks of columns
        figures = itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (1, 2), (0, 16, 32))
        names = ("block_m", "block_n", "num_warps", "num_stages", "chunk")
        return [
            {
                name: value
                for name, value in zip(names, row, strict=True)
                if value or name != "chunk"
            }
            for row in figures
            if row[4] <= place.width
        ]
    descriptors = (True, False) if capability >= 90 and place.arithmetic == "16bit" else (False,)
    stages = (1, 2, 3, 4) if capability >= 80 else (1, 2)
    # one pass holds dk, dv and a share of dq at once: its tiles of queries are smaller
    rows = (16, 32, 64) if place.kernel == "one_pass" else (64, 128)
    tiles = itertools.product(rows, (32, 64, 128), (4, 8), stages, descriptors)
    found = []
    for block_m, block_n, num_warps, num_stages, tma in tiles:
        if block_m * block_n * place.width > 128 * 128 * 128:
            continue
        if num_warps == 8 and block_m * block_n < 32 * 64:
            continue
        entry: Entry = {"block_m": block_m, "block_n": block_n}
        entry |= {"num_warps": num_warps, "num_stages": num_stages}
        if tma:
            entry["tma"] = True
        if place.kernel == "one_pass" and capability >= 90:
            entry["reduce"] = True
        found.append(entry)
    return found


def pick(timings: Iterable[Timing], owned: str) -> list[Entry]:
    """The list for the table: by descriptor first, then by pointer, each for large grids and for small.

    Args:
        timings: of everything that compiled and was right; the committed entries among them.
        owned: name of the tile side that the grid is over, `block_m` or `block_n`.

    Raises:
        ValueError: no configuration without descriptors is among them; operands that no tensor map can
            describe need one.
    """
    chosen: list[Entry] = []
    measured = list(timings)
    for tma in (True, False):
        rivals = [each for each in measured if bool(each.entry.get("tma")) == tma]
        if not rivals:
            continue
        best = min(rivals, key=lambda each: each.large)
        chosen.append(best.entry)
        # the launcher takes the first whose grid fills the GPU: what follows must have a smaller tile
        smaller = [each for each in rivals if each.entry[owned] < best.entry[owned]]
        if smaller:
            quick = min(smaller, key=lambda each: each.small)
            if quick.small * _WORTH < best.small:
                chosen.append(quick.entry)
    if all(entry.get("tma") for entry in chosen):
        raise ValueError("no configuration that works without descriptors was measured")
    return chosen


def with_picks(
    table: Mapping[str, Any], capability: int, picks: Mapping[Place, list[Entry]], origin: str
) -> dict[str, Any]:
    """The table with the picks for one architecture, in a family of its own if it shared one.

    Args:
        table: content of kernels/tuned/attention.json.
        capability: of the GPU that was measured.
        picks: lists by place.
        origin: what measured them: device, result file, date.
    """
    changed = copy.deepcopy(dict(table))
    architectures, families = changed["architectures"], changed["families"]
    name = architectures.get(str(capability)) or _older(architectures, capability)
    others = [arch for arch, family in architectures.items() if family == name]
    if others != [str(capability)]:
        own = f"sm_{capability}"
        # its members keep what they had: they were not measured
        if own == name:
            moved = f"{name}_untimed"
            families[moved] = copy.deepcopy(families[name])
            architectures |= {arch: moved for arch in others if arch != str(capability)}
        else:
            families[own] = copy.deepcopy(families[name])
        architectures[str(capability)] = name = own
    for place, entries in picks.items():
        node = families[name].setdefault(place.kernel, {}).setdefault(place.arithmetic, {})
        node[str(place.width)] = entries
    changed["architectures"] = dict(sorted(architectures.items(), key=lambda item: int(item[0])))
    changed.setdefault("measured", {})[name] = origin
    return changed


def _older(architectures: Mapping[str, str], capability: int) -> str:
    known = [int(arch) for arch in architectures if int(arch) <= capability]
    if not known:
        raise ValueError(f"compute capability {capability / 10:.1f} is older than every family")
    return architectures[str(max(known))]


def table_text(table: Mapping[str, Any]) -> str:
    """The table as JSON, a configuration a line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s+(\"block_m\"[^{}]*?)\s+\}", _on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match.group(1)) + "}"
