"""Lists of clips and labels: CSV, JSON lines, the original's JSON, or a folder per class.

Everything in a manifest is text from somewhere else. Paths stay inside a declared root, fields and
files are capped, and every complaint names the line. A manifest of a million rows is columns, not
a million objects.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..audio import SUFFIXES

MAX_FIELD_CHARS = 64 * 1024
MAX_MANIFEST_BYTES = 2 << 30
_ALIASES = {"wav": "path", "file": "path", "filename": "path", "label": "labels", "key": "id"}

Row = tuple[int, str, list[str], str]  # line, path, labels, id


class ManifestError(ValueError):
    """A manifest cannot be used. The message names file and line, what was got and expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Clips and their labels.

    Attributes:
        root: folder that every path is relative to and stays inside of.
        paths: one a clip, relative to the root, with forward slashes.
        labels: class indices of each clip (several for multi-label sets).
        classes: class names; the index is the class.
        lines: where each clip stands in the file it was read from (0 for a folder).
        source: that file or folder.
    """

    root: Path
    paths: list[str]
    labels: list[tuple[int, ...]]
    classes: tuple[str, ...]
    lines: list[int]
    source: str

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The path to open; checked again, as a link may have appeared since.

        Raises:
            ManifestError: the file lies outside the root by way of a link.
        """
        path = self.root / self.paths[index]
        root = _real(self.root)
        if not os.path.realpath(path).startswith(root if root.endswith(os.sep) else root + os.sep):
            raise ManifestError(
                f"{self.source}, line {self.lines[index]}: {self.paths[index]!r} is a link that "
                f"leaves the root {str(self.root)!r}; copy the file into it"
            )
        return path

    def select(self, indices: Sequence[int]) -> Manifest:
        """Some of the clips, in the order given, with the same classes."""
        return dataclasses.replace(
            self,
            paths=[self.paths[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            lines=[self.lines[i] for i in indices],
        )


def read_manifest(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    label_separator: str | None = None,
    check_files: bool = True,
    need_labels: bool = True,
) -> Manifest:
    """Read a manifest by its suffix: .csv, .jsonl, or .json as the original AST lists its data.

    CSV needs a header with `path` (or wav, file, filename) and `label` or `labels`; JSON lines
    need the same names; the original's JSON is {"data": [{"wav": ..., "labels": "mid,mid"}]}.

    Args:
        path: the manifest.
        root: folder that paths are relative to; the manifest's own folder by default.
        classes: class names in order; by default the labels found, sorted.
        aliases: further names of classes (such as AudioSet's mids), with their indices.
        label_separator: splits a text of labels; "," for the original's JSON, ";" otherwise.
        check_files: look for each file now rather than when it is read.
        need_labels: refuse clips without labels; clips that are only to be labelled need none.

    Raises:
        ManifestError: with the line.
        FileNotFoundError: there is no such manifest.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if not root.is_dir():
        raise ManifestError(f"root {str(root)!r} is not a folder")
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: {size} bytes: expected at most {MAX_MANIFEST_BYTES}")
    readers: dict[str, Callable[[Path, str, bool], Iterator[Row]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".json": _read_original,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ManifestError(f"{path}: suffix {suffix!r}: expected .csv, .jsonl or .json")
    separator = label_separator or ("," if suffix == ".json" else ";")
    rows = readers[suffix](path, separator, need_labels)
    return _collect(rows, path, root, classes, aliases, check_files, need_labels)


def read_folder(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Manifest:
    """A folder per class: `root/<class>/**/<clip>`; links and hidden files are left out.

    Raises:
        ManifestError: there are no classes or no audio files.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"{str(root)!r} is not a folder")
    names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    )
    if not names:
        raise ManifestError(f"{str(root)!r} has no subfolders: expected one folder per class")
    rows = (
        (0, file.relative_to(root).as_posix(), [name], "")
        for name in names
        for file in audio_files(root / name)
    )
    return _collect(rows, root, root, classes, None, False)


@functools.lru_cache(maxsize=64)
def _real(root: Path) -> str:
    """The root with its links followed, looked up once and not for every clip."""
    return os.path.realpath(root)


def audio_files(folder: Path) -> list[Path]:
    """Audio files under a folder by suffix, sorted; links and hidden files are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(place, name)
            if file.suffix.lower() in SUFFIXES and name[0] != "." and not file.is_symlink():
                found.append(file)
    return found


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, for CSV files that are written."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _collect(
    rows: Iterable[Row],
    source: Path,
    root: Path,
    classes: Sequence[str] | None,
    aliases: Mapping[str, int] | None,
    check_files: bool,
    need_labels: bool = True,
) -> Manifest:
    paths: list[str] = []
    texts: list[tuple[str, ...]] = []
    lines: list[int] = []
    seen_ids: dict[str, int] = {}
    known = None
    if classes is not None:
        known = {name: index for index, name in enumerate(classes)}
        if len(known) < len(classes):
            raise ManifestError(f"classes: {len(classes) - len(known)} names occur twice")
        known |= aliases or {}
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple per distinct label set
    for line, path, labels, key in rows:
        where = f"{source}, line {line}" if line else str(source)
        check_path(path, where)
        if key and key in seen_ids:
            raise ManifestError(f"{where}: id {key!r} was already on line {seen_ids[key]}")
        if key:
            seen_ids[key] = line
        if not labels and need_labels:
            raise ManifestError(f"{where}: {path!r} has no label")
        unknown = [label for label in labels if known is not None and label not in known]
        if unknown:
            raise ManifestError(
                f"{where}: label {unknown[0]!r} is not among the {len(classes or ())} classes"
            )
        if check_files:
            _check_file(root, path, where)
        text = tuple(dict.fromkeys(labels))
        paths.append(path)
        texts.append(shared.setdefault(text, text))
        lines.append(line)
    if not paths:
        raise ManifestError(f"{source}: holds no clips")
    if known is None:
        classes = sorted({label for text in shared for label in text})
        known = {name: index for index, name in enumerate(classes)}
    indices = {text: tuple(known[label] for label in text) for text in shared}
    found = [indices[text] for text in texts]
    return Manifest(root, paths, found, tuple(classes or ()), lines, str(source))


def check_path(path: str, where: str) -> None:
    """Refuse a path that could leave its root.

    Raises:
        ManifestError: the path is empty, absolute, holds NUL, `..`, `~` or a backslash.
    """
    problem = None
    if not path or path == ".":
        problem = "is empty"
    elif "\0" in path:
        problem = "holds a NUL character"
    elif path[0] in "/~" or (len(path) > 1 and path[1] == ":"):
        problem = "is not relative to the root"
    elif "\\" in path:
        problem = "holds a backslash: expected forward slashes"
    elif ".." in path and ".." in PurePosixPath(path).parts:
        problem = "leaves its folder with '..'"
    if problem:
        raise ManifestError(
            f"{where}: path {path[:200]!r} {problem}; write it relative to the root"
        )


def _check_file(root: Path, path: str, where: str) -> None:
    file = os.path.join(root, path)  # noqa: PTH118 - a million Path objects are slow
    if not os.path.exists(file):  # noqa: PTH110
        raise ManifestError(f"{where}: there is no file {path!r} under {str(root)!r}")
    real_root = os.path.realpath(root)
    if not os.path.realpath(file).startswith(real_root.rstrip("/") + "/"):
        raise ManifestError(
            f"{where}: {path!r} is a link that leaves the root {str(root)!r}; copy the file into it"
        )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column; BOM and CRLF are accepted."""
    # newline="" leaves line ends to the csv module, utf-8-sig drops a BOM
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            for cells in reader:
                if not cells:
                    continue
                # the csv module's own limit is larger and belongs to the whole process
                if max(map(len, cells)) > MAX_FIELD_CHARS:
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: a field is longer than {MAX_FIELD_CHARS} "
                        "characters: is this a manifest?"
                    )
                if len(cells) != len(header):
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: {len(cells)} fields: expected "
                        f"{len(header)} ({', '.join(header)})"
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ManifestError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: is not UTF-8 text: {error}") from error


def _read_csv(path: Path, separator: str, need_labels: bool) -> Iterator[Row]:
    for line, row in _csv_rows(path):
        yield _row(row, separator, line, path, need_labels)


def _read_jsonl(path: Path, separator: str, need_labels: bool) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            if len(raw) > 4 * MAX_FIELD_CHARS:
                raise ManifestError(
                    f"{path}, line {line}: {len(raw)} bytes: expected at most {4 * MAX_FIELD_CHARS}"
                )
            yield _row(_json(raw, f"{path}, line {line}"), separator, line, path, need_labels)


def _read_original(path: Path, separator: str, need_labels: bool) -> Iterator[Row]:
    content = _json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise ManifestError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    for number, row in enumerate(data, start=1):
        yield _row(row, separator, number, path, need_labels)


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not JSON: {error}") from error


def _row(row: Any, separator: str, line: int, source: Path, need_labels: bool) -> Row:
    where = f"{source}, line {line}"
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: got {type(row).__name__}: expected path and labels by name")
    found = {_ALIASES.get(name, name): value for name, value in row.items()}
    if not need_labels:
        found.setdefault("labels", [])
    for name in ("path", "labels"):
        if name not in found:
            raise ManifestError(
                f"{where}: has {', '.join(map(str, row)) or 'nothing'}: expected {name!r}"
            )
    labels = found["labels"]
    if isinstance(labels, str):
        labels = [part for text in labels.split(separator) if (part := text.strip())]
    key = found.get("id") or ""
    path = found["path"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ManifestError(f"{where}: labels is {type(labels).__name__}: expected text")
    if not isinstance(path, str) or not isinstance(key, str):
        raise ManifestError(f"{where}: path and id: expected text")
    for text in (path, key, *labels):
        if len(text) > MAX_FIELD_CHARS:
            raise ManifestError(
                f"{where}: a field of {len(text)} characters: expected at most {MAX_FIELD_CHARS}"
            )
    return line, path, labels, key
