"""The default recipe beside logistic regression and a small CNN, on small sets that it was not chosen on.

    python -m benchmarks.small_data --out docs/small_data.json            goes on where it was stopped
    python -m benchmarks.small_data --out docs/small_data.json --table    writes the table into docs/training.md
    python -m benchmarks.small_data --sets initials vowels --out FILE     the sets that the default was chosen on

Every clip is tested once a seed: three folds, whole groups (speakers, kits, consonants...) in one, so that what is
tested on was never heard in training. Differences are in points of accuracy; their intervals come from drawing
clips, and seeds, again (paired bootstrap). A result is written after each run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import small_methods
from .environment import collect
from .small_sets import SOURCES, SmallSet, folds_by_group, read_set

UNSEEN = ("drums", "cries", "packs", "malayalam")
CHOSEN_ON = ("initials", "vowels")
METHODS = ("ours", "cnn", "lr", "lr-spread")
NAMES = {"ours": "the default", "cnn": "small CNN", "lr": "LR, means", "lr-spread": "LR, means and deviations"}  # fmt: skip
DOCS = Path("docs/training.md")
MARKS = ("<!-- small-data:begin -->", "<!-- small-data:end -->")


def run_set(
    whole: SmallSet, folds: int, seeds: list[int], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The next run of a set that is not among the rows, all methods of a fold and seed at once.

    Returns:
        Its rows; none if there is nothing left.
    """
    truth = np.array(small_methods.indices_of(whole))
    fold_of = np.array(folds_by_group(whole.groups, whole.labels, folds, seed=0))
    done = {(row["set"], row["fold"], row["seed"]) for row in rows}
    for seed in seeds:
        for fold in range(folds):
            if (whole.name, fold, seed) in done:
                continue
            train = np.flatnonzero(fold_of != fold).tolist()
            test = np.flatnonzero(fold_of == fold).tolist()
            found: dict[str, tuple[list[int], float]] = {}
            started = time.perf_counter()
            predicted, settings = small_methods.ours(whole, train, test, seed)
            found["ours"] = predicted, time.perf_counter() - started
            started = time.perf_counter()
            predicted = small_methods.cnn(whole, train, test, seed, settings)
            found["cnn"] = predicted, time.perf_counter() - started
            for method in ("lr", "lr-spread"):
                started = time.perf_counter()
                predicted = small_methods.logistic(whole, train, test, method == "lr-spread")
                found[method] = predicted, time.perf_counter() - started
            about = {
                "clips": len(train),
                "epochs": settings["train"]["epochs"],
                "frames": settings["front"]["num_frames"],
            }
            return [
                {
                    **{"set": whole.name, "fold": fold, "seed": seed, "method": method, **about},
                    "correct": "".join(str(int(hit)) for hit in np.array(each) == truth[test]),
                    "seconds": round(seconds, 1),
                }
                for method, (each, seconds) in found.items()
            ]
    return []


def hits(rows: list[dict[str, Any]], name: str, method: str) -> np.ndarray:
    """Which clips a method got right, [seeds, clips]; seeds that lack a fold are left out."""
    mine = [row for row in rows if (row["set"], row["method"]) == (name, method)]
    folds = sorted({row["fold"] for row in mine})
    lines = []
    for seed in sorted({row["seed"] for row in mine}):
        found = {row["fold"]: row["correct"] for row in mine if row["seed"] == seed}
        if sorted(found) == folds:
            lines.append([int(hit) for fold in folds for hit in found[fold]])
    return np.array(lines, dtype=np.float64)


def difference(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 4000
) -> tuple[float, float, float]:
    """Points by which ours is better, and their 95 % interval: clips and seeds drawn again, in pairs."""
    rng = np.random.default_rng(0)
    seeds, clips = ours.shape
    gaps = ours - theirs
    means = np.empty(draws)
    for draw in range(draws):
        chosen = gaps[rng.integers(seeds, size=seeds)].mean(0)
        means[draw] = chosen[rng.integers(clips, size=clips)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(gaps.mean()), 100 * float(low), 100 * float(high)


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def table(content: dict[str, Any] | None) -> str:
    """The table of a result file, for the docs; of none that there is nothing yet."""
    if content is None:
        return "Not measured yet (`python -m benchmarks.small_data --out docs/small_data.json`)."
    rows, lines = content["rows"], []
    facts = content["environment"]
    lines.append(
        f"Accuracy in %, torch {facts['torch']}, {facts['date']}; in brackets by how many points the default is "
        "better (95 % interval)."
    )
    lines.append("")
    lines.append("| set | clips, classes, groups | runs | the default | small CNN | LR, means | LR, means and deviations | minutes a run |")  # fmt: skip
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["set"] for row in rows):
        ours = hits(rows, name, "ours")
        if not len(ours):
            continue
        about = content["sets"][name]
        cells = [
            f"{name}: {about['what']}",
            f"{about['clips']}, {about['classes']}, {about['groups']} ({about['group']})",
            f"{len(ours)} x {about['folds']}",
            f"**{100 * ours.mean():.1f}**",
        ]
        for method in METHODS[1:]:
            theirs = hits(rows, name, method)
            gap, low, high = difference(ours, theirs)
            cells.append(f"{100 * theirs.mean():.1f} ({gap:+.1f}: {low:+.1f} to {high:+.1f}, {verdict(low, high)})")  # fmt: skip
        seconds = [r["seconds"] for r in rows if (r["set"], r["method"]) == (name, "ours")]
        cells.append(f"{np.median(seconds) / 60:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_table(content: dict[str, Any] | None, place: Path = DOCS) -> str:
    """The text of a page with its table made anew."""
    before, rest = place.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(content)}\n{MARKS[1]}{after}"


def main() -> None:
    """Run what is missing, write after each run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_data")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sets", nargs="+", default=list(UNSEEN), choices=[*CHOSEN_ON, *SOURCES])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=0, help="0: as torch finds them")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/ast_fast/small_sets")
    parser.add_argument(
        "--table", action="store_true", help="write the table into the docs, and stop"
    )
    options = parser.parse_args()
    if options.table:
        known = options.out.is_file()
        content = json.loads(options.out.read_text(encoding="utf-8")) if known else None
        DOCS.write_text(put_table(content), encoding="utf-8")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    content = {"environment": collect("cpu"), "sets": {}, "rows": []}
    if options.out.is_file():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    # seed by seed, so that a run that is stopped leaves whole sets
    for count in range(1, len(options.seeds) + 1):
        for name in options.sets:
            whole = read_set(name, options.cache)
            content["sets"][name] = _about(whole, options.folds)
            while found := run_set(whole, options.folds, options.seeds[:count], content["rows"]):
                content["rows"] += found
                text = json.dumps(content, indent=1) + "\n"
                partial = options.out.with_suffix(".partial")
                partial.write_text(text, encoding="utf-8")
                partial.replace(options.out)
                shown = "  ".join(
                    f"{row['method']} {np.mean([int(c) for c in row['correct']]):.3f} ({row['seconds']:.0f} s)"
                    for row in found
                )
                print(f"{name} fold {found[0]['fold']} seed {found[0]['seed']}: {shown}", flush=True)  # fmt: skip
    print(table(content))


def _about(whole: SmallSet, folds: int) -> dict[str, Any]:
    source = SOURCES.get(whole.name)
    return {
        "what": "22 initials of Mandarin syllables, 1 voice" if source is None else source.what,
        "group": "final" if source is None else source.groups,
        "clips": len(whole.waves),
        "classes": len(whole.classes),
        "groups": len(set(whole.groups)),
        "folds": folds,
    }


if __name__ == "__main__":
    main()
