"""What is held out: exactly so many clips, of every class its share, the same on every machine."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_fast.data import Manifest, hold_out, missing_classes, read_parts
from ast_fast.data.stratify import held_count, stratify
from ast_fast.data.syllables import split_by_syllable

several = st.lists(
    st.lists(st.integers(0, 7), max_size=4, unique=True).map(tuple), min_size=2, max_size=60
)
one_each = st.lists(st.integers(0, 9).map(lambda label: (label,)), min_size=2, max_size=80)
shares = st.floats(0.02, 0.9)
seeds = st.integers(0, 2**31)


def possible(labels, share):
    count = int(np.floor(share * len(labels) + 0.5))
    return count < len(labels)


def classes_of(labels, places):
    # clips without a label are a class of their own
    return Counter(label for place in places for label in (labels[place] or (-1,)))


def sides(labels, held):
    rest = sorted(set(range(len(labels))) - set(held))
    return classes_of(labels, rest), classes_of(labels, held)


@given(several, shares, seeds)
@settings(max_examples=150, deadline=None)
def test_exactly_the_share_is_held_out_once_each(labels, share, seed):
    if not possible(labels, share):
        with pytest.raises(ValueError, match="leaves none to train on"):
            stratify(labels, share, seed)
        return
    held = stratify(labels, share, seed)
    assert held == sorted(set(held)) and set(held) < set(range(len(labels)))
    assert len(held) == held_count(len(labels), share)
    assert abs(len(held) - share * len(labels)) < 1.0
    assert held == stratify(labels, share, seed)


@given(one_each, shares, seeds)
@settings(max_examples=150, deadline=None)
def test_every_class_of_two_clips_is_on_both_sides_where_the_size_allows_it(labels, share, seed):
    if not possible(labels, share):
        return
    held = stratify(labels, share, seed)
    total, (train, out) = classes_of(labels, range(len(labels))), sides(labels, held)
    often = [label for label, count in total.items() if count > 1]
    if len(held) >= len(often) and len(labels) - len(held) >= len(total):
        assert all(train[label] and out[label] for label in often)
        assert all(train[label] for label in total), "the only clip of a class is to be learnt"
    elif len(held) < len(often):
        # one each as far as they go
        assert all(out[label] <= max(1, share * total[label]) + 1 for label in often)


@given(several, shares, seeds)
@settings(max_examples=60, deadline=None)
def test_no_swap_would_bring_a_class_to_the_side_that_lacks_it(labels, share, seed):
    if not possible(labels, share) or not (0.2 < share < 0.8):
        return
    total = classes_of(labels, range(len(labels)))
    held = stratify(labels, share, seed)
    if len(total) > min(len(held), len(labels) - len(held)):
        return  # no room for all: frequent ones keep part of their share
    rest = sorted(set(range(len(labels))) - set(held))

    def absent(train, out):
        one, other = classes_of(labels, train), classes_of(labels, out)
        return {(0, c) for c in total if not one[c]} | {
            (1, c) for c in total if total[c] > 1 and not other[c]
        }

    lacking = absent(rest, held)
    for out, back in itertools.product(held, rest) if lacking else ():
        train = [*(place for place in rest if place != back), out]
        swapped = [*(place for place in held if place != out), back]
        assert not absent(train, swapped) < lacking


@given(several, shares, seeds, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_list_and_of_the_classes_changes_nothing(labels, share, seed, random):
    if not possible(labels, share):
        return

    def drawn(order, numbers):
        paths = [f"{place:02}.wav" for place in order]
        names = [""] * 8
        for label, number in enumerate(numbers):
            names[number] = f"class {label}"
        told = [tuple(numbers[label] for label in labels[place]) for place in order]
        manifest = Manifest(Path("/"), paths, told, tuple(names), [0] * len(paths), "a list")
        kept, held = hold_out(manifest, share, seed)
        assert not set(kept.paths) & set(held.paths)
        return set(held.paths)

    order, numbers = list(range(len(labels))), list(range(8))
    first = drawn(order, numbers)
    random.shuffle(order)
    random.shuffle(numbers)
    assert drawn(order, numbers) == first


@given(several, st.floats(0.1, 0.7), seeds, st.integers(2, 12))
@settings(max_examples=100, deadline=None)
def test_groups_stay_whole_and_the_size_is_within_one_group(labels, share, seed, speakers):
    groups = [f"speaker {place * 7 % speakers}" for place in range(len(labels))]
    if not possible(labels, share):
        return
    if len(set(groups)) == 1:
        with pytest.raises(ValueError, match="two groups or more"):
            stratify(labels, share, seed, groups=groups)
        return
    held = set(stratify(labels, share, seed, groups=groups))
    for name in set(groups):
        members = {place for place, group in enumerate(groups) if group == name}
        assert members <= held or not members & held
    assert 0 < len(held) < len(labels)
    assert abs(len(held) - share * len(labels)) <= max(Counter(groups).values()) + 1


@pytest.mark.parametrize(("share", "near"), [(0.25, 4.0), (0.1, 2.0)])
def test_clips_of_two_to_four_labels_keep_the_share_of_every_class(share, near):
    rng = np.random.default_rng(0)
    labels = [
        tuple(rng.choice(20, rng.integers(2, 5), replace=False).tolist()) for _ in range(1000)
    ]
    for seed in range(5):
        held = stratify(labels, share, seed)
        assert len(held) == 1000 * share
        total, (_, out) = classes_of(labels, range(1000)), sides(labels, held)
        assert max(abs(out[label] - share * total[label]) for label in total) <= near


def test_a_hundred_classes_of_four_clips_are_held_out_as_far_as_a_tenth_goes():
    labels = [(place // 4,) for place in range(400)]
    held = stratify(labels, 0.1, 0)
    assert len(held) == 40 and max(sides(labels, held)[1].values()) == 1
    quarter = sides(labels, stratify(labels, 0.25, 0))
    assert set(quarter[1].values()) == {1} and len(quarter[1]) == 100


def test_frequent_classes_keep_half_of_their_share_where_rare_ones_would_take_it_all():
    labels = [(place // 2,) for place in range(2000)] + [(1000 + n % 2,) for n in range(2000)]
    out = sides(labels, stratify(labels, 0.1, 0))[1]
    assert sum(out.values()) == 400 and min(out[1000], out[1001]) >= 50


def test_the_draw_is_the_same_on_every_machine():
    labels = [(n % 5, 5 + n % 3) if n % 7 else () for n in range(60)]
    assert stratify(labels, 0.15, 3) == PINNED
    assert stratify(labels, 0.15, 4) != PINNED


PINNED = [1, 4, 5, 18, 22, 28, 30, 48, 59]


def test_every_class_of_two_clips_is_evaluated_of_millions_too():
    """100,000 clips of 527 classes by Zipf's law: a second or so on one core."""
    rng = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, 528)
    flat = iter(rng.choice(527, 400_000, p=weight / weight.sum()).tolist())
    labels = [
        tuple(dict.fromkeys(next(flat) for _ in range(size)))
        for size in rng.integers(1, 5, 100_000).tolist()
    ]
    held = stratify(labels, 0.1, 0)
    total, (train, out) = classes_of(labels, range(len(labels))), sides(labels, held)
    assert len(held) == 10_000
    assert all(train[label] and out[label] for label in total if total[label] > 1)
    worst = max(abs(out[label] / total[label] - 0.1) for label in total if total[label] > 200)
    assert worst < 0.02


def manifest(paths, labels, classes=("a", "b")):
    return Manifest(Path("/"), paths, labels, classes, [0] * len(paths), "a list")


def test_a_file_that_is_listed_twice_stays_on_one_side():
    paths = [f"{place // 2}.wav" for place in range(40)]
    for seed in range(10):
        kept, held = hold_out(manifest(paths, [(n % 2,) for n in range(40)]), 0.25, seed)
        assert not set(kept.paths) & set(held.paths) and len(held) == 10


def test_small_sets_keep_one_clip_aside_by_default(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.wav").write_bytes(b"")
    kept, held = read_parts(tmp_path, holdout=0.1)
    assert (len(kept), len(held)) == (3, 1)
    with pytest.raises(ValueError, match="leaves none to train on: expected a smaller share"):
        read_parts(tmp_path, holdout=0.95)
    with pytest.raises(ValueError, match=r"holdout=1\.5: expected 0"):
        read_parts(tmp_path, holdout=1.5)
    single = manifest(["a.wav"], [(0,)])
    with pytest.raises(ValueError, match="1 clip leaves none to evaluate on"):
        hold_out(single, 0.1, 0)


def test_classes_that_are_on_one_side_only_are_named():
    labels = [(0,), (0,), (0,), (1,), (2,)]
    data = manifest([f"{n}.wav" for n in range(5)], labels, ("a", "b", "c"))
    kept, held = hold_out(data, 0.2, 0)
    assert missing_classes(kept, held) == [
        "no clip to evaluate on of 2 of 3 classes: 'b', 'c'",
    ]
    assert missing_classes(data.select([0, 3]), data.select([1, 4])) == [
        "no clip to evaluate on of 1 of 3 classes: 'b'",
        "no clip to train on of 1 of 3 classes: 'c'",
    ]


def test_numbers_to_predict_are_held_out_too():
    data = Manifest(
        Path("/"),
        [f"{n}.wav" for n in range(10)],
        [()] * 10,
        ("valence",),
        [0] * 10,
        "a list",
        np.arange(10, dtype=np.float32)[:, None],
    )
    kept, held = hold_out(data, 0.25, 0)
    assert len(held) == 3 and sorted([*kept.values[:, 0], *held.values[:, 0]]) == list(range(10))


def test_runs_that_began_before_splits_were_kept_draw_as_they_did():
    data = manifest([f"{n}.wav" for n in range(12)], [(n % 2,) for n in range(12)])
    assert hold_out(data, 0.25, 7, draw=1)[1].paths == OLD


OLD = ["1.wav", "2.wav", "4.wav", "7.wav"]


def test_a_share_of_syllables_that_rounds_to_none_or_all_is_refused():
    for unseen, count in ((0.1, 0), (0.9, 2)):
        with pytest.raises(ValueError, match=f"of 2 syllables is {count} to test on"):
            split_by_syllable(["a", "b", "a"], unseen=unseen)
    assert split_by_syllable(["a", "b", "a"], unseen=0.5)[1] in ([1], [0, 2])
