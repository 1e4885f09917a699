"""What a finished job needs to know to run again the clips that failed, and nothing else.

Beside OUT lies `OUT.retry.json`: which clips failed, and where in OUT their rows belong. A second start with
`--retry-failed` runs these, and writes OUT anew: parts of the old file, and between them what has come out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from .vector_files import index_of

_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Retry:
    """Clips of a finished file that failed.

    Attributes:
        of: what the file is known by.
        clips: number of each, and the writer's position where its rows belong.
    """

    of: str
    clips: list[tuple[int, int]]

    @classmethod
    def read(cls, told: Any) -> Self | None:
        """From what `to_json` gave; None if it is something else."""
        if not isinstance(told, dict) or not isinstance(told.get("clips"), list):
            return None
        return cls(str(told.get("of")), [(int(number), int(at)) for number, at in told["clips"]])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"of": self.of, "clips": self.clips}


def known_by(path: Path) -> str:
    """Size and checksum of a file."""
    found = 0
    with path.open("rb") as file:
        while content := file.read(_READ_BYTES):
            found = zlib.crc32(content, found)
        return f"{os.fstat(file.fileno()).st_size} {found:08x}"


def retry_file(out: Path) -> Path:
    """Where it lies."""
    return out.with_name(f"{out.name}.retry.json")


def read_retry(out: Path) -> tuple[dict[str, Any], Retry] | None:
    """The job's plan, and what failed; None where nothing did."""
    try:
        told = json.loads(retry_file(out).read_text(encoding="utf-8"))
        plan, retry = told["plan"], Retry.read(told["retry"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return None if retry is None else (plan, retry)


def write_retry(
    out: Path, partial: Path, plan: dict[str, Any], clips: Sequence[tuple[int, int]]
) -> None:
    """Say of a file that is about to take the name `out` which clips failed; nothing if none did."""
    file = retry_file(out)
    if not clips:
        file.unlink(missing_ok=True)
        return
    aside = file.with_name(f".{file.name}.partial")
    told = {"plan": plan, "retry": Retry(known_by(partial), list(clips)).to_json()}
    with aside.open("w", encoding="utf-8") as target:
        json.dump(told, target, allow_nan=False)
        target.flush()
        os.fsync(target.fileno())
    aside.replace(file)


def before(out: Path, folder: Path) -> Path:
    """The old file, as a job that runs again sees it from its folder."""
    return folder / f"before{out.suffix}"


def keep_before(out: Path, folder: Path) -> None:
    """Have the old file, and its table if it has one, at hand until the new one has taken its name."""
    link = before(out, folder)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / out.name)
    if index_of(out).exists():  # the new table takes its name before the new file does
        shutil.copyfile(index_of(out), index_of(link))
