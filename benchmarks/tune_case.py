"""What a slot is measured on: the suites' cases at a batch that fills the GPU and at one clip, ours in several forms.

Ours stands first in every case, in the committed configuration; then the same run in other configurations
(only the table differs, so inputs and graphs are shared), then what a library offers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from . import tune_place
from .case import Candidate, Case, Inputs, Run, Settings, candidate
from .tune_slots import LIBRARIES, PRODUCTS, ROW_WIDTHS, Entry, Slot, clips, committed

TWO_PASSES = "two passes"
TOKENS = 1214


def variants(place: Slot) -> tuple[str, ...]:
    """Names of the cases that a slot is measured on, if there are several."""
    return PRODUCTS[place.path[0]] if place.op == "gemm" else ("",)


def label(entry: Entry) -> str:
    """An entry in one line, as rows name it."""
    return " ".join(f"{key}={value}" for key, value in entry.items() if key != "use")


def case_for(
    place: Slot, capability: int, settings: Settings, dtype: str, size: str, variant: str = ""
) -> Case:
    """The suite's case that takes this slot.

    Args:
        place: what is measured.
        capability: of the GPU (90 for 9.0).
        settings: tiny shapes for a dry run.
        dtype: of the inputs.
        size: `large` fills the GPU, `small` is one clip.
        variant: one of `variants(place)`.
    """
    tiny = settings.tiny
    b = 1 if tiny else clips(place.op, size)
    mode = "forward" if place.direction == "forward" else "backward"
    build = _BUILDERS[place.op]
    case = build(place, capability, settings, dtype, b, mode, variant)
    if case.bound == "copy" and not tiny:
        # the tensors are larger than the caches already: one set of inputs will do
        case = dataclasses.replace(case, bound="", flops=None, bytes=None)
    return dataclasses.replace(case, suite="tune", graph=False)


def with_rivals(case: Case, place: Slot, settings: Settings, rivals: Sequence[Entry]) -> Case:
    """The case with ours, ours in other configurations, and the libraries."""
    ours, *others = case.candidates
    prepare = _shared(ours.prepare)
    forms = [_form(ours.name, None, prepare, ours.prepare_gate)]
    for entry in rivals:
        placement = tune_place.Placement(place.op, place.path, entry)
        forms.append(_form(label(entry), placement, prepare, ours.prepare_gate))
    wanted = (*LIBRARIES[place.op], TWO_PASSES)
    kept = [
        dataclasses.replace(
            each, timed=each.timed and each.name in wanted, prepare=_placed(each.prepare, None)
        )
        for each in others
        if each.name in wanted or each.yardstick
    ]
    return dataclasses.replace(case, candidates=(*forms, *kept))


def _form(
    name: str,
    placement: tune_place.Placement | None,
    prepare: Callable[[list[Inputs]], Run],
    gate: Callable[[Inputs], Run] | None,
) -> Candidate:
    """Ours under one configuration; what it is checked by stands under it too."""
    checked = None
    if gate is not None:

        def checked(inputs: Inputs, gate: Callable[[Inputs], Run] = gate) -> Run:
            return tune_place.Placed(gate(inputs), placement)

    return Candidate(name, _placed(prepare, placement), own=True, prepare_gate=checked)


def _shared(prepare: Callable[[list[Inputs]], Run]) -> Callable[[list[Inputs]], Run]:
    """Prepared once for all configurations: what a forward saved serves every backward."""
    # with the list itself, whose number may be given to another once it is gone
    made: dict[int, tuple[list[Inputs], Run]] = {}

    def once(inputs: list[Inputs]) -> Run:
        if id(inputs) not in made:
            made[id(inputs)] = (inputs, prepare(inputs))
        return made[id(inputs)][1]

    return once


def _placed(
    prepare: Callable[[list[Inputs]], Run], placement: tune_place.Placement | None
) -> Callable[[list[Inputs]], Run]:
    def placed(inputs: list[Inputs]) -> Run:
        tune_place.put(None)
        return tune_place.Placed(prepare(inputs), placement)

    return placed


def _attention(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import attention

    width = int(place.path[2])
    heads, tokens = (2, 20) if settings.tiny else (768 // width, TOKENS)
    case = attention.dense_case(settings, dtype, b, tokens, heads, width, mode)
    if place.path[0] != "one_pass":
        return case
    one = candidate(settings.ours, attention.one_pass, mode, attention.WRT, ("do",))
    ours, *others = case.candidates
    return dataclasses.replace(
        case, candidates=(one, dataclasses.replace(ours, name=TWO_PASSES, own=True), *others)
    )


def _masked(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import attention_masks

    width = int(place.path[2])
    sizes = (1, 3, 5, 2, width) if settings.tiny else (b, 12, 101, 768 // width, width)
    return attention_masks.factorised_case(settings, dtype, mode, sizes)


def _norm(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import block

    limit = committed(place, capability)[0]["max_width"]
    t, width = (7, 48) if settings.tiny else (TOKENS, ROW_WIDTHS[limit])
    return block.op_case(settings, place.op, dtype, (b, t, width), mode)


def _mlp(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import decisions

    # GELU alone: beside two products its share would drown
    return decisions.gelu_case(settings, mode, b, dtype)


def _gemm(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import epilogues

    kind, product = place.path[0], variant.removesuffix(" saved")
    kind += "_saved" if product != variant else ""
    case = epilogues.case(settings, kind, product, b, dtype)
    ours, *others = case.candidates
    return dataclasses.replace(
        case, candidates=(dataclasses.replace(ours, name=settings.ours), *others)
    )


def _log_mel(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import frontend

    return frontend.mel_case(settings, b, 0.2 if settings.tiny else 10.0, 128, mode)


def _patch_embed(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import patch_embed

    sizes = (1, 36, 32) if settings.tiny else (b, 1024, 768)
    with_dx = place.path[0] in ("columns", "input_gradient")
    return patch_embed.patch_case(settings, dtype, *sizes, mode, with_dx)


def _fp8(
    place: Slot, capability: int, settings: Settings, dtype: str, b: int, mode: str, variant: str
) -> Case:
    from .suites import fp8_operands

    rows = 10 if settings.tiny else b * TOKENS
    limit = committed(place, capability)[0].get("max_width", 1024)
    width = 48 if settings.tiny else ROW_WIDTHS[limit]
    return fp8_operands.case(settings, place.path[0], dtype, rows, width)


_BUILDERS: dict[str, Callable[..., Case]] = {
    "attention": _attention,
    "attention_masked": _masked,
    "gemm": _gemm,
    "layer_norm": _norm,
    "add_layer_norm": _norm,
    "mlp": _mlp,
    "log_mel": _log_mel,
    "patch_embed": _patch_embed,
    "fp8": _fp8,
}


def facts(place: Slot, job: dict[str, Any], role: str, entry: Entry | None) -> dict[str, Any]:
    """What a row says about the choice it is evidence for; `tune_pick` reads it."""
    return {
        "op": place.op,
        "path": list(place.path),
        "direction": place.direction,
        "size": job["size"],
        "variant": job["variant"],
        "capability": job["capability"],
        "role": role,
        "entry": entry,
    }
