"""Everything a run has found, in one file that is always whole: `results.tar.gz`.

A machine that is lent for minutes may be taken away at any of them, and may give back only a few files. So the
folder of a run is packed every half minute and at its end, aside and then moved into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from . import record

NAME = "results.tar.gz"
EVERY_S = 30.0
# larger files are packed from their end: the last lines of a log say why it ended
_LARGEST = 2**20


class NotPacked(RuntimeError):
    """The last archive could not be written; the message says where everything is."""


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for one run, gone afterwards: unless it could not be packed, then it is all there is."""
    folder = Path(tempfile.mkdtemp(prefix="ast_fast_gpu_"))
    try:
        yield folder
    except NotPacked:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _held(out: Path) -> int:
    """The folder, open and locked until it is closed or the process has ended.

    Raises:
        RuntimeError: another run holds it.
    """
    held = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise RuntimeError(
            f"--out {out}: another run packs into it; give one of its own"
        ) from error
    except OSError:
        pass  # a file system without locks
    return held


class Archive:
    """Packs a folder again and again until it is closed.

    Args:
        folder: what is packed.
        out: folder of the archive; it is made.
        every_s: seconds between two times; 0 packs at the start and the end alone.

    Raises:
        RuntimeError: nothing can be written there, or another run does.
    """

    def __init__(self, folder: Path, out: Path, every_s: float = EVERY_S) -> None:
        self.path = out / NAME
        self._folder, self._every_s = folder, every_s
        self._lock, self._closing = threading.Lock(), threading.Event()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._held = _held(out)
            self._put_earlier_aside()
            # a folder that takes nothing is found out now, not when there is something to lose
            self.pack()
        except OSError as error:
            raise RuntimeError(f"--out {out}: expected a folder to write to: {error}") from error
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        if every_s:
            self._thread.start()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Pack for the last time.

        Raises:
            NotPacked: it cannot be written; the archive is the one before, the folder has all of it.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._every_s)
        try:
            self.pack()
        except OSError as error:
            where = f"what was found since its last half minute stays in {self._folder}"
            raise NotPacked(f"{self.path} cannot be written: {error}; {where}") from error
        finally:
            os.close(self._held)

    def pack(self) -> None:
        """Write the archive anew; a crash while it is written leaves the one before."""
        with self._lock:
            partial = self.path.with_name(f".{NAME}.partial")
            try:
                with partial.open("wb") as file:
                    with tarfile.open(fileobj=file, mode="w:gz") as tar:
                        for path in sorted(self._folder.rglob("*")):
                            if path.is_file() and not path.name.endswith(".partial"):
                                _add(tar, path, path.relative_to(self._folder).as_posix())
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.path)
            except OSError:
                # on a full disk it would take the room that the next one needs
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise

    def _put_earlier_aside(self) -> None:
        """What an earlier run left in the folder is not ours to write over."""
        if self.path.exists():
            names = (
                self.path.with_name(f"results-{number}.tar.gz") for number in itertools.count(1)
            )
            self.path.rename(next(path for path in names if not path.exists()))

    def _repeat(self) -> None:
        while not self._closing.wait(self._every_s):
            # a file that a worker removes meanwhile is packed the next time, or was of no use
            with contextlib.suppress(OSError):
                self.pack()


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        # a log may grow while it is packed: only what was there is
        kept = size if path.suffix == ".json" else min(size, _LARGEST)
        file.seek(size - kept)
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = kept, int(path.stat().st_mtime)
        tar.addfile(entry, file)


def unpack(path: Path, out: Path, dry_run: bool = True) -> list[Path]:
    """Put the result files of an archive into a folder; returns where they are.

    What the folder has stays: another file of the same name gets a number, as after two runs on one day.

    Args:
        path: of the archive.
        out: the folder; it is made.
        dry_run: take the files of a dry run too.

    Raises:
        ValueError: it is no archive, has no result file, or is of a dry run.
    """
    try:
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".json")]
            contents = {member.name: tar.extractfile(member) for member in members}
            texts = {name: file.read() for name, file in contents.items() if file is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a whole {NAME} of benchmarks.gpu: {error}") from error
    if not texts:
        raise ValueError(f"{path}: holds no result file; the log in it says why")
    if not dry_run and any(_of_dry_run(text) for text in texts.values()):
        raise ValueError(
            f"{path}: of a dry run, whose times say nothing; --dry-run unpacks it all the same"
        )
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for name, text in texts.items():
        # names with folders are no result files of ours
        target = out / Path(name).name
        same = [each for each in out.glob(f"{target.stem}*.json") if each.read_bytes() == text]
        if not same:
            target = record.unused(target)
            target.write_bytes(text)
        found.append(same[0] if same else target)
    return found


def _of_dry_run(text: bytes) -> bool:
    try:
        return bool(json.loads(text)["settings"].get("dry_run"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # whoever reads it says what is wrong with it
