"""Which measurements a tuning run makes, in which order: the best guesses of every op before anything generated.

    guesses     of every slot, and what each op and direction is against the libraries
    one clip    the same guesses where only one clip is there
    generated   a grid of the rest, slot by slot in turn

A job measures a few configurations of one slot in a few seconds. Jobs are plain values in the order to run
them in (`priority`), so a run that is cut off leaves the most valuable part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import tune_space
from .case import Settings
from .tune_case import label, variants
from .tune_slots import OPS, Entry, Slot, committed, slots
from .tune_use import use_key

Job = dict[str, Any]

AT_ONCE = 8  # configurations measured beside the committed one
_GUESSED = 3  # generated ones that stand in where nobody has guessed
JOB_S = 2.5  # what a job is expected to take
_LIMIT_S = 60
_COMPILE_LIMIT_S = 60
# medians of ten
LIMITS = {"seconds": 0.0, "min_rounds": 10, "max_rounds": 10, "sample_ms": 3.0, "warmup_ms": 5.0}
TINY_LIMITS = LIMITS | {"min_rounds": 2, "max_rounds": 2, "sample_ms": 0.1, "warmup_ms": 0.1}
TIERS = ("guesses", "one clip", "generated")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a tuning run was asked for."""

    capability: int
    dtype: str = "bf16"
    widths: tuple[int, ...] = (64,)
    ops: tuple[str, ...] = OPS
    # only what kernels/tuned holds, which a warm cache has compiled: nothing generated
    listed_only: bool = False


def wanted_slots(wanted: Wanted) -> list[Slot]:
    """The slots of the ops asked for, most valuable first."""
    found = [
        place
        for op in wanted.ops
        for place in slots(
            op,
            wanted.capability,
            "f32" if op == "log_mel" else wanted.dtype,
            wanted.widths,
        )
    ]
    return sorted(found, key=lambda place: place.value)


def tune_jobs(settings: Settings, wanted: Wanted) -> list[Job]:
    """Measurements in the order to run them in."""
    places = wanted_slots(wanted)
    if settings.tiny:
        places = _one_a_direction(places)
    found: list[Job] = []
    judges = _judges(places)
    for tier in TIERS[:2] if wanted.listed_only or settings.tiny else TIERS:
        # in turn: the first few of every slot before more of any
        turns = [
            list(_slot_jobs(settings, wanted, place, tier, place in judges)) for place in places
        ]
        for turn in range(max(map(len, turns), default=0)):
            for jobs in turns:
                found += jobs[turn : turn + 1]
    for number, job in enumerate(found):
        job["priority"] = number
    return found


def plan_jobs(settings: Settings, capability: int, seconds: float) -> list[Job]:
    """The measurements of `tune_jobs` in the settings' first dtype that fit in `seconds`, in their order.

    Only configurations of kernels/tuned, which `_aot --warm` has compiled. No job where our kernels do not
    run, as in a dry run of the plan.
    """
    if settings.backend != "triton":
        return []
    wanted = Wanted(capability, settings.dtypes[0], listed_only=True)
    return tune_jobs(settings, wanted)[: max(1, int(seconds / JOB_S))]


def compile_jobs(measured: Iterable[Job]) -> list[Job]:
    """What measurements will launch, a configuration a job, in the order in which they will: for all cores."""
    found: dict[tuple[str, str], Job] = {}
    for job in measured:
        for entry in job["entries"]:
            key = compile_key(job, entry)
            if key in found:
                continue
            made = {name: job[name] for name in ("op", "path", "dtype", "capability")}
            made |= {"kind": "compile", "title": f"compile {key[0]} {key[1]}", "group": "tune"}
            made |= {"size": "large", "variant": ""}
            made |= {"limit_s": _COMPILE_LIMIT_S, "entries": [entry], "priority": job["priority"]}
            found[key] = made
    return list(found.values())


def compile_key(job: Job, entry: Entry) -> tuple[str, str]:
    """What tells one compilation from another: sizes and cases of a slot share their kernels."""
    return (Slot(job["op"], tuple(job["path"])).label, label(entry))


def _one_a_direction(places: Sequence[Slot]) -> list[Slot]:
    """For dry runs: a slot of every op and direction."""
    found: dict[tuple[str, str], Slot] = {}
    for place in places:
        found.setdefault((place.op, place.direction), place)
    return list(found.values())


def _judges(places: Sequence[Slot]) -> set[Slot]:
    """The slots whose measurements say whether a library is faster: one a use, even without a rival of ours."""
    found: dict[tuple[str, ...], Slot] = {}
    for place in places:
        if use_key(place) is not None:
            found.setdefault(use_key(place) or (), place)
    return set(found.values())


def _slot_jobs(
    settings: Settings, wanted: Wanted, place: Slot, tier: str, judges: bool
) -> Iterator[Job]:
    dtype = place.dtype(wanted.dtype)
    known = committed(place, wanted.capability)
    best = tune_space.guesses(place, wanted.capability)
    rest = tune_space.generated(place, wanted.capability, dtype)
    if not best and not wanted.listed_only:
        best, rest = rest[:_GUESSED], rest[_GUESSED:]
    # the rest of a committed list competes too: for small grids, and for operands without a tensor map
    best = [*known[1:], *best] if place.is_list else best
    if settings.tiny:
        best = best[:1]
    sizes = {"guesses": ["large"], "one clip": ["small"], "generated": ["large"]}[tier]
    if place.is_list:
        # a list is for both sizes of grid: either measurement alone decides nothing
        sizes = {"guesses": ["large", "small"], "one clip": [], "generated": ["large", "small"]}[
            tier
        ]
    entries = rest if tier == "generated" else best
    groups = [entries[at : at + AT_ONCE] for at in range(0, len(entries), AT_ONCE)]
    if tier != "generated" and judges:
        groups = groups or [[]]  # against the libraries alone
    for number, group in enumerate(groups):
        for size in sizes:
            for variant in variants(place):
                title = f"tune {place.label} {variant} {size} {tier} {number + 1}"
                yield {
                    "kind": "tune",
                    "title": title.replace("  ", " "),
                    "group": "tune",
                    "limit_s": _LIMIT_S,
                    "tier": tier,
                    "op": place.op,
                    "path": list(place.path),
                    "entries": group,
                    "committed": known[0],
                    "dtype": dtype,
                    "capability": wanted.capability,
                    "size": size,
                    "variant": variant,
                    "limits": TINY_LIMITS if settings.tiny else LIMITS,
                }
