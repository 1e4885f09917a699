"""Runs side by side: figures, the settings that differ, and intervals over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import run_plots
from ._text import without_nan
from .data.split_file import SPLIT, read_head
from .report import HtmlReport
from .run_folder import NAMES, RunFolder

# 97.5 % points of Student's t by degrees of freedom; beyond 30, of 40, 60, 120 and the normal
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# runs that differ in these alone repeat one setting
_REPEATS = frozenset({"seed", "fold", "holdout_seed"})


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A mean over runs, and half the width of its 95 % confidence interval (None for one run)."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" +- {self.half:.4f}")


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval by Student's t, which holds for few runs, too."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, len(values))
    freedom = len(values) - 1
    if freedom <= len(_T):
        point = _T[freedom - 1]
    else:
        # the next lower tabled degree: the interval is never too narrow
        point = next(
            t
            for most, t in ((40, 2.042), (60, 2.021), (120, 2.000), (math.inf, 1.980))
            if freedom < most
        )
    return Interval(mean, point * statistics.stdev(values) / math.sqrt(len(values)), len(values))


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs.

    Attributes:
        runs: in the order given, with names that tell them apart.
        groups: of each run, the number of its setting: those that differ in seed or fold alone share one.
        different: settings that are not the same in all runs, but for those: by name, of each run.
    """

    runs: list[RunFolder]
    groups: list[int]
    different: dict[str, list[Any]]

    @property
    def other_clips(self) -> str:
        """What is to be said where the runs were not all evaluated on the same clips; empty if they were."""
        sets: dict[str, list[str]] = {}
        silent = []
        for run in self.runs:
            file = run.folder / SPLIT
            if file.is_file():
                sets.setdefault(str(read_head(file).get("evaluated")), []).append(run.name)
            else:
                silent.append(run.name)
        told = []
        if len(sets) > 1:
            alike = "; ".join(", ".join(names) for names in sets.values())
            told.append(
                f"the runs were evaluated on {len(sets)} different sets of clips ({alike}): their figures "
                "differ by the clips, too"
            )
        if silent and (sets or len(silent) < len(self.runs)):
            told.append(f"which clips were evaluated on is not known of {', '.join(silent)}")
        return "; ".join(told)

    @property
    def figures(self) -> list[str]:
        """Names of the figures that any run was evaluated by."""
        return list(dict.fromkeys(name for run in self.runs for name in run.final))

    def members(self, group: int) -> list[RunFolder]:
        """The runs of a setting."""
        return [run for run, own in zip(self.runs, self.groups, strict=True) if own == group]

    def title(self, group: int) -> str:
        """The name of a run, or those of several and how many they are."""
        found = self.members(group)
        return found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"

    def over_seeds(self, name: str) -> list[tuple[str, Interval]]:
        """A figure of each setting, over its runs."""
        rows = []
        for group in dict.fromkeys(self.groups):
            values = [run.final[name] for run in self.members(group) if name in run.final]
            if values:
                rows.append((self.title(group), interval(values)))
        return rows


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs and find how they differ.

    Raises:
        ValueError: there are fewer than two, or one is given twice.
        FileNotFoundError: a folder holds no run.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} runs: expected at least two to compare")
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{str(place)!r} is given twice")
    runs = [RunFolder.read(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [
            dataclasses.replace(run, name=f"{place.parent.name}/{place.name}")
            for run, place in zip(runs, places, strict=True)
        ]
    found = {name for run in runs for name in run.settings}
    # what was measured of the clips follows from what was set
    names = sorted(
        name
        for name in found
        if name.rpartition(".")[2] not in _REPEATS and not name.startswith("measured.")
    )
    columns = {name: [run.settings.get(name) for run in runs] for name in names}
    different = {
        name: values
        for name, values in columns.items()
        if any(value != values[0] for value in values)
    }
    keys = [
        json.dumps(without_nan([values[place] for values in different.values()]), allow_nan=False)
        for place in range(len(runs))
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return Comparison(runs, [numbers[key] for key in keys], different)


Table = tuple[list[str], list[list[str]]]


def figure_table(comparison: Comparison) -> Table:
    """Each run: its last figures, its best, and how quick it was."""
    header = ["run", *comparison.figures, "best", "at step", "steps", "clips/s", "waiting"]
    rows = []
    for run in comparison.runs:
        steps, best, judge = run.of_kind("step"), run.best, run.judge
        speed, waited = run.typical("clips_per_second"), run.typical("wait_share")
        rows.append(
            [
                run.name,
                *(_number(run.final.get(name)) for name in comparison.figures),
                f"{judge} {best[judge]:.4f}" if best is not None and judge is not None else "-",
                str(best["step"]) if best is not None else "-",
                str(steps[-1]["step"]) if steps else "-",
                "-" if speed is None else f"{speed:.0f}",
                "-" if waited is None else f"{waited:.0%}",
            ]
        )
    return header, rows


def setting_table(comparison: Comparison) -> Table:
    """The settings that differ, a column a run."""
    header = ["setting", *(run.name for run in comparison.runs)]
    rows = [
        [
            name,
            *(
                value if isinstance(value, str) else json.dumps(without_nan(value), allow_nan=False)
                for value in values
            ),
        ]
        for name, values in comparison.different.items()
    ]
    return header, rows


def seed_table(comparison: Comparison) -> Table | None:
    """Means and 95 % intervals of each setting; None if no setting has several runs."""
    if len(set(comparison.groups)) == len(comparison.runs):
        return None
    groups = list(dict.fromkeys(comparison.groups))
    rows = []
    for group in groups:
        found = comparison.members(group)
        cells = []
        for name in comparison.figures:
            values = [run.final[name] for run in found if name in run.final]
            cells.append(str(interval(values)) if values else "-")
        rows.append([comparison.title(group), str(len(found)), *cells])
    return ["setting of", "runs", *comparison.figures], rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write a page: figures, intervals over seeds, curves in the same axes, settings that differ."""
    names = [run.name for run in comparison.runs]
    report = HtmlReport(f"{len(names)} training runs", ", ".join(names))
    report.section(
        "Figures",
        "After the last step, and at the best evaluation."
        + (f" Note: {comparison.other_clips}." if comparison.other_clips else ""),
    )
    report.table(*figure_table(comparison))
    seeds = seed_table(comparison)
    if seeds is not None:
        report.section(
            "Over seeds",
            "Runs that differ in seed or fold alone: mean and 95 % confidence interval by Student's t.",
        )
        report.table(*seeds)
    judges = list(dict.fromkeys(run.judge for run in comparison.runs if run.judge is not None))
    for judge in judges:
        rows = [(title, found.mean, found.half) for title, found in comparison.over_seeds(judge)]
        title = NAMES.get(judge, judge)
        report.picture(
            f"final_{judge}",
            run_plots.interval_bars(rows, f"{title[:1].upper()}{title[1:]} after the last step"),
            "Whiskers: 95 % confidence interval over seeds.",
        )
    report.section("Curves", "Runs of one setting share a colour.")
    report.picture("curves", run_plots.overlaid(comparison.runs, comparison.groups), "By step.")
    report.section(
        "Settings that differ",
        "" if comparison.different else "None, but for seed and fold.",
    )
    if comparison.different:
        report.table(*setting_table(comparison))
    return report.write(out, f"{out.stem}_plots")


def table_text(table: Table) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    header, rows = table
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
