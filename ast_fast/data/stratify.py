"""Which clips to keep aside, so that every class has its share of them: iterative stratification.

After Sechidis, Tsoumakas and Vlahavas (2011): the rarest class is dealt out first, because the clips
of frequent ones can still make up for it later. Here each class is dealt out at once rather than clip by
clip, the number of clips held out is exact, and a last pass swaps clips until no swap brings another class
to the side that it is missing from.

Random order is a hash of the seed and of each clip's name, and everything else is whole numbers and
single float64 operations: the same clips on every machine, in whatever order they are listed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np

_ROUNDS = 8
_MANY = 4096  # of so many units any number is like all of them
_SCANNED = 200_000_000  # entries that the swaps may look at: some seconds


def stratify(
    labels: Sequence[tuple[int, ...]],
    share: float,
    seed: int,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> list[int]:
    """Places of the clips to hold out, rising.

    Of N clips it is `held_count(N, share)`, to the clip; within half a group where groups are larger. A class of
    two clips or more is on both sides where the number of clips held out allows it: frequent classes come
    first. The only clip of a class is not held out, so that the class is learnt. Clips without a label count as a class.

    Args:
        labels: class indices of each clip; numbered alike, the clips drawn are alike.
        share: above 0, below 1.
        seed: of the draw.
        names: of the clips; the draw of a clip then follows its name and not its place.
        groups: clips of one group stay on one side.

    Raises:
        ValueError: the share leaves nothing on one side.

    >>> len(stratify([(n % 3,) for n in range(30)], 0.1, seed=0))
    3
    """
    want = held_count(len(labels), share)
    units = _Units(labels, groups if groups is not None else range(len(labels)))
    if len(units.weight) < 2:
        raise ValueError(
            f"holdout={share}: all {len(labels)} clips are of one group: expected two groups or more"
        )
    order = _order(seed, names if names is not None else list(map(str, range(len(labels)))), units)
    dealt = _Deal(units, order, want, share)
    dealt.deal()
    dealt.fill()
    for side in (1, 0):
        dealt.cover(side)
    return np.flatnonzero(dealt.side[units.of_clip] == 1).tolist()


def held_count(count: int, share: float) -> int:
    """How many of so many clips a share is: rounded, and one at least.

    Raises:
        ValueError: it is none, or all.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"holdout={share}: expected a share above 0 and below 1")
    if count < 2:
        raise ValueError(
            f"holdout={share} of {count} clip leaves none to evaluate on: give --eval-data, or "
            "--holdout 0"
        )
    found = max(1, math.floor(share * count + 0.5))
    if found >= count:
        raise ValueError(
            f"holdout={share} of {count} clips leaves none to train on: expected a smaller share"
        )
    return found


class _Units:
    """What stays together, and the classes in each: entries (unit, class, clips), sorted by unit.

    A unit is a group, which is one clip as a rule.
    """

    def __init__(self, labels: Sequence[tuple[int, ...]], groups: Sequence[object]) -> None:
        if len(groups) != len(labels):
            raise ValueError(f"groups: got {len(groups)} for {len(labels)} clips")
        if isinstance(groups, range):
            self.of_clip = np.arange(len(labels))
        else:
            numbers: dict[object, int] = {}
            self.of_clip = np.asarray([numbers.setdefault(g, len(numbers)) for g in groups])
        self.weight = np.bincount(self.of_clip)  # clips
        sizes = np.fromiter(map(len, labels), np.int64, len(labels))
        flat = np.fromiter(itertools.chain.from_iterable(labels), np.int64, int(sizes.sum()))
        # clips without a label are a class of their own
        bare = np.flatnonzero(sizes == 0)
        clips = np.concatenate((np.repeat(np.arange(len(labels)), sizes), bare))
        flat = np.concatenate((flat, np.full(len(bare), -1)))
        self.classes, numbers_of = np.unique(flat, return_inverse=True)
        wide = max(len(self.classes), 1)
        codes, self.count = np.unique(self.of_clip[clips] * wide + numbers_of, return_counts=True)
        self.unit, self.label = codes // wide, codes % wide
        self.begin = np.searchsorted(self.unit, np.arange(len(self.weight) + 1))

    def entries(self, units: np.ndarray) -> np.ndarray:
        """Places of all entries of some units."""
        begins, ends = self.begin[units], self.begin[units + 1]
        sizes = ends - begins
        first = np.repeat(begins - np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes)
        return first + np.arange(len(first))


def _order(seed: int, names: Sequence[str], units: _Units) -> np.ndarray:
    """The units in random order."""
    key = str(seed).encode() + b"\0"
    blake = hashlib.blake2b
    drawn = np.frombuffer(
        b"".join(
            blake(key + name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            for name in names
        ),
        "<u8",
    )
    # a group's is that of its first in this order, which no order of the list changes
    least = np.full(len(units.weight), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, units.of_clip, drawn)
    return np.argsort(least, kind="stable")


class _Deal:
    """Sides of the units (1 is held out, 0 is trained on, -1 is open), and the classes on each."""

    def __init__(self, units: _Units, order: np.ndarray, want: int, share: float) -> None:
        self.units, self.want, self.share = units, want, share
        self.rank = np.empty(len(order), np.int64)
        self.rank[order] = np.arange(len(order))
        classes = len(units.classes)
        self.side = np.full(len(order), -1, np.int8)
        self.sides = np.zeros((2, classes), np.int64)  # clips of each class on each side
        self.total = np.bincount(units.label, units.count, classes).astype(np.int64)
        self.spread = np.bincount(units.label, minlength=classes)  # units
        self.open = self.total.copy()
        self.open_units = self.spread.copy()
        # entries by class, and in each class in random order
        by_class = np.lexsort((self.rank[units.unit], units.label))
        self._members = units.unit[by_class]
        self._starts = np.searchsorted(units.label[by_class], np.arange(classes + 1))
        # what each side sets aside for a class that it is to have, in clips
        self.must = np.stack(
            [self._affordable(len(units.of_clip) - want, 1), self._affordable(want, 2)]
        )

    def _affordable(self, clips: int, least: int) -> np.ndarray:
        """What a side of so many clips sets aside for each class, the frequent ones first; 0 for no room."""
        units = self.units
        per_unit = np.bincount(units.unit, minlength=len(units.weight))
        # the part of a clip that a class pays for, where clips have several
        costs = np.bincount(units.label, 1.0 / per_unit[units.unit], len(self.total)) / self.spread
        able = np.flatnonzero(self.spread >= least)
        able = able[np.argsort(-self.total[able], kind="stable")]
        if len(able) and np.cumsum(costs[able])[-1] > clips + 1e-6:
            # not all find room: a frequent class keeps half of its share before a rare one gets a clip
            costs = np.maximum(costs, costs * self.spread * (clips / len(units.of_clip) / 2))
        found = np.zeros(len(self.total))
        fits = able[np.cumsum(costs[able]) <= clips + 1e-6]
        found[fits] = costs[fits]
        return found

    def members(self, label: int) -> np.ndarray:
        """Units with a class, in random order."""
        return self._members[self._starts[label] : self._starts[label + 1]]

    def deal(self) -> None:
        """Deal out every unit, the rarest class first."""
        want, left = self.want, int(self.units.weight.sum())  # clips to be held out, clips open
        while left:
            rare = np.where(self.open_units > 0, self.open, np.iinfo(np.int64).max)
            label = int(np.argmin(rare))
            units = self.members(label)
            units = units[self.side[units] < 0]
            held = self._chosen(label, units, want, left)
            self._put(units[held], 1)
            self._put(units[~held], 0)
            want -= int(self.units.weight[units[held]].sum())
            left -= int(self.units.weight[units].sum())

    def _chosen(self, label: int, units: np.ndarray, want: int, left: int) -> np.ndarray:
        """Which of the units of a class that are open are held out."""
        weight = self.units.weight[units]
        here = int(weight.sum())
        # the share of the class, and of what the other classes took too much or left over its part
        ideal = self.share * float(self.total[label]) - float(self.sides[1, label])
        ideal += (want / left - self.share) * here
        need = [0.0 if self.sides[s, label] else float(self.must[s, label]) for s in (0, 1)]
        low, high = need[1], here - need[0]
        # room is kept for classes that are still to come
        later = [self._reserved(s, label) for s in (0, 1)]
        high = max(low, min(high, want - later[1]))
        low = min(max(low, here - max(need[0], left - want - later[0])), high)
        if self.spread[label] == 1:
            high = low = 0.0
        number = math.floor(min(max(ideal, low), high) + 0.5)
        # these hold whatever else is wished for: the number held out is exact
        number = min(max(number, want - (left - here), 0), here, want)
        return self._suited(units, weight, number)

    def _suited(self, units: np.ndarray, weight: np.ndarray, number: int) -> np.ndarray:
        """Units of so many clips whose other classes want them held out, chosen in a few rounds."""
        held = np.zeros(len(units), bool)
        if number <= 0:
            return held
        if number >= weight.sum():
            return ~held
        if len(units) > _MANY:
            return np.asarray(np.cumsum(weight) - weight / 2 <= number)
        entries = self.units.entries(units)
        labels, counts = self.units.label[entries], self.units.count[entries]
        sizes = self.units.begin[units + 1] - self.units.begin[units]
        owner = np.repeat(np.arange(len(units)), sizes)
        wish = self.share * self.total - self.sides[1]
        still = self.open.astype(np.float64)
        for rounds in range(_ROUNDS, 0, -1):
            places = np.flatnonzero(~held)
            need = wish / np.maximum(still, 1.0) - self.share
            score = np.bincount(owner, need[labels], len(units))[places]
            places = places[np.argsort(-score, kind="stable")]
            part = -(-(number - int(weight[held].sum())) // rounds)
            taken = places[np.cumsum(weight[places]) - weight[places] / 2 <= part]
            held[taken[: len(places) - 1]] = True
            chosen = held[owner]
            spent = np.bincount(labels[chosen], counts[chosen], len(wish))
            wish = self.share * self.total - self.sides[1] - spent
            if weight[held].sum() >= number:
                break
        return held

    def _reserved(self, side: int, label: int) -> float:
        """Clips that a side needs for the classes that it must have and has not."""
        missing = (self.must[side] > 0) & (self.sides[side] == 0) & (self.open_units > 0)
        missing[label] = False
        # added one after another: a sum in another order could fall on the other side of a whole number
        return float(np.floor(np.cumsum(self.must[side, missing])[-1:]).sum())

    def _put(self, units: np.ndarray, side: int) -> None:
        entries = self.units.entries(units)
        labels, counts = self.units.label[entries], self.units.count[entries]
        found = np.bincount(labels, counts, len(self.total)).astype(np.int64)
        if self.side[units[:1]].max(initial=-1) < 0:
            self.open -= found
            self.open_units -= np.bincount(labels, minlength=len(self.total))
        else:
            self.sides[1 - side] -= found
        self.sides[side] += found
        self.side[units] = side

    def fill(self) -> None:
        """The lightest unit to a side that has none, as happens with large groups."""
        for side in (0, 1):
            if not (self.side == side).any():
                lightest = np.lexsort((self.rank, self.units.weight))[:1]
                self._put(lightest, side)

    def cover(self, side: int) -> None:
        """Swap units so that classes that a side lacks come to it, and none is lost to either."""
        budget = _SCANNED
        lacking = np.flatnonzero((self.sides[side] == 0) & (self.spread >= (1 if side == 0 else 2)))
        for label in lacking[np.argsort(-self.total[lacking], kind="stable")]:
            if self.sides[side, label]:
                continue  # came with another
            for unit in self.members(int(label)):
                if budget < 0:
                    return
                budget -= len(self.units.label)
                back = self._swappable(int(unit), side)
                if back is not None:
                    self._put(np.asarray([unit]), side)
                    self._put(np.asarray([back]), 1 - side)
                    break

    def _swappable(self, unit: int, side: int) -> int | None:
        """What can go the other way when a unit comes to a side; None if the unit cannot be spared."""
        units = self.units
        own = slice(units.begin[unit], units.begin[unit + 1])
        labels, counts = units.label[own], units.count[own]
        least = np.maximum(self.must, np.stack([self.spread > 0, self.spread > 1]))
        if (self.sides[1 - side, labels] - counts < least[1 - side, labels]).any():
            return None
        here = self.sides[side].copy()
        here[labels] += counts
        loses = here[units.label] - units.count < least[side, units.label]
        keeps = np.bincount(units.unit, loses, len(units.weight)) == 0
        fits = keeps & (self.side == side) & (units.weight == units.weight[unit])
        places = np.flatnonzero(fits)
        return int(places[np.argmin(self.rank[places])]) if len(places) else None
