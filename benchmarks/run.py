"""Run suites: `python -m benchmarks.run --suite attention,block [--peers sdpa] [--quick]`.

Prints a table per case and writes one result file a suite.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import ceilings, environment, harness, peers, record, suites, table
from .case import Settings, listed, texts
from .timing import Limits


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    made.add_argument(
        "--suite",
        default="all",
        help=f"all, or some of {', '.join((*suites.SUITES, *suites.EXTRA))}",
    )
    made.add_argument("--peers", help=f"all, none, or some of {', '.join(peers.PEERS)}")
    made.add_argument("--json", type=Path, metavar="FILE", help="one file for all suites")
    made.add_argument("--out", type=Path, default=record.RESULTS, help="folder of result files")
    made.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    made.add_argument("--quick", action="store_true", help="few shapes, few rounds; writes no file")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--dtype", default="f32,bf16", help="some of f32, bf16, f16, bf16-amp")
    made.add_argument("--backend", choices=("triton", "cpp", "reference"), help="of our ops")
    made.add_argument(
        "--only", default="", metavar="TEXT,...", help="cases whose title has one of these"
    )
    made.add_argument("--seconds", type=float, default=8.0, help="time a case (least rounds aside)")
    made.add_argument(
        "--minutes", type=float, help="stop after this long; the rest is listed as late"
    )
    made.add_argument("--list", action="store_true", help="print the titles of the cases and stop")
    return made


def default_backend(device: str) -> str:
    """The fast backend of a device, or the reference where it is missing."""
    from ast_fast import cpp

    if device == "cuda":
        return "triton"
    return "cpp" if cpp.available() else "reference"


def settings_of(options: argparse.Namespace) -> Settings:
    """What the command line asks for.

    Raises:
        ValueError: a name is unknown, or there is no such device.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    dtypes = tuple(options.dtype.split(","))
    unknown = sorted(set(dtypes) - {"f32", "bf16", "f16", "bf16-amp"})
    if unknown:
        raise ValueError(
            f"--dtype {options.dtype!r}: unknown {', '.join(unknown)}; expected f32, bf16, f16"
        )
    return Settings(
        device=device,
        dtypes=dtypes,
        backend=options.backend or default_backend(device),
        quick=options.quick,
        peers=peers.names(options.peers),
        only=texts(options.only),
    )


def limits_of(options: argparse.Namespace) -> Limits:
    """Rounds and times of a case."""
    if options.quick:
        return Limits(
            seconds=min(options.seconds, 3.0), min_rounds=3, max_rounds=15, sample_ms=10.0
        )
    return Limits(seconds=options.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 1 if one of our results was wrong or failed."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        chosen = suites.names(options.suite)
        settings = settings_of(options)
    except ValueError as error:
        made.error(str(error))
    if options.list:
        for name in chosen:
            for case in suites.load(name, settings):
                print(case.title)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    from ast_fast.backend import use_backend

    with use_backend(settings.backend):
        return execute(chosen, settings, options)


def execute(chosen: Sequence[str], settings: Settings, options: argparse.Namespace) -> int:
    """Measure the suites one after the other, writing after every case."""
    if settings.cuda:
        environment.same_arithmetic()
    limits = limits_of(options)
    facts = environment.collect(settings.device)
    print(
        f"{facts['device_name']}, torch {facts['torch']}, {facts['threads']} threads, {settings.ours}"
    )
    tops = ceilings.measure(settings.device, settings.dtypes, quick=settings.quick)
    print(", ".join(f"{key} {value:.4g}" for key, value in tops.items()))
    deadline = time.monotonic() + options.minutes * 60 if options.minutes else None
    asked = {
        "seconds": limits.seconds,
        "min_rounds": limits.min_rounds,
        "sample_ms": limits.sample_ms,
        "backend": settings.backend,
        "quick": settings.quick,
    }
    good = True
    combined = record.ResultFile(suite="all", environment=facts, settings=asked, ceilings=tops)
    for name in chosen:
        file = record.ResultFile(suite=name, environment=facts, settings=asked, ceilings=tops)
        path = options.out / record.file_name(facts, name)
        for case in suites.load(name, settings):
            if not listed(case.title, settings.only):
                continue
            print(f"\n{case.title}", flush=True)
            if deadline is not None and time.monotonic() > deadline:
                rows = [harness.blank(case, settings.ours, "late", "out of time")]
            else:
                rows = harness.measure(case, settings, tops, limits)
            print(table.text(rows), flush=True)
            first = rows[0].status
            good = good and first in ("ok", "late", "skipped")
            file.rows += rows
            combined.rows += rows
            # a quick look is no result: noise must not reach the tables
            if options.json is not None:
                combined.write(options.json)
            elif not settings.quick:
                file.write(path)
    if len(combined.rows) > 1:
        print(f"\n{table.summary(combined.rows)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
