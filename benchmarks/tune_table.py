"""The committed tables with what was measured in them: a family of the GPU's own, its entries, its `use`.

A family that several architectures share is copied for the one that was measured, and the others keep what
they had: they were not measured. Nothing is written but what a measurement changed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .tune_pick import Change, Use

TABLES = Path(__file__).resolve().parent.parent / "kernels" / "tuned"
_TIMED = "Families under `measured` were timed as it says. The others: "


def path_of(op: str) -> Path:
    """The file of an op's table."""
    return TABLES / f"{op}.json"


def read(op: str) -> dict[str, Any]:
    """An op's table."""
    content: dict[str, Any] = json.loads(path_of(op).read_text(encoding="utf-8"))
    return content


def with_changes(
    table: Mapping[str, Any],
    capability: int,
    changes: Iterable[Change],
    uses: Iterable[Use],
    origin: str,
) -> dict[str, Any]:
    """The table with what was measured for one architecture, in a family of its own if it shared one.

    Args:
        table: content of a file of kernels/tuned.
        capability: of the GPU that was measured (90 for 9.0).
        changes: of configurations.
        uses: which implementation is to run.
        origin: what measured them: device, date, result file.

    Raises:
        ValueError: the GPU is older than every family.
    """
    changed, name = own_family(table, capability)
    family = changed["families"][name]
    for change in changes:
        *above, last = change.place.path
        node: Any = family
        for key in above:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if change.entries is None:
            del node[last]
        elif change.place.is_list:
            node[last] = [dict(entry) for entry in change.entries]
        else:
            (entry,) = change.entries
            node[int(last) if isinstance(node, list) else last] = dict(entry)
    for use in uses:
        _set_use(changed, name, use)
    said = changed.setdefault("measured", {}).get(name, "")
    if origin not in said:
        changed["measured"][name] = f"{said}; {origin}" if said else origin
    if not changed["origin"].startswith(_TIMED):
        changed["origin"] = _TIMED + changed["origin"]
    return changed


def _set_use(table: dict[str, Any], family: str, use: Use) -> None:
    from ast_fast.kernels import _use

    op, direction = use.key[:2]
    if op == "gemm":
        table["families"][family][use.key[2]]["use"] = use.name == "triton"
        return
    if op == "attention":
        arithmetic, width = use.key[2], int(use.key[3])
        _use.set_use(table, family, op, direction, use.name, arithmetic, width, use.size)
        return
    _use.set_use(table, family, op, direction, use.name)


def current_use(table: Mapping[str, Any], capability: int, use: Use) -> str:
    """What the table says now."""
    from ast_fast.kernels import _use

    family = table["families"][family_of(table, capability)]
    op, direction = use.key[:2]
    if op == "gemm":
        return "triton" if family[use.key[2]]["use"] else "cublas"
    choice = family.get("use", {}).get(op, {}).get(direction, _use.DEFAULT)
    keys = (*use.key[2:], use.size or "")
    return (
        choice if isinstance(choice, str) else _use.look_up(choice, keys[0], int(keys[1]), keys[2])
    )


def family_of(table: Mapping[str, Any], capability: int) -> str:
    """Name of the family that a GPU takes, as `_tuned.family` finds it.

    Raises:
        ValueError: the GPU is older than every family.
    """
    architectures = table["architectures"]
    known = [int(arch) for arch in architectures if int(arch) <= capability]
    if not known:
        raise ValueError(f"compute capability {capability / 10:.1f} is older than every family")
    found: str = architectures[str(max(known))]
    return found


def own_family(table: Mapping[str, Any], capability: int) -> tuple[dict[str, Any], str]:
    """A copy of the table in which no other architecture takes the family of this one; its name."""
    from ast_fast.kernels._aot import ARCHITECTURES

    changed = copy.deepcopy(dict(table))
    architectures, families = changed["architectures"], changed["families"]
    name = family_of(table, capability)
    oldest = min(map(int, architectures))
    others = {*map(int, architectures), *(arch for arch in ARCHITECTURES if arch >= oldest)}
    others = {arch for arch in others - {capability} if family_of(table, arch) == name}
    if others:
        own = f"sm_{capability}"
        theirs = name
        if own == name:
            theirs = f"{name}_untimed"
            families[theirs] = copy.deepcopy(families[name])
        else:
            families[own] = copy.deepcopy(families[name])
        # listed by name, or they would take the new family as the newest that is not newer
        architectures |= {str(arch): theirs for arch in others}
        name = own
    architectures[str(capability)] = name
    changed["architectures"] = dict(sorted(architectures.items(), key=lambda item: int(item[0])))
    if others:
        _unlist(changed["architectures"], table)
    return changed, name


def _unlist(architectures: dict[str, str], before: Mapping[str, Any]) -> None:
    """Take out again what need not be listed: an architecture that would take the same family unlisted."""
    for arch in list(architectures):
        if arch in before["architectures"]:
            continue
        older = [int(each) for each in architectures if int(each) < int(arch)]
        if older and architectures[str(max(older))] == architectures[arch]:
            del architectures[arch]


def text(table: Mapping[str, Any], like: str) -> str:
    """The table as JSON, a configuration a line, laid out as the text it replaces."""
    before = json.loads(like)
    for indent in (1, 2):
        if _laid_out(before, indent) == like:
            return _laid_out(table, indent)
    return _laid_out(table, 2)


def _laid_out(node: Any, indent: int, depth: int = 0) -> str:
    """With two spaces every mapping of plain values is a line; with one, only configurations are."""

    def plain(values: Sequence[Any]) -> bool:
        return not any(isinstance(value, dict | list) for value in values)

    if isinstance(node, dict) and plain(list(node.values())) and (indent == 2 or depth > 2):
        return json.dumps(node)
    if not isinstance(node, dict | list) or not node:
        return json.dumps(node)
    space, end = "\n" + " " * indent * (depth + 1), "\n" + " " * indent * depth
    if isinstance(node, dict):
        items = [f"{json.dumps(k)}: {_laid_out(v, indent, depth + 1)}" for k, v in node.items()]
        return "{" + space + ("," + space).join(items) + end + "}" + ("" if depth else "\n")
    return (
        "[" + space + ("," + space).join(_laid_out(v, indent, depth + 1) for v in node) + end + "]"
    )


def named(
    op: str, changes: Sequence[Change], uses: Sequence[Use]
) -> tuple[list[Change], list[Use]]:
    """Those of one op."""
    return (
        [change for change in changes if change.place.op == op],
        [use for use in uses if use.key[0] == op],
    )
