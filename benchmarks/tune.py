"""Find the fastest configurations of the attention kernels on this GPU: `python -m benchmarks.tune attention`.

Compiles every candidate ahead of time on the CPU's cores and drops what spills or does not fit; checks and times the
rest, a few at a time interleaved with the committed configuration, on a grid that fills the GPU and on one clip; writes
the result file, and with --write the picks into kernels/tuned/attention.json, in a family of this GPU's own. Nothing is
ever tuned while a user's program runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import jobs, pool, record
from .case import Settings
from .tune_space import Entry, Place, Timing, candidates, pick, table_text, with_picks

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "tuned" / "attention.json"
KERNELS = ("forward", "dq", "dkv", "one_pass")
OWNED = {"forward": "block_m", "dq": "block_m", "dkv": "block_n", "one_pass": "block_n"}
_ARITHMETIC = {"bf16": "16bit", "f16": "16bit", "f32": "f32"}
_SHAPES = {"large": (32, 1214), "small": (1, 1214)}
_TINY = {"large": (1, 20), "small": (1, 7)}
_AT_ONCE = 6  # candidates timed beside the committed one
_COMPILE_SLOTS = max(1, (os.cpu_count() or 2) - 2)
# of the time limit, for compiling
_COMPILE_SHARE = 0.4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("op", choices=("attention",))
    made.add_argument("--minutes", type=float, default=9.0, help="time limit (default 9)")
    made.add_argument("--dtype", default="bf16", choices=tuple(_ARITHMETIC))
    made.add_argument("--width", default="64", help="head widths, such as 64,128")
    made.add_argument("--kernels", default=",".join(KERNELS), help="some of " + ", ".join(KERNELS))
    made.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the result file")
    made.add_argument("--write", action="store_true", help=f"put the picks into {TABLE.name}")
    made.add_argument(
        "--dry-run", action="store_true", help="two candidates each in Triton's interpreter"
    )
    return made


def places(options: argparse.Namespace) -> list[Place]:
    """What the command line asks for.

    Raises:
        ValueError: a kernel or a width is unknown.
    """
    kernels = [name for name in options.kernels.split(",") if name]
    unknown = sorted(set(kernels) - set(KERNELS))
    if unknown or not kernels:
        raise ValueError(f"--kernels: unknown {', '.join(unknown)}; expected {', '.join(KERNELS)}")
    widths = [int(text) if text.isdigit() else 0 for text in options.width.split(",")]
    if not set(widths) <= {32, 64, 96, 128}:
        raise ValueError(f"--width {options.width!r}: expected some of 32, 64, 96, 128")
    arithmetic = _ARITHMETIC[options.dtype]
    return [Place(kernel, arithmetic, width) for kernel in kernels for width in widths]


def committed(place: Place, capability: int) -> list[Entry]:
    """The table's list for one place; empty where the GPU's family has none."""
    from ast_fast.kernels import _tuned

    family = _tuned.configs("attention", capability)
    return list(family.get(place.kernel, {}).get(place.arithmetic, {}).get(str(place.width), []))


def entries(place: Place, capability: int) -> list[Entry]:
    """The committed configurations, then the candidates that are not among them."""
    known = committed(place, capability)
    return known + [entry for entry in candidates(place, capability) if entry not in known]


def compile_job(place: Place, entry: Entry, dtype: str, capability: int) -> jobs.Job:
    """Compile one candidate; no GPU is touched."""
    return _job("compile", place, [entry], dtype, f"compile {place} {_config_name(entry)}") | {
        "capability": capability
    }


def measure_jobs(
    place: Place, rivals: Sequence[Entry], lead: Entry, dtype: str, tiny: bool
) -> Iterator[jobs.Job]:
    """Time candidates in groups, each with the committed configuration in its rounds."""
    others = [entry for entry in rivals if entry != lead]
    groups = [others[at : at + _AT_ONCE] for at in range(0, len(others), _AT_ONCE)] or [[]]
    for size, shape in (_TINY if tiny else _SHAPES).items():
        for number, group in enumerate(groups):
            title = f"tune {place} {size} {number + 1} of {len(groups)}"
            job = _job("tune", place, [lead, *group], dtype, title)
            yield job | {"size": size, "shape": list(shape)}


def _job(kind: str, place: Place, group: list[Entry], dtype: str, title: str) -> jobs.Job:
    return {
        "kind": kind,
        "title": title,
        "group": "tune",
        "limit_s": 180,
        "place": list(place),
        "entries": group,
        "dtype": dtype,
    }


def _config_name(entry: Entry) -> str:
    from ast_fast.kernels.attention_problem import Config

    return Config(**entry).name


class Findings:
    """What has been measured: which candidates compile, and times over the committed one's."""

    def __init__(self) -> None:
        self.compiled: dict[Place, list[Entry]] = {}
        self.ratios: dict[tuple[Place, str, str], float] = {}
        self.rows: list[record.Row] = []

    def add(self, job: jobs.Job, answer: dict[str, Any]) -> None:
        """Keep the answer of one job."""
        rows = [record.Row(**row) for row in answer["rows"]]
        place = Place(*job["place"])
        if job["kind"] == "compile":
            if rows[0].status == "ok":
                self.compiled.setdefault(place, []).append(job["entries"][0])
            else:
                self.rows += rows
            return
        self.rows += rows
        timed = {row.provider: row for row in rows}
        lead = timed.get(_config_name(job["entries"][0]))
        for entry in job["entries"]:
            row = timed.get(_config_name(entry))
            if lead is None or row is None or row.status != "ok":
                continue
            # a peer may be ten times as far off as we may; these are all ours
            if row.error is not None and lead.budget is not None and row.error > lead.budget:
                row.status, row.reason = "wrong", f"over our budget of {lead.budget:.3g}"
                continue
            # its time over the lead's; the lead has none
            ratio = 1.0 if row.ratio is None else row.ratio["p50"]
            self.ratios[place, job["size"], json.dumps(entry)] = ratio
        done = ", ".join(f"{row.provider} {row.status}" for row in rows if row.status != "ok")
        print(f"{job['title']}: {done or 'all right'}", flush=True)

    def timings(self, place: Place) -> list[Timing]:
        """Candidates of one place that were right at both sizes."""
        found = []
        for (where, size, text), large in self.ratios.items():
            if where == place and size == "large":
                small = self.ratios.get((place, "small", text))
                if small is not None:
                    found.append(Timing(json.loads(text), large, small))
        return found


def search(options: argparse.Namespace, settings: Settings, capability: int) -> Findings:
    """Compile, then measure, within the time limit."""
    started = time.monotonic()
    end = started + options.minutes * 60
    wanted = [place for place in places(options) if committed(place, capability)]
    limits = {"seconds": 0.5, "min_rounds": 5, "max_rounds": 25, "sample_ms": 3.0}
    if options.dry_run:
        limits |= {"seconds": 0.0, "min_rounds": 2, "max_rounds": 2, "sample_ms": 0.1}
        limits["warmup_ms"] = 0.1
    setup = {"settings": dataclasses.asdict(settings), "limits": limits, "threads": 0}
    found = Findings()
    with pool.Pool(setup) as workers:
        if options.dry_run:
            # an interpreted kernel cannot be compiled
            found.compiled = {place: entries(place, capability)[:2] for place in wanted}
        else:
            asked = [
                compile_job(place, entry, options.dtype, capability)
                for place in wanted
                for entry in entries(place, capability)
            ]
            deadline = started + _COMPILE_SHARE * (end - started)
            late = workers.run(asked, found.add, slots=_COMPILE_SLOTS, deadline=deadline)
            print(f"{len(asked) - len(late)} of {len(asked)} candidates compiled or refused")
        asked = []
        for place in wanted:
            lead = committed(place, capability)[0]
            rivals = found.compiled.get(place, [])
            asked += measure_jobs(place, rivals, lead, options.dtype, settings.tiny)
        late = workers.run(asked, found.add, slots=1, deadline=end)
        if late:
            print(f"{len(late)} of {len(asked)} measurements did not fit in the time")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, search, write, return the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        wanted = places(options)
    except ValueError as error:
        made.error(str(error))
    if options.dry_run and (options.dtype != "f32" or options.write):
        made.error(
            "--dry-run goes with --dtype f32 and without --write: the interpreter has no bfloat16"
        )
    if options.dry_run:
        # before Triton is imported, here and in the workers
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from . import environment

    if not options.dry_run and not torch.cuda.is_available():
        made.error("this PyTorch sees no CUDA device; --dry-run shows the control flow on a CPU")
    device = "cpu" if options.dry_run else "cuda"
    settings = Settings(
        device=device, dtypes=(options.dtype,), backend="triton", tiny=options.dry_run
    )
    capability = 80
    if not options.dry_run:
        major, minor = torch.cuda.get_device_capability()
        capability = major * 10 + minor
    found = search(options, settings, capability)
    facts = environment.collect(device)
    file = record.ResultFile(
        suite="tune",
        environment=facts,
        settings={"minutes": options.minutes, "dtype": options.dtype, "dry_run": options.dry_run},
        rows=found.rows,
    )
    path = options.out / record.file_name(facts, "tune")
    file.write(path)
    print(f"measured: {path}")
    picks: dict[Place, list[Entry]] = {}
    for place in wanted:
        timings = found.timings(place)
        if timings:
            picks[place] = pick(timings, OWNED[place.kernel])
            best = min(timing.large for timing in timings)
            print(
                f"{place}: {', '.join(map(_config_name, picks[place]))}; {1 / best:.2f}x the committed"
            )
    if options.write and picks:
        origin = f"measured on {facts['device_name']} on {facts['date'][:10]}: {path.name}"
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        changed = with_picks(table, capability, picks, origin)
        TABLE.write_text(table_text(changed), encoding="utf-8")
        print(f"written: {TABLE.relative_to(ROOT)}; run the tests of tests/aot on it")
    return 0 if picks else 1


if __name__ == "__main__":
    sys.exit(main())
