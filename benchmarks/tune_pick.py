"""From the rows of tuning runs to changes of the tables. Plain values: result files are enough, no GPU is needed.

Only rows that were right and measured count. All ratios are over the committed configuration's time in the
same rounds, so what was measured at other times, or in other files of the same commit, can be put together.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .tune_slots import PRODUCTS, Entry, Slot
from .tune_use import Against, choose, fused_is_faster, use_key

# a configuration must be faster by this much in the median, and faster at all in 80 % of the rounds
_GAIN = 0.99
# at one clip it may be this much slower
_LOSS = 1.03
# an entry for small grids must beat the one for large grids by this factor to earn its place
_WORTH = 1.03
# of attention's kernels: the side of the tile that the grid is over
_OWNED = {"forward": "block_m", "dq": "block_m", "dkv": "block_n", "one_pass": "block_n"}
_SIZES = {"large": "full", "small": "small"}
# of attention: name of the grid (`_use.GRIDS`) at a size and a head width
Grids = Callable[[str, int], str]


class Timing(NamedTuple):
    """One configuration's times over the committed one's, on a grid that fills the GPU and on one clip."""

    entry: Entry
    large: float
    small: float


@dataclasses.dataclass
class Change:
    """What a table is to say at one place, and why."""

    place: Slot
    entries: list[Entry] | None  # the list, or the one entry; None: the place goes
    why: str


@dataclasses.dataclass
class Use:
    """Which implementation is to run."""

    key: tuple[str, ...]  # tune_use.use_key
    size: str | None  # full | small | None for both
    name: str
    why: str


class Evidence:
    """Rows that count, in order: what each configuration and library took over the committed configuration."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.capabilities: set[int] = set()
        self.committed: dict[Slot, Entry] = {}
        self._ours: dict[tuple[Slot, str, str], dict[str, Against]] = {}
        self._libraries: dict[tuple[Slot, str, str], dict[str, Against]] = {}
        self._two_passes: dict[tuple[Slot, str], Against] = {}
        for row in rows:
            self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        about = row.get("tune")
        if not about or row["status"] != "ok" or row["ms"] is None:
            return
        place, size = Slot(about["op"], tuple(about["path"])), about["size"]
        variant, role = about["variant"], about["role"]
        self.capabilities.add(about["capability"])
        if role == "committed":
            self.committed.setdefault(place, about["entry"])
        if row["ratio"] is None:
            return
        found = Against(*(row["ratio"][name] for name in ("p20", "p50", "p80")))
        if role == "candidate":
            key = (place, size, json.dumps(about["entry"]))
            self._ours.setdefault(key, {})[variant] = found
        elif role == "library":
            self._libraries.setdefault((place, size, row["provider"]), {})[variant] = found
        elif role == "two passes":
            self._two_passes[place, size] = found

    def places(self) -> list[Slot]:
        """Slots whose committed configuration was measured."""
        return list(self.committed)

    def variants(self, place: Slot, size: str) -> set[str]:
        """Cases that anything was measured on beside the committed configuration."""
        found: set[str] = set()
        for source in (self._ours, self._libraries):
            for (where, what, _), by_variant in source.items():
                if (where, what) == (place, size):
                    found |= set(by_variant)
        return found

    def ours(self, place: Slot, size: str) -> dict[str, float]:
        """Time of every configuration (as JSON) over the committed one's; noise counts as no gain."""
        found = {json.dumps(self.committed[place]): 1.0} if place in self.committed else {}
        wanted = self.variants(place, size)
        for (where, what, text), by_variant in self._ours.items():
            # measured on some of the cases only: nothing is known of the others
            if (where, what) == (place, size) and set(by_variant) == wanted:
                mean = math.exp(
                    sum(math.log(each.p50) for each in by_variant.values()) / len(wanted)
                )
                steady = all(each.p80 < 1.0 or each.p50 > 1.0 for each in by_variant.values())
                gained = mean >= 1.0 or (mean < _GAIN and steady)
                found[text] = mean if gained else 1.0
        return found

    def libraries(self, place: Slot, size: str) -> dict[str, dict[str, Against]]:
        """What libraries took over the committed configuration's time, by name and case."""
        return {
            name: by_variant
            for (where, what, name), by_variant in self._libraries.items()
            if (where, what) == (place, size)
        }

    def two_passes(self, place: Slot) -> Against | None:
        """Of a one-pass backward: what the two passes took."""
        return self._two_passes.get((place, "large"))


def changes(found: Evidence, committed: Mapping[Slot, list[Entry]]) -> list[Change]:
    """Places of the tables that are to change.

    Args:
        found: what was measured.
        committed: entries of every place in the tables as they are.
    """
    made = []
    for place in found.places():
        known = committed.get(place) or []
        if not same(known[:1], [found.committed[place]]):
            continue  # measured against another table
        ours = found.ours(place, "large")
        if place.is_list:
            change = _list_change(found, place, known)
        elif len(ours) < 2:
            change = None
        else:
            change = _entry_change(ours, found.ours(place, "small"), place)
        if change is not None and not same(change.entries, known):
            made.append(change)
    return made


def same(some: Sequence[Entry] | None, others: Sequence[Entry]) -> bool:
    """Whether entries are alike but for what is to be used at all."""

    def figures(entries: Sequence[Entry]) -> list[Entry]:
        return [{name: x for name, x in each.items() if name != "use"} for each in entries]

    return some is not None and figures(some) == figures(others)


def _entry_change(
    ours: Mapping[str, float], small: Mapping[str, float], place: Slot
) -> Change | None:
    allowed = {text: ratio for text, ratio in ours.items() if small.get(text, 1.0) <= _LOSS}
    best = min(allowed, key=lambda text: allowed[text])
    if allowed[best] >= 1.0:
        return None
    return Change(place, [json.loads(best)], f"{1 / allowed[best]:.3f}x as fast")


def _list_change(found: Evidence, place: Slot, known: list[Entry]) -> Change | None:
    two = found.two_passes(place)
    large, small = found.ours(place, "large"), found.ours(place, "small")
    if two is not None and two.p50 * _WORTH < min(large.values()) and two.p80 < 1.0:
        return Change(place, None, f"two passes take {two.p50:.3f} of the time of one")
    timings = [
        Timing(json.loads(text), ratio, small[text])
        for text, ratio in large.items()
        if text in small
    ]
    if len(timings) < 2:
        return None
    if min(each.large for each in timings) >= 1.0 and len(known) > 1:
        measured = [each.entry for each in timings]
        if not all(entry in measured for entry in known):
            return None  # nothing faster, and the rest of the list was not measured
    picked = pick(timings, _OWNED[place.path[0]], known)
    best = min(each.large for each in timings)
    return Change(place, picked, f"{1 / best:.3f}x as fast")


def pick(timings: Sequence[Timing], owned: str, known: Sequence[Entry] = ()) -> list[Entry]:
    """The list for a table: by descriptor first, then by pointer, each for large grids and for small.

    Args:
        timings: of everything that was right; the committed entries among them, first.
        owned: name of the tile side that the grid is over, `block_m` or `block_n`.
        known: the committed list; its entries without descriptors stay where none was measured.

    Raises:
        ValueError: no configuration without descriptors is among them; operands that no tensor map can
            describe need one.
    """
    chosen: list[Entry] = []
    for tma in (True, False):
        rivals = [each for each in timings if bool(each.entry.get("tma")) == tma]
        if not rivals:
            chosen += [entry for entry in known if not tma and not entry.get("tma")]
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


def uses(found: Evidence, made: Sequence[Change], grids: Grids) -> list[Use]:
    """Which implementation is to run each op and direction that was measured against a library.

    Args:
        found: what was measured.
        made: the changes of configurations, which our time counts with.
        grids: of attention: name of the grid (full or small) at a measured size and head width.
    """
    decided: list[Use] = []
    by_key: dict[tuple[str, ...], list[Slot]] = {}
    for place in found.places():
        key = use_key(place)
        if key is not None:
            by_key.setdefault(key, []).append(place)
    picked = {change.place: change for change in made}
    for key, places in by_key.items():
        decided += _uses_of(found, key, places, picked, grids)
    return decided


def _uses_of(
    found: Evidence,
    key: tuple[str, ...],
    places: Sequence[Slot],
    picked: Mapping[Slot, Change],
    grids: Grids,
) -> list[Use]:
    op, direction = key[:2]
    if op == "gemm":
        return _gemm_use(found, key, places[0], picked)
    if op != "attention":
        # the place for the largest model's width, if they are told apart by width
        judged = [place for place in places if found.libraries(place, "large")]
        if not judged:
            return []
        first = min(judged, key=lambda place: place.value)
        beside = [place for place in places if place.case_key == first.case_key]
        ours = _ours(found, beside, picked, "large")
        name, factor = choose(op, direction, ours, _single(found.libraries(first, "large")))
        return [Use(key, None, name, f"{factor:.3f}x as fast as the other")]
    made = []
    for size, grid in _SIZES.items():
        libraries = _single(found.libraries(places[0], size))
        if libraries and grid == grids(size, int(key[3])):
            name, factor = choose(op, direction, _ours(found, places, picked, size), libraries)
            made.append(Use(key, grid, name, f"{factor:.3f}x as fast as the other"))
    return made


def _ours(
    found: Evidence, places: Sequence[Slot], picked: Mapping[Slot, Change], size: str
) -> float:
    """Our time with the changes made over the committed time: kernels run one after the other, so gains add."""
    total = 1.0
    for place in places:
        change = picked.get(place)
        if change is not None and change.entries:
            ratios = found.ours(place, size)
            # a list offers several, of which a launch takes the one for its grid
            total += min(ratios.get(json.dumps(entry), 1.0) for entry in change.entries) - 1.0
        elif change is not None:
            two = found.two_passes(place)
            assert two is not None
            total += two.p50 - 1.0
    return total


def _single(libraries: Mapping[str, Mapping[str, Against]]) -> dict[str, Against]:
    return {name: next(iter(by_variant.values())) for name, by_variant in libraries.items()}


def _gemm_use(
    found: Evidence, key: tuple[str, ...], place: Slot, picked: Mapping[Slot, Change]
) -> list[Use]:
    """Ours where it is faster at every product of the kind, and nowhere slower at one clip."""
    libraries = found.libraries(place, "large").get("torch", {})
    if set(libraries) != set(PRODUCTS[place.path[0]]):
        return []
    ours = _ours(found, [place], picked, "large")
    small = found.libraries(place, "small").get("torch", {})
    ours_small = _ours(found, [place], picked, "small")
    faster = all(fused_is_faster(ours, each) for each in libraries.values())
    faster &= all(each.p50 * _LOSS > ours_small for each in small.values())
    worst = min(each.p50 for each in libraries.values()) / ours
    return [Use(key, None, "triton" if faster else "cublas", f"{worst:.3f}x cuBLAS at the worst")]
