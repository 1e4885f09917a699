"""Results of many clips as one file, by work that may be killed at any moment and goes on where it stood.

While a job runs, every process appends what it has done to a file of its own in `OUT.parts/`. At the end
the first process merges them, in the order of the clips, into a file that takes its name when it is
whole. So OUT is there or not; a clip is in the parts or not; and whoever is killed leaves both true. The
number of processes may change from one start to the next.
"""

from __future__ import annotations

import dataclasses
import fcntl
import heapq
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from ..training.logs import Progress
from .engine import Engine
from .outputs import ClipOutput, Failure
from .ranks import Ranks
from .records import Record, RecordWriter, flush_folder, read_records
from .sources import Unit, digest_of

FORMAT = 1


class JobError(ValueError):
    """A job cannot start, or cannot go on, as it was asked to."""


class OutputWriter(Protocol):
    """Writes the records of a job in their order; see `writers`."""

    def add(self, record: Record) -> None:
        """The next clip."""

    def close(self) -> None:
        """Finish the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What a job came to.

    Attributes:
        clips: of the sources.
        failed: of them, those that could not be read.
        before: done by earlier starts.
        seconds: this start took.
        audio_s: seconds of audio in what this process did.
        errors: file that lists those that failed, if there are any.
    """

    clips: int
    failed: int
    before: int
    seconds: float
    audio_s: float
    errors: Path | None


def run_job(
    out: Path,
    units: Sequence[Unit],
    engine: Engine,
    encode: Callable[[ClipOutput], Record],
    make_writer: Callable[[Path], OutputWriter],
    settings: dict[str, Any],
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Summary:
    """Run clips and write what comes of them.

    Args:
        out: the file that is to be.
        units: the clips, the same in every process and at every start.
        engine: runs them.
        encode: what is kept of a clip.
        make_writer: writes the final file at a path.
        settings: plain values; a job is only resumed with the same.
        resume: go on with what `OUT.parts/` holds, if there is anything.
        ranks: the processes that share the work.
        progress: show progress.

    Raises:
        JobError: there is something at `out` already, or other settings or clips began the job.
        RankLostError: another process ended early.
        KeyboardInterrupt: it was interrupted; says how to go on.
    """
    ranks = ranks or Ranks()
    started = time.monotonic()
    job = _Job(Path(out), units, settings)
    with ranks, job:
        said = _caught(lambda: job.begin(resume)) if ranks.rank == 0 else ""
        if said := ranks.from_first(said):
            raise JobError(said)
        if job.out.exists():
            return Summary(job.clips, job.count_errors(), job.clips, 0.0, 0.0, job.errors_found())
        done = job.done()
        before = sum(done)
        # the share of each is the same whatever the others have done meanwhile
        mine = [
            kept
            for unit in units[ranks.rank :: ranks.world_size]
            if (kept := unit.without(_Flags(done))) is not None
        ]
        audio_s = job.work(mine, engine, encode, ranks, progress)
        ranks.wait()
        failed = job.merge(make_writer) if ranks.rank == 0 else 0
        failed = ranks.from_first(failed)
        seconds = time.monotonic() - started
        return Summary(job.clips, failed, before, seconds, audio_s, job.errors_found())


def _caught(action: Callable[[], None]) -> str:
    """What a JobError says, for all ranks to end with; empty if there is none."""
    try:
        action()
    except JobError as error:
        return str(error)
    return ""


class _Flags:
    """Numbers whose byte is set, as a collection."""

    def __init__(self, flags: bytearray) -> None:
        self._flags = flags

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and bool(self._flags[number])

    def __iter__(self) -> Iterator[int]:
        return (number for number, flag in enumerate(self._flags) if flag)

    def __len__(self) -> int:
        return sum(self._flags)


class _Job:
    """The files of a job."""

    def __init__(self, out: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.parts")
        self.errors = out.with_name(f"{out.name}.errors.jsonl")
        self.clips = sum(len(unit.numbers) for unit in units)
        self._units, self._settings = units, settings
        self._lock: IO[str] | None = None

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    # ---- beginning

    def begin(self, resume: bool) -> None:
        """Make the folder of parts, or take up the one that is there."""
        if not self.clips:
            raise JobError("no audio files were found in the sources named")
        plan = self._plan()
        if self.out.exists():
            if not resume:
                raise JobError(
                    f"{str(self.out)!r} exists already: choose another file, or delete it"
                )
            self._own()
            shutil.rmtree(self.folder, ignore_errors=True)  # killed between the last two steps
            return
        if not self.out.parent.is_dir():
            raise JobError(f"{str(self.out.parent)!r} is not a folder: make it first")
        known = self._known()
        if known is not None and not resume:
            raise JobError(
                f"{str(self.folder)!r} holds an unfinished run: go on with it (resume), or delete it"
            )
        if known is not None and known != plan:
            raise JobError(
                f"{str(self.folder)!r} was begun otherwise: {_difference(known, plan)}; resume with "
                "the same, or delete it to begin anew"
            )
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise JobError(f"{str(self.folder)!r} cannot be made: {error.strerror}") from error
        self._own()
        if known is None:
            partial = self.folder / ".job.json"
            partial.write_text(json.dumps(plan, indent=1), encoding="utf-8")
            _flush(partial)
            partial.replace(self.folder / "job.json")
            flush_folder(self.folder)
            flush_folder(self.out.parent)

    def _plan(self) -> dict[str, Any]:
        content = {"format": FORMAT, "clips": self.clips, "sources": digest_of(self._units)}
        plan: dict[str, Any] = json.loads(json.dumps({**content, "settings": self._settings}))
        return plan

    def _known(self) -> dict[str, Any] | None:
        try:
            known = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise JobError(
                f"{self.folder / 'job.json'}: is not JSON ({error}): delete the folder to begin anew"
            ) from error
        return known if isinstance(known, dict) else {}

    def _own(self) -> None:
        """Keep others out while this process lives."""
        if not self.folder.is_dir():
            return
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(
                f"{str(self.folder)!r}: another process is at this job: wait for it or end it"
            ) from error

    # ---- work

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.records"))

    def done(self) -> bytearray:
        """A byte for each clip: whether the parts hold it."""
        flags = bytearray(self.clips)
        for path in self._parts():
            for record in read_records(path):
                flags[record.number] = 1
        return flags

    def work(
        self,
        units: list[Unit],
        engine: Engine,
        encode: Callable[[ClipOutput], Record],
        ranks: Ranks,
        progress: bool,
    ) -> float:
        """Run units and append what comes of them; gives the seconds of audio in them."""
        count = sum(len(unit.numbers) for unit in units)
        if not count:
            return 0.0
        writer = RecordWriter(self.folder, ranks.rank)
        bar = Progress(count, title="clips", enabled=progress and ranks.rank == 0)
        pace = Pace()
        failed = 0
        try:
            for output in engine.run(iter(units)):
                if isinstance(output, Failure):
                    failed += 1
                    writer.write(failure_record(output))
                    bar.say(f"skipped {output.error}")
                    seconds = 0.0
                else:
                    writer.write(encode(output))
                    seconds = output.seconds
                bar.step(**pace.step(seconds, failed))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {pace.clips} of {count} clips; they are kept in "
                f"{str(self.folder)!r}: go on with the same command and --resume"
            ) from None
        finally:
            writer.close()
            bar.close()
        return pace.audio_s

    # ---- the end

    def merge(self, make_writer: Callable[[Path], OutputWriter]) -> int:
        """Write the final files from the parts; gives how many clips failed."""
        partial = self.out.with_name(f".{self.out.name}.partial")
        errors = self.errors.with_name(f".{self.errors.name}.partial")
        try:
            failed = self._write(make_writer(partial), errors)
        except BaseException:
            for left in (partial, errors):
                left.unlink(missing_ok=True)
            raise
        _flush(partial)
        if failed:
            _flush(errors)
            errors.replace(self.errors)
        else:
            errors.unlink()
            self.errors.unlink(missing_ok=True)
        partial.replace(self.out)
        flush_folder(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        return failed

    def _write(self, writer: OutputWriter, errors: Path) -> int:
        """Give all records to a writer, in order, and list those that failed."""
        parts = [read_records(path) for path in self._parts()]
        failed, last, clips = 0, -1, 0
        with errors.open("w", encoding="utf-8") as file:
            for record in heapq.merge(*parts, key=lambda record: record.number):
                if record.number == last:  # two processes had it
                    continue
                last, clips = record.number, clips + 1
                if "error" in record.meta:
                    failed += 1
                    file.write(json.dumps(record.meta) + "\n")
                else:
                    writer.add(record)
        writer.close()
        if clips != self.clips:
            raise JobError(
                f"{str(self.folder)!r} holds {clips} of {self.clips} clips: run it again to resume"
            )
        return failed

    def errors_found(self) -> Path | None:
        """The file that lists what failed, if there is one."""
        return self.errors if self.errors.exists() else None

    def count_errors(self) -> int:
        """Lines of that file."""
        if not self.errors.exists():
            return 0
        with self.errors.open("rb") as file:
            return sum(1 for _ in file)


def failure_record(failure: Failure) -> Record:
    """What is kept of a clip that cannot be read."""
    error = failure.error
    meta = {
        "file": failure.path if failure.path is not None else failure.source,
        "error": type(error).__name__,
        "reason": error.reason,
    }
    return Record(failure.number, meta, {})


class Pace:
    """How quick a job is; `Progress` says how long it will take."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.clips, self.audio_s = 0, 0.0

    def step(self, audio_s: float, failed: int) -> dict[str, str]:
        """One clip is done; what to show."""
        self.clips += 1
        self.audio_s += audio_s
        took = max(time.monotonic() - self._started, 1e-6)
        shown = {
            "clips/s": f"{self.clips / took:.1f}",
            "audio": f"{self.audio_s / took:.0f}x",
        }
        return {**shown, "failed": str(failed)} if failed else shown


def _difference(known: dict[str, Any], plan: dict[str, Any]) -> str:
    """What differs between two plans, by name."""
    said = []
    if known.get("sources") != plan["sources"] or known.get("clips") != plan["clips"]:
        said.append(f"other clips ({known.get('clips')}, now {plan['clips']})")
    before, now = known.get("settings") or {}, plan["settings"]
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            said.append(f"{name} was {before.get(name)!r:.80}, is {now.get(name)!r:.80}")
    return "; ".join(said) or "by another version"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
