"""Everything a run has found, in one file that is always whole: `results.tar.gz`.

A machine that is lent for minutes may be taken away at any of them, and may give back only a few files. So the
folder of a run is packed every half minute and at its end, aside and then moved into place.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import threading
from pathlib import Path

NAME = "results.tar.gz"
EVERY_S = 30.0
# larger files are packed from their end: the last lines of a log say why it ended
_LARGEST = 2**20


class Archive:
    """Packs a folder again and again until it is closed.

    Args:
        folder: what is packed.
        out: folder of the archive; it is made.
        every_s: seconds between two times; 0 packs at the end alone.
    """

    def __init__(self, folder: Path, out: Path, every_s: float = EVERY_S) -> None:
        self.path = out / NAME
        self._folder, self._every_s = folder, every_s
        self._lock, self._closing = threading.Lock(), threading.Event()
        out.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        if every_s:
            self._thread.start()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Pack for the last time."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._every_s)
        self.pack()

    def pack(self) -> None:
        """Write the archive anew; a crash while it is written leaves the one before."""
        with self._lock:
            partial = self.path.with_name(f".{NAME}.partial")
            with partial.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w:gz") as tar:
                    for path in sorted(self._folder.rglob("*")):
                        if path.is_file() and not path.name.endswith(".partial"):
                            _add(tar, path, path.relative_to(self._folder).as_posix())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)

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


def unpack(path: Path, out: Path) -> list[Path]:
    """Put the result files of an archive into a folder; returns where they are.

    Raises:
        ValueError: it is no archive, or has no result file.
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
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for name, text in texts.items():
        # names with folders are no result files of ours
        target = out / Path(name).name
        target.write_bytes(text)
        found.append(target)
    return found
