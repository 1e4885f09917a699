"""Read weights from a file or directory of any dialect, without running code from it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from .._optional import optional_import
from .errors import CheckpointError
from .keys import State, dialect_of, to_ours
from .safety import (
    check_archive,
    check_count,
    check_header,
    check_pickle,
    check_tensors,
    check_weights,
)
from .settings import settings_of_transformers
from .sizes import sizes_of
from .training_files import weights_in

_log = logging.getLogger("ast_fast.hub")

FORMAT = "ast_fast"  # key of our settings in config.json and in the safetensors metadata
VERSION = 1  # of those settings
_MAX_JSON_BYTES = 16 * 2**20
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HINT = "download it again, or convert it with the program that wrote it"


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local path of a file, a directory or a Hugging Face hub id (fetched if it is one).

    Args:
        source: what to look for.
        revision: branch, tag or commit hash of a hub id: a hash pins what is loaded for good.

    Raises:
        CheckpointError: nothing is there, and it is no hub id or the hub is out of reach; or a revision
            was asked of a local path.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} was asked of the local path {str(path)!r}: revisions are of hub "
                "ids; leave it out"
            )
        return path
    name = os.fspath(source)
    if not HUB_ID.fullmatch(name) or path.suffix in _SUFFIXES:
        raise CheckpointError(
            f"{name!r} does not exist: expected a file, a directory or a hub id owner/name"
        )
    hub = optional_import("huggingface_hub")
    if hub is None:
        raise CheckpointError(
            f"{name!r} does not exist here, and reading it from the Hugging Face hub needs "
            "huggingface_hub: pip install 'ast-fast[hf]', or pass a local directory"
        )
    try:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "pytorch_model.bin"],
            )
        )
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{name!r} does not exist here and cannot be had from the Hugging Face hub{at} "
            f"({type(error).__name__}: {error}): download https://huggingface.co/{name} on a machine "
            "with network and pass the directory"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    try:
        size = file.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{str(file)!r} has {size} bytes: expected settings of at most 16 MiB"
            )
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(file)!r} cannot be read as JSON ({error}): {_HINT}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(values).__name__}: expected a JSON object"
        )
    return values


def read_tensors(file: Path) -> tuple[State, dict[str, str]]:
    """Tensors of one file under the names it uses, and its metadata (safetensors only).

    Raises:
        CheckpointError: the file is missing, broken, hostile or holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} does not exist: expected a file of weights")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{str(file)!r} is empty: {_HINT}")
    if file.suffix == ".safetensors":
        # imported here: a machine that only computes needs no safetensors
        from safetensors import SafetensorError, safe_open

        check_header(file)
        try:
            with safe_open(file, framework="pt") as opened:
                check_count(len(opened.keys()), file)
                # a copy: a memory map would change or vanish with the file
                return {key: opened.get_tensor(key).clone() for key in opened.keys()}, dict(  # noqa: SIM118
                    opened.metadata() or {}
                )
        except CheckpointError:
            raise
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{str(file)!r} is no readable safetensors file ({error}): {_HINT}"
            ) from error
    check_archive(file)
    check_pickle(file)
    state = weights_in(_load_pickle(file), file)
    check_tensors(state, file)
    return state, {}


class _Inert(dict[Any, Any]):
    """What stands for an object beside the weights (a path, a namespace): it takes all and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


# whose objects trainers keep beside weights: hyperparameters, paths, figures
_BYSTANDERS = {
    *("argparse", "pathlib", "numpy", "omegaconf", "collections", "datetime", "enum"),
    *("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"),
}


def _load_pickle(file: Path) -> Any:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            names = _bystanders(file)
            if not names:
                raise
            # their names lead to nothing but the inert class: no code of theirs is looked up or run
            inert: list[Any] = [(_Inert, name) for name in names]
            with torch.serialization.safe_globals(inert):
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(file)!r} holds more than tensors, or is damaged; it was not run "
            f"({_first_line(error)}): save its state_dict alone, with torch.save(model.state_dict(), ...)"
        ) from error
    except (
        OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError,
        AttributeError, ImportError, MemoryError, OverflowError, RecursionError, AssertionError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {_first_line(error)}): {_HINT}"
        ) from error


def _bystanders(file: Path) -> list[str]:
    """Classes that a pickle names and that are known to be harmless to leave out; none if others are there."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # an older format, or damaged: the first error tells
        return []
    known = all(name.partition(".")[0] in _BYSTANDERS for name in names)
    return list(names) if known else []


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def read_weights(
    path: str | os.PathLike[str], wanted: Mapping[str, Any] | None = None, **sizes: Any
) -> tuple[State, dict[str, Any]]:
    """Weights under our names, and what is known about them.

    Args:
        path: a file (.pth, .pt, .bin, .safetensors) or a directory (ours or transformers').
        wanted: sizes that the model shall have: see `sizes_of`.
        sizes: settings of `ModelConfig` that the file does not tell (fstride, input_fdim, ...).

    Returns:
        The state dict, and a dict with `dialect` ("ast_fast", "original", "timm", "transformers"),
        `files` read, `model` (settings for `ModelConfig`; empty for timm's image models), `frontend`
        (settings for `LogMelConfig`, or None), `guesses` (what nothing but habit speaks for, in words) and
        `statistics` (whether the normalisation is known).

    Raises:
        CheckpointError: it cannot be read, is no AST, or tells other sizes than were said; names the file
            and the fix.
    """
    path = Path(path)
    settings: dict[str, Any] = {}
    files = [path]
    config: dict[str, Any] = {}
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = _weight_files(path)
    elif not path.is_file():
        raise CheckpointError(f"{str(path)!r} does not exist: expected a file or a directory")
    state: State = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, metadata = read_tensors(file)
        twice = next((key for key in tensors if key in state), None)
        if twice is not None:
            raise CheckpointError(
                f"{str(file)!r} holds {twice!r}, as another part of {str(path)!r} does: {_HINT}"
            )
        state.update(tensors)
    try:
        dialect = dialect_of(state)
        state = to_ours(state)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
    check_weights(state, path)
    if (path.is_dir() or dialect == "transformers") and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    info: dict[str, Any] = {"dialect": dialect, "files": files, "model": {}, "frontend": None}
    info.update(guesses=(), statistics=False)
    own = _own_settings(path, config, metadata)
    if own is not None:
        settings = own
        info["dialect"] = "ast_fast"
    elif dialect == "transformers" and (config or path.is_dir()):
        settings = settings_of_transformers(folder, config)
    if settings:
        info["model"], info["frontend"] = settings["model"], settings.get("frontend")
        front = info["frontend"]
        info["statistics"] = isinstance(front, dict) and {"mean", "std"} <= set(front)
        _check_said(path, info["model"], sizes)
    elif dialect != "timm" or "mlp_head.1.weight" in state:
        found = sizes_of(state, files[0], sizes, wanted)
        info["model"], info["guesses"] = found.model, found.guesses
        if found.statistics is not None:
            mean, std = found.statistics
            info["frontend"], info["statistics"] = {"mean": mean, "std": std}, True
        if dialect == "transformers":
            info["model"].update(eps=1e-12, head_eps=1e-12)
    return state, info


def _check_said(path: Path, model: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """What is said of a file must be what it says itself."""
    for name, value in said.items():
        if model.get(name, value) != value:
            raise CheckpointError(
                f"{str(path)!r} says {name}={model[name]!r:.60} itself, and {value!r} was said of it: leave that "
                f"out; for a model of another size pass {name}={value!r} to from_pretrained"
            )


def _weight_files(directory: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return [directory / name]
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map")
            names = sorted(set(parts.values())) if isinstance(parts, dict) else []
            # a part is a file of this directory: an index may not point elsewhere
            if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
                raise CheckpointError(
                    f"{str(index)!r} names no files of its own directory: {_HINT}"
                )
            return [directory / n for n in names]
    if any((directory / "model" / name).is_file() for name in _WEIGHTS):
        raise CheckpointError(
            f"{str(directory)!r} is the folder of a run: name its model, {str(directory / 'model')!r}"
        )
    raise CheckpointError(
        f"{str(directory)!r} holds no weights: expected {' or '.join(_WEIGHTS)} beside config.json"
    )


def _own_settings(
    path: Path, config: dict[str, Any], metadata: dict[str, str]
) -> dict[str, Any] | None:
    """Our settings: those inside the weights win, since file and settings are then one."""
    if FORMAT in metadata:
        try:
            settings = json.loads(metadata[FORMAT])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{str(path)!r} carries unreadable settings ({error}): {_HINT}"
            ) from error
    elif FORMAT in config:
        settings = config[FORMAT]
    else:
        return None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise CheckpointError(f"{str(path)!r} carries settings without a model: {_HINT}")
    version = settings.get("version", VERSION)
    if version != VERSION:
        raise CheckpointError(
            f"{str(path)!r} is of version {version!r:.60}, and this ast_fast reads version {VERSION}: "
            "pip install -U ast-fast"
        )
    if FORMAT in config and config[FORMAT] != settings:
        _log.warning(
            "%s/config.json differs from the settings inside the weights, which count; to change "
            "settings, pass them to from_pretrained and save again",
            path,
        )
    return settings
