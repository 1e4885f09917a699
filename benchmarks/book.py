"""The result files of a GPU run, one a group, what is printed meanwhile, and the summary at its end."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

from . import jobs, record, table, tuned

# lines of each part of the summary: what is kept of a run's output is often its end alone
_MOST_TEXT = 11_000  # characters of the whole summary: of more, the start is what would be lost
_MOST_LINE = 160
_MOST_LINES = {"late": 8, "findings": 16, "not ok": 20, "fastest configurations": 20, "speed": 64}


class Book:
    """Takes the answers of jobs and writes what they say.

    Args:
        out: folder of the result files.
        asked: what the run was asked for, for the files' heads.
        shown: print as well.
    """

    def __init__(self, out: Path, asked: dict[str, Any], shown: bool = True) -> None:
        self.out, self.asked, self.shown = out, asked, shown
        self.environment: dict[str, Any] = {}
        self.ceilings: dict[str, float] = {}
        self.digests: dict[str, dict[str, str]] = {}
        self.files: dict[str, record.ResultFile] = {}
        self.steps: list[str] = []  # one line a step of the plan
        self._unwritten = ""

    def add(self, job: jobs.Job, answer: dict[str, Any]) -> None:
        """Keep the answer of one job and write its file."""
        if job["kind"] == "device":
            self._head(answer)
            return
        if job["kind"] == "smoke" and "before" not in job:
            self.digests[job["name"]] = answer.get("digests", {})
        rows = [record.Row(**row) for row in answer["rows"]]
        self._file(job["group"]).rows += rows
        self._write(job["group"])
        bad = [row for row in rows if row.status in ("wrong", "failed")]
        if job["kind"] == "case":
            self.say(f"\n{job['title']}\n{table.text(rows)}")
            return
        state = "ok" if not bad else f"{len(bad)} of {len(rows)} NOT OK"
        took = f", {answer['seconds']:.1f} s" if "seconds" in answer else ""
        self.say(f"{job['title']}: {state}{took}")
        for row in rows:
            if row.status in ("wrong", "failed") or row.reason.startswith("finding"):
                self.say(f"    {row.case} {row.dtype}: {row.status}, {row.reason}")

    def late(self, left: list[jobs.Job]) -> None:
        """List what did not fit in the time."""
        for job in left:
            self._file(job["group"]).rows.append(jobs.failed_row(job, "out of time", "late"))
        for group in {job["group"] for job in left}:
            self._write(group)

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        if self.shown:
            print(text, flush=True)
        # a full disk must not end a run that can still print
        with contextlib.suppress(OSError):
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _head(self, answer: dict[str, Any]) -> None:
        if "environment" not in answer:
            raise RuntimeError(f"the device does not answer: {answer['rows'][0]['reason']}")
        self.environment, self.ceilings = answer["environment"], answer["ceilings"]
        facts = self.environment
        names = ("device_name", "driver", "torch", "cuda", "commit", "date")
        self.say(", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)))
        self.say(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()))

    def _file(self, group: str) -> record.ResultFile:
        if group not in self.files:
            self.files[group] = record.ResultFile(
                suite=group,
                environment=self.environment,
                settings=self.asked,
                ceilings=self.ceilings,
            )
        return self.files[group]

    def _write(self, group: str) -> None:
        name = record.file_name(self.environment, group)
        try:
            self.files[group].write(self.out / name)
        except OSError as error:
            if not self._unwritten:
                self._unwritten = f"result files cannot be written, this is all there is: {error}"
                self.say(self._unwritten)

    def summary(self) -> str:
        """What did not fit, what failed, what was found, and last what was fast."""
        # a job may end while this is made
        files = dict(self.files)
        rows = [row for file in files.values() for row in list(file.rows)]
        parts = {
            "late": _noted(rows, lambda row: row.status == "late"),
            "not ok": _noted(rows, lambda row: row.status in ("wrong", "failed")),
            "findings": _noted(rows, lambda row: row.reason.startswith("finding")),
            "steps": self.steps,
        }
        if "tuned" in self.files:
            plain = [vars(row) for row in self.files["tuned"].rows]
            parts["fastest configurations"] = tuned.fastest(plain)
        parts["speed"] = _speeds(files)
        lines = ["", "summary", *([f" {self._unwritten}"] if self._unwritten else [])]
        for group, file in files.items():
            states = [row.status for row in file.rows]
            counts = (f"{states.count(s)} {s}" for s in record.STATUSES if s in states)
            lines.append(f" {group}: {', '.join(counts)}")
        for name, found in parts.items():
            most = _MOST_LINES.get(name, len(found))
            if name == "speed":
                left = _MOST_TEXT - len("\n".join(lines))
                ends = itertools.accumulate(len(line) + 3 for line in found)
                most = min(most, sum(end <= left for end in ends))
            if found:
                lines += [f" {name}", *(f"  {line}" for line in found[:most])]
            if len(found) > most:
                lines.append(f"  and {len(found) - most} more")
        return "\n".join(lines)

    @property
    def good(self) -> bool:
        """Whether none of our results was wrong or failed."""
        return not any(
            row.status in ("wrong", "failed") and row.provider.startswith("ast_fast")
            for file in self.files.values()
            for row in file.rows
        )


def _speeds(files: dict[str, record.ResultFile]) -> list[str]:
    """One line a case: our time and rate, and the peer that comes closest."""
    lines = []
    for group, file in files.items():
        if group in ("tune", "tuned"):
            continue
        by_case: dict[tuple[str, ...], list[record.Row]] = {}
        for row in list(file.rows):
            if row.ms is not None:
                shape = " ".join(f"{name}{size}" for name, size in row.shape.items())
                key = (row.case, row.mode, shape, row.dtype, row.clock)
                by_case.setdefault(key, []).append(row)
        lines += [_speed(key, rows) for key, rows in by_case.items()]
    return lines


def _speed(key: tuple[str, ...], rows: list[record.Row]) -> str:
    first, peers = rows[0], [row for row in rows if row.ratio is not None]
    assert first.ms is not None
    case, mode, shape, dtype, clock = key
    what = f"{case} {mode} {shape} {dtype}" + (" (graph)" if clock == "graph" else "")
    own = f"{first.provider} {table.duration(first.ms['p50'])}"
    share = "" if first.share is None else f", {first.share:.0%} of {first.ceiling}"
    if not peers:
        return f"{what}: {own}{share}"
    best = min(peers, key=lambda row: row.ratio["p50"])  # type: ignore[index]
    assert best.ratio is not None
    low, middle, high = (best.ratio[name] for name in ("p20", "p50", "p80"))
    return f"{what}: {own}{share}; {middle:.2f}x {best.provider} ({low:.2f}-{high:.2f})"


def _noted(rows: list[record.Row], wanted: Any) -> list[str]:
    """Rows in a line each; what several share in one."""
    found: dict[str, int] = {}
    for row in rows:
        if wanted(row):
            line = f"{row.case} {row.mode} {row.dtype} {row.provider}: {row.status}, {row.reason}"
            found[line[:_MOST_LINE]] = found.get(line[:_MOST_LINE], 0) + 1
    return [line + (f" ({count} times)" if count > 1 else "") for line, count in found.items()]
