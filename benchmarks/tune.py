"""Find the fastest configurations of our kernels on this GPU, and whether a library is faster still.

    python -m benchmarks.tune [OP[,OP...]] --seconds 300 [--out DIR] [--write]
    python -m benchmarks.tune --from FILE [FILE...] [--write]      picks from result files; needs no GPU

Candidates compete with the committed configuration and with what a library offers, interleaved on the same
inputs, on a batch that fills the GPU and on one clip; a wrong one never wins. Best guesses of every op come
before anything generated, compiled ahead on the CPU's cores while others are measured, so whatever the
budget the most valuable part of it was used. --write puts the picks into kernels/tuned: the order of
configurations, and under `use` which implementation is to run. Nothing is tuned while a user's program runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import pool, record, tune_jobs, tune_report
from .case import Settings
from .tune_ahead import Ahead
from .tune_slots import OPS

_COMPILE_SLOTS = max(1, (os.cpu_count() or 2) - 3)
# a measurement whose candidates are still being compiled waits this long for them
_PATIENCE_S = 12.0
_STEP_S = 0.1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("op", nargs="?", default="all", help=f"all, or some of {', '.join(OPS)}")
    made.add_argument("--seconds", type=float, default=300.0, help="time limit (default 300)")
    made.add_argument("--dtype", default="bf16", choices=("bf16", "f16", "f32"))
    made.add_argument("--width", default="64", help="head widths of attention, such as 64,128")
    made.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the result file")
    made.add_argument(
        "--from",
        dest="files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="pick from these result files instead of measuring",
    )
    made.add_argument("--write", action="store_true", help="put the picks into kernels/tuned")
    made.add_argument(
        "--dry-run", action="store_true", help="one candidate each in Triton's interpreter"
    )
    return made


def wanted_ops(text: str) -> tuple[str, ...]:
    """Ops of a comma-separated list.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - {*OPS, "all"})
    if unknown or not names:
        raise ValueError(
            f"op {text!r}: unknown {', '.join(unknown) or '(none given)'}; "
            f"expected all, or some of {', '.join(OPS)}"
        )
    return OPS if "all" in names else tuple(op for op in OPS if op in names)


def wanted_widths(text: str) -> tuple[int, ...]:
    """Head widths of a comma-separated list.

    Raises:
        ValueError: one is none of those that the kernels take.
    """
    widths = [int(name) if name.isdigit() else 0 for name in text.split(",")]
    if not set(widths) <= {32, 64, 96, 128}:
        raise ValueError(f"--width {text!r}: expected some of 32, 64, 96, 128")
    return tuple(widths)


Finished = Callable[[tune_jobs.Job, dict[str, Any]], None]


def search(
    measured: Sequence[tune_jobs.Job],
    workers: pool.Pool,
    compilers: pool.Pool | None,
    add: Finished,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[tune_jobs.Job]:
    """Measure in order of value within the time, and compile what comes next on the other cores.

    Args:
        measured: jobs of `tune_jobs.tune_jobs`.
        workers: processes that measure.
        compilers: processes that compile; None: an interpreted kernel cannot be.
        add: called with each job and its answer.
        seconds: time limit; no job starts later.
        clock: seconds, rising.
        sleep: waits that many seconds.

    Returns:
        The measurements that did not fit in the time.
    """
    end = clock() + seconds
    waiting = list(measured)
    asked = tune_jobs.compile_jobs(waiting) if compilers is not None else []
    with Ahead(compilers, asked, add, slots=_COMPILE_SLOTS, deadline=end) as ahead:
        idle_since = clock()
        while waiting and clock() < end:
            job = next((job for job in waiting if ahead.known(job)), None)
            if job is None:
                if clock() - idle_since < _PATIENCE_S:
                    sleep(_STEP_S)
                    continue
                job = waiting[0]  # its worker compiles what is missing
            waiting.remove(job)
            left = ahead.without_refused(job)
            if left is not None:
                workers.run([left], add, slots=1, deadline=end)
            idle_since = clock()
    return waiting


def measure(options: argparse.Namespace, ops: tuple[str, ...], widths: tuple[int, ...]) -> Path:
    """Run the search on this machine; the result file."""
    import torch

    from . import environment

    dry = options.dry_run
    device = "cpu" if dry else "cuda"
    settings = Settings(device=device, dtypes=(options.dtype,), backend="triton", tiny=dry)
    capability = 80  # what the interpreter stands for
    if not dry:
        major, minor = torch.cuda.get_device_capability()
        capability = major * 10 + minor
    wanted = tune_jobs.Wanted(capability, options.dtype, widths, ops)
    measured = tune_jobs.tune_jobs(settings, wanted)
    facts = environment.collect(device)
    asked = {"seconds": options.seconds, "dtype": options.dtype, "dry_run": dry}
    file = record.ResultFile(suite="tune", environment=facts, settings=asked)
    path = record.unused(options.out / record.file_name(facts, "tune"))

    lock = threading.Lock()  # two pools report

    def add(job: tune_jobs.Job, answer: dict[str, Any]) -> None:
        with lock:
            keep(job, answer)

    def keep(job: tune_jobs.Job, answer: dict[str, Any]) -> None:
        rows = [record.Row(**row) for row in answer["rows"]]
        bad = [f"{row.provider} {row.status}: {row.reason}" for row in rows if row.status != "ok"]
        if job["kind"] == "tune" or bad:
            print(f"{job['title']}: {'; '.join(bad) or 'all right'}", flush=True)
            file.rows += rows
            file.write(path)

    setup = {
        "settings": dataclasses.asdict(settings),
        "limits": tune_jobs.LIMITS,
        "threads": 1 if dry else 0,
    }
    # those that compile leave the GPU alone: to ask whether it still answers would take memory on it
    apart = setup | {"settings": dataclasses.asdict(settings) | {"device": "cpu"}, "threads": 1}
    with pool.Pool(setup) as workers, pool.Pool(apart) as compilers:
        late = search(measured, workers, None if dry else compilers, add, options.seconds)
    print(f"{len(measured) - len(late)} of {len(measured)} measurements in {options.seconds:.0f} s")
    file.write(path)
    print(f"measured: {path}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, search or read, report, write; return the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        ops, widths = wanted_ops(options.op), wanted_widths(options.width)
    except ValueError as error:
        made.error(str(error))
    if not 0 < options.seconds < float("inf"):
        made.error(f"--seconds {options.seconds:g}: expected more than 0 and an end")
    if options.files and options.dry_run:
        made.error("--from reads result files: --dry-run makes one")
    if options.dry_run and (options.dtype != "f32" or options.write):
        made.error(
            "--dry-run goes with --dtype f32 and without --write: the interpreter has no bfloat16"
        )
    files = options.files
    if not files:
        if options.dry_run:
            # before Triton is imported, here and in the workers
            os.environ["TRITON_INTERPRET"] = "1"
        import torch

        if not options.dry_run and not torch.cuda.is_available():
            made.error(
                "this PyTorch sees no CUDA device; --dry-run shows the control flow on a CPU, and "
                "--from picks from result files"
            )
        files = [measure(options, ops, widths)]
    try:
        report = tune_report.Report(files, ops, dry_run=options.dry_run)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.text())
    if options.write:
        print(report.write())
    return 0 if report.found.places() else 1


if __name__ == "__main__":
    sys.exit(main())
