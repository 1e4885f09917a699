"""The comparison on small sets: folds keep groups whole, intervals are of pairs, and the docs show the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import small_data, small_methods
from benchmarks.small_sets import SmallSet, folds_by_group

ROOT = Path(__file__).resolve().parents[2]


def some_set(clips=36):
    rng = np.random.default_rng(0)
    waves = []
    for index in range(clips):
        at = np.arange(4000) / 16000
        tone = np.sin(2 * np.pi * (300 if index % 2 else 2500) * at * (1 + 0.1 * rng.random()))
        waves.append(torch.from_numpy((8000 * tone).astype(np.int16)))
    labels = ["low" if index % 2 else "high" for index in range(clips)]
    return SmallSet("some", waves, labels, [f"group {index % 9}" for index in range(clips)])


def test_folds_keep_groups_whole_and_alike():
    whole = some_set()
    folds = folds_by_group(whole.groups, whole.labels, 3, seed=0)
    for group in set(whole.groups):
        assert len({f for f, g in zip(folds, whole.groups, strict=True) if g == group}) == 1
    assert [folds.count(fold) for fold in range(3)] == [12, 12, 12]
    assert folds == folds_by_group(whole.groups, whole.labels, 3, seed=0)
    assert folds != folds_by_group(whole.groups, whole.labels, 3, seed=1)


def test_a_difference_is_of_pairs():
    rng = np.random.default_rng(1)
    theirs = (rng.random((2, 400)) < 0.6).astype(float)
    ours = theirs.copy()
    ours[:, :40] = 1.0  # never worse
    gap, low, high = small_data.difference(ours, theirs)
    assert gap == pytest.approx(100 * (ours - theirs).mean()) and 0 < low < gap < high < 10
    assert small_data.verdict(low, high) == "better"
    assert small_data.verdict(*small_data.difference(theirs, ours)[1:]) == "worse"
    assert small_data.difference(ours, ours) == (0.0, 0.0, 0.0)
    assert small_data.verdict(-0.1, 0.2) == "undecided"


def test_a_run_that_is_stopped_goes_on_with_what_is_missing(monkeypatch):
    whole = some_set()
    settings = {"train": {"epochs": 3}, "front": {"num_frames": 16}}
    right = {"ours": lambda test: [int(i % 2) for i in test], "cnn": lambda test: [0] * len(test)}
    monkeypatch.setattr(
        small_methods, "ours", lambda w, train, test, seed: (right["ours"](test), settings)
    )
    monkeypatch.setattr(small_methods, "cnn", lambda w, train, test, seed, s: right["cnn"](test))
    rows = []
    while found := small_data.run_set(whole, 3, [0, 1], rows):
        assert [row["method"] for row in found] == list(small_data.METHODS)
        rows += found
    assert len(rows) == 3 * 2 * 4
    assert small_data.hits(rows, "some", "ours").shape == (2, 36)
    assert small_data.hits(rows, "some", "ours").all()
    assert small_data.hits(rows, "some", "cnn").mean() == 0.5
    assert small_data.hits(rows, "some", "lr").mean() == 1.0  # tones are told apart by their means
    # a seed whose folds are not all there does not count
    assert small_data.hits(rows[:-4], "some", "ours").shape == (1, 36)


def test_the_cnn_learns_by_the_settings_of_the_default():
    whole = some_set()
    front = {"num_frames": 26, "num_mel_bins": 32, "mean": -8.0, "std": 4.0}
    train = {"epochs": 6, "batch_size": 8, "warmup_steps": 2}
    found = small_methods.cnn(
        whole, list(range(24)), list(range(24, 36)), 0, {"front": front, "train": train}
    )
    truth = small_methods.indices_of(whole)[24:]
    assert sum(a == b for a, b in zip(found, truth, strict=True)) >= 10


def test_the_page_shows_what_the_file_holds():
    file, page = ROOT / "docs" / "small_data.json", ROOT / "docs" / "training.md"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    assert small_data.put_table(content, page) == page.read_text(encoding="utf-8")


def test_a_table_says_what_its_rows_say():
    rows = [
        {
            **{"set": "some", "fold": fold, "seed": 0, "method": method, "epochs": 3, "frames": 16},
            **{"clips": 24, "seconds": 60.0, "correct": right * 12},
        }
        for fold in range(3)
        for method, right in (("ours", "1"), ("cnn", "0"), ("lr", "1"), ("lr-spread", "1"))
    ]
    about = {"what": "tones", "group": "file", "clips": 36, "classes": 2, "groups": 9, "folds": 3}
    content = {
        "environment": {"torch": "2", "date": "today"},
        "sets": {"some": about},
        "rows": rows,
    }
    line = small_data.table(content).splitlines()[-1]
    assert line.startswith("| some: tones | 36, 2, 9 (file) | 1 x 3 | **100.0** | 0.0 (+100.0: ")
    assert "better) | 100.0 (+0.0: +0.0 to +0.0, undecided)" in line and line.endswith("| 1.0 |")
    assert small_data.table(None).startswith("Not measured yet")
