"""Manifests as files: CSV, JSON lines, and the JSON that the original AST lists its data in."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..names import listed
from .manifest import (
    MAX_FIELD_CHARS,
    Manifest,
    ManifestError,
    Row,
    check_size,
    collect,
    csv_rows,
    csv_table,
    finite,
)
from .manifest_blocks import Block, csv_blocks, line_blocks, mapped, uniform_columns

_ALIASES = {
    **{"wav": "path", "file": "path", "filename": "path"},
    **{"label": "labels", "key": "id", "fold": "split"},
}
_KNOWN = frozenset(("path", "id", "split"))
# columns by which other tools name a part of a file; a duration alone is only said of it
_SEGMENT = re.compile(
    r"(start|begin|offset|onset|end|stop|t_?start|t_?end|t_?min|t_?max|(start|begin|end|stop|segment_start|segment_end)"
    r"_?(s|sec|secs|seconds|ms|time|times?tamp|frame|sample)s?|segment_(start|end)|(offset|onset)_(s|sec|seconds|ms))",
    re.IGNORECASE,
)
_PLAIN_CHARS = 4096
_MOST_FORMS = 1000  # of rows, remembered of a file that invents new ones
_LONGEST_BYTES = 4 * MAX_FIELD_CHARS  # of a line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names differ; of two alike Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r:.80} stands in it twice")
    return found


_scan: Callable[[str, int], tuple[Any, int]] = json.scanner.make_scanner(  # type: ignore[attr-defined]
    json.JSONDecoder(object_pairs_hook=_object)
)
# a whole line; texts without escapes, so that what stands in quotes is what is meant
_TEXT = rf'"([^"\\\x00-\x1f]{{0,{_PLAIN_CHARS}}})"'
_LIST = rf"\[([^\[\]{{}}\\\x00-\x1f]{{0,{_PLAIN_CHARS}}})\]"
_PLAIN_JSON = re.compile(
    rf'^\{{ ?"(?:path|wav|file|filename)" ?: ?{_TEXT} ?, ?"labels?" ?: ?(?:{_TEXT}|{_LIST})'
    rf'(?: ?, ?"(?:split|fold)" ?: ?{_TEXT})? ?\}} ?\r?$',
    re.MULTILINE,
).findall
_Named = Iterator[tuple[int, Any]]  # line, and what stands there by name


def read_manifest(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    label_separator: str | None = None,
    values: Sequence[str] = (),
    check_files: bool = True,
    leave_out_missing: bool = False,
    need_labels: bool = True,
) -> Manifest:
    """Read a manifest by its suffix: .csv, .jsonl, or .json as the original AST lists its data.

    CSV needs a header with `path` (or wav, file, filename) and `label` or `labels`; JSON lines
    need the same names, or `values`, an object of numbers to predict; the original's JSON is {"data": [{"wav": ..., "labels": "mid,mid"}]}. A
    column `split` (or fold) names the part of the set that a clip belongs to. Absolute paths may
    stand there if they lie inside the root.

    Args:
        path: the manifest.
        root: folder that paths are relative to; the manifest's own folder by default.
        classes: class names in order; by default the labels found, sorted.
        aliases: further names of classes (such as AudioSet's mids), with their indices.
        label_separator: splits a text of labels; "," for the original's JSON, ";" otherwise.
        values: columns of numbers to predict; labels are not read then.
        check_files: look for each file now rather than when it is read.
        leave_out_missing: leave files out that are not there, and list them, rather than refuse.
        need_labels: refuse a list that says nothing of labels; clips that are only to be labelled need
            none. A label that is empty (in JSON "" or []) is a clip of no class.

    Raises:
        ManifestError: with the line.
        FileNotFoundError: there is no such manifest.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if not root.is_dir():
        raise ManifestError(f"root {str(root)!r} is not a folder")
    check_size(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".json"):
        raise ManifestError(f"{path}: suffix {suffix!r}: expected .csv, .jsonl or .json")
    separator = label_separator or ("," if suffix == ".json" else ";")
    within = os.path.abspath(root).rstrip("/") + "/"  # noqa: PTH100 - links stay as they are
    rows: Iterator[Row | Block] | None = None
    unused = _Unused(values)
    if not values:
        plain = {".csv": _plain_csv, ".jsonl": _plain_jsonl}.get(suffix)
        rows = plain(path, separator, within, need_labels, unused) if plain is not None else None
    if rows is None:
        readers = {".csv": csv_rows, ".jsonl": _read_jsonl, ".json": _read_original}
        named = readers[suffix](path)
        if not values:
            named, values = _value_names(named)
            unused.values = values
        rows = _rows(named, separator, tuple(values), within, path, need_labels, unused)
    return collect(
        rows,
        path,
        root,
        classes=classes,
        aliases=aliases,
        value_names=values,
        check_files=check_files,
        leave_out_missing=leave_out_missing,
        need_labels=need_labels,
        notes=unused,
    )


def _value_names(named: _Named) -> tuple[_Named, tuple[str, ...]]:
    """Names of the numbers to predict where the first row holds them by name, as `prepare` writes."""
    first = next(named, None)
    if first is None:
        return named, ()
    row = first[1]
    numbers = row.get("values") if isinstance(row, dict) and "labels" not in row else None
    return itertools.chain([first], named), tuple(numbers) if isinstance(numbers, dict) else ()


def _read_jsonl(path: Path) -> _Named:
    for line, content in line_blocks(path, _LONGEST_BYTES):
        yield from _json_lines(path, line, content)


def _json_lines(path: Path, first: int, content: bytes) -> _Named:
    for line, raw in enumerate(content.split(b"\n"), start=first):
        if not raw or raw.isspace():
            continue
        if len(raw) >= _LONGEST_BYTES:
            raise ManifestError(
                f"{path}, line {line}: {len(raw) + 1} bytes: expected at most {_LONGEST_BYTES}"
            )
        try:
            text = raw.decode().strip(" \t\r")
            try:
                row, end = _scan(text, 0)
            except StopIteration:
                end = -1
            if end != len(text):
                # says what is wrong, which takes more time
                row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{path}, line {line}: is not JSON: {error}") from error
        yield line, row


def _read_original(path: Path) -> _Named:
    content = _json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise ManifestError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    yield from enumerate(data, start=1)


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not JSON: {error}") from error


def _meant(names: Sequence[str], where: str) -> list[str]:
    """What columns are, by their names.

    Raises:
        ManifestError: two mean the same.
    """
    columns = [_ALIASES.get(name, name) for name in names]
    if len(set(columns)) < len(columns):
        twice, _ = Counter(columns).most_common(1)[0]
        both = [name for name, column in zip(names, columns, strict=True) if column == twice]
        raise ManifestError(
            f"{where}: has {' and '.join(map(repr, both))}, which both mean {twice}: expected one of them"
        )
    return columns


class _Unused:
    """Names that rows have and that mean nothing here, to be said at the end."""

    def __init__(self, values: Sequence[str]) -> None:
        self.values = values
        self._names: dict[str, None] = {}
        self._seen: set[tuple[str, ...]] = set()  # names of rows that were looked at

    def look(self, row: Mapping[str, Any], source: Path, line: int) -> None:
        """Remember what of a row has no use.

        Raises:
            ManifestError: two names mean the same; or some name parts of files: whole ones would be taken for them.
        """
        names = tuple(row)
        if names in self._seen:
            return
        where = f"{source}, line {line}"
        known = _KNOWN | ({"values"} if self.values else {"labels"})
        meant = zip(names, _meant(names, where), strict=True)
        others = [name for name, column in meant if column not in known and name not in self.values]
        parts = [name for name in others if _SEGMENT.fullmatch(name)]
        if parts:
            raise ManifestError(
                f"{where}: {', '.join(map(repr, parts))} name parts of files, and a manifest takes whole ones: cut the "
                "files into clips; if they are cut already, leave these columns out"
            )
        if len(self._seen) < _MOST_FORMS:
            self._seen.add(names)
            self._names |= dict.fromkeys(others)

    def __iter__(self) -> Iterator[str]:
        shown = [name for name in self._names if name.strip()]
        if shown:
            yield f"columns that are not used: {listed(shown)}"


def _plain_csv(
    path: Path, separator: str, within: str, _: bool, __: _Unused
) -> Iterator[Row | Block] | None:
    """Rows of a path, labels and perhaps a part, the form that sets of millions have; None for other columns."""
    header, rows = csv_table(path)
    columns = _meant(header, f"{path}, line 1")
    if sorted(columns) not in (["labels", "path"], ["labels", "path", "split"]):
        return None
    place, label = columns.index("path"), columns.index("labels")
    part = columns.index("split") if "split" in columns else None
    seen: dict[str, tuple[str, ...]] = {}  # labels by their text
    stripped: dict[str, str] = {}

    def plain() -> Iterator[Row | Block]:
        for found in csv_blocks(path, header, _LONGEST_BYTES):
            if isinstance(found, int):
                yield from singly(found)
                return
            line, cells = found
            labels = mapped(cells[label], seen, lambda text: _parts(text, separator))
            splits = () if part is None else mapped(cells[part], stripped, str.strip)
            yield Block(line, [text.removeprefix(within) for text in cells[place]], labels, splits)

    def singly(first: int) -> Iterator[Row]:
        for line, cells in rows:
            if line < first:
                continue
            text = cells[label]
            labels = seen.get(text)
            if labels is None:
                labels = seen[text] = _parts(text, separator)
            split = "" if part is None else cells[part].strip()
            yield Row(line, cells[place].removeprefix(within), labels, "", split)

    return plain()


def _plain_jsonl(
    path: Path, separator: str, within: str, need_labels: bool, unused: _Unused
) -> Iterator[Row | Block] | None:
    """Rows of a path, labels and perhaps a part, read by an expression; None if the first has numbers.

    Lines of another form, and whatever is wrong, are left to the JSON reader, with their neighbours.
    """
    if _value_names(_read_jsonl(path))[1]:
        return None
    seen: dict[tuple[str, str], tuple[str, ...] | None] = {}  # labels by their text

    def alike_lines(line: int, text: str) -> Block | None:
        """A block whose lines are all `{"path": text, "labels": text or [text]}` in one spelling."""
        text = text.replace("\r\n", "\n").removesuffix("\n")
        first = _PLAIN_JSON(text.partition("\n")[0])
        columns = uniform_columns(text) if first else None
        if columns is None:
            return None
        paths, labels = columns
        if max(map(len, itertools.chain(paths, {*labels}))) > _PLAIN_CHARS:
            return None
        listed = bool(first[0][2])
        made = mapped(labels, alone if listed else spelled, (lambda t: (t,)) if listed else of_text)
        if within in text:
            paths = [path.removeprefix(within) for path in paths]
        return Block(line, paths, made)

    alone: dict[str, tuple[str, ...]] = {}
    spelled: dict[str, tuple[str, ...]] = {}

    def of_text(text: str) -> tuple[str, ...]:
        return _parts(text, separator)

    def found(line: int, content: bytes) -> Block | None:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
        alike = alike_lines(line, text)
        if alike is not None:
            return alike
        matches = _PLAIN_JSON(text)
        if len(matches) != text.count("\n") + (not text.endswith("\n")):
            return None
        # by columns: an object and a few calls for each of a million rows would take as long as reading
        paths, labels, lists, splits = zip(*matches, strict=True)
        told = list(zip(labels, lists, strict=True))
        for new in set(told).difference(seen):
            seen[new] = _listed(new[1]) if new[1] else _parts(new[0], separator)
        several = [labels for labels in map(seen.__getitem__, told) if labels is not None]
        if len(several) < len(told):
            return None
        if within in text:
            paths = tuple(path.removeprefix(within) for path in paths)
        splits = tuple(map(str.strip, splits)) if any(splits) else ()
        return Block(line, paths, several, splits)

    def plain() -> Iterator[Row | Block]:
        for line, content in line_blocks(path, _LONGEST_BYTES):
            block = found(line, content)
            if block is not None:
                yield block
                continue
            named = _json_lines(path, line, content)
            yield from _rows(named, separator, (), within, path, need_labels, unused)

    return plain()


def _listed(several: str) -> tuple[str, ...] | None:
    """The labels of a list; None if they are no texts."""
    try:
        labels = json.loads(f"[{several}]")
    except ValueError:
        return None
    return tuple(labels) if all(type(label) is str for label in labels) else None


def _rows(
    named: _Named,
    separator: str,
    values: tuple[str, ...],
    within: str,
    source: Path,
    need_labels: bool,
    unused: _Unused,
) -> Iterator[Row]:
    parts: dict[str, tuple[str, ...]] = {}
    for line, row in named:
        # the plain form again: nothing is copied, and no message made
        if not values and type(row) is dict and len(row) == 2:
            path, text = row.get("path"), row.get("label", row.get("labels"))
            if type(path) is str and type(text) is str and len(path) + len(text) <= _PLAIN_CHARS:
                labels = parts.get(text)
                if labels is None:
                    labels = parts[text] = _parts(text, separator)
                yield Row(line, path.removeprefix(within), labels)
                continue
        if isinstance(row, dict):
            unused.look(row, source, line)
            if not need_labels and not {"label", "labels"} & row.keys():
                row = {"labels": [], **row}
        yield _row(row, separator, values, within, f"{source}, line {line}", line)


def _parts(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part for piece in text.split(separator) if (part := piece.strip()))


def _row(
    row: Any, separator: str, values: tuple[str, ...], within: str, where: str, line: int
) -> Row:
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: got {type(row).__name__}: expected path and labels by name")
    found = {_ALIASES.get(name, name): value for name, value in row.items()}
    if values and isinstance(found.get("values"), dict):
        found |= found["values"]
    for name in ("path", *(values or ("labels",))):
        if name not in found:
            hint = "" if values or name == "path" else " (or number columns, named as values)"
            raise ManifestError(
                f"{where}: has {', '.join(map(str, row)) or 'nothing'}: expected {name!r}{hint}"
            )
    labels = [] if values else found["labels"]
    if isinstance(labels, str):
        labels = list(_parts(labels, separator))
    path, key, split = found["path"], found.get("id") or "", found.get("split")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ManifestError(f"{where}: labels is {type(labels).__name__}: expected text")
    if not isinstance(path, str) or not isinstance(key, str):
        raise ManifestError(f"{where}: path and id: expected text")
    if split is not None and (isinstance(split, bool) or not isinstance(split, (str, int))):
        raise ManifestError(f"{where}: split is {type(split).__name__}: expected text or a number")
    split = "" if split is None else str(split).strip()
    for text in (path, key, split, *labels):
        if len(text) > MAX_FIELD_CHARS:
            raise ManifestError(
                f"{where}: a field of {len(text)} characters: expected at most {MAX_FIELD_CHARS}"
            )
    numbers = tuple(finite(found[name], name, where) for name in values)
    return Row(line, path.removeprefix(within), labels, key, split, numbers)
