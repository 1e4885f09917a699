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
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from .._files import sync
from ..training.logs import Progress
from .engine import Engine
from .outputs import ClipOutput, Failure
from .pace import Pace
from .ranks import Ranks
from .records import Record, RecordWriter, read_records
from .retry import Retry, before, keep_before, known_by, read_retry, retry_file, write_retry
from .sources import Unit, digest_of

FORMAT = 1


class JobError(ValueError):
    """A job cannot start, or cannot go on, as it was asked to."""


class OutputWriter(Protocol):
    """Writes the records of a job in their order; see `writers`."""

    def add(self, record: Record) -> None:
        """The next clip."""

    def position(self) -> int:
        """How far the file is, in what `copy` counts in."""

    def copy(self, before: Path, begin: int, end: int | None) -> None:
        """Append what an earlier file has from one position to another, or to its end."""

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
    retry_failed: bool = False,
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
        retry_failed: the same, and read again what could not be read; of a finished job that alone.
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
        said = ""
        if ranks.rank == 0:
            said = _caught(lambda: job.begin(resume or retry_failed, retry_failed))
        said, job.again = ranks.from_first((said, job.again))
        if said:
            raise JobError(said)
        if job.out.exists() and job.again is None:
            return Summary(job.clips, job.count_errors(), job.clips, 0.0, 0.0, job.errors_found())
        done = job.done(retry_failed)
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
        self.again: Retry | None = None  # a finished job's clips that failed

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    # ---- beginning

    def begin(self, resume: bool, retry_failed: bool = False) -> None:
        """Make the folder of parts, or take up the one that is there."""
        if not self.clips:
            raise JobError("no audio files were found in the sources named")
        plan = self._plan()
        if self.out.exists():
            if not resume:
                raise JobError(
                    f"{str(self.out)!r} exists already: choose another file, or delete it"
                )
            self._begin_again(plan, retry_failed)
            return
        if not self.out.parent.is_dir():
            raise JobError(f"{str(self.out.parent)!r} is not a folder: make it first")
        known = self._known()
        if known is not None and not resume:
            raise JobError(
                f"{str(self.folder)!r} holds an unfinished run: go on with it (resume), or delete it"
            )
        if known is not None:
            if "retry" in known:
                raise JobError(
                    f"{str(self.folder)!r} holds clips read again for {str(self.out)!r}, which is gone: "
                    "put it back, or delete the folder to begin anew"
                )
            self._fits(known, plan, self.folder)
        self._make_folder()
        if known is None:
            self._write_plan(plan)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise JobError(f"{str(self.folder)!r} cannot be made: {error.strerror}") from error
        self._own()

    def _write_plan(self, plan: dict[str, Any]) -> None:
        partial = self.folder / ".job.json"
        partial.write_text(json.dumps(plan, indent=1, allow_nan=False), encoding="utf-8")
        sync(partial)
        partial.replace(self.folder / "job.json")
        sync(self.folder)
        sync(self.out.parent)

    def _begin_again(self, plan: dict[str, Any], retry_failed: bool) -> None:
        """The file is there: go on with the clips of it that failed, if that was begun or is asked for."""
        self._own()
        known = self._known() or {}
        begun = Retry.read(known.pop("retry", None))
        if begun is not None and begun.of == known_by(self.out):
            self._fits(known, plan, self.folder)
            self.again = begun
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # killed between the last two steps
        self._lock = None
        if not retry_failed or not self.errors.exists():
            return
        told = read_retry(self.out)
        if told is None or told[1].of != known_by(self.out):
            raise JobError(
                f"{str(self.out)!r} is not as it was written, or {str(retry_file(self.out))!r} is gone: "
                "where the clips that failed belong is not known; delete it to begin anew"
            )
        self._fits(told[0], plan, self.out)
        self._make_folder()
        keep_before(self.out, self.folder)
        self.again = told[1]
        self._write_plan({**plan, "retry": self.again.to_json()})

    @staticmethod
    def _fits(known: dict[str, Any], plan: dict[str, Any], where: Path) -> None:
        if known != plan:
            raise JobError(
                f"{str(where)!r} was begun otherwise: {_difference(known, plan)}; resume with the same, "
                "or delete it to begin anew"
            )

    def _plan(self) -> dict[str, Any]:
        content = {"format": FORMAT, "clips": self.clips, "sources": digest_of(self._units)}
        plan: dict[str, Any] = json.loads(
            json.dumps({**content, "settings": self._settings}, allow_nan=False)
        )
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

    def done(self, retry_failed: bool = False) -> bytearray:
        """A byte for each clip: whether it is done, and need not be retried."""
        flags = bytearray(self.clips)
        if self.again is not None:
            flags = bytearray(b"\1" * self.clips)
            for number, _ in self.again.clips:
                flags[number] = 0
        for path in self._parts():
            for record in read_records(path):
                if not (retry_failed and "error" in record.meta):
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
            sync(partial)
            write_retry(self.out, partial, self._plan(), failed)
        except BaseException:
            for left in (partial, errors):
                left.unlink(missing_ok=True)
            raise
        if failed:
            sync(errors)
            errors.replace(self.errors)
        else:
            errors.unlink()
            self.errors.unlink(missing_ok=True)
        partial.replace(self.out)
        sync(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        return len(failed)

    def _write(self, writer: OutputWriter, errors: Path) -> list[tuple[int, int]]:
        """Give all records to a writer, in order, and list those that failed; gives where they belong."""
        parts = [read_records(path) for path in self._parts()]
        records = heapq.merge(*parts, key=lambda record: record.number)
        failed: list[tuple[int, int]] = []
        clips = copied = 0
        old, places = before(self.out, self.folder), self.again.clips if self.again else []
        with errors.open("w", encoding="utf-8") as file:
            for number, found in itertools.groupby(records, key=lambda record: record.number):
                record = _best(found)
                if self.again is not None:
                    if clips == len(places) or places[clips][0] != number:
                        break
                    writer.copy(old, copied, places[clips][1])
                    copied = places[clips][1]
                clips += 1
                if "error" in record.meta:
                    failed.append((number, writer.position()))
                    file.write(json.dumps(record.meta, allow_nan=False) + "\n")
                else:
                    writer.add(record)
            if self.again is not None:
                writer.copy(old, copied, None)
        expected = self.clips if self.again is None else len(places)
        if clips != expected:
            raise JobError(
                f"{str(self.folder)!r} holds {clips} of {expected} clips: run it again to resume"
            )
        writer.close()
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


def _best(records: Iterator[Record]) -> Record:
    """Of what several starts and processes had of a clip: what was read, if any of them could."""
    found = list(records)
    return next((record for record in found if "error" not in record.meta), found[-1])


def failure_record(failure: Failure) -> Record:
    """What is kept of a clip that cannot be read."""
    error = failure.error
    meta = {
        "file": failure.path if failure.path is not None else failure.source,
        "error": type(error).__name__,
        "reason": error.reason,
    }
    return Record(failure.number, meta, {})


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
