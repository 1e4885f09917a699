"""The result files: what a row holds, how a file is checked, and how it is written.

A file is rewritten whole and moved into place after every row, so that a run that is cut off leaves
what it measured. README.md beside this describes the fields for readers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
STATUSES = ("ok", "wrong", "failed", "skipped", "late")


@dataclasses.dataclass(kw_only=True)
class Row:
    """One candidate on one case, or one check."""

    suite: str
    case: str
    mode: str  # forward | backward | step | latency | check
    shape: dict[str, int]
    dtype: str
    provider: str
    status: str
    reason: str = ""  # why it is not ok
    clock: str = ""  # host | events | graph
    rounds: int = 0
    calls: int = 0  # calls a sample
    ms: dict[str, float] | None = None  # p20, p50, p80 of one call
    # time of this provider over time of ours, round by round; above 1 ours is faster
    ratio: dict[str, float] | None = None
    error: float | None = None  # the worst output's, against float64
    budget: float | None = None
    worst: str = ""  # name of that output and the measure
    clips_per_second: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    ceiling: str = ""  # gemm | copy
    share: float | None = None  # of the measured ceiling
    peak_mib: float | None = None
    # of a tuning run: which choice it is evidence for (tune_case.facts); other files have no such key
    tune: dict[str, Any] | None = None


@dataclasses.dataclass(kw_only=True)
class ResultFile:
    """Rows and everything that says what they mean."""

    suite: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        for row in values["rows"]:
            if row["tune"] is None:
                del row["tune"]
        return values

    def write(self, path: Path) -> None:
        """Write aside and move into place. Figures are rounded to five digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        text = json.dumps(_rounded(self.to_dict()), indent=1, allow_nan=False)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no NaN: an error that is not a number is stored as null beside status "wrong"
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """A result file as plain values.

    Raises:
        ValueError: it does not follow the schema.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found = problems(content)
    if found:
        raise ValueError(f"{path.name} is not a result file of schema {SCHEMA}: {'; '.join(found)}")
    return content


ENVIRONMENT_KEYS = ("device", "device_name", "torch", "commit", "date", "threads", "packages")


def problems(content: dict[str, Any]) -> list[str]:
    """What in `content` breaks the schema, one sentence each."""
    names = {field.name for field in dataclasses.fields(ResultFile)}
    if set(content) != names:
        return [f"top-level keys are {sorted(content)}, expected {sorted(names)}"]
    found = []
    if content["schema"] != SCHEMA:
        found.append(f"schema is {content['schema']}, expected {SCHEMA}")
    missing = [key for key in ENVIRONMENT_KEYS if key not in content["environment"]]
    if missing:
        found.append(f"environment lacks {', '.join(missing)}")
    if not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(content["environment"].get("date"))
    ):
        found.append("environment.date is not of the form 2026-01-31T12:00:00Z")
    for number, row in enumerate(content["rows"]):
        found += [f"row {number}: {problem}" for problem in _row_problems(row)]
    return found


def _row_problems(row: dict[str, Any]) -> list[str]:
    names = {field.name for field in dataclasses.fields(Row)}
    if set(row) | {"tune"} != names:
        return [f"keys differ by {sorted((set(row) | {'tune'}) ^ names)}"]
    found = []
    if row["status"] not in STATUSES:
        found.append(f"status {row['status']!r} is none of {', '.join(STATUSES)}")
    if row["status"] != "ok":
        if row["ms"] is not None or row["ratio"] is not None:
            found.append(f"status {row['status']!r} and yet a speed")
        if not row["reason"]:
            found.append(f"status {row['status']!r} without a reason")
    for name in ("ms", "ratio"):
        spread = row[name]
        if spread is None:
            continue
        if set(spread) != {"p20", "p50", "p80"}:
            found.append(f"{name} has {sorted(spread)}, expected p20, p50, p80")
        elif not 0 < spread["p20"] <= spread["p50"] <= spread["p80"]:
            found.append(f"{name} is not positive and ascending: {spread}")
    if row["ms"] is not None and (row["error"] is None or row["budget"] is None):
        found.append("a speed without an error and a budget")
    return found


def file_name(environment: dict[str, Any], suite: str) -> str:
    """`<device>-<suite>-<date>.json`."""
    device = re.sub(r"[^a-z0-9]+", "_", environment["device_name"].lower()).strip("_")
    return f"{device}-{suite}-{environment['date'][:10]}.json"


def unused(path: Path) -> Path:
    """`path`, or the first of `-2`, `-3`, ... behind its stem that is no file: two runs of a day are two results."""
    numbers = itertools.count(2)
    found = path
    while found.exists():
        found = path.with_name(f"{path.stem}-{next(numbers)}{path.suffix}")
    return found
