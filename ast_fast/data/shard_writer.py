"""Write a dataset as tar shards: each shard aside and moved into place, an index last, resumable."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .._optional import require_package
from ..audio import AudioReport
from .dataset import Clip, ClipSet
from .manifest import ManifestError
from .sampler import class_counts
from .shard_index import FORMAT, INDEX, VERSION, is_shards
from .tar import END, packed

Encoding = Literal["s16", "flac"]
SHARD_BYTES = 512 << 20
_PROGRESS = "index.partial.json"


def write_shards(
    dataset: ClipSet,
    folder: str | os.PathLike[str],
    *,
    encoding: Encoding = "s16",
    shard_bytes: int = SHARD_BYTES,
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
        resume: go on where an interrupted call with the same arguments stopped.
        on_clip: called after each clip.

    Returns:
        What reading the clips changed, and what was skipped and left out.

    Raises:
        ManifestError: the folder holds shards already, or an interrupted run of other settings.
    """
    if encoding not in ("s16", "flac"):
        raise ValueError(f"encoding={encoding!r}: expected s16 or flac")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}: expected a positive size")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "clips": len(dataset),
        "classes": list(dataset.classes),
        "sample_rate_hz": dataset.sample_rate_hz,
        "encoding": encoding,
        "shard_bytes": shard_bytes,
    }
    done, shards, report = _begin(folder, state, resume)
    while done < len(dataset):
        name = f"{len(shards):06d}.tar"
        entry, done = _write_shard(
            dataset, folder / name, done, encoding, shard_bytes, report, on_clip
        )
        shards.append(entry)
        progress = {**state, "next": done, "shards": shards, "report": report.to_dict()}
        _replace(folder / _PROGRESS, json.dumps(progress).encode())
    written = [labels for shard in shards for labels in shard["labels"]]
    index = {
        "format": FORMAT,
        "version": VERSION,
        "sample_rate_hz": dataset.sample_rate_hz,
        "encoding": encoding,
        "clips": len(written),
        "classes": list(dataset.classes),
        "class_counts": class_counts(written, len(dataset.classes)),
        "shards": shards,
    }
    _replace(folder / INDEX, json.dumps(index).encode())
    (folder / _PROGRESS).unlink(missing_ok=True)
    return report


def _begin(
    folder: Path, state: dict[str, Any], resume: bool
) -> tuple[int, list[dict[str, Any]], AudioReport]:
    """The next clip, the shards that are there, and what reading those told."""
    progress = folder / _PROGRESS
    if (folder / INDEX).exists() or (is_shards(folder) and not progress.exists()):
        raise ManifestError(f"{str(folder)!r} holds shards already: choose another folder")
    if not progress.exists():
        return 0, [], AudioReport()
    if not resume:
        raise ManifestError(
            f"{str(folder)!r} holds an interrupted run: resume it, or choose another folder"
        )
    saved = json.loads(progress.read_bytes())
    changed = [name for name, value in state.items() if saved.get(name) != value]
    if changed:
        raise ManifestError(
            f"{str(folder)!r} was begun with other {', '.join(changed)}: resume with the same"
        )
    for shard in saved["shards"]:
        file = folder / shard["name"]
        if not file.is_file() or file.stat().st_size != shard["bytes"] + len(END):
            raise ManifestError(f"{str(file)!r} is gone or not as it was written: start again")
    return saved["next"], saved["shards"], AudioReport(**saved["report"])


def _write_shard(
    dataset: ClipSet,
    path: Path,
    first: int,
    encoding: Encoding,
    shard_bytes: int,
    report: AudioReport,
    on_clip: Callable[[], None] | None,
) -> tuple[dict[str, Any], int]:
    """One shard; returns its entry in the index and the number of the next clip."""
    partial = path.with_name(f".{path.name}.partial")
    digest, size, index = hashlib.sha256(), 0, first
    offsets, labels = [], []
    with partial.open("wb") as file:
        while index < len(dataset):
            item = dataset[index]
            members = b""
            if isinstance(item, Clip):
                members = _members(item, dataset, encoding)
                if size and size + len(members) + len(END) > shard_bytes:
                    break  # this clip begins the next shard, and is counted there
                offsets.append(size)
                labels.append(list(item.labels))
                file.write(members)
                digest.update(members)
                size += len(members)
            report.merge(item.report)
            index += 1
            if on_clip is not None:
                on_clip()
        file.write(END)
        digest.update(END)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    entry = {
        "name": path.name,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "offsets": offsets,
        "labels": labels,
    }
    return entry, index


def _members(clip: Clip, dataset: ClipSet, encoding: Encoding) -> bytes:
    wave = clip.wave
    if wave.dtype != torch.int16:
        wave = (wave * 32768.0).round().clamp(-32768, 32767).to(torch.int16)
    samples = wave.numpy().astype("<i2", copy=False)
    told = {
        "labels": [dataset.classes[label] for label in clip.labels],
        "sample_rate_hz": dataset.sample_rate_hz,
    }
    key = f"{clip.index:09d}"
    sound = samples.tobytes() if encoding == "s16" else _flac(samples, dataset.sample_rate_hz)
    return packed(f"{key}.{encoding}", sound) + packed(f"{key}.json", json.dumps(told).encode())


def _flac(samples: np.ndarray, rate_hz: int) -> bytes:
    soundfile = require_package("soundfile", "writing FLAC", "audio")
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write aside, sync, move into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
