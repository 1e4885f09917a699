"""The accuracy of cheaper inference on the demo's model: every way runs and says what it did."""

from __future__ import annotations

import pytest

from benchmarks import demo_accuracy


@pytest.mark.slow
def test_every_way_is_evaluated_on_the_model_of_one_run():
    rows = demo_accuracy.measured(seed=0, epochs=1)
    ways = [row["way"] for row in rows]
    assert ways[0] == "as trained" and "0 tokens merged a block" in ways
    assert all(0.2 < row["accuracy"] <= 1.0 for row in rows)
    by_way = {row["way"]: row for row in rows}
    plain = by_way["as trained"]["loss"]
    assert by_way["0 tokens merged a block"]["loss"] == plain
    assert by_way["12 tokens merged a block"]["loss"] != plain
    assert by_way["12 tokens merged a block"]["tokens"][-1] < 27
