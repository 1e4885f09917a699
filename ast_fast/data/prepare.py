"""Every clip of a set read, examined and stored once, by several processes, and resumable.

What is found of each clip is a line of `clips.jsonl`, in the order of the set. At a commit the lines and
what was stored so far are on disk, and a small file says how far that is; what lies behind is done again.
So the result is the same however often it was interrupted, and by however many workers it was made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from .._files import sync
from ..config import AudioConfig
from .dataset import Clip, ClipSet, Skip, Waveform
from .examine import SILENT_PEAK, Energies, Examiner, Pack, changes_of
from .manifest import ManifestError
from .reading import Reading, Step, clip_name
from .shards import ShardSet
from .threads import InlineReader
from .workers import ProcessWorkers

Content = bytes | memoryview
Drop = Literal["silent", "duplicates"]
CLIPS = "clips.jsonl"
_PROGRESS = "prepare.partial.json"
_DONE = "prepare.json"  # the same of a run that came to its end
_MAX_BYTES = 256 << 20
_MAX_RESTARTS = 1000  # three a file that ends its process
_CLIPS_A_TASK = 8


class Store(Protocol):
    """Where clips go."""

    @property
    def pack(self) -> Pack | None:
        """Makes the bytes of a clip; None where there are none to be stored."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one."""

    def begin(self, folder: Path, saved: Any) -> None:
        """Start in a folder, or go on from what `state` gave.

        Raises:
            ManifestError: the folder is in use, or does not hold what it held.
        """

    def is_due(self, size: int) -> bool:
        """Whether to commit before a clip of so many bytes is added."""

    def add(self, index: int, content: Content) -> None:
        """Take the bytes of a clip."""

    def commit(self) -> Any:
        """Have everything on disk; returns what `begin` needs to go on from here."""

    def finish(self, clips: Path) -> None:
        """Write what describes all of it; `clips` has the lines."""


def prepare_clips(
    dataset: ClipSet,
    folder: Path,
    store: Store,
    *,
    workers: int = 0,
    resume: bool = False,
    drop: Sequence[Drop] = (),
    energies: Energies | None = None,
    frames: int = 1024,
    on_clip: Callable[[], None] | None = None,
) -> Path:
    """Read, examine and store every clip; a clip that cannot be read is a line that says why.

    Args:
        dataset: clips, at the rate to be stored.
        folder: made if it is missing.
        store: takes their bytes.
        workers: processes that read; 0 reads in this one. A file that ends its process is skipped.
        resume: go on where an interrupted call with the same arguments stopped; nothing is done if it came
            to its end.
        drop: leave out silent clips, or all but the first of those with the same samples.
        energies: log-mel energies of int16 samples, for statistics; they run in the workers.
        frames: length that the statistics with padding are of.
        on_clip: called after each clip.

    Returns:
        `clips.jsonl`: a JSON object a clip, with its number, name, labels, and what was found.

    Raises:
        ManifestError: the folder is in use, or an interrupted run there had other settings.
        LoaderError: workers keep dying.
    """
    if workers < 0 or frames < 1 or set(drop) - {"silent", "duplicates"}:
        raise ValueError(
            f"workers={workers}, frames={frames}, drop={tuple(drop)}: expected 0 or more, 1 or more, "
            "and silent or duplicates"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        settings = {
            "clips": len(dataset),
            "classes": list(dataset.classes),
            "sample_rate_hz": dataset.sample_rate_hz,
            "source": _digest(dataset),
            "audio": _plain(getattr(dataset, "audio", None)),
            "frames": frames if energies is not None else 0,
            "drop": sorted(drop),
            **store.settings(),
        }
        if resume and _is_done(folder, settings):
            for _ in range(len(dataset) if on_clip is not None else 0):
                on_clip()  # type: ignore[misc]
            return folder / CLIPS
        ledger = _Ledger(folder, settings, resume, store)
        seen = ledger.hashes() if "duplicates" in drop else {}
        pool: InlineReader | ProcessWorkers
        examiner = Examiner(dataset, store.pack, energies, frames)
        if workers:
            pool = ProcessWorkers(examiner, workers, _MAX_BYTES, _MAX_RESTARTS)
        else:
            pool = InlineReader(examiner)
        try:
            for _ in range(ledger.done if on_clip is not None else 0):
                on_clip()  # type: ignore[misc]
            reading = Reading(pool, _MAX_BYTES)
            with contextlib.closing(reading.run(_steps(dataset, ledger.done))) as steps:
                for fetched in steps:
                    for item in fetched.items:
                        line, content = _told(dataset, item)
                        line |= _dropped(line, drop, seen)
                        kept = "error" not in line and "dropped" not in line
                        if kept and store.is_due(len(content)):
                            ledger.commit()
                        if kept:
                            store.add(item.index, content)
                        ledger.write(line)
                        if on_clip is not None:
                            on_clip()
            return ledger.finish()
        finally:
            ledger.close()
            pool.close()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock is the folder's own and leaves nothing behind."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for patience in range(20, -1, -1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not patience:
                    raise ManifestError(
                        f"{str(folder)!r}: another process is preparing here: wait for it or end it"
                    ) from error
                # workers of a process that was killed hold its lock until they notice
                time.sleep(0.1)
            except OSError:  # some network disks cannot lock a folder
                break
        yield
    finally:
        os.close(handle)


def _digest(dataset: ClipSet) -> str:
    """What tells the clips of one set from those of another of the same size."""
    found = hashlib.blake2b(digest_size=16)
    for path in getattr(getattr(dataset, "manifest", None), "paths", ()):
        found.update(path.encode("utf-8", "surrogateescape") + b"\0")
    found.update(repr(dataset.labels).encode())
    for column in (getattr(dataset, "values", None), getattr(dataset, "splits", None)):
        found.update(b"" if column is None else repr(list(map(str, column))).encode())
    return found.hexdigest()


def _plain(audio: AudioConfig | None) -> dict[str, Any] | None:
    return None if audio is None else audio.to_dict()


def _steps(dataset: ClipSet, begin: int) -> Iterator[Step]:
    """Tasks for the clips from a number on, in order: blocks of shards, or a few files at a time."""
    number = 0
    if isinstance(dataset, ShardSet):
        for place, block in enumerate(dataset.blocks):
            first = max(begin - block.first, 0)
            if first < block.count:
                number += 1
                refs = [(number, clip) for clip in range(first, block.count)]
                yield Step([(number, place)], refs, [number])
        return
    for start in range(begin, len(dataset), _CLIPS_A_TASK):
        indices = list(range(start, min(start + _CLIPS_A_TASK, len(dataset))))
        number += 1
        refs = [(number, place) for place in range(len(indices))]
        yield Step([(number, indices)], refs, [number])


def _told(dataset: ClipSet, item: Waveform | Skip) -> tuple[dict[str, Any], Content]:
    """The line of a clip, and its bytes."""
    index = item.index
    line: dict[str, Any] = {"clip": index, "name": clip_name(dataset, index)}
    paths = getattr(getattr(dataset, "manifest", None), "paths", None)
    if paths is not None:
        line["path"] = paths[index]
    values, splits = getattr(dataset, "values", None), getattr(dataset, "splits", None)
    if values is None:
        line["labels"] = list(dataset.labels[index])
    else:
        line["values"] = [float(value) for value in values[index]]
    if splits is not None:
        line["split"] = splits[index]
    if isinstance(item, Skip):
        line["error"] = next(iter(item.report.skipped))
        line["reason"] = item.report.notes[0]
        return line, b""
    line |= item.facts
    changes = changes_of(item.report)
    if changes:
        line["changes"] = changes
    if item.report.notes:
        line["notes"] = item.report.notes
    content = torch.empty(item.length, dtype=torch.uint8)
    if item.length:
        item.copy_to(content)
    return line, content.numpy().data


def _dropped(line: dict[str, Any], drop: Sequence[Drop], seen: dict[str, int]) -> dict[str, str]:
    if "error" in line:
        return {}
    if "silent" in drop and line["peak"] < SILENT_PEAK:
        return {"dropped": "silent"}
    if "duplicates" in drop and seen.setdefault(line["hash"], line["clip"]) != line["clip"]:
        return {"dropped": "duplicate"}
    return {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `clips.jsonl`."""
    with path.open("rb") as file:
        for raw in file:
            yield json.loads(raw)


def _is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a run with these settings came to its end here.

    Raises:
        ManifestError: one with others did.
    """
    done, lines = folder / _DONE, folder / CLIPS
    if not lines.exists():
        return False
    progress = folder / _PROGRESS
    if progress.exists():  # killed between the last two steps
        _check_same(folder, json.loads(progress.read_bytes()), settings)
        progress.replace(done)
    if not done.exists():
        return False
    _check_same(folder, json.loads(done.read_bytes()), settings, "prepared")
    return True


def _check_same(
    folder: Path, state: dict[str, Any], settings: dict[str, Any], was: str = "begun"
) -> None:
    saved = state["settings"]
    changed = [name for name, value in settings.items() if saved.get(name) != value]
    if changed:
        raise ManifestError(
            f"{str(folder)!r} was {was} with other {', '.join(changed)}: resume with the same, or choose "
            "another folder"
        )


class _Ledger:
    """The lines, and the file that says how far lines and store are whole."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool, store: Store) -> None:
        self._folder, self._settings, self._store = folder, settings, store
        self._progress = folder / _PROGRESS
        self._partial = folder / f"{CLIPS}.partial"
        self.done, size, saved = 0, 0, None
        if self._progress.exists():
            state = self._read(resume)
            self.done, size, saved = state["next"], state["bytes"], state["store"]
        store.begin(folder, saved)
        if saved is None and (folder / CLIPS).exists():
            raise ManifestError(
                f"{str(folder)!r} holds a prepared set already: choose another folder"
            )
        self._file = self._partial.open("ab")
        if self._size() < size:
            self._file.close()
            raise ManifestError(f"{str(self._partial)!r} is shorter than it was: start again")
        self._file.truncate(size)
        self._written = self.done
        if saved is None:  # from here on an interrupted run is known as one
            self.commit()

    def _read(self, resume: bool) -> dict[str, Any]:
        if not resume:
            raise ManifestError(
                f"{str(self._folder)!r} holds an interrupted run: resume it, or choose another folder"
            )
        state: dict[str, Any] = json.loads(self._progress.read_bytes())
        _check_same(self._folder, state, self._settings)
        return state

    def _size(self) -> int:
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def hashes(self) -> dict[str, int]:
        """Of the clips that are done: the first clip of each."""
        seen: dict[str, int] = {}
        if self._partial.exists():
            for line in read_lines(self._partial):
                if "hash" in line and line.get("dropped") != "silent":
                    seen.setdefault(line["hash"], line["clip"])
        return seen

    def write(self, line: dict[str, Any]) -> None:
        """Append the line of the next clip."""
        self._file.write(json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n")
        self._written += 1

    def commit(self) -> None:
        """Everything so far is whole."""
        stored = self._store.commit()
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {
            "settings": self._settings,
            "next": self._written,
            "bytes": self._size(),
            "store": stored,
        }
        replace(self._progress, json.dumps(state, allow_nan=False).encode())

    def finish(self) -> Path:
        """The last commit; the lines get their name and the store its description."""
        self.commit()
        self._store.finish(self._partial)
        self._file.close()
        path = self._folder / CLIPS
        self._partial.replace(path)
        # what a second start with `resume` looks at: the report may still be missing
        self._progress.replace(self._folder / _DONE)
        return path

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def replace(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write aside, sync, move into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for part in (content,) if isinstance(content, bytes) else content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def stored(clips: Path) -> Iterator[dict[str, Any]]:
    """The lines of clips that were stored."""
    return (line for line in read_lines(clips) if "error" not in line and "dropped" not in line)


__all__ = ["CLIPS", "Clip", "Drop", "Store", "prepare_clips", "read_lines", "replace", "stored"]
