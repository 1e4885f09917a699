"""Write a dataset as a verified manifest, with or without copies of the clips as FLAC."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .._files import sync
from ..names import safe_cell, safe_path
from .dataset import Clip, ClipSet
from .examine import Pack, flac_bytes
from .manifest import ManifestError
from .prepare import Content, replace, stored

MANIFEST, CLASSES = "manifest.jsonl", "classes.csv"
_CSV = "manifest.csv"
_AUDIO = "audio"
_COMMIT_BYTES, _COMMIT_CLIPS = 64 << 20, 1000


class ManifestStore:
    """Stores nothing but the list of the clips that were found good.

    Paths stay relative to the root they had: give that root wherever the list is read.

    Args:
        dataset: files of a manifest.

    Raises:
        ManifestError: the clips are not files.
    """

    pack: Pack | None = None

    def __init__(self, dataset: ClipSet) -> None:
        if getattr(dataset, "manifest", None) is None:
            raise ManifestError(
                "the clips are no files that a manifest could list: write shards or files instead"
            )
        self._dataset = dataset
        self._names = getattr(dataset, "manifest").paths  # noqa: B009 - not of every ClipSet
        self._clips = self._bytes = 0

    def settings(self) -> dict[str, Any]:
        """See `Store`."""
        return {"form": "manifest"}

    def begin(self, folder: Path, saved: Any) -> None:
        """See `Store`."""
        self._folder = folder
        if saved is None and (folder / MANIFEST).exists():
            raise ManifestError(f"{str(folder)!r} holds a manifest already: choose another folder")

    def is_due(self, size: int) -> bool:
        """Every so often."""
        return self._clips >= _COMMIT_CLIPS or self._bytes >= _COMMIT_BYTES

    def add(self, index: int, content: Content) -> None:
        """See `Store`."""
        self._clips += 1
        self._bytes += len(content)

    def commit(self) -> Any:
        """See `Store`."""
        self._clips = self._bytes = 0
        return {}

    def finish(self, clips: Path) -> None:
        """The manifest as JSON lines and, where it can say the same, as CSV; and the classes."""
        classes, values = self._dataset.classes, getattr(self._dataset, "values", None)
        rows = self._rows(clips)
        replace(
            self._folder / MANIFEST,
            (json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows),
        )
        # a label that would not come back as it is, a file whose name is no text: JSON lines alone
        text = all(_is_text(row["path"]) for row in self._rows(clips))
        if text and all(";" not in name and name == safe_cell(name).strip() for name in classes):
            replace(self._folder / _CSV, map(str.encode, self._csv(clips, values is not None)))
        if values is None:
            head = [("index", "mid", "display_name")]
            table = [*head, *((number, name, name) for number, name in enumerate(classes))]
            replace(self._folder / CLASSES, map(str.encode, _csv_lines(table)))

    def _rows(self, clips: Path) -> Iterator[dict[str, Any]]:
        classes = self._dataset.classes
        for line in stored(clips):
            row: dict[str, Any] = {"path": self._names[line["clip"]]}
            if "values" in line:
                row["values"] = dict(zip(classes, line["values"], strict=True))
            else:
                row["labels"] = [classes[label] for label in line["labels"]]
            if line.get("split"):
                row["split"] = line["split"]
            yield row

    def _csv(self, clips: Path, with_values: bool) -> Iterator[str]:
        """The rows as lines of CSV."""
        splits = getattr(self._dataset, "splits", None) is not None
        names = self._dataset.classes if with_values else ("labels",)

        def cells() -> Iterator[Sequence[Any]]:
            yield ["path", *names, *(["split"] if splits else [])]
            for row in self._rows(clips):
                path = row["path"]
                told = list(row["values"].values()) if with_values else [";".join(row["labels"])]
                # "./" keeps a name that begins with "-" from being a formula, and is the same file
                yield [safe_path(path), *told, *([row.get("split", "")] if splits else [])]

        return _csv_lines(cells())


def _is_text(name: str) -> bool:
    """Whether a file's name is one in UTF-8, and not only bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_lines(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    for row in rows:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        yield line.getvalue()


class FileStore(ManifestStore):
    """Copies of the clips as FLAC of 16 bits at the dataset's rate, and their manifest.

    Args:
        dataset: any clips; those of files keep their folders and names.
    """

    def __init__(self, dataset: ClipSet) -> None:
        self._dataset = dataset
        self._clips = self._bytes = 0
        self._names = _copy_names(dataset)
        self._new: list[Path] = []
        self._rate_hz = dataset.sample_rate_hz
        self.pack = self._packed

    def _packed(self, clip: Clip, samples: np.ndarray) -> bytes:
        return flac_bytes(samples, self._rate_hz)

    def settings(self) -> dict[str, Any]:
        """See `Store`."""
        return {"form": "files"}

    def add(self, index: int, content: Content) -> None:
        """See `Store`."""
        super().add(index, content)
        path = self._folder / self._names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
        self._new.append(path)

    def commit(self) -> Any:
        """Have the files written since the last time on disk."""
        for path in self._new:
            sync(path)
        for folder in {path.parent for path in self._new}:
            sync(folder)
        self._new = []
        return super().commit()


def _copy_names(dataset: ClipSet) -> list[str]:
    """Where the copy of each clip goes; no two to the same place."""
    manifest = getattr(dataset, "manifest", None)
    if manifest is None:
        return [f"{_AUDIO}/{i // 1000:06d}/{i:09d}.flac" for i in range(len(dataset))]
    taken: set[str] = set()
    names = []
    for index, path in enumerate(manifest.paths):
        plain = PurePosixPath(path)
        name = f"{_AUDIO}/{plain.with_suffix('.flac')}"
        if name.casefold() in taken:  # 1.wav beside 1.mp3, or a clip that is listed twice
            name = f"{_AUDIO}/{plain}.{index:09d}.flac"
        taken.add(name.casefold())
        names.append(name)
    return names
