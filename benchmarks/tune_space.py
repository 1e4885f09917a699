"""Candidates for a slot's configuration: the best guesses of kernels/tuned/candidates.json, and a grid of the rest.

Plain values only: nothing here needs a GPU, so all of it is tested without one.
"""

from __future__ import annotations

import itertools

from .tune_slots import Entry, Slot, committed, slot

# figures of which half and double are worth a try, and those that go up and down by one
_DOUBLED = (
    *("rows", "rows_of_float32", "cols", "elements", "tokens", "frames", "samples", "bins"),
    *("mels", "inner", "block_m", "block_n", "block_k", "group_m"),
    *("warps", "num_warps", "programs_per_sm"),
)
_STEPPED = ("stages", "num_stages")
_SMALLEST = {"warps": 2, "num_warps": 4, "block_m": 16, "block_n": 16, "block_k": 16, "inner": 16}
_SMALLEST |= {"samples": 16, "bins": 16, "cols": 16}
_LARGEST = {"warps": 16, "num_warps": 8, "stages": 5, "num_stages": 4, "programs_per_sm": 8}


def guesses(place: Slot, capability: int) -> list[Entry]:
    """What compile figures and reading suggest, best first, without what is committed."""
    from ast_fast.kernels import _candidates

    known = committed(place, capability)
    named = _candidates.candidates(place.op, capability)
    found = [each.entry for each in named if slot(place.op, each.path) == place]
    return _distinct([_complete(entry, known) for entry in found], known)


def generated(place: Slot, capability: int, dtype: str) -> list[Entry]:
    """What is left to try once all guesses are measured, without guesses and what is committed."""
    known = committed(place, capability)
    if place.op == "attention":
        found = _attention(place, capability)
    else:
        found = _neighbours(known[0], dtype) if known else []
    return _distinct(found, [*known, *guesses(place, capability)])


def _complete(entry: Entry, known: list[Entry]) -> Entry:
    """A candidate may name only what differs; attention's are whole, and what they leave out has a default."""
    if not known or "block_m" in entry:
        return entry
    return {**known[0], **entry}


def _distinct(found: list[Entry], known: list[Entry]) -> list[Entry]:
    kept: list[Entry] = []
    for entry in found:
        if entry not in kept and entry not in known:
            kept.append(entry)
    return kept


def _neighbours(entry: Entry, dtype: str) -> list[Entry]:
    """The entry with one figure changed: stages and warps first, doubled tiles, which often spill, last."""
    changed: list[tuple[int, Entry]] = []
    for name, value in entry.items():
        if name == ("rows" if dtype == "f32" else "rows_of_float32") and "rows_of_float32" in entry:
            continue  # no launch in this dtype reads it
        least, most = _SMALLEST.get(name, 1), _LARGEST.get(name, 4096)
        if isinstance(value, bool):
            values = [(0, not value)] if name == "split" else []
        elif name in _STEPPED:
            values = [(0, value + 1), (0, value - 1)]
        elif name in _DOUBLED:
            first = 0 if name in ("warps", "num_warps", "programs_per_sm") else 1
            values = [(first, value // 2), (2 * first, value * 2)]
        else:
            values = []
        changed += [
            (order, entry | {name: each})
            for order, each in values
            if isinstance(each, bool) or least <= each <= most
        ]
    return [each for _, each in sorted(changed, key=lambda pair: pair[0])]


def _attention(place: Slot, capability: int) -> list[Entry]:
    """Tiles below 64 queries or 32 keys leave tensor cores idle; above 128 x 128 every head width spills."""
    kernel, arithmetic, width = place.path[0], place.path[1], int(place.path[2])
    if arithmetic == "f32":
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
            if row[4] <= width
        ]
    descriptors = (True, False) if capability >= 90 and arithmetic == "16bit" else (False,)
    stages = (1, 2, 3, 4) if capability >= 80 else (1, 2)
    # one pass holds dk, dv and a share of dq at once: its tiles of queries are smaller
    rows = (16, 32, 64) if kernel == "one_pass" else (64, 128)
    tiles = itertools.product(rows, (32, 64, 128), (4, 8), stages, descriptors)
    found = []
    for block_m, block_n, num_warps, num_stages, tma in tiles:
        if block_m * block_n * width > 128 * 128 * 128:
            continue
        if num_warps == 8 and block_m * block_n < 32 * 64:
            continue
        entry: Entry = {"block_m": block_m, "block_n": block_n}
        entry |= {"num_warps": num_warps, "num_stages": num_stages}
        if tma:
            entry["tma"] = True
        if kernel == "one_pass" and capability >= 90:
            entry["reduce"] = True
        found.append(entry)
    return found
