"""Tiles of a mask: its rectangles, merged and cut to what one program computes, as small tensors on the device.

Neighbouring rectangles of few rows share a tile (columns of 12 patches: five fill 60 of 64 rows), rectangles
of many rows are cut. A column tile is a run of gathered tokens of which each is visible to some row; one that
is full and visible to all rows needs no pattern and comes first. Every visible pair is in exactly one column
tile. A plan is made once per mask, device and tile shapes, and lives as long as the mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A tile of so few rows takes the narrow shape if it has more columns than a few tiles of them.
NARROW_ROWS = 16
_NARROW_COLUMN_TILES = 2
# A smaller tile must save this share of the computed pairs: it reads its columns more often.
_WORTH_A_SMALLER_TILE = 0.1
_WORD = 32  # bits of a pattern word


class Shape(NamedTuple):
    """Rows and columns that a program computes at a time."""

    rows: int
    columns: int


class Launch(NamedTuple):
    """Tiles that share no row; the tensors are arguments of the kernels."""

    choice: int  # index into the shapes that were offered
    tiles: int
    pairs: int  # computed, hidden ones and padding included
    rows: Tensor  # int32 [tiles, rows]: 2 * token + whether an earlier pass wrote it, or -1
    table: Tensor  # int32 [tiles, 4]: first column tile, first with a pattern, end, 0
    columns: Tensor  # int32 [column tiles, columns]: token or -1
    patterns: Tensor  # int32 [column tiles]: index into bits, or -1
    bits: Tensor  # int32 [patterns, words, rows]: bit c of word w is column 32 w + c

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The last five, in the order in which the kernels take them."""
        return self[3:]


class Plan(NamedTuple):
    """One side of a mask."""

    launches: tuple[Launch, ...]  # in the order in which they must run
    idle: Tensor | None  # int64, rows that see nothing

    @property
    def pairs(self) -> int:
        """Pairs that are computed for one clip and head."""
        return sum(launch.pairs for launch in self.launches)


class _Piece(NamedTuple):
    """Rows and columns that belong together, on the CPU."""

    rows: Tensor  # int64 [r]
    columns: Tensor  # int64 [c]
    seen: Tensor  # bool [r, c], no row and no column of it is empty


_plans = WeakTensorKeyDictionary()
_lock = threading.Lock()


def plan(
    rectangles: Sequence[Tensor],  # rows, columns, table, seen
    shapes: tuple[Shape, ...],  # largest first; a later one of NARROW_ROWS is for few rows
    rows: int,  # tokens on the side of the rows
    columns: int,
    device: torch.device,
) -> Plan:
    """The tiles of one side of a mask, from the cache where they were made before.

    Raises:
        ValueError: the mask has tokens that the operands lack.
    """
    key = (shapes, rows, columns, device)
    # the table of a mask is the same object at every call, and no other mask has it
    with _lock:
        known = _plans.setdefault(rectangles[2], {})
    if key not in known:
        known[key] = _make(rectangles, shapes, rows, columns, device)
    return known[key]


def _make(
    rectangles: Sequence[Tensor],
    shapes: tuple[Shape, ...],
    rows: int,
    columns: int,
    device: torch.device,
) -> Plan:
    for name, tokens, count in (("row", rectangles[0], rows), ("column", rectangles[1], columns)):
        if tokens.numel() and int(tokens.max()) >= count:
            raise ValueError(
                f"the mask has {name} token {int(tokens.max())}, the operands have {count} tokens: "
                "make the mask for these lengths"
            )
    wide = [i for i, shape in enumerate(shapes) if i == 0 or shape.rows > NARROW_ROWS]
    narrow = next((i for i in range(1, len(shapes)) if i not in wide), None)
    written = torch.zeros(rows, dtype=torch.bool)
    launches: list[Launch] = []
    passes = int(rectangles[2][:, 5].max()) + 1 if len(rectangles[2]) else 0
    for index in range(passes):
        pieces = [piece for piece in _pieces(rectangles, index) if piece.rows.numel()]
        best: list[Launch] = []
        for choice in wide:
            few, many = _fit(pieces, shapes[choice], None if narrow is None else shapes[narrow])
            made = [_launch(many, choice, shapes[choice], written)] if many else []
            if few and narrow is not None:
                made.append(_launch(few, narrow, shapes[narrow], written))
            share = 1 - _WORTH_A_SMALLER_TILE
            if not best or _pairs(made) <= share * _pairs(best):
                best = made
        for piece in pieces:
            written[piece.rows] = True
        launches += best
    idle = (~written).nonzero().flatten()
    return Plan(
        tuple(_on_device(launch, device) for launch in launches),
        idle.to(device) if len(idle) else None,
    )


def _pairs(launches: Sequence[Launch]) -> int:
    return sum(launch.pairs for launch in launches)


def _on_device(launch: Launch, device: torch.device) -> Launch:
    return Launch(*launch[:3], *(x.to(device) for x in launch.tensors))


def _pieces(rectangles: Sequence[Tensor], index: int) -> Iterator[_Piece]:
    """The rectangles of pass `index`, without rows and columns that see nothing."""
    rows, columns, table, seen = rectangles
    for first, count, start, length, offset, owner in table.tolist():
        if owner != index:
            continue
        visible = torch.ones(count, length, dtype=torch.bool)
        if offset >= 0:
            visible = seen[offset : offset + count * length].view(count, length) != 0
        yield _tight(
            rows[first : first + count].long(), columns[start : start + length].long(), visible
        )


def _tight(rows: Tensor, columns: Tensor, seen: Tensor) -> _Piece:
    """A piece without the rows and columns of which nothing is visible."""
    by_row, by_column = seen.any(1), seen.any(0)
    return _Piece(rows[by_row], columns[by_column], seen[by_row][:, by_column])


def _fit(
    pieces: list[_Piece], shape: Shape, narrow: Shape | None
) -> tuple[list[_Piece], list[_Piece]]:
    """Pieces for tiles of the narrow shape, and for tiles of `shape`."""

    def is_narrow(rows: int, columns: int) -> bool:
        limit = _NARROW_COLUMN_TILES * shape.columns
        return narrow is not None and rows <= narrow.rows and columns > limit

    def cost(rows: int, columns: int) -> int:
        tile = narrow if narrow is not None and is_narrow(rows, columns) else shape
        return tile.rows * tile.columns * -(-columns // tile.columns)

    fitted: list[_Piece] = []
    for piece in pieces:
        for first in range(0, len(piece.rows), shape.rows):
            part = slice(first, first + shape.rows)
            cut = _tight(piece.rows[part], piece.columns, piece.seen[part])
            last = fitted[-1] if fitted else None
            if last is not None and len(last.rows) + len(cut.rows) <= shape.rows:
                joined = torch.cat([last.columns, cut.columns]).unique()
                apart = cost(*last.seen.shape) + cost(*cut.seen.shape)
                if cost(len(last.rows) + len(cut.rows), len(joined)) < apart:
                    fitted[-1] = _joined(last, cut, joined)
                    continue
            fitted.append(cut)
    few = [piece for piece in fitted if is_narrow(*piece.seen.shape)]
    return few, [piece for piece in fitted if not is_narrow(*piece.seen.shape)]


def _joined(a: _Piece, b: _Piece, columns: Tensor) -> _Piece:
    """Two pieces of one pass as one; pairs across them are hidden."""
    seen = torch.zeros(len(a.rows) + len(b.rows), len(columns), dtype=torch.bool)
    seen[: len(a.rows), torch.searchsorted(columns, a.columns)] = a.seen
    seen[len(a.rows) :, torch.searchsorted(columns, b.columns)] = b.seen
    return _Piece(torch.cat([a.rows, b.rows]), columns, seen)


def _launch(pieces: list[_Piece], choice: int, shape: Shape, written: Tensor) -> Launch:
    """The tensors of one launch, a tile a piece."""
    known: dict[bytes, int] = {}
    rows = torch.full((len(pieces), shape.rows), -1, dtype=torch.int32)
    table, columns, patterns, bits = [], [], [], []
    end = 0
    for tile, piece in enumerate(pieces):
        rows[tile, : len(piece.rows)] = (2 * piece.rows + written[piece.rows]).int()
        # columns that all rows see first: most column tiles then need no pattern
        order = (~piece.seen.all(0)).sort(stable=True).indices
        count = -(-len(order) // shape.columns)
        tokens = torch.full((count * shape.columns,), -1, dtype=torch.int32)
        tokens[: len(order)] = piece.columns[order].int()
        columns.append(tokens)
        whole = int(piece.seen.all(0).sum()) // shape.columns
        table.append((end, end + whole, end + count, 0))
        end += count
        patterns += [-1] * whole
        for words in _words(piece.seen[:, order[whole * shape.columns :]], shape):
            name = words.numpy().tobytes()
            if name not in known:
                known[name] = len(bits)
                bits.append(words)
            patterns.append(known[name])
    words = -(-shape.columns // _WORD)
    return Launch(
        choice,
        len(pieces),
        end * shape.rows * shape.columns,
        rows,
        torch.tensor(table, dtype=torch.int32),
        torch.cat(columns).view(end, shape.columns),
        torch.tensor(patterns, dtype=torch.int32),
        torch.stack(bits) if bits else torch.zeros(1, words, shape.rows, dtype=torch.int32),
    )


def _words(seen: Tensor, shape: Shape) -> Tensor:
    """Bits of `seen` [r, c] by column tile, padding hidden.  # int32 [column tiles, words, rows]"""
    tiles = -(-seen.shape[1] // shape.columns)
    words = -(-shape.columns // _WORD)
    flat = torch.zeros(shape.rows, tiles * shape.columns, dtype=torch.int64)
    flat[: len(seen), : seen.shape[1]] = seen.long()
    spread = torch.zeros(shape.rows, tiles, words * _WORD, dtype=torch.int64)
    spread[..., : shape.columns] = flat.view(shape.rows, tiles, shape.columns)
    packed = (spread.view(shape.rows, tiles, words, _WORD) << torch.arange(_WORD)).sum(-1)
    # bit 31 is the sign of a word
    packed = torch.where(packed >= 1 << (_WORD - 1), packed - (1 << _WORD), packed)
    return packed.int().permute(1, 2, 0).contiguous()
