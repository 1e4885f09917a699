"""The pictures of a run, each as PNG bytes: curves, confusion, attention, throughput."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._optional import require_package

OURS, PLAIN, ACCENT, GREY = "#0b6e99", "#b9b9b9", "#d1495b", "#6b6b6b"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "ast_fast",
}
Rows = Sequence[Mapping[str, Any]]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    matplotlib = require_package("matplotlib", "plots", "train")
    backend = require_package("matplotlib.backends.backend_agg", "plots", "train")
    figures = require_package("matplotlib.figure", "plots", "train")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained", dpi=120)
        backend.FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    matplotlib = require_package("matplotlib", "plots", "train")
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def training_curves(log: Rows, chance: float | None = None) -> bytes:
    """Training loss by step, and the evaluation after each epoch.

    Args:
        log: rows of `log.jsonl`.
        chance: accuracy of always naming the most frequent class.
    """
    steps = [row for row in log if row["kind"] == "step"]
    evals = [row for row in log if row["kind"] == "eval"]
    figure, ((left, right),) = _figure(1, 2, 9.6, 3.4)
    at, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    left.plot(at, losses, color=OURS, alpha=0.3, lw=1, label="_one batch")
    left.plot(
        at,
        _running_mean(losses),
        color=OURS,
        lw=1.8,
        label=f"training, augmented{_of_several(losses)}",
    )
    marks = {"marker": "o", "ms": 3.5}
    at, losses = [r["step"] for r in evals], [r["loss"] for r in evals]
    left.plot(at, losses, color=ACCENT, lw=1.2, label="evaluation set", **marks)
    left.set(title="Loss", xlabel="optimiser step", ylabel="loss (nats)", yscale="log")
    left.legend()
    name = next((n for n in ("accuracy", "map") if evals and n in evals[0]), "loss")
    title = {"accuracy": "Accuracy", "map": "Mean average precision"}.get(name, "Loss")
    epochs = [r["epoch"] + 1 for r in evals]
    scores = [r[name] for r in evals]
    right.plot(epochs, scores, color=OURS, marker="o", ms=3.5, lw=1.6)
    right.set(title=f"{title} on the evaluation set", xlabel="epoch", ylabel=title.lower())
    right.xaxis.get_major_locator().set_params(integer=True)
    if scores:
        right.annotate(
            f"{scores[-1]:.3f}",
            (epochs[-1], scores[-1]),
            (0, -14),
            textcoords="offset points",
            ha="right",
        )
    if name == "accuracy":
        right.set_ylim(0, 1.03)
        if chance is not None:
            right.axhline(chance, color=GREY, ls="--", lw=1)
            right.annotate(
                f"most frequent class: {chance:.2f}",
                (epochs[-1], chance),
                (0, 4),
                textcoords="offset points",
                ha="right",
                color=GREY,
            )
    return _png(figure)


def _mean_width(values: Sequence[float]) -> int:
    """How many values to take the mean of: 9, or fewer where that would flatten a short curve."""
    return 9 if len(values) >= 27 else 3 if len(values) >= 9 else 1


def _of_several(values: Sequence[float], unit: str = "") -> str:
    """What a legend says of a running mean; nothing where it is the values themselves."""
    width = _mean_width(values)
    return f" (mean of {width}{unit})" if width > 1 else ""


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the values up to half a width away, fewer at the ends."""
    half = _mean_width(values) // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def precision_curves(runs: Rows) -> bytes:
    """Training loss, and accuracy after each epoch, of runs that differ in precision and seed.

    Args:
        runs: each with precision, seed, step and loss (lists), and evaluations (step, accuracy).
    """
    figure, ((left, right),) = _figure(1, 2, 9.6, 3.4)
    names = list(dict.fromkeys(run["precision"] for run in runs))
    colours = dict(zip(names, (GREY, OURS, ACCENT, PLAIN), strict=False))
    for run in runs:
        look = {"color": colours[run["precision"]], "lw": 1.6, "alpha": 0.9}
        left.plot(run["step"], _running_mean(run["loss"]), **look)
        evals = run["evaluations"]
        right.plot([e["step"] for e in evals], [e["accuracy"] for e in evals], **look)
    for name in names:
        left.plot([], [], color=colours[name], lw=1.6, label=name)
    left.set(title="Training loss (mean of 9)", xlabel="optimiser step", yscale="log")
    left.legend()
    right.set(title="Accuracy on the evaluation set", xlabel="optimiser step", ylim=(0, 1.03))
    return _png(figure)


def check_curves(checks: Rows) -> bytes:
    """Errors of the equivalence checks beside their budgets, by step."""
    parts = [("logits", "Logits", 1), ("loss_error", "Loss", None), ("gradient", "Gradient", 1)]
    figure, (axes,) = _figure(1, 3, 9.6, 3.2)
    for axis, (name, title, index) in zip(axes, parts, strict=True):
        budget_name = "loss_budget" if name == "loss_error" else f"{name}_budget"
        rows = [row for row in checks if row[name] is not None]
        steps = [row["step"] for row in rows]
        errors = [row[name] if index is None else row[name][index] for row in rows]
        budgets = [row[budget_name] if index is None else row[budget_name][index] for row in rows]
        # an error of exactly 0 has no place on a logarithmic axis
        axis.plot(steps, [max(e, 1e-12) for e in errors], color=OURS, marker="o", ms=4, lw=1.4)
        axis.plot(steps, budgets, color=ACCENT, ls="--", lw=1.4)
        unit = "absolute error (nats)" if index is None else "relative L2 error"
        axis.set(title=title, xlabel="optimiser step", ylabel=unit, yscale="log")
        low = min([max(e, 1e-12) for e in errors], default=1e-7)
        axis.set_ylim(low / 5, max(budgets, default=1e-4) * 5)
    axes[0].legend(["fast path against float64", "budget"], loc="best")
    return _png(figure)


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """Counts of truth (rows) against prediction (columns), coloured by the share of the row."""
    size = len(classes)
    share = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    small = size <= 20
    width = max(4.6, min(12.0, 0.62 * size + 2.8))
    figure, ((axis,),) = _figure(1, 1, width, width * 0.82)
    image = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    axis.set(title="Confusion on the evaluation set", xlabel="predicted", ylabel="truth")
    if small:
        axis.set_xticks(range(size), classes, rotation=25, ha="right")
        axis.set_yticks(range(size), classes)
        for row in range(size):
            for column in range(size):
                value = int(confusion[row, column])
                shade = (
                    "white" if share[row, column] > 0.55 else ("#333333" if value else "#bbbbbb")
                )
                axis.text(column, row, str(value), ha="center", va="center", color=shade)
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    return _png(figure)


def attention_overlays(
    spectrograms: Tensor,  # [B, F, S] natural-log mel energies
    attention: Tensor,  # [B, F, S]
    titles: Sequence[str],
    seconds_per_frame: float,
    bin_hz: Sequence[float],
    lengths: Sequence[int],
) -> bytes:
    """Log-mel spectrograms above, the same with the attention over them below.

    Args:
        spectrograms: [B, F, S], natural-log mel energies.
        attention: [B, F, S], any scale; shown from its least to its most.
        titles: one a clip.
        seconds_per_frame: hop in seconds.
        bin_hz: centre frequency of each mel bin.
        lengths: frames of each clip; what follows is padding and is shown blank.
    """
    count, bins, frames = spectrograms.shape
    figure, axes = _figure(2, count, 2.5 * count + 1.0, 5.0)
    extent = (0.0, frames * seconds_per_frame, -0.5, bins - 0.5)
    ticks = [index for index in range(bins) if index % max(1, bins // 5) == bins // 10]
    plain = None
    # padding is raw 0, louder than most sound, and must not decide the colours
    heard = torch.cat([s[:, :n].flatten() for s, n in zip(spectrograms, lengths, strict=True)])
    low, high = float(heard.quantile(0.03)), float(heard.quantile(0.995))
    for column in range(count):
        # padding is no sound: it is left white
        kept = spectrograms[column].clone()
        kept[:, lengths[column] :] = float("nan")
        weight = attention[column].clone()
        weight[:, lengths[column] :] = 0
        for axis in axes[:, column]:
            axis.grid(False)
            axis.set_yticks(ticks, [f"{bin_hz[index]:.0f}" for index in ticks])
            axis.tick_params(labelleft=column == 0)
        options = {
            "origin": "lower",
            "aspect": "auto",
            "extent": extent,
            "interpolation": "nearest",
        }
        plain = axes[0, column].imshow(kept.numpy(), cmap="magma", vmin=low, vmax=high, **options)
        axes[1, column].imshow(kept.numpy(), cmap="gray", vmin=low, vmax=high + 4, **options)
        inside = weight[weight > 0]
        scaled = ((weight - inside.min()) / (inside.max() - inside.min())).clamp(0, 1)
        # little attention is transparent, much covers the sound
        opacity = torch.where(weight > 0, 0.1 + 0.75 * scaled, 0.0)
        axes[1, column].imshow(
            scaled.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=opacity.numpy(), **options
        )
        axes[0, column].set_title(titles[column])
        axes[1, column].set_xlabel("time (s)")
    axes[0, 0].set_ylabel("log-mel\nfrequency (Hz)")
    axes[1, 0].set_ylabel("attention over it\nfrequency (Hz)")
    figure.colorbar(plain, ax=axes[0, :].tolist(), label="ln energy", shrink=0.9)
    solid = require_package("matplotlib.cm", "plots", "train").ScalarMappable(cmap="inferno")
    figure.colorbar(solid, ax=axes[1, :].tolist(), label="attention, least to most", shrink=0.9)
    return _png(figure)


def throughput_bars(rows: Rows) -> bytes:
    """Clips a second, ours beside plain PyTorch, with the 20 % to 80 % spread.

    Args:
        rows: {"what", "ours", "plain"}; the last two are {"p20", "p50", "p80"} in clips a second.
    """
    figure, axes = _figure(1, len(rows), 2.6 * len(rows) + 1.6, 3.6)
    for axis, row in zip(axes[0], rows, strict=True):
        for place, (key, colour) in enumerate((("plain", PLAIN), ("ours", OURS))):
            value = row[key]
            spread = [[value["p50"] - value["p20"]], [value["p80"] - value["p50"]]]
            axis.bar(place, value["p50"], color=colour, width=0.62)
            axis.errorbar(place, value["p50"], yerr=spread, color="#333333", capsize=4, lw=1)
            axis.annotate(
                f"{value['p50']:,.0f}",
                (place, value["p50"] / 2),
                ha="center",
                va="center",
                color="white" if key == "ours" else "#333333",
            )
        ratio = row["ours"]["p50"] / row["plain"]["p50"]
        axis.set_xticks([0, 1], ["plain\nPyTorch", "ast_fast"])
        axis.set(title=f"{row['what']}\n{ratio:.2f}x", ylabel="clips per second")
        axis.grid(False, axis="x")
        axis.set_xlim(-0.6, 1.6)
    return _png(figure)
