"""Every committed kernel configuration as a case of its own: run it, check it, time it.

A variant replaces, in the table of one op, the list that a configuration sits in by that
configuration alone, and runs the op on inputs that select it. Nothing here searches: candidates are
what kernels/tuned/*.json holds; the timings say which of a list's entries is fastest on this GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from . import harness, tune_place
from .case import Case, Settings, candidate
from .record import Row
from .timing import Limits

OPS = (
    "attention",
    "attention_masked",
    "layer_norm",
    "add_layer_norm",
    "mlp",
    "patch_embed",
    "log_mel",
)
# widths of the model stand for their class; the widest row for the classes above
_WIDTHS = {256: 192, 512: 384, 1024: 768}
_DTYPES = {"16bit": ("bf16", "f16"), "f16": ("bf16", "f16"), "tf32": ("f32",), "f32": ("f32",)}
_DTYPES["ieee"] = ("f32",)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration, how to put it in place, and what selects it."""

    op: str
    path: tuple[str, ...]  # keys from the family down; the last is the place in a list, if any
    entry: dict[str, Any]
    dtype: str
    tf32: bool

    @property
    def label(self) -> str:
        """Op, path, dtype and figures in one line."""
        figures = " ".join(f"{key}={value}" for key, value in self.entry.items())
        return f"{self.op} {'/'.join(self.path)} {self.dtype} ({figures})"

    @property
    def rivals(self) -> str:
        """What the entries of one list have in common: only they compete."""
        return f"{self.op} {'/'.join(self.path[:-1])} {self.dtype}"


def labels(capability: int) -> list[str]:
    """Labels of all variants for a GPU of this capability; one line with the reason if unreadable."""
    return [variant.label for variant in variants(capability)]


@functools.cache
def variants(capability: int) -> tuple[Variant, ...]:
    """All variants for a GPU of this capability (90 for 9.0), attention's first."""
    from ast_fast.kernels import _tuned

    found: list[Variant] = []
    for op in OPS:
        if _tuned.family(op, capability) is not None:
            found += _walk(op, _tuned.configs(op, capability), (), capability)
    return tuple(found)


def _walk(op: str, node: Any, path: tuple[str, ...], capability: int) -> Iterator[Variant]:
    """Every configuration under a node of the table: a dict of plain values is one."""
    if isinstance(node, list):
        for place, item in enumerate(node):
            yield from _walk(op, item, (*path, str(place)), capability)
    elif not isinstance(node, dict):
        return  # a number for the whole family
    elif all(not isinstance(value, dict | list) for value in node.values()):
        kind = next((key for key in path if key in _DTYPES), "")
        for dtype in _DTYPES.get(kind, ("bf16", "f32")):
            if op == "log_mel" and dtype != "f32":
                continue
            if dtype == "bf16" and capability < 80:
                continue
            yield Variant(op, path, node, dtype, kind == "tf32")
    else:
        for key, item in node.items():
            if key == "use" and not path:
                continue  # which implementation runs, no configuration
            yield from _walk(op, item, (*path, key), capability)


def _family_with(variant: Variant, family: dict[str, Any]) -> dict[str, Any]:
    """The family's table with the variant's list cut to its entry, where a list is a choice."""
    changed = copy.deepcopy(family)
    *above, last = variant.path
    node: Any = changed
    for key in above[:-1]:
        node = node[key]
    # attention picks from its lists by grid size, layout or mask; elsewhere the width picks
    if variant.op.startswith("attention") and last.isdigit():
        node[above[-1]] = [variant.entry]
    return changed


@contextlib.contextmanager
def in_place(variant: Variant) -> Iterator[None]:
    """The variant's configuration in force for every launch."""
    from ast_fast.kernels import _tuned

    original = _tuned.configs

    def configs(op: str, capability: int) -> dict[str, Any]:
        family = original(op, capability)
        return _family_with(variant, family) if op == variant.op else family

    _tuned.configs = configs
    tune_place.forget()
    try:
        yield
    finally:
        _tuned.configs = original
        tune_place.forget()


def case_for(variant: Variant, settings: Settings) -> Case:
    """A case whose inputs make the launcher take this configuration."""
    from .suites import attention, attention_masks, block, frontend, patch_embed

    settings = dataclasses.replace(settings, peers=("none",))
    backward = variant.path[0] not in ("forward", "gelu_forward")
    mode = "backward" if backward else "forward"
    b, t = (1, 20) if settings.tiny else (8, 1214)
    if variant.op == "attention":
        width = int(variant.path[2])
        heads = 2 if settings.tiny else 768 // width
        case = attention.dense_case(settings, variant.dtype, b, t, heads, width, mode)
        return _in_any_order(case, settings) if variant.path[0] == "one_pass" else case
    if variant.op == "attention_masked":
        width = int(variant.path[2])
        sizes = (1, 3, 5, 2, width) if settings.tiny else (b, 12, 101, 768 // width, width)
        return attention_masks.factorised_case(settings, variant.dtype, mode, sizes)
    if variant.op in ("layer_norm", "add_layer_norm"):
        limit = int(variant.entry["max_width"])
        width = 48 if settings.tiny else _WIDTHS.get(limit, limit)
        return block.op_case(settings, variant.op, variant.dtype, (b, t, width), mode)
    if variant.op == "mlp":
        width = 48 if settings.tiny else 768
        return block.op_case(settings, "mlp", variant.dtype, (b, t, width), mode)
    if variant.op == "patch_embed":
        sizes = (1, 36, 32) if settings.tiny else (b, 1024, 768)
        with_dx = variant.path[0] in ("columns", "input_gradient")
        return patch_embed.patch_case(settings, variant.dtype, *sizes, mode, with_dx)
    bins = int(variant.entry.get("max_mel_bins", 128))
    return frontend.mel_case(settings, b, 0.2 if settings.tiny else 10.0, bins, mode)


def _in_any_order(case: Case, settings: Settings) -> Case:
    """The case with our attention free to add gradients up in any order: only so is one pass taken."""
    from .suites import attention

    candidates = tuple(
        candidate(settings.ours, attention.one_pass, case.mode, attention.WRT, ("do",))
        if given.name == settings.ours
        else given
        for given in case.candidates
    )
    return dataclasses.replace(case, candidates=candidates)


def run(
    variant: Variant, settings: Settings, limits: Limits, ceilings: dict[str, float]
) -> list[Row]:
    """Check and time one configuration; its row carries the label as its case."""
    from ast_fast.equivalence import run_ops

    scope = in_place(variant) if settings.cuda else contextlib.nullcontext()
    with scope, run_ops.tf32(variant.tf32):
        case = case_for(variant, settings)
        if variant.tf32:
            case = dataclasses.replace(case, tf32=True)
        rows = harness.measure(case, settings, ceilings, limits, say=lambda _: None)
    for row in rows:
        row.suite, row.case = "tuned", variant.label
        if variant.tf32:
            row.dtype = "tf32"
    return [row for row in rows if row.provider == settings.ours and row.clock != "graph"]


def fastest(rows: list[dict[str, Any]]) -> list[str]:
    """For every list of rival configurations, the one that was fastest, as lines of text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["ms"]:
            head = row["case"].split(" (")[0]
            op, path, dtype = head.split(" ")
            parent, _, place = path.rpartition("/")
            if place.isdigit():
                groups.setdefault(f"{op} {parent} {dtype}", []).append(row)
    lines = []
    for name, rivals in sorted(groups.items()):
        ordered = sorted(rivals, key=lambda row: row["ms"]["p50"])
        if len(ordered) > 1:
            figures = ordered[0]["case"].split(" (")[1].rstrip(")")
            gain = ordered[-1]["ms"]["p50"] / ordered[0]["ms"]["p50"]
            lines.append(
                f"{name}: {figures} at {ordered[0]['ms']['p50']:.4g} ms, {gain:.2f}x the slowest"
            )
    return lines
