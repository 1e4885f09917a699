"""Pictures of training runs, each as PNG bytes: histories, classes, calibration, runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration import Reliability
from .plots import ACCENT, GREY, OURS, PLAIN, _figure, _of_several, _png, _running_mean
from .run_folder import NAMES, RunFolder

COLOURS = (OURS, ACCENT, "#3a7d44", "#8d5a97", "#c9862b", "#4d4d4d", "#2a9d8f", "#b5651d")
# (name in the log, title, unit, logarithmic)
_STEP_PANELS = (
    ("lr", "Learning rate", "rate", False),
    ("grad_norm", "Gradient norm, before clipping", "norm", True),
    ("clips_per_second", "Speed", "clips per second", False),
    ("wait_share", "Waiting for data", "share of the time", False),
)


def history(run: RunFolder) -> bytes:
    """Loss, the judging figure, learning rate, gradient norm, speed and waiting, by step."""
    steps, evals = run.of_kind("step"), run.of_kind("eval")
    panels = [panel for panel in _STEP_PANELS if any(panel[0] in row for row in steps)]
    judge = run.judge
    count = 1 + (judge not in (None, "loss")) + len(panels)
    columns = min(3, count)
    figure, axes = _figure(-(-count // columns), columns, 11.0, 2.9 * -(-count // columns))
    places = iter(axes.flat)
    axis = next(places)
    at, values = _series(steps, "loss")
    axis.plot(at, values, color=OURS, alpha=0.3, lw=1)
    axis.plot(
        at,
        _running_mean(values),
        color=OURS,
        lw=1.8,
        label=f"training{_of_several(values, ' lines')}",
    )
    at, values = _series(evals, "loss")
    if values:
        axis.plot(at, values, color=ACCENT, marker="o", ms=3, lw=1.2, label="evaluation set")
    axis.set(title="Loss", xlabel="step")
    if all(value > 0 for value in [*values, *_series(steps, "loss")[1]]):
        axis.set_yscale("log")
    axis.legend()
    if judge not in (None, "loss"):
        axis = next(places)
        at, values = _series(evals, str(judge))
        axis.plot(at, values, color=ACCENT, marker="o", ms=3, lw=1.4)
        best = run.best
        if best is not None:
            axis.axhline(best[str(judge)], color=GREY, ls="--", lw=1)
            axis.annotate(
                f"best: {best[str(judge)]:.4f} at step {best['step']}",
                (0.98, 0.05),
                xycoords="axes fraction",
                ha="right",
                color=GREY,
            )
        title = NAMES.get(str(judge), str(judge))
        axis.set(title=f"{title[:1].upper()}{title[1:]}", xlabel="step")
    for name, title, unit, logarithmic in panels:
        axis = next(places)
        at, values = _series(steps, name)
        smooth = name in ("grad_norm", "clips_per_second", "wait_share")
        axis.plot(at, values, color=OURS, alpha=0.3 if smooth else 1, lw=1.2)
        if smooth:
            axis.plot(at, _running_mean(values), color=OURS, lw=1.6)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if logarithmic and all(value > 0 for value in values):
            axis.set_yscale("log")
        elif name != "lr":
            axis.set_ylim(0, 1.02 if name == "wait_share" else None)
    for axis in places:
        axis.set_visible(False)
    return _png(figure)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def class_bars(
    names: Sequence[str], values: Sequence[float], counts: Sequence[int], title: str, most: int = 40
) -> bytes:
    """One figure a class, the worst first; of many classes the worst and the best.

    Args:
        names: of the classes.
        values: their figures, 0 to 1; NaN for classes without a clip, which are left out.
        counts: clips of each.
        title: what the figure is.
        most: bars at most.
    """
    order = sorted(
        (index for index, value in enumerate(values) if value == value),
        key=lambda index: values[index],
    )
    gap = None
    if len(order) > most:
        gap = most // 2
        order = [*order[: most // 2], *order[-(most // 2) :]]
    figure, ((axis,),) = _figure(1, 1, 9.0, 1.1 + 0.26 * max(3, len(order)))
    places = [place + (gap is not None and place >= gap) for place in range(len(order))]
    axis.barh(places, [values[index] for index in order], color=OURS, height=0.72)
    axis.set_yticks(places, [f"{names[i][:40]} ({counts[i]})" for i in order])
    for place, index in zip(places, order, strict=True):
        inside = values[index] > 0.12
        axis.annotate(
            f"{values[index]:.3f}",
            (values[index], place),
            (-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "#333333",
        )
    if gap is not None:
        axis.annotate("...", (0.01, gap), va="center", color=GREY)
    axis.set_ylim(max(places, default=0) + 0.6, -0.6)
    axis.grid(False, axis="y")
    axis.set(title=f"{title} (clips of the class)", xlim=(0, 1))
    return _png(figure)


def reliability_diagram(found: Reliability, what: str) -> bytes:
    """What was said against what came true, above how often it was said."""
    figure, axes = _figure(2, 1, 5.6, 5.8)
    (top,), (bottom,) = axes
    middles, width = (found.edges[:-1] + found.edges[1:]) / 2, float(found.edges[1])
    some = found.counts > 0
    top.bar(
        middles[some].tolist(),
        found.share_right[some].tolist(),
        width=width * 0.94,
        color=OURS,
        label="came true",
    )
    top.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="as it should be")
    top.plot(
        found.confidence[some].tolist(),
        found.share_right[some].tolist(),
        color=ACCENT,
        marker="o",
        ms=4,
        lw=1,
        label="by the bin's mean",
    )
    top.set(title=f"Calibration: error {found.error:.4f}", xlim=(0, 1), ylim=(0, 1.02))
    top.set(ylabel="share that came true")
    top.legend(loc="upper left")
    bottom.bar(middles.tolist(), found.counts.tolist(), width=width * 0.94, color=PLAIN)
    bottom.set(xlim=(0, 1), xlabel=f"probability of {what}", ylabel="predictions")
    if int(found.counts.max()) > 50 * max(1, int(found.counts[some].min())):
        bottom.set_yscale("log")
    return _png(figure)


def confused_pairs(confusion: Tensor, classes: Sequence[str], most: int = 12) -> list[list[str]]:
    """The commonest mistakes: truth, what was said, clips, share of the truth's clips."""
    off = confusion.clone()
    off.fill_diagonal_(0)
    totals = confusion.sum(1)
    rows = []
    for place in off.flatten().argsort(descending=True, stable=True)[:most].tolist():
        truth, said = divmod(place, len(classes))
        count = int(off[truth, said])
        if count:
            share = count / int(totals[truth])
            rows.append([classes[truth], classes[said], str(count), f"{share:.0%}"])
    return rows


def overlaid(runs: Sequence[RunFolder], groups: Sequence[int]) -> bytes:
    """Curves of several runs in the same axes, runs of one setting in one colour.

    Args:
        runs: to draw.
        groups: of each run, the number of its setting.
    """
    judges = list(dict.fromkeys(run.judge for run in runs if run.judge not in (None, "loss")))
    panels: list[tuple[str, str, str]] = [("step", "loss", "Training loss (running mean)")]
    panels += [("eval", "loss", "Loss on the evaluation set")]
    panels += [("eval", str(judge), NAMES.get(str(judge), str(judge))) for judge in judges]
    panels += [("step", "lr", "Learning rate"), ("step", "grad_norm", "Gradient norm")]
    panels += [("step", "clips_per_second", "Clips per second")]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 11.0, 2.9 * rows + 0.4)
    flat_axes = list(axes.flat)
    for axis, (kind, name, title) in zip(flat_axes, panels, strict=False):
        positive = True
        for run, group in zip(runs, groups, strict=True):
            at, values = _series(run.of_kind(kind), name)
            if not values:
                continue
            positive &= min(values) > 0
            smooth = kind == "step" and name != "lr"
            axis.plot(
                at,
                _running_mean(values) if smooth else values,
                color=COLOURS[group % len(COLOURS)],
                lw=1.4,
                alpha=0.85,
                marker="" if kind == "step" else "o",
                ms=2.5,
            )
        axis.set(title=f"{title[:1].upper()}{title[1:]}", xlabel="step")
        if positive and name in ("loss", "grad_norm"):
            axis.set_yscale("log")
    for axis in flat_axes[len(panels) :]:
        axis.set_visible(False)
    names: dict[int, list[str]] = {}
    for run, group in zip(runs, groups, strict=True):
        names.setdefault(group, []).append(run.name)
    handles = [
        flat_axes[0].plot([], [], color=COLOURS[group % len(COLOURS)], lw=2)[0] for group in names
    ]
    labels = [
        ", ".join(found) if len(found) < 5 else f"{found[0]} and {len(found) - 1} more"
        for found in names.values()
    ]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return _png(figure)


def interval_bars(rows: Sequence[tuple[str, float, float | None]], title: str) -> bytes:
    """A figure of each setting, with its confidence interval where there are several runs.

    Args:
        rows: name, mean, half the width of the interval (None: one run).
        title: what the figure is.
    """
    figure, ((axis,),) = _figure(1, 1, 8.0, 1.2 + 0.36 * max(2, len(rows)))
    for place, (_, mean, half) in enumerate(rows):
        axis.errorbar(
            mean,
            place,
            xerr=half,
            fmt="o",
            color=COLOURS[place % len(COLOURS)],
            capsize=4,
            ms=6,
        )
        axis.annotate(
            f"{mean:.4f}" + ("" if half is None else f" \N{PLUS-MINUS SIGN} {half:.4f}"),
            (mean, place),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(rows)), [name[:48] for name, _, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.7)
    axis.margins(x=0.15)
    axis.set(title=title)
    return _png(figure)


def loss_histogram(losses: Tensor) -> bytes:
    """How the loss is spread over the clips of the evaluation set."""
    figure, ((axis,),) = _figure(1, 1, 6.4, 2.8)
    values = losses.double()
    high = float(torch.quantile(values, 0.995)) or 1.0
    axis.hist(values.clamp(max=high).tolist(), bins=40, color=OURS)
    axis.set(title="Loss of each clip", xlabel="loss (the last bar: and above)", ylabel="clips")
    axis.set_yscale("log")
    return _png(figure)
