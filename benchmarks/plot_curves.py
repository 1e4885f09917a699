"""Attention's rate over clip length and over batch, beside the peers, from one result file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .tables import Content

_LINES = {
    "sdpa-cudnn": "#7a9e3f",
    "sdpa-flash": "#b3402a",
    "sdpa": "#8a8f98",
    "one pass": "#12a594",
    "flex": "#a05fb4",
}
_OURS = "#1b6ca8"
_MODEL = {"H": 12, "D": 64}
_TOKENS = 1214

Row = dict[str, Any]
Point = tuple[int, float]


def curves(
    file: Content, mode: str, dtype: str, place: Callable[[Row], int | None]
) -> dict[str, list[Point]]:
    """Points (x, TFLOP/s) of every provider, by x; `place` gives x of a row's shape, or None to leave it out."""
    found: dict[str, list[Point]] = {}
    for row in file["rows"]:
        wanted = (row["case"], row["mode"], row["dtype"]) == ("attention", mode, dtype)
        heads = all(row["shape"].get(key) == value for key, value in _MODEL.items())
        if not (wanted and heads and row["tflops"] and row["clock"] != "graph"):
            continue
        x = place(row["shape"])
        known = row["provider"] in _LINES or row["provider"].startswith("ast_fast")
        if x is not None and known:
            found.setdefault(row["provider"], []).append((x, row["tflops"]))
    return {name: sorted(points) for name, points in found.items()}


def by_length(shape: Row) -> int | None:
    """Tokens of a case; the batch shrinks as clips grow, so that every grid fills the device."""
    return shape["T"] if shape["B"] * shape["T"] >= 32 * _TOKENS else None


def by_batch(shape: Row) -> int | None:
    """Clips of a case of 10 s clips."""
    return shape["B"] if shape["T"] == _TOKENS else None


def draw(file: Content, dtype: str, pyplot: Any) -> Any | None:
    """Four panels: forward and backward, over length and over batch; None with too few points."""
    panels = [
        (mode, label, curves(file, mode, dtype, place))
        for mode in ("forward", "backward")
        for label, place in (("tokens a clip", by_length), ("clips of 1214 tokens", by_batch))
    ]
    if not any(len(points) > 1 for *_, lines in panels for points in lines.values()):
        return None
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), sharey="row")
    for panel, (mode, label, lines) in zip(axes.flat, panels, strict=True):
        for name, points in sorted(lines.items(), key=lambda line: line[0] in _LINES):
            ours = name not in _LINES
            panel.plot(
                [x for x, _ in points],
                [rate for _, rate in points],
                "o-",
                color=_LINES.get(name, _OURS),
                linewidth=2.5 if ours else 1.5,
                markersize=4,
                label=name,
            )
        panel.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        panel.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel(f"{label}, {mode}", fontsize=9)
        panel.grid(color="#d7dae0")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for row in axes:
        row[0].set_ylabel("TFLOP/s", fontsize=9)
    handles, names = max(
        (panel.get_legend_handles_labels() for panel in axes.flat), key=lambda found: len(found[1])
    )
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False, fontsize=9)
    facts = file["environment"]
    title = f"attention, 12 heads of 64, {dtype}: {facts['device_name']}, torch {facts['torch']}"
    figure.suptitle(f"{title}, {facts['date'][:10]}", x=0.02, ha="left", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    return figure
