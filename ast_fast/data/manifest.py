"""A list of clips with their labels, and the rules that every reader of such lists keeps.

Everything in a manifest is text from somewhere else. Paths stay inside a declared root, fields and
files are capped, and every complaint names the line. A manifest of a million rows is columns, not
a million objects.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ..names import in_order, is_name, part_name, same_name
from .manifest_blocks import Block, are_plain, mapped
from .tree import Walk

MAX_FIELD_CHARS = 64 * 1024
MAX_MANIFEST_BYTES = 2 << 30


class ManifestError(ValueError):
    """A manifest cannot be used. The message names file and line, what was got and expected."""


class Row(NamedTuple):
    """A clip as a reader finds it."""

    line: int  # in the file; 0 for a folder
    path: str  # relative to the root, with forward slashes
    labels: Sequence[str]
    key: str = ""  # an id that may occur once
    split: str = ""
    values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Clips and their labels, or numbers to predict.

    Attributes:
        root: folder that every path is relative to and stays inside of.
        paths: one a clip, relative to the root, with forward slashes.
        labels: class indices of each clip (several for multi-label sets; none beside `values`).
        classes: class names; the index is the class. Beside `values`, the names of its columns.
        lines: where each clip stands in the file it was read from (0 for a folder).
        source: that file or folder.
        values: [N, K] float32, numbers to predict, for regression; None for classes.
        splits: the part of the set that each clip belongs to ("train", or a fold's number); None
            where there are no parts.
        missing: clips that the source lists and that are not there, if they were left out.
        notes: what else reading chose or left out, a sentence each.
        link_roots: folders outside the root that links in it may lead to.
    """

    root: Path
    paths: list[str]
    labels: list[tuple[int, ...]]
    classes: tuple[str, ...]
    lines: list[int]
    source: str
    values: np.ndarray | None = None
    splits: list[str] | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    link_roots: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The path to open; checked again, as a link may have appeared since.

        Raises:
            ManifestError: the file lies outside the root by way of a link.
        """
        path = self.root / self.paths[index]
        if not _inside(self.root, path) and not any(
            _inside(Path(root), path) for root in self.link_roots
        ):
            where = _where(Path(self.source), self.lines[index])
            raise ManifestError(
                f"{where}: {self.paths[index]!r} is a link that leaves the root {str(self.root)!r}; copy the file into it"
            )
        return path

    def select(self, indices: Sequence[int]) -> Manifest:
        """Some of the clips, in the order given, with the same classes."""
        return dataclasses.replace(
            self,
            paths=[self.paths[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            lines=[self.lines[i] for i in indices],
            values=None if self.values is None else self.values[np.asarray(indices, np.int64)],
            splits=None if self.splits is None else [self.splits[i] for i in indices],
        )

    def labelled(self, classes: Sequence[str], labels: Sequence[tuple[int, ...]]) -> Manifest:
        """The same clips, their classes named and numbered otherwise."""
        return dataclasses.replace(self, classes=tuple(classes), labels=list(labels))

    def with_missing(self, missing: Sequence[str]) -> Manifest:
        """The same clips, and further ones that are listed and not there."""
        return dataclasses.replace(self, missing=(*self.missing, *missing))


@functools.lru_cache(maxsize=64)
def _real(root: str) -> str:
    """The root with its links followed and a slash behind; looked up once, not for every clip."""
    real = os.path.realpath(root)
    return real if real.endswith(os.sep) else real + os.sep


def _inside(root: Path, path: str | Path) -> bool:
    return os.path.realpath(path).startswith(_real(os.path.abspath(root)))  # noqa: PTH100 - asked for every clip


def audio_files(folder: Path) -> list[Path]:
    """Audio files under a folder by suffix, sorted; hidden files, and links that leave it, are left out."""
    return [folder / path for path in audio_paths(folder)]


def audio_paths(folder: Path) -> list[str]:
    """The same as texts relative to the folder, with forward slashes: a million of them are cheap."""
    return Walk(folder).sounds(folder)


def collect(
    rows: Iterable[Row | Block],
    source: Path,
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    value_names: Sequence[str] = (),
    check_files: bool = False,
    leave_out_missing: bool = False,
    need_labels: bool = True,
    notes: Iterable[str] = (),
    link_roots: Sequence[str] = (),
) -> Manifest:
    """A manifest of rows, every one of them checked.

    Args:
        rows: what a reader found, one by one or by the thousand.
        source: where, for messages.
        root: folder of the paths.
        classes: class names in order; by default the labels found, sorted.
        aliases: further names of classes, with their indices.
        value_names: names of the numbers to predict; rows then hold values and need no label.
        check_files: look for each file now rather than when it is read.
        leave_out_missing: leave files out that are not there, and list them, rather than refuse.
        need_labels: refuse a list in which no clip has a label; those that have none are of no class.
        notes: what the reader has to say; asked for when all rows are read.
        link_roots: see `Manifest`.

    Raises:
        ManifestError: with the line.
    """
    paths: list[str] = []
    texts: list[tuple[str, ...]] = []
    lines: list[int] = []
    splits: list[str] = []
    values: list[tuple[float, ...]] = []
    missing: list[str] = []
    seen_ids: dict[str, int] = {}
    known = _known(classes, aliases)
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple per distinct label set
    parts: dict[str, str] = {}

    def took(block: Block) -> bool:
        """Take a block by its columns, if nothing in it asks for a look at single rows."""
        if check_files or not are_plain(block.paths):
            return False
        for new in set(block.labels).difference(shared):
            names = tuple(map(same_name, new))
            if known is not None and not known.keys() >= set(names):
                return False
            shared[new] = tuple(dict.fromkeys(names))
        paths.extend(block.paths)
        texts.extend(map(shared.__getitem__, block.labels))
        lines.extend(range(block.line, block.line + len(block.paths)))
        if any(block.splits):
            splits.extend(mapped(block.splits, parts, part_name))
        else:
            splits.extend([""] * len(block.paths))
        return True

    def singly() -> Iterator[tuple[Any, ...]]:
        for found in rows:
            if not isinstance(found, Block):
                yield found
            elif not took(found):
                yield from found.rows()

    for line, path, labels, key, split, numbers in singly():
        # a million times: what is only said of errors is not made before there is one
        if _PLAIN(path) is None:
            check_path(path, _where(source, line))
        if key:
            if key in seen_ids:
                raise ManifestError(
                    f"{_where(source, line)}: id {key!r} was already on line {seen_ids[key]}"
                )
            seen_ids[key] = line
        text = tuple(labels)
        found = shared.get(text)
        if found is None:
            label_names = tuple(map(same_name, text))
            unknown = [label for label in label_names if known is not None and label not in known]
            if unknown:
                raise ManifestError(
                    f"{_where(source, line)}: label {unknown[0]!r} is not among the "
                    f"{len(classes or ())} classes"
                )
            found = shared[text] = tuple(dict.fromkeys(label_names))
        if check_files and not _file_is_there(root, path, source, line):
            if not leave_out_missing:
                raise ManifestError(
                    f"{_where(source, line)}: there is no file {path!r} under {str(root)!r}"
                )
            missing.append(path)
            continue
        paths.append(path)
        texts.append(found)
        lines.append(line)
        if split:
            split = parts.get(split) or parts.setdefault(split, part_name(split))
        splits.append(split)
        if value_names:
            values.append(numbers)
    if not paths:
        gone = f": none of the {len(missing)} files is under {str(root)!r}" if missing else ""
        raise ManifestError(f"{source}: holds no clips{gone}")
    said = [*notes, *_listed_twice(paths, texts, values)]
    if value_names:
        classes = value_names
        numbered: list[tuple[int, ...]] = [()] * len(paths)
    else:
        distinct = set(texts)
        if known is None:
            classes = in_order({label for text in distinct for label in text})
            if not classes and need_labels:
                raise ManifestError(f"{source}: none of its {len(paths)} clips has a label")
            odd = next((name for name in classes if not is_name(name)), None)
            if odd is not None:
                line = next(line for line, text in zip(lines, texts, strict=True) if odd in text)
                raise ManifestError(
                    f"{_where(source, line)}: the label {odd!r:.80} is empty or holds a NUL character"
                )
            known = {name: index for index, name in enumerate(classes)}
        indices = {text: tuple(dict.fromkeys(known[label] for label in text)) for text in distinct}
        numbered = [indices[text] for text in texts]
        bare = sum(not text for text in texts) if () in distinct else 0
        if bare and need_labels:
            said.append(unlabelled(bare))
    return Manifest(
        root,
        paths,
        numbered,
        tuple(classes or ()),
        lines,
        str(source),
        np.asarray(values, np.float32) if value_names else None,
        splits if any(splits) else None,
        tuple(missing),
        tuple(said),
        tuple(link_roots),
    )


def _listed_twice(
    paths: Sequence[str],
    texts: Sequence[tuple[str, ...]],
    values: Sequence[tuple[float, ...]],
) -> list[str]:
    """What is said of files that are listed more than once."""
    if len(set(paths)) == len(paths):
        return []
    told: dict[str, set[tuple[Any, ...]]] = {}
    counts: Counter[str] = Counter(paths)
    for path, what in zip(paths, values or texts, strict=True):
        if counts[path] > 1:
            told.setdefault(path, set()).add(tuple(sorted(what)))
    first = next(iter(told))
    text = f"{len(told)} files are listed more than once, such as {first!r:.200}"
    differ = [path for path, what in told.items() if len(what) > 1]
    if differ:
        kind = "numbers" if values else "labels"
        text += f"; {len(differ)} of them with other {kind} each time, such as {differ[0]!r:.200}"
    return [text]


def unlabelled(count: int) -> str:
    """What is said of clips without a label."""
    return (
        f"{count} clips have no label: negatives, for several labels a clip or for presence and absence "
        "(loss binary_cross_entropy)"
    )


# a path that is plainly below the root; `check_path` says what is wrong with another, if anything is
_PLAIN = re.compile(r"[^/~.\\\0:][^:.\\\0][^.\\\0]*(?:\.[^.\\\0]+)?\Z").match


def _where(source: Path, line: int) -> str:
    return f"{source}, line {line}" if line else str(source)


def _known(
    classes: Sequence[str] | None, aliases: Mapping[str, int] | None
) -> dict[str, int] | None:
    if classes is None:
        return None
    known = {same_name(name): index for index, name in enumerate(classes)}
    if len(known) < len(classes):
        raise ManifestError(f"classes: {len(classes) - len(known)} names occur twice")
    return known | {same_name(name): index for name, index in (aliases or {}).items()}


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


def _file_is_there(root: Path, path: str, source: Path, line: int) -> bool:
    file = os.path.join(root, path)  # noqa: PTH118 - a million Path objects are slow
    if not os.path.exists(file):  # noqa: PTH110
        return False
    if not _inside(root, file):
        raise ManifestError(
            f"{_where(source, line)}: {path!r} is a link that leaves the root {str(root)!r}; copy the "
            "file into it"
        )
    return True


def finite(text: object, name: str, where: str) -> float:
    """A number to predict.

    Raises:
        ManifestError: it is none, NaN or infinite.
    """
    try:
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise ValueError
        number = float(text)
        if not abs(number) < 1e30:  # float32 holds it, and NaN fails
            raise ValueError
    except ValueError:
        raise ManifestError(f"{where}: {name} is {text!r:.80}: expected a finite number") from None
    return number


def csv_cells(path: Path, *, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty; BOM and CRLF are accepted.

    Raises:
        ManifestError: no UTF-8, no CSV, too long a field or file; names the line.
        FileNotFoundError: there is no such file.
    """
    check_size(path)
    # newline="" leaves line ends to the csv module, utf-8-sig drops a BOM
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, strict=True, skipinitialspace=skip_spaces)
            for cells in reader:
                if not cells:
                    continue
                # the csv module's own limit is larger and belongs to the whole process
                if len(max(cells, key=len)) > MAX_FIELD_CHARS:
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: a field is longer than {MAX_FIELD_CHARS} "
                        "characters: is this a manifest?"
                    )
                yield reader.line_num, cells
        except csv.Error as error:
            raise ManifestError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: is not UTF-8 text: {error}") from error


def csv_table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Names of the columns, and line number and cells of each row.

    Raises:
        ManifestError: see `csv_cells`; or a row has more or fewer fields than the header.
    """
    rows = csv_cells(path)
    _, header = next(rows, (0, []))
    header = [cell.strip() for cell in header]
    width = len(header)
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"{path}, line 1: two columns are called {twice!r}: expected one")

    def checked() -> Iterator[tuple[int, list[str]]]:
        for row in rows:
            if len(row[1]) != width:
                raise ManifestError(
                    f"{path}, line {row[0]}: {len(row[1])} fields: expected {width} "
                    f"({', '.join(header)})"
                )
            yield row

    return header, checked()


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by the name of their column.

    Raises:
        ManifestError: see `csv_table`.
    """
    header, rows = csv_table(path)
    for line, cells in rows:
        yield line, dict(zip(header, cells, strict=True))


def check_size(path: Path) -> None:
    """Refuse a manifest that is larger than any sane one.

    Raises:
        ManifestError: it is.
        FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: {size} bytes: expected at most {MAX_MANIFEST_BYTES}")
