"""Write a dataset as tar shards: each shard aside and moved into place, an index last, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ..audio import AudioReport
from .dataset import Clip, ClipSet
from .examine import flac_bytes
from .manifest import ManifestError
from .prepare import Content, prepare_clips, read_lines, replace, stored
from .prepare_report import audio_report
from .sampler import class_counts
from .shard_index import FORMAT, INDEX, VERSION, is_shards
from .tar import END, packed

Encoding = Literal["s16", "flac"]
SHARD_BYTES = 512 << 20


def write_shards(
    dataset: ClipSet,
    folder: str | os.PathLike[str],
    *,
    encoding: Encoding = "s16",
    shard_bytes: int = SHARD_BYTES,
    workers: int = 0,
    resume: bool = False,
    on_clip: Callable[[], None] | None = None,
) -> AudioReport:
    """Write every clip of a dataset that can be read into tar shards, with an index.

    Samples are stored as 16-bit, whatever they were; the report says what reading changed.

    Args:
        dataset: clips, at the rate to be stored.
        folder: made if it is missing.
        encoding: "s16" for raw samples (quick to read), "flac" for about half the size.
        shard_bytes: a shard is closed before it would grow beyond this.
        workers: processes that read and encode; 0 for this one alone. The shards are the same.
        resume: go on where an interrupted call with the same arguments stopped.
        on_clip: called after each clip.

    Returns:
        What reading the clips changed, and what was skipped and left out.

    Raises:
        ManifestError: the folder holds shards already, or an interrupted run of other settings.
    """
    store = ShardStore(dataset, encoding, shard_bytes)
    clips = prepare_clips(
        dataset, Path(folder), store, workers=workers, resume=resume, on_clip=on_clip
    )
    return audio_report(read_lines(clips))


class ShardStore:
    """Puts clips into tar shards; what `prepare_clips` commits is a shard.

    Args:
        dataset: see `write_shards`.
        encoding: see `write_shards`.
        shard_bytes: see `write_shards`.
    """

    def __init__(
        self, dataset: ClipSet, encoding: Encoding = "s16", shard_bytes: int = SHARD_BYTES
    ) -> None:
        if encoding not in ("s16", "flac"):
            raise ValueError(f"encoding={encoding!r}: expected s16 or flac")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes={shard_bytes}: expected a positive size")
        self._dataset, self._encoding, self._shard_bytes = dataset, encoding, shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._offsets: list[int] = []
        self._size = 0
        self._file: BinaryIO | None = None

    def settings(self) -> dict[str, Any]:
        """See `Store`."""
        return {"encoding": self._encoding, "shard_bytes": self._shard_bytes}

    def pack(self, clip: Clip, samples: np.ndarray) -> bytes:
        """The members of a clip: sound, and JSON that tells of it."""
        dataset, key = self._dataset, f"{clip.index:09d}"
        told: dict[str, Any] = {"sample_rate_hz": dataset.sample_rate_hz}
        values, splits = getattr(dataset, "values", None), getattr(dataset, "splits", None)
        if values is None:
            told = {"labels": [dataset.classes[label] for label in clip.labels], **told}
        else:
            numbers = (float(value) for value in values[clip.index])
            told["values"] = dict(zip(dataset.classes, numbers, strict=True))
        if splits is not None:
            told["split"] = splits[clip.index]
        raw = self._encoding == "s16"
        sound = (
            samples.astype("<i2", copy=False).tobytes()
            if raw
            else flac_bytes(samples, dataset.sample_rate_hz)
        )
        told_bytes = json.dumps(told, allow_nan=False).encode()
        return packed(f"{key}.{self._encoding}", sound) + packed(f"{key}.json", told_bytes)

    def begin(self, folder: Path, saved: Any) -> None:
        """See `Store`."""
        self._folder = folder
        if saved is None:
            if (folder / INDEX).exists() or is_shards(folder):
                raise ManifestError(f"{str(folder)!r} holds shards already: choose another folder")
            return
        for shard in saved:
            file = folder / shard["name"]
            if not file.is_file() or file.stat().st_size != shard["bytes"] + len(END):
                raise ManifestError(f"{str(file)!r} is gone or not as it was written: start again")
        self._shards = saved

    def is_due(self, size: int) -> bool:
        """A shard is closed before it would grow too large."""
        return bool(self._offsets) and self._size + size + len(END) > self._shard_bytes

    def add(self, index: int, content: Content) -> None:
        """See `Store`."""
        if self._file is None:
            name = f"{len(self._shards):06d}.tar"
            self._path = self._folder / name
            self._partial = self._path.with_name(f".{name}.partial")
            self._file = self._partial.open("wb")
            self._digest = hashlib.sha256()
        self._offsets.append(self._size)
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def commit(self) -> Any:
        """Close the shard that is open, if any."""
        if self._file is not None:
            self._file.write(END)
            self._digest.update(END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            self._shards.append(
                {
                    "name": self._path.name,
                    "bytes": self._size,
                    "sha256": self._digest.hexdigest(),
                    "offsets": self._offsets,
                }
            )
            self._file, self._offsets, self._size = None, [], 0
        return self._shards

    def finish(self, clips: Path) -> None:
        """The index, with what the lines say of each clip."""
        dataset, lines = self._dataset, stored(clips)
        counted: list[list[int]] = []
        shards = []
        for shard in self._shards:
            told = [next(lines) for _ in shard["offsets"]]
            entry = {**shard, "labels": [line.get("labels", []) for line in told]}
            counted += entry["labels"]
            if getattr(dataset, "values", None) is not None:
                entry["values"] = [line["values"] for line in told]
            if getattr(dataset, "splits", None) is not None:
                entry["splits"] = [line["split"] for line in told]
            shards.append(entry)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "sample_rate_hz": dataset.sample_rate_hz,
            "encoding": self._encoding,
            "clips": len(counted),
            "classes": list(dataset.classes),
            "class_counts": class_counts(counted, len(dataset.classes)),
            "shards": shards,
        }
        replace(self._folder / INDEX, json.dumps(index, allow_nan=False).encode())
