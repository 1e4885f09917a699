"""Write weights so that a crash at any moment leaves the old or the new ones loadable."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import sync
from .errors import CheckpointError
from .keys import to_transformers
from .reading import FORMAT, VERSION
from .safety import refuse_not_finite
from .settings import as_json, settings_for_transformers

_log = logging.getLogger("ast_fast.hub")
_STALE_SECONDS = 3600.0  # no save takes as long: what is older was left by one that was killed


class _TensorsError(Exception):
    """safetensors could not write."""


def replace_file(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new file beside the target, put it on disk, then give it the target's name.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written; the old file stays.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        # a directory of its own: safetensors too keeps a temporary file beside the one it writes
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{str(target.parent)!r} cannot be written ({error}): choose another directory"
        ) from error
    temporary = Path(folder) / target.name
    try:
        write(temporary)
        sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        sync(target.parent)
    except (OSError, _TensorsError) as error:
        raise CheckpointError(
            f"{str(target)!r} could not be written ({error}); what was there before is kept"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another save swept it first
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _umask() -> int:
    # the only way to read it; mkstemp makes files private, a checkpoint follows the user's habit
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_tensors(state: Mapping[str, Tensor], metadata: dict[str, str]) -> Callable[[Path], None]:
    # safetensors refuses views and shared memory: every tensor is stored whole and by itself
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

    def write(path: Path) -> None:
        # imported here: a machine that only computes needs no safetensors
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(tensors, path, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            raise _TensorsError(str(error)) from error

    return write


def _write_text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def replace_text(target: Path, text: str) -> Path:
    """Fill a text file, whole or not at all; returns its path."""
    replace_file(target, _write_text(text))
    return target


def write_pretrained(
    directory: str | os.PathLike[str], state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Path:
    """Write model.safetensors and config.json.

    The settings are inside the weights too, so that a crash between the two files does no harm:
    the weights' own settings count.

    Args:
        directory: made if absent; may be the one the weights came from.
        state: our keys.
        settings: {"model": ..., "frontend": ...}.

    Raises:
        CheckpointError: it cannot be written, or weights are NaN or infinite; what was there before is kept.
    """
    directory = Path(directory)
    refuse_not_finite(state, f"what is to be saved in {str(directory)!r}")
    content = {"version": VERSION, **settings}
    metadata = {FORMAT: as_json(content)}
    replace_file(directory / "model.safetensors", _write_tensors(state, metadata))
    replace_file(directory / "config.json", _write_text(as_json({FORMAT: content})))
    return directory


def write_transformers(
    directory: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    model: Mapping[str, Any],
    frontend: Mapping[str, Any],
) -> Path:
    """Write a directory that transformers (4 and 5) loads as `ASTForAudioClassification`.

    Args:
        directory: made if absent.
        state: our keys; the dead image heads are left out.
        model: `ModelConfig` as a dict.
        frontend: `LogMelConfig` as a dict.

    Raises:
        ValueError: transformers' AST cannot express the model.
        CheckpointError: it cannot be written, or weights are NaN or infinite.
    """
    files = settings_for_transformers(model, frontend)
    if model["eps"] != model["head_eps"]:
        _log.warning(
            "transformers' AST has one LayerNorm epsilon: the head's %g becomes %g",
            model["head_eps"],
            model["eps"],
        )
    directory = Path(directory)
    refuse_not_finite(state, f"what is to be saved in {str(directory)!r}")
    replace_file(directory / "model.safetensors", _write_tensors(to_transformers(state), {}))
    for name, values in files.items():
        replace_file(directory / name, _write_text(as_json(values)))
    return directory
