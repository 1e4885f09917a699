"""The report is one file that needs nothing else, and its pictures hold what they should."""

import base64
import io
import re

import pytest
import torch

from ast_fast import plots
from ast_fast.report import HtmlReport

Image = pytest.importorskip("PIL.Image")

LOG = [{"kind": "step", "step": s, "loss": 1.0 / (s + 1)} for s in range(20)] + [
    {"kind": "eval", "step": s, "epoch": s // 10, "loss": 0.5, "accuracy": 0.7} for s in (9, 19)
]
CHECKS = [
    {
        "step": s,
        "logits": [1e-7, 1e-7],
        "logits_budget": [2e-6, 2e-6],
        "loss_error": 0.0,
        "loss_budget": 1e-6,
        "gradient": [1e-9, 1e-7],
        "gradient_budget": [1e-6, 3e-6],
    }
    for s in (0, 10)
]
SPEED = {"p20": 90.0, "p50": 100.0, "p80": 120.0}


def pictures():
    spectrograms = torch.randn(2, 16, 30)
    return {
        "training": plots.training_curves(LOG, 0.3),
        "checks": plots.check_curves(CHECKS),
        "confusion": plots.confusion_matrix(torch.tensor([[5, 1], [0, 7]]), ("a", "b")),
        "many": plots.confusion_matrix(torch.eye(50), tuple(map(str, range(50)))),
        "attention": plots.attention_overlays(
            spectrograms,
            torch.rand(2, 16, 30),
            ("a", "b"),
            0.01,
            [100.0 * i for i in range(16)],
            [20, 30],
        ),
        "throughput": plots.throughput_bars(
            [{"what": "Inference", "ours": SPEED, "plain": SPEED}] * 2
        ),
    }


def test_every_picture_is_a_png_with_something_in_it():
    for name, png in pictures().items():
        image = Image.open(io.BytesIO(png)).convert("L")
        assert image.width > 400 and image.height > 250, name
        low, high = image.getextrema()
        assert high == 255 and low < 100, name


def test_the_same_data_gives_the_same_bytes():
    assert plots.training_curves(LOG, 0.3) == plots.training_curves(LOG, 0.3)


def test_a_run_without_evaluations_still_has_its_curves():
    assert plots.training_curves([row for row in LOG if row["kind"] == "step"])


def test_the_page_is_self_contained_and_escapes_text(tmp_path):
    report = HtmlReport("a <b> title", "lead & more")
    report.cards([("98 %", "<i>accuracy</i>")])
    report.section("Part", "text <script>alert(1)</script>")
    report.picture("curve", pictures()["checks"], "errors & budgets")
    report.table(("a", "b"), [("<x>", "2")])
    path = report.write(tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "<i>" not in text and "&lt;x&gt;" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', text)
    assert sources == ["data:image/png;base64,"]
    embedded = base64.b64decode(re.search(r"base64,([^\"]+)", text).group(1))
    assert embedded == (tmp_path / "deep" / "plots" / "curve.png").read_bytes()
