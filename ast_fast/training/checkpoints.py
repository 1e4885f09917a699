"""Checkpoints that are whole or absent: a crash at any point leaves the last good one loadable.

A checkpoint is written to a folder with a temporary name, flushed to disk, renamed, and only then
pointed to. It holds the model as `from_pretrained` reads it, the optimiser and random state as
tensors, the rest as JSON with the SHA-256 of every file; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._files import sync
from ..hub import CheckpointError

SCHEMA = 1
_log = logging.getLogger("ast_fast.training")


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint could not be written; the ones written before are still there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint on disk, read and verified.

    Attributes:
        folder: where it lies; `folder / "model"` is a pretrained model directory.
        tensors: optimiser and random state.
        state: everything else, plain values.
    """

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: `step-00000120/`, and the pointers `latest` and `best`.

    Args:
        folder: where they lie; created if needed.
        keep: how many of the newest to keep; the best one is kept beside them.
        owner: whether this process writes; others of the same run only read.

    Raises:
        CheckpointWriteError: the folder cannot be made or another process trains in it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, owner: bool = True) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._lock: IO[str] | None = None
        if owner:
            self._own()

    def _own(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise CheckpointWriteError(
                f"{self.folder}: cannot be written: {error.strerror}; choose another run folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CheckpointWriteError(
                f"{self.folder}: another process is training here; wait for it or choose another "
                "run folder"
            ) from error
        # what a killed process left half written
        for left_over in (*self.folder.glob(".tmp-*"), *self.folder.glob(".old-*")):
            shutil.rmtree(left_over, ignore_errors=True)

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        write_model: Callable[[Path], object],
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        best: bool = False,
    ) -> Path:
        """Write a checkpoint, point to it, and drop those no longer kept.

        Args:
            step: steps done.
            write_model: writes the model into the folder it is given.
            tensors: optimiser and random state.
            state: plain values.
            best: whether this is the best so far.

        Raises:
            CheckpointWriteError: the disk is full or not writable.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_model(partial / "model")
            contiguous = {
                name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
            }
            save_file(contiguous, partial / "state.safetensors")
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {path.relative_to(partial).as_posix(): _sha256(path) for path in files}
            meta = {"schema": SCHEMA, "step": step, "files": digests, "state": state}
            (partial / "state.json").write_text(
                json.dumps(meta, indent=1, allow_nan=False), encoding="utf-8"
            )
            for path in (*files, partial / "state.json"):
                sync(path)
            for place in {path.parent for path in files} | {partial}:
                sync(place)
            if final.exists():  # the same step again, after resuming
                final.rename(self.folder / f".old-{final.name}-{os.getpid()}")
            partial.rename(final)
            sync(self.folder)
            self._point("latest", final.name)
            if best:
                self._point("best", final.name)
        except (OSError, SafetensorError, CheckpointError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise CheckpointWriteError(
                f"{final}: the checkpoint could not be written: {reason}; the earlier ones are "
                "intact: make room or choose another run folder, and resume"
            ) from error
        self._prune()
        return final

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """
        steps = sorted((path.name for path in self.folder.glob("step-*")), reverse=True)
        latest = self.pointer("latest")
        if latest in steps:
            steps.remove(latest)
            steps.insert(0, latest)
        problems = []
        for name in steps:
            try:
                return read_checkpoint(self.folder / name)
            except CheckpointError as error:
                problems.append(str(error))
                _log.warning("%s; trying an older checkpoint", error)
        if problems:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be used: {'; '.join(problems)}; start a new run"
            )
        return None

    def pointer(self, name: str) -> str | None:
        """The folder that `latest` or `best` names."""
        try:
            return (self.folder / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def _point(self, name: str, target: str) -> None:
        partial = self.folder / f".{name}-{os.getpid()}"
        partial.write_text(target + "\n", encoding="ascii")
        sync(partial)
        partial.replace(self.folder / name)
        sync(self.folder)

    def _prune(self) -> None:
        kept = {self.pointer("latest"), self.pointer("best")}
        newest = sorted(path.name for path in self.folder.glob("step-*"))[-self.keep :]
        for path in self.folder.glob("step-*"):
            if path.name not in kept and path.name not in newest:
                shutil.rmtree(path, onerror=_warn_left_over)
        for path in self.folder.glob(".old-*"):
            shutil.rmtree(path, onerror=_warn_left_over)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint and verify every file of it.

    Raises:
        CheckpointError: something is missing, changed or of another version.
    """
    try:
        meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if meta["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder}: has schema {meta['schema']}: expected {SCHEMA}; use the version of "
                "ast_fast that wrote it"
            )
        for name, digest in meta["files"].items():
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder}: {name} is not what was written (SHA-256 differs)")
        return Checkpoint(folder, load_file(folder / "state.safetensors"), meta["state"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is not a whole checkpoint: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _warn_left_over(_: object, path: str, info: tuple[Any, BaseException, Any]) -> None:
    _log.warning("an old checkpoint could not be deleted: %s: %s", path, info[1])
