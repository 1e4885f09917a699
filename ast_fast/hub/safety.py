"""What a file may ask of memory: nothing that its own size does not account for.

A pickle in a zip archive, a header or a view can declare terabytes in a few bytes. Sizes are compared before
anything is read or built, so that a hostile file costs an error and no memory.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..finite import NotFiniteError, check_state
from .errors import CheckpointError

_HINT = "download it again, or convert it with the program that wrote it"
# PyTorch stores archives uncompressed, and weights of any worth do not shrink to a quarter
_MOST_EXPANSION = 4
_SLACK_BYTES = 1 << 20
_MAX_ENTRIES = 100_000
# PyTorch's restricted reader calls it with any number, and fills so many bytes with zeros
_ALLOCATOR = b"bytearray"
_MAX_HEADER_BYTES = 16 << 20  # of safetensors: a million tensors


def check_archive(file: Path) -> None:
    """Refuse a zip archive that unpacks to far more than it is; a file of another kind passes.

    Raises:
        CheckpointError: the declared sizes are beyond what the file can hold.
    """
    size = file.stat().st_size
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error):
        return  # a damaged one: reading it says so
    declared = sum(entry.file_size for entry in entries)
    if len(entries) > _MAX_ENTRIES or declared > _MOST_EXPANSION * size + _SLACK_BYTES:
        raise CheckpointError(
            f"{str(file)!r} has {size} bytes and would unpack to {declared} in {len(entries)} parts: "
            "expected an archive as torch.save writes it, uncompressed; it was not unpacked"
        )


def check_pickle(file: Path) -> None:
    """Refuse a pickle that asks for memory by name. PyTorch's reader with weights_only runs no code, and yet
    makes a bytearray of any length for whoever asks: eight gibibytes for two hundred bytes of file.

    Raises:
        CheckpointError: it does.
    """
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as all_of,
        ):
            # wherever it lies: two programs need not find the same pickle in an archive
            found = all_of.find(_ALLOCATOR) >= 0
        if not found and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                packed = [e for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
                found = any(_ALLOCATOR in _unpacked(archive, entry) for entry in packed)
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ):
        return  # a damaged one: reading it says so
    if found:
        raise CheckpointError(
            f"{str(file)!r} holds a bytearray, or asks for one: expected tensors; it was not read. "
            "Save its state_dict alone, with torch.save(model.state_dict(), ...)"
        )


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """No more of it than the directory declares, whatever it unpacks to: read() without a size unpacks all."""
    with archive.open(entry) as opened:
        return opened.read(entry.file_size)


def check_count(names: int, file: Path) -> None:
    """Refuse more tensors than any model has.

    Raises:
        CheckpointError: there are.
    """
    if names > _MAX_ENTRIES:
        raise CheckpointError(
            f"{str(file)!r} names {names} tensors: expected those of a model, {_MAX_ENTRIES} at most"
        )


def check_header(file: Path) -> None:
    """Refuse a safetensors file whose header is longer than the file or than any model's.

    Raises:
        CheckpointError: it is.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
    declared = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if declared > min(size, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{str(file)!r} is no readable safetensors file: it has {size} bytes and declares a header of "
            f"{declared}: {_HINT}"
        )


def check_tensors(state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse tensors that are larger than what is stored of them, or that are no plain numbers.

    Raises:
        CheckpointError: names the tensor.
    """
    stored: dict[int, int] = {}
    used = 0
    for key, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(
                f"{str(file)!r}: {key!r} is a {value.layout} tensor on {value.device}: expected plain "
                "tensors; save model.state_dict() of the model in floating point"
            )
        storage = value.untyped_storage()
        held = storage.nbytes()
        needed = value.numel() * value.element_size()
        if needed > held:
            raise CheckpointError(
                f"{str(file)!r}: {key!r} has shape {tuple(value.shape)}, {needed} bytes, of which {held} are "
                "stored: expected whole tensors; save {key: value.contiguous() ...}"
            )
        stored[storage.data_ptr()] = held
        used += needed
    held, size = sum(stored.values()), file.stat().st_size
    if held > _MOST_EXPANSION * size + _SLACK_BYTES:
        raise CheckpointError(
            f"{str(file)!r} has {size} bytes and makes tensors of {held}, which it does not hold: expected "
            "tensors with their values; save model.state_dict()"
        )
    if used > _MOST_EXPANSION * held + _SLACK_BYTES:
        raise CheckpointError(
            f"{str(file)!r} holds {held} bytes that its tensors use as {used}: expected tensors of their own"
        )


def check_weights(state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights that are no floating point numbers, or NaN, which a model would take at face value.

    Raises:
        CheckpointError: names the tensor.
    """
    for key, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f"{str(file)!r}: {key!r} is {value.dtype}: expected floating point weights, not quantised"
            )
    refuse_not_finite(state, repr(str(file)))


def refuse_not_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        CheckpointError: names the tensors.
    """
    try:
        check_state(state, what)
    except NotFiniteError as error:
        raise CheckpointError(str(error)) from error
