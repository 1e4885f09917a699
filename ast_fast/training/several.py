"""Several runs of one recipe: other seeds, other folds, and what their figures come to."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._optional import require_package
from ..hub.writing import replace_text

CONFIDENCE = 0.95


def variants(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The single runs of a plan by the name of their folder: every fold with every seed.

    Args:
        plan: as `run.json` holds it, with `seeds` and `folds`.

    Raises:
        ValueError: one comes twice.

    >>> plan = {"seeds": [3, 4], "folds": [], "settings": {"train": {"seed": 0}}, "how": {}}
    >>> {name: one["settings"]["train"]["seed"] for name, one in variants(plan).items()}
    {'seed-3': 3, 'seed-4': 4}
    """
    seeds, folds = plan.get("seeds") or [None], plan.get("folds") or [None]
    found: dict[str, dict[str, Any]] = {}
    for fold in folds:
        for seed in seeds:
            parts = [f"fold-{fold}"] * (fold is not None) + [f"seed-{seed}"] * (seed is not None)
            one = copy.deepcopy({**plan, "seeds": [], "folds": []})
            if fold is not None:
                one["how"]["fold"] = fold
            if seed is not None:
                # what is held out stays what it is
                one.setdefault("holdout_seed", one["settings"]["train"]["seed"])
                one["settings"]["train"]["seed"] = seed
            name = "-".join(parts)
            if name in found:
                raise ValueError(f"seeds={seeds}, folds={folds}: expected each once")
            found[name] = one
    return found


def together(figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation and the half-width of the 95 % confidence interval of each figure.

    The interval is Student's t of the runs: it says where the mean of many such runs would lie. A figure
    that a run lacks is left out.

    Args:
        figures: of each run by name.
    """
    names = [
        name
        for name in next(iter(figures.values()), {})
        if all(name in run for run in figures.values())
    ]
    count = len(figures)
    found: dict[str, Any] = {}
    for name in names:
        values = [run[name] for run in figures.values()]
        found[name] = {"mean": statistics.fmean(values)}
        if count > 1:
            deviation = statistics.stdev(values)
            stats = require_package("scipy.stats", "a confidence interval", "train")
            reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
            found[name] |= {"std": deviation, "ci95": reach * deviation / math.sqrt(count)}
    return {"runs": {name: dict(run) for name, run in figures.items()}, "together": found}


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What `together` found as lines of text."""
    count = len(summary["runs"])
    lines = [f"mean of {count} runs" + (", with its 95 % interval:" if count > 1 else ":")]
    for name, found in summary["together"].items():
        interval = f" +- {found['ci95']:.4f}" if "ci95" in found else ""
        lines.append(f"  {name} {found['mean']:.4f}{interval}")
    return lines


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None if it is not finished."""
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    replace_text(path, json.dumps(value, indent=1, allow_nan=False))
