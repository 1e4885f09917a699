"""Rows of a manifest by the thousand: columns that are checked together, where each row by itself would take longer.

A block stands for plain rows on consecutive lines. What is not plain, and whatever is wrong, is left to the readers of
single rows, which name the line.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLOCK_BYTES = 1 << 18
_PLAIN_CHARS = 4096
# in quotes, doubled ones inside; or without
_CELL = rf'(?:"([^"\r\n]{{0,{_PLAIN_CHARS}}}(?:""[^"\r\n]{{0,{_PLAIN_CHARS}}})*)"|([^",\r\n]{{0,{_PLAIN_CHARS}}}))'
# what no plain path holds anywhere, or at its beginning
_NOWHERE = ("\\", "\0", "..", ":")
_NOT_FIRST = ("\n", "/", "~", ".")


class Block(NamedTuple):
    """Rows on consecutive lines, as columns."""

    line: int  # of the first
    paths: Sequence[str]
    labels: Sequence[tuple[str, ...]]
    splits: Sequence[str] = ()  # none where there are no parts

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """One by one, as `manifest.Row` has them."""
        nothing: Iterable[str] = itertools.repeat("")
        return zip(
            itertools.count(self.line),
            self.paths,
            self.labels,
            nothing,
            self.splits or nothing,
            itertools.repeat(()),
            strict=False,
        )


def are_plain(paths: Sequence[str]) -> bool:
    """Whether all of some paths are plainly below their root; a few searches for thousands of them."""
    text = "\n" + "\n".join(paths) + "\n"
    if text.count("\n") != len(paths) + 1:
        return False
    if any(part in text for part in _NOWHERE):
        return False
    return not any(f"\n{part}" in text for part in _NOT_FIRST)


def line_blocks(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines, many at a time, and the number of the first; a line beyond `longest` bytes comes cut."""
    with path.open("rb") as file:
        line = 1
        while content := file.read(BLOCK_BYTES):
            if not content.endswith(b"\n"):
                content += file.readline(longest)
            yield line, content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
            line += content.count(b"\n")


def csv_blocks(path: Path, header: Sequence[str], longest: int) -> Iterator[Any]:
    """Columns of a CSV file by blocks: (line, [cells of each column]).

    The last may be the number of a line, from which on something stands that only a CSV parser can tell.

    Args:
        path: the file.
        header: its first line, as a parser reads it.
        longest: bytes of a line.
    """
    find = re.compile("^" + ",".join([_CELL] * len(header)) + "$", re.MULTILINE).findall
    for line, content in line_blocks(path, longest):
        try:
            text = content.decode()
        except UnicodeDecodeError:
            yield line
            return
        if line == 1:
            first, _, text = text.partition("\n")
            if [cell.strip() for cell in first.rstrip("\r").split(",")] != list(header):
                yield 1
                return
        begin = line + (line == 1)
        text = text.replace("\r\n", "\n").rstrip("\n")
        if not text:
            continue
        columns = _quoted(text, find) if '"' in text else _bare(text, len(header))
        if columns is None:
            yield begin
            return
        yield begin, columns


def _bare(text: str, width: int) -> list[list[str]] | None:
    """The columns of lines without quotes; None if one is not of `width` plain cells."""
    lines = text.split("\n")
    if "\r" in text or set(map(_COMMAS, lines)) != {width - 1}:
        return None
    if max(map(len, lines)) > _PLAIN_CHARS:
        return None
    cells = ",".join(lines).split(",")
    return [cells[place::width] for place in range(width)]


_COMMAS = operator.methodcaller("count", ",")


def _quoted(text: str, find: Callable[[str], list[Any]]) -> list[list[str]] | None:
    """The columns of lines whose quotes close on them; None if one is of another form."""
    found = find(text)
    if len(found) != text.count("\n") + 1:
        return None
    columns = list(zip(*found, strict=True))
    return [
        [(quote.replace('""', '"') if quote else bare) for quote, bare in zip(a, b, strict=True)]
        for a, b in zip(columns[::2], columns[1::2], strict=True)
    ]


def uniform_columns(text: str) -> list[list[str]] | None:
    r"""The second and the fourth text in quotes of every line, where all lines are alike but for these; else None.

    So are the values of `{"path": ..., "labels": ...}`; no escape and no control character may be among them.

    >>> uniform_columns('{"a": "1", "b": ["2"]}\n{"a": "3", "b": ["4"]}')
    [['1', '3'], ['2', '4']]
    """
    first, _, _ = text.partition("\n")
    shape = first.split('"')
    if len(shape) != 9 or "\\" in text or not text.replace("\n", "").isprintable():
        return None
    before, between, behind = ('"'.join(part) for part in (shape[:3], shape[4:7], shape[8:]))
    before, between, behind = f'{before}"', f'"{between}"', f'"{behind}'
    if not text.startswith(before) or not text.endswith(behind):
        return None
    rows = text[len(before) : len(text) - len(behind)].split(f"{behind}\n{before}")
    # as many quotes in every row as between two cells, and none inside of one
    if {*map(_QUOTES, rows)} != {between.count('"')} or text.count("\n") != len(rows) - 1:
        return None
    joined = between.join(rows)
    cells = joined.split(between)
    if len(cells) != 2 * len(rows) or joined.count('"') != (len(cells) - 1) * between.count('"'):
        return None
    return [cells[::2], cells[1::2]]


_QUOTES = operator.methodcaller("count", '"')


def mapped(texts: Sequence[str], seen: dict[str, Any], make: Callable[[str], Any]) -> list[Any]:
    """`make` of every text, made once for each that differs."""
    for new in set(texts).difference(seen):
        seen[new] = make(new)
    return list(map(seen.__getitem__, texts))
