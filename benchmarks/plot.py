"""Pictures from committed result files alone: `python -m benchmarks.plot [--out DIR]`.

One picture of ratios a file (how many times faster ours is than each peer, with the spread), one of how
near to the machine's ceilings our ops come, and on a GPU attention's rate over length and batch. PNG and SVG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot_curves, record
from .tables import Content, load, newest

OURS, RIVAL, GRID = "#1b6ca8", "#8a8f98", "#d7dae0"
_TIMED = (
    *("frontend", "path", "inference", "training", "attention", "block", "patch_embed"),
    *("decisions", "headline", "tokens", "accelerated"),
)


def pairs(file: Content) -> list[tuple[str, str, dict[str, float]]]:
    """Case, peer and ratio of every row that has one."""
    found = []
    for row in file["rows"]:
        if row["ratio"] is not None:
            shape = " ".join(f"{key}{value}" for key, value in row["shape"].items())
            mode = "" if row["mode"] in ("forward", "step") else f" {row['mode']}"
            graph = " graph" if row["clock"] == "graph" else ""
            label = f"{row['case']}{mode} {shape} {row['dtype']}{graph}"
            found.append((label, row["provider"], row["ratio"]))
    return found


def draw_ratios(file: Content, pyplot: Any) -> Any:
    """Ratios as dots with their p20 to p80, grouped by case; the line at 1 is "as fast"."""
    found = pairs(file)
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.26 * max(len(found), 1)))
    previous, labels = "", []
    for place, (label, peer, ratio) in enumerate(found):
        colour = OURS if ratio["p50"] >= 0.97 else "#b3402a"
        axes.plot([ratio["p20"], ratio["p80"]], [place, place], color=colour, linewidth=2)
        axes.plot([ratio["p50"]], [place], "o", color=colour, markersize=5)
        labels.append(f"{label}  vs {peer}" if label != previous else f"vs {peer}")
        previous = label
    axes.axvline(1.0, color=RIVAL, linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        "how many times faster ast_fast is: median of ratios within a round, p20 to p80"
    )
    _title(axes, file, f"{file['suite']}")
    return figure


def draw_ceilings(files: Sequence[Content], pyplot: Any) -> Any:
    """Our share of the measured ceiling, a bar a case."""
    bars = []
    for file in files:
        for row in file["rows"]:
            if row["provider"].startswith("ast_fast") and row["share"] is not None:
                shape = " ".join(f"{key}{value}" for key, value in row["shape"].items())
                what = "matrix products" if row["ceiling"] == "gemm" else "copy"
                label = f"{row['case']} {row['mode']} {shape} {row['dtype']} ({what})"
                bars.append((label, row["share"]))
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.2 * max(len(bars), 1)))
    axes.barh(range(len(bars)), [share for _, share in bars], color=OURS, height=0.7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1.0, color=RIVAL, linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("share of what a large matrix product or copy reaches on this machine")
    _title(axes, files[0], "share of the measured ceiling")
    return figure


def draw_roofline(file: Content, pyplot: Any) -> Any:
    """Components of whole passes under the machine's roofs: rate over operations a byte."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    tops = file["ceilings"]
    reach = [2.0**power for power in range(-2, 12)]
    roofs = {"f32": "-", "bf16": "--"}
    for dtype, style in roofs.items():
        top = tops.get(f"gemm_{dtype}_tflops")
        if top:
            knee = top * 1e3 / tops["copy_gbps"]
            places = sorted([*reach, knee])
            roof = [min(top, tops["copy_gbps"] * x / 1e3) for x in places]
            axes.plot(places, roof, style, color=RIVAL, label=f"roof, {dtype}")
    colours = {"products": OURS, "attention": "#b3402a", "norms": "#3b8f4a", "GELU": "#8a5fb5"}
    markers = {"f32": "o", "bf16": "s", "int8": "^", "bf16-amp": "D", "bf16-master": "P"}
    for row in file["rows"]:
        if row["tflops"] and row["gbps"]:
            what = f"{row['case']} {row['dtype']}: {row['provider']}"
            axes.plot(
                [row["tflops"] * 1e3 / row["gbps"]],
                [row["tflops"]],
                markers.get(row["dtype"], "x"),
                color=colours.get(row["provider"], "#5c5c5c"),
                label=what,
                markersize=6,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of memory traffic, at least")
    axes.set_ylabel("TFLOP/s")
    axes.grid(color=GRID)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _title(axes, file, "components of whole passes under the machine's roofs")
    return figure


def _title(axes: Any, file: Content, what: str) -> None:
    facts = file["environment"]
    detail = f"{facts['device_name']}, torch {facts['torch']}, {facts['date'][:10]}"
    axes.set_title(f"{what}\n{detail}", loc="left", fontsize=10)


def save(figure: Any, out: Path, name: str) -> list[Path]:
    """PNG and SVG of one figure."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        # no date inside: the same results give the same file
        extra = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=140, bbox_inches="tight", **extra)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all pictures there are results for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "plots", metavar="DIR")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ast_fast"
    from matplotlib import pyplot

    contents = load(options.results)
    for device in ("cpu", "cuda"):
        files = newest(contents, device, _TIMED)
        drawn = {file["suite"]: draw_ratios(file, pyplot) for file in files if pairs(file)}
        if files:
            drawn["ceilings"] = draw_ceilings(files, pyplot)
        for file in newest(contents, device, ("components",)):
            drawn["roofline"] = draw_roofline(file, pyplot)
        for file in files:
            curves = plot_curves.draw(file, "bf16", pyplot) if device == "cuda" else None
            if file["suite"] == "attention" and curves is not None:
                drawn["attention-curves"] = curves
        for name, figure in drawn.items():
            for path in save(figure, options.out, f"{device}-{name}"):
                print(path.name)
            pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
