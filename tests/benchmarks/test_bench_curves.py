"""The picture of attention's rate over length and batch: which rows become which points."""

import pytest

from benchmarks.plot_curves import by_batch, by_length, curves, draw


def row(b, t, provider, tflops, mode="forward", **other):
    shape = {"B": b, "T": t, "H": 12, "D": 64}
    made = {"case": "attention", "mode": mode, "dtype": "bf16", "shape": shape, "clock": "events"}
    return made | {"provider": provider, "tflops": tflops} | other


def file(rows):
    facts = {"device_name": "a GPU", "torch": "2", "date": "2026-01-01T00:00:00Z"}
    return {"rows": rows, "environment": facts}


ROWS = [
    row(64, 1214, "ast_fast[triton]", 400.0),
    row(1, 1214, "ast_fast[triton]", 200.0),
    row(512, 146, "ast_fast[triton]", 300.0),
    row(64, 1214, "sdpa-cudnn", 380.0),
    row(64, 1214, "sdpa-math", 20.0),
    row(1, 1214, "ast_fast[triton]", 250.0, clock="graph"),
    row(64, 1214, "ast_fast[triton]", 350.0, mode="backward"),
    row(64, 1214, "ast_fast[triton]", 100.0, dtype="f32"),
    row(64, 1214, "sdpa", None),
    row(64, 1214, "ast_fast[triton]", 9.0, shape={"B": 64, "T": 1214, "H": 6, "D": 128}),
]


def test_points_are_of_the_model_alone():
    assert curves(file(ROWS), "forward", "bf16", by_batch) == {
        "ast_fast[triton]": [(1, 200.0), (64, 400.0)],
        "sdpa-cudnn": [(64, 380.0)],
    }
    # one clip does not fill a device: it says nothing of length
    assert curves(file(ROWS), "forward", "bf16", by_length)["ast_fast[triton]"] == [
        (146, 300.0),
        (1214, 400.0),
    ]


def test_there_is_a_picture_only_of_lines():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert draw(file(ROWS[:1]), "bf16", pyplot) is None
    figure = draw(file(ROWS), "bf16", pyplot)
    assert len(figure.axes) == 4
    assert "a GPU" in figure.get_suptitle()
    pyplot.close(figure)
