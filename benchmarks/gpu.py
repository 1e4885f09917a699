"""One command for any CUDA machine with PyTorch and Triton: is it right, and how fast is it.

    python -m benchmarks.gpu [--minutes 9.5] [--out DIR] [--only TEXT,...] [--dry-run]
    python -m benchmarks.gpu --suite checks,attention       some parts, as long as there is time
    python -m benchmarks.gpu --unpack results.tar.gz        the result files of a run elsewhere

Without --suite it follows the plan of plan.py, most important first: proofs, checks, kernels, tuning, whole
models. Each job runs in a process that is replaced if the job crashes it, hangs it or loses the device; each
step ends when its time is up. Everything found is packed into DIR/results.tar.gz every half minute and at
the end, and the run ends inside its limit by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import BEGAN, archive, jobs, plan, pool, record, suites
from .background import Background, Watchdog, warming
from .book import Book
from .case import Settings, listed, texts

Now = Callable[[], float]
# with --suite, checks may take this share of the time before the first suite is measured; what is left
# of them comes after the suites
_CHECK_SHARE = 0.4
# how long a job may outlast its step
_GRACE_S = 2.0
_DEVICE_GRACE_S = 60.0
_DEVICE_AGAIN_S = 20.0
# kept at the end of a run for its summary; less is left when the watchdog bites
_LAST_S = 6.0
_WATCHDOG_S = 3.0
_MOST_MINUTES = 24 * 60
# what an interrupted or lent machine sends; the first of them packs what was found
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# importing or compiling the others would take longer than everything else of a dry run
_DRY_RUN_PEERS = ("torch", "sdpa", "sdpa-padded", "loop")
_DRY_RUN_CASES = 2  # a suite
PHASES = ("smoke", "checks", "tuned", "proofs", *suites.SUITES)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--suite", help=f"instead of the plan: all, or some of {', '.join(PHASES)}")
    made.add_argument(
        "--minutes", type=float, default=plan.MINUTES, help="time limit (default %(default)s)"
    )
    made.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        help="folder of results.tar.gz, or of what is unpacked (default benchmarks/results)",
    )
    made.add_argument(
        "--dtype",
        default="bf16,f16,f32",
        help="most important first (default %(default)s); the plan takes the first alone",
    )
    made.add_argument(
        "--only", default="", metavar="TEXT,...", help="jobs whose titles have one of these"
    )
    made.add_argument("--compiled", action="store_true", help="peers under torch.compile too")
    made.add_argument("--quick", action="store_true", help="fewer shapes, with --suite")
    made.add_argument(
        "--dry-run", action="store_true", help="the whole control flow on a CPU, tiny shapes"
    )
    made.add_argument("--list", action="store_true", help="print the jobs and stop")
    made.add_argument(
        "--unpack", type=Path, metavar="FILE", help="put an archive's result files into --out"
    )
    return made


def phases(text: str) -> tuple[str, ...]:
    """Phases of a comma-separated list.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = texts(text)
    unknown = sorted(set(wanted) - {*PHASES, "all"})
    if unknown or not wanted:
        raise ValueError(
            f"--suite {text!r}: unknown {', '.join(unknown) or '(none given)'}; "
            f"expected some of all, {', '.join(PHASES)}"
        )
    return PHASES if "all" in wanted else tuple(name for name in PHASES if name in wanted)


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings of a real or a dry run.

    Raises:
        ValueError: there is no GPU, a dtype is unknown, or there is no time.
    """
    import torch

    if not 0 < options.minutes <= _MOST_MINUTES:
        raise ValueError(
            f"--minutes {options.minutes}: expected more than 0 and at most {_MOST_MINUTES}, a day"
        )
    dtypes = texts(options.dtype)
    unknown = sorted(set(dtypes) - {"bf16", "f16", "f32"})
    if unknown or not dtypes:
        named = ", ".join(unknown) or "(none given)"
        raise ValueError(f"--dtype: unknown {named}; expected some of bf16, f16, f32")
    only = texts(options.only)
    if options.dry_run:
        from .run import default_backend

        return Settings(
            dtypes=("f32",),
            backend=default_backend("cpu"),
            tiny=True,
            peers=_DRY_RUN_PEERS,
            only=only,
        )
    if options.list and not torch.cuda.is_available():
        return Settings(
            device="cuda", dtypes=dtypes, backend="triton", quick=options.quick, only=only
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "this PyTorch sees no CUDA device; --dry-run shows the control flow on a CPU, --list "
            "the plan, and `python -m benchmarks.run --device cpu` measures a CPU"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        dtypes = tuple(dtype for dtype in dtypes if dtype != "bf16")
        if not dtypes:
            raise ValueError("--dtype bf16: this GPU has no bfloat16; expected some of f16, f32")
    return Settings(device="cuda", dtypes=dtypes, backend="triton", quick=options.quick, only=only)


def three_lists(chosen: Sequence[str], settings: Settings, dry_run: bool) -> list[list[jobs.Job]]:
    """Of chosen phases: checks to run first, suites, and checks that may wait."""
    first: list[jobs.Job] = []
    later: list[jobs.Job] = []
    if "smoke" in chosen:
        first += jobs.smoke_jobs(settings, 60)
    if "checks" in chosen:
        lead, *others = [*settings.dtypes, *(["tf32"] if settings.cuda else [])]
        first += jobs.check_jobs(settings, lead)
        for precision in others:
            later += jobs.check_jobs(settings, precision)
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
    return [plan.chosen(jobs_, settings.only) for jobs_ in (first, measured, later)]


def _tuned_jobs(settings: Settings) -> list[jobs.Job]:
    try:
        found = list(jobs.tuned_jobs(settings, _capability(settings)))
    except (ImportError, ValueError) as error:
        print(f"configurations cannot be listed: {error}")
        return []
    if settings.tiny:
        # a dry run only shows that they are found and run, with what a CPU can stand in for
        found = [job for job in found if " f32 " in job["title"]]
        return found[:: max(1, len(found) // 4)]
    return found


def _capability(settings: Settings) -> int:
    import torch

    if not settings.cuda or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def _leads(job: jobs.Job, settings: Settings) -> bool:
    """Whether a configuration serves the model in the leading dtype."""
    return f" {settings.dtypes[0]} " in job["title"]


class Run:
    """One run: its clock, its book, its workers."""

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Settings,
        book: Book,
        now: Now,
        began: float | None = None,
    ) -> None:
        self.options, self.settings, self.book, self.now = options, settings, book, now
        self.started = now() if began is None else began
        self.end = self.started + options.minutes * 60 - _LAST_S
        self.known = plan.Known(settings, options.dry_run, _capability(settings))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now() - self.started

    def device(self, workers: Any, deadline: float) -> None:
        """Ask where we are; everything else needs the answer.

        Raises:
            RuntimeError: the device does not answer.
        """
        # a cold disk may take its time over the first import: without an answer there is no run
        asked = [jobs.device_job()]

        def look(deadline: float) -> None:
            workers.run(asked, self.book.add, slots=1, deadline=deadline, grace_s=_DEVICE_GRACE_S)

        try:
            look(deadline)
        except RuntimeError as error:
            # everything hangs on this one answer
            self.book.say(f"{error}; asked once more")
            look(min(self.end, max(deadline, self.now() + _DEVICE_AGAIN_S)))
        if not self.book.environment:
            raise RuntimeError("no time was left to look at the device: raise --minutes")
        self.known.ceilings = self.book.ceilings

    def follow(self, steps: Sequence[plan.Step], workers: Any, make_pool: Any, stop: Any) -> None:
        """Every step of the plan in its time; what goes wrong in one is recorded, and the next begins."""
        lead, *others = steps
        self.device(workers, self.started + lead.end(self.options.minutes))
        self.book.steps.append(f"{lead.name}: {self.elapsed():.0f} s")
        for step in others:
            began = self.elapsed()
            if step.quiet:
                stop()
            try:
                line = self._step(step, workers, make_pool, began)
            except Exception as error:
                line = f"broke off: {type(error).__name__}: {error}"
            self.known.digests = self.book.digests
            done = f"{step.name}: {line}; {began:.0f} s to {self.elapsed():.0f} s"
            self.book.steps.append(done)
            self.book.say(f"== {done}")

    def _step(self, step: plan.Step, workers: Any, make_pool: Any, began: float) -> str:
        found = plan.chosen(step.jobs(self.known), self.settings.only)
        for job in found:
            job["ceilings"] = self.known.ceilings
        deadline = min(self.end, self.started + step.end(self.options.minutes, began))
        slots = 1 if self.options.dry_run else step.slots
        extra = step.extra(self.known)
        if extra is None:
            left = self._in(workers, found, slots, deadline)
        else:
            with make_pool(extra) as own:
                left = self._in(own, found, slots, deadline)
        self.book.late(left)
        note = step.note(self.known)
        return f"{len(found) - len(left)} of {len(found)} jobs" + (f" ({note})" if note else "")

    def _in(self, workers: Any, found: list[jobs.Job], slots: int, deadline: float) -> Any:
        return workers.run(found, self.book.add, slots=slots, deadline=deadline, grace_s=_GRACE_S)

    def take(self, chosen: Sequence[str], workers: Any) -> None:
        """Chosen phases: checks, suites, the remaining checks, as long as there is time."""
        self.device(workers, self.end)
        first, measured, later = three_lists(chosen, self.settings, self.options.dry_run)
        for job in (*first, *measured, *later):
            job["ceilings"] = self.known.ceilings
        slots = 1 if self.options.dry_run else plan.CHECK_SLOTS
        share = _CHECK_SHARE if measured else 1.0
        checks_end = min(self.end, self.started + share * (self.end - self.started))
        left = self._in(workers, first, slots, checks_end)
        late = self._in(workers, measured, 1, self.end)
        self.book.late(late + self._in(workers, [*left, *later], slots, self.end))


def execute(
    options: argparse.Namespace,
    settings: Settings,
    chosen: Sequence[str] | None,
    now: Now = time.monotonic,
    began: float | None = None,
) -> int:
    """Run within the time limit, which counts from `began`; exit status 1 if one of our results was not ok."""
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
    with archive.run_folder() as folder:
        book = Book(folder, asked | limits)

        def make_pool(extra: Any = None) -> pool.Pool:
            return pool.Pool(setup, extra, folder, now)

        run = Run(options, settings, book, now, began)
        with archive.Archive(folder, options.out) as packed:

            def last_words() -> None:
                try:
                    book.say(book.summary())
                    whole = options.minutes * 60
                    book.say(f"{run.elapsed():.0f} s of {whole:.0f} s; {packed.path}")
                finally:
                    # what cannot be written now is said when the archive is closed
                    with contextlib.suppress(OSError):
                        packed.pack()

            def cut_off() -> None:
                book.say("the run did not end by itself and is cut off")
                last_words()

            with (
                Watchdog(options.minutes * 60 - _WATCHDOG_S - run.elapsed(), cut_off),
                Background(warming(run.known), folder) as background,
                make_pool() as workers,
            ):
                try:
                    if chosen is None:
                        steps = plan.steps(options.dry_run)
                        run.follow(steps, workers, make_pool, background.stop)
                    else:
                        run.take(chosen, workers)
                finally:
                    # before the workers are ended, which may take seconds
                    last_words()
    return 0 if book.good else 1


def print_plan(known: plan.Known, minutes: float) -> None:
    """The steps, their ends, and the titles of their jobs."""
    for step in plan.steps(known.dry_run):
        end = step.end(minutes)
        print(f"until {int(end // 60)}:{int(end % 60):02d}  {step.name}, {step.slots} at a time")
        for job in plan.chosen(step.jobs(known), known.settings.only):
            print(f"    {job['title']}")


def print_lists(lists: Sequence[Sequence[jobs.Job]]) -> None:
    """The titles of chosen suites' jobs."""
    for name, found in zip(("first", "then", "if time is left"), lists, strict=True):
        print(name)
        for job in found:
            print(f"    {job['title']}")


def told_to_end(number: int, _: object) -> None:
    """End the run as its end would: what was found is packed, and no second signal breaks that off."""
    for each in _SIGNALS:
        # not SIG_IGN: of one that is on its way already Python would print a warning, behind the summary
        signal.signal(each, lambda *_: None)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Parse, run, return the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        if options.unpack is not None:
            for path in archive.unpack(options.unpack, options.out, options.dry_run):
                print(path)
            return 0
        chosen = None if options.suite is None else phases(options.suite)
        settings = settings_of(options)
    except ValueError as error:
        made.error(str(error))
    if chosen is None:
        settings = plan.settings_of_plan(settings, options.compiled)
    elif not options.compiled:
        settings = dataclasses.replace(settings, without=plan.COMPILED)
    if settings.only or options.list:
        known = plan.Known(settings, options.dry_run, _capability(settings))
        lists = [] if chosen is None else three_lists(chosen, settings, options.dry_run)
        steps = plan.steps(options.dry_run) if chosen is None else []
        found = [*(step.jobs(known) for step in steps), *lists]
        titles = [job["title"] for some in found for job in some]
        absent = [text for text in settings.only if not any(listed(t, (text,)) for t in titles)]
        if absent:
            made.error(f"--only {', '.join(absent)}: no job's title has it; --list prints them all")
        if options.list:
            print_lists(lists) if lists else print_plan(known, options.minutes)
            return 0
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, told_to_end)
    try:
        return execute(options, settings, chosen, began=began)
    except RuntimeError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
