"""One command for any CUDA machine with PyTorch and Triton: is it right, and how fast is it.

    python -m benchmarks.gpu [--suite a,b] [--minutes 9] [--out DIR] [--dry-run]

Prints the device and its ceilings, checks every op and the whole model at full size in every dtype,
runs every committed kernel configuration, then measures the suites, most important first, until the
time is up. Results are rewritten after every job: a run that is cut off leaves what it measured. A job
that raises, crashes or hangs is recorded as failed and the rest goes on in a new process.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import jobs, pool, record, suites, table, tuned
from .case import Settings

# checks may take this share of the time before the first suite is measured; what is left of them
# comes after the suites
_CHECK_SHARE = 0.4
# checks do not measure time, so several processes compile and run side by side
_CHECK_SLOTS = 4
# importing or compiling the others would take longer than everything else of a dry run
_DRY_RUN_PEERS = ("torch", "sdpa", "sdpa-padded", "loop")
_DRY_RUN_CASES = 2  # a suite
PHASES = ("checks", "tuned", "proofs", *suites.SUITES)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--suite", default="all", help=f"all, or some of {', '.join(PHASES)}")
    made.add_argument("--minutes", type=float, default=9.0, help="time limit (default 9)")
    made.add_argument("--out", type=Path, default=record.RESULTS, help="folder of result files")
    made.add_argument("--dtype", default="bf16,f16,f32", help="most important first")
    made.add_argument("--only", default="", metavar="TEXT", help="jobs whose title has this text")
    made.add_argument("--quick", action="store_true", help="fewer shapes")
    made.add_argument(
        "--dry-run", action="store_true", help="the whole control flow on a CPU, tiny shapes"
    )
    return made


def phases(text: str) -> tuple[str, ...]:
    """Phases of a comma-separated list.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(wanted) - {*PHASES, "all"})
    if unknown or not wanted:
        raise ValueError(
            f"--suite {text!r}: unknown {', '.join(unknown) or '(none given)'}; "
            f"expected some of all, {', '.join(PHASES)}"
        )
    return PHASES if "all" in wanted else tuple(name for name in PHASES if name in wanted)


class Book:
    """The result files of a run, one a group, and what is printed."""

    def __init__(self, out: Path, asked: dict[str, Any], shown: bool = True) -> None:
        self.out = out
        self.asked = asked
        self.environment: dict[str, Any] = {}
        self.ceilings: dict[str, float] = {}
        self.files: dict[str, record.ResultFile] = {}
        self.shown = shown

    def add(self, job: jobs.Job, answer: dict[str, Any]) -> None:
        """Keep the answer of one job and write its file."""
        if job["kind"] == "device":
            self._head(answer)
            return
        rows = [record.Row(**row) for row in answer["rows"]]
        self._file(job["group"]).rows += rows
        self._write(job["group"])
        bad = [row for row in rows if row.status in ("wrong", "failed")]
        if job["kind"] == "case":
            self._say(f"\n{job['title']}\n{table.text(rows)}")
        else:
            state = "ok" if not bad else f"{len(bad)} of {len(rows)} NOT OK"
            took = f", {answer['seconds']:.1f} s" if "seconds" in answer else ""
            self._say(f"{job['title']}: {state}{took}")
            for row in bad:
                self._say(f"    {row.case} {row.dtype}: {row.status}, {row.reason}")

    def late(self, left: list[jobs.Job]) -> None:
        """List what did not fit in the time."""
        for job in left:
            self._file(job["group"]).rows.append(jobs.failed_row(job, "out of time", "late"))
        for group in {job["group"] for job in left}:
            self._write(group)

    def _head(self, answer: dict[str, Any]) -> None:
        if "environment" not in answer:
            raise RuntimeError(f"the device does not answer: {answer['rows'][0]['reason']}")
        self.environment, self.ceilings = answer["environment"], answer["ceilings"]
        facts = self.environment
        names = ("device_name", "driver", "torch", "cuda", "commit", "date")
        self._say(", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)))
        self._say(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()))

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
        self.files[group].write(self.out / name)

    def _say(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)

    def summary(self) -> str:
        """Counts a group, the failures, and the fastest configurations."""
        lines = ["", "summary"]
        for group, file in self.files.items():
            states = [row.status for row in file.rows]
            counts = ", ".join(
                f"{states.count(state)} {state}" for state in record.STATUSES if state in states
            )
            lines.append(f"  {group}: {counts}")
        if "tuned" in self.files:
            rows = [vars(row) for row in self.files["tuned"].rows]
            lines += ["fastest configurations", *(f"  {line}" for line in tuned.fastest(rows))]
        return "\n".join(lines)

    @property
    def good(self) -> bool:
        """Whether none of our results was wrong or failed."""
        return not any(
            row.status in ("wrong", "failed") and row.provider.startswith("ast_fast")
            for file in self.files.values()
            for row in file.rows
        )


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings of a real or a dry run.

    Raises:
        ValueError: there is no GPU, or a dtype is unknown.
    """
    import torch

    dtypes = tuple(options.dtype.split(","))
    unknown = sorted(set(dtypes) - {"bf16", "f16", "f32"})
    if unknown:
        raise ValueError(f"--dtype: unknown {', '.join(unknown)}; expected some of bf16, f16, f32")
    if options.dry_run:
        from .run import default_backend

        return Settings(
            dtypes=("f32",),
            backend=default_backend("cpu"),
            tiny=True,
            peers=_DRY_RUN_PEERS,
            only=options.only,
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "this PyTorch sees no CUDA device; --dry-run shows the control flow on a CPU, and "
            "`python -m benchmarks.run --device cpu` measures a CPU"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        dtypes = tuple(dtype for dtype in dtypes if dtype != "bf16")
    return Settings(
        device="cuda", dtypes=dtypes, backend="triton", quick=options.quick, only=options.only
    )


def plan(chosen: Sequence[str], settings: Settings, dry_run: bool) -> list[list[jobs.Job]]:
    """Jobs in three lists: checks to run first, suites, and checks that may wait."""
    first: list[jobs.Job] = []
    later: list[jobs.Job] = []
    if "checks" in chosen:
        lead, *others = [*settings.dtypes, *(["tf32"] if settings.cuda else [])]
        first += jobs.check_jobs(settings, lead)
        for precision in others:
            later += jobs.check_jobs(settings, precision)
    if dry_run and "checks" in chosen:
        first += jobs.probe_jobs()
    if "tuned" in chosen:
        configurations = list(_tuned_jobs(settings))
        first += [job for job in configurations if _leads(job, settings)]
        later += [job for job in configurations if not _leads(job, settings)]
    if "proofs" in chosen:
        # after the suites: they take minutes, and the checks already say whether results are right
        later = [*jobs.proof_jobs(settings), *later]
    measured = []
    for name in chosen:
        if name in suites.SUITES:
            found = list(jobs.case_jobs(settings, name))
            measured += found[:_DRY_RUN_CASES] if dry_run else found
    # 16-bit of every suite before float32 of any
    order = {dtype: place for place, dtype in enumerate(settings.dtypes)}
    measured.sort(key=lambda job: order.get(job["dtype"], 9))
    lists = [first, measured, later]
    only = settings.only
    return [[job for job in jobs_ if not only or only in job["title"]] for jobs_ in lists]


def _tuned_jobs(settings: Settings) -> list[jobs.Job]:
    capability = 90
    if settings.cuda:
        import torch

        major, minor = torch.cuda.get_device_capability()
        capability = major * 10 + minor
    try:
        found = list(jobs.tuned_jobs(settings, capability))
    except (ImportError, ValueError) as error:
        print(f"configurations cannot be listed: {error}")
        return []
    if settings.tiny:
        # a dry run only shows that they are found and run, with what a CPU can stand in for
        found = [job for job in found if " f32 " in job["title"]]
        return found[:: max(1, len(found) // 4)]
    return found


def _leads(job: jobs.Job, settings: Settings) -> bool:
    """Whether a configuration serves the model in the leading dtype."""
    return f" {settings.dtypes[0]} " in job["title"]


def execute(options: argparse.Namespace, settings: Settings, chosen: Sequence[str]) -> int:
    """Run the plan within the time limit; exit status 1 if one of our results was not ok."""
    started = time.monotonic()
    total = options.minutes * 60
    end = started + total
    asked = {"minutes": options.minutes, "backend": settings.backend, "dry_run": options.dry_run}
    limits = {"seconds": 2.0, "min_rounds": 5, "max_rounds": 25, "sample_ms": 5.0}
    if options.dry_run:
        limits = {"seconds": 0.0, "min_rounds": 2, "max_rounds": 2, "sample_ms": 0.1}
        limits |= {"warmup_ms": 0.1}
    setup = {
        "settings": dataclasses.asdict(settings),
        "limits": limits,
        "threads": 1 if options.dry_run else 0,
    }
    book = Book(options.out, asked | limits)
    with pool.Pool(setup) as workers:
        late = _run_phases(workers, book, options, settings, chosen, (started, end))
    book.late(late)
    print(book.summary())
    print(f"{time.monotonic() - started:.0f} s of {total:.0f} s; results in {options.out}")
    return 0 if book.good else 1


def _run_phases(
    workers: pool.Pool,
    book: Book,
    options: argparse.Namespace,
    settings: Settings,
    chosen: Sequence[str],
    limits: tuple[float, float],
) -> list[jobs.Job]:
    """Device, checks, suites, the remaining checks; returns what did not fit in the time."""
    started, end = limits
    workers.run([jobs.device_job()], book.add, slots=1, deadline=end)
    if not book.environment:
        raise RuntimeError("no time was left to look at the device: raise --minutes")
    first, measured, later = plan(chosen, settings, options.dry_run)
    for job in (*first, *measured, *later):
        job["ceilings"] = book.ceilings
    slots = 1 if options.dry_run else _CHECK_SLOTS
    share = _CHECK_SHARE if measured else 1.0
    checks_end = min(end, started + share * (end - started))
    left = workers.run(first, book.add, slots=slots, deadline=checks_end)
    late = workers.run(measured, book.add, slots=1, deadline=end)
    return late + workers.run([*left, *later], book.add, slots=slots, deadline=end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        chosen = phases(options.suite)
        settings = settings_of(options)
    except ValueError as error:
        made.error(str(error))
    return execute(options, settings, chosen)


if __name__ == "__main__":
    sys.exit(main())
