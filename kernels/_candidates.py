"""Configurations that a tuning run is to try, best guess first; no launch reads them.

    tuned/candidates.json   families -> capability -> op -> [{"path": [...], "entry": {...}, "reason": "..."}]

A path is the keys of tuned/<op>.json from the family down to what the entry stands for: a list that a
launch chooses from (attention: `dkv/16bit/64`), one place of a list (layer_norm: `backward/2`), or a
configuration (gemm: `gelu`). The compile gate takes every candidate by `aot_cases`; one that does not
compile without spills under both Tritons is taken out of the file, or names the one under which it does
("triton": "3.6") and is not there for another.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton

from . import _tuned, attention_problem
from ._aot import AotCase

# the file that lists the compile cases of an op, where it is not the op's own
_CASES = {"attention": "attention_aot", "fp8": "fp8_aot"}


class Candidate(NamedTuple):
    """One configuration to try."""

    path: tuple[str, ...]
    entry: dict[str, Any]
    reason: str
    triton: str = ""  # the only version it is for; empty for all

    @property
    def label(self) -> str:
        """Path and figures in one word: dkv/16bit/64:block_m=64,block_n=64."""
        figures = ",".join(f"{key}={value}" for key, value in self.entry.items())
        return f"{'/'.join(self.path)}:{figures}"


@functools.cache
def _families() -> dict[str, dict[str, list[dict[str, Any]]]]:
    path = Path(__file__).parent / "tuned" / "candidates.json"
    return json.loads(path.read_text(encoding="utf-8"))["families"]


def ops(capability: int) -> list[str]:
    """Ops with candidates for a GPU of `capability` (90 for 9.0), in the order of the file."""
    return list(_families().get(str(capability), {}))


def candidates(op: str, capability: int) -> list[Candidate]:
    """What is worth timing for `op` on a GPU of exactly `capability`, best guess first."""
    return [each for each in _listed(op, capability) if triton.__version__.startswith(each.triton)]


def _listed(op: str, capability: int) -> list[Candidate]:
    found = _families().get(str(capability), {}).get(op, [])
    return [Candidate(**{**each, "path": tuple(each["path"])}) for each in found]


def with_entry(
    family: dict[str, Any], path: tuple[str, ...], entry: dict[str, Any]
) -> dict[str, Any]:
    """A copy of a family's table with `entry` alone where `path` leads."""
    changed = copy.deepcopy(family)
    *above, last = path
    node: Any = changed
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node[key]
    place = int(last) if isinstance(node, list) else last
    # where a launch chooses from a list it is to find this entry and no other
    node[place] = [dict(entry)] if isinstance(node[place], list) else dict(entry)
    return changed


@contextmanager
def in_place(
    op: str, capability: int, path: tuple[str, ...], entry: dict[str, Any]
) -> Iterator[None]:
    """`entry` in force for every launch and every list of cases of `op` on GPUs of `capability`."""
    original = _tuned.configs
    changed = with_entry(original(op, capability), path, entry)

    def configs(wanted: str, arch: int) -> dict[str, Any]:
        return changed if (wanted, arch) == (op, capability) else original(wanted, arch)

    _tuned.configs = configs
    attention_problem.table_configs.cache_clear()
    try:
        yield
    finally:
        _tuned.configs = original
        attention_problem.table_configs.cache_clear()


def aot_cases(arch: int) -> list[AotCase]:
    """What the candidates for `arch` ask for beyond the tables; twins in float16."""
    found = []
    for op in ops(arch):
        module = importlib.import_module(f"ast_fast.kernels.{_CASES.get(op, op)}")
        seen = {_key(case) for case in module.aot_cases(arch)}
        for candidate in _listed(op, arch):
            with in_place(op, arch, candidate.path, candidate.entry):
                cases = module.aot_cases(arch)
            for case in cases:
                if _key(case) not in seen:
                    seen.add(_key(case))
                    name = f"{op}-{case.name}-{candidate.label}"
                    twin = case.twin or "fp16" in case.name
                    found.append(case._replace(name=name, twin=twin, triton=candidate.triton))
    return found


def _key(case: AotCase) -> tuple[Any, ...]:
    """What decides what is compiled."""
    types, constants = sorted(case.signature.items()), sorted(case.constexprs.items())
    options = (case.num_warps, case.num_stages, case.maxnreg)
    return (id(case.fn), tuple(types), str(constants), case.divisible, options)
