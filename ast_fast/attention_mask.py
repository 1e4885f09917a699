"""Which keys a query sees, as rectangles of tokens: masks whose cost falls with what they leave out.

A mask holds, once for its queries and once for its keys, rectangles of `rows` tokens by `columns` tokens. Together
they cover every visible pair exactly once. Rectangles of one pass share no row token: a kernel may work on them side
by side, and passes follow one another. Kernels gather the tokens of a rectangle and never look at the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Tokens = np.ndarray  # int32 [n]


class Rectangles(NamedTuple):
    """One side of a mask in tensors on the CPU; arguments of the registered ops."""

    rows: Tensor  # int32, row tokens of all rectangles one after another
    columns: Tensor  # int32, column tokens likewise
    table: (
        Tensor  # int64 [R, 6]: first row, rows, first column, columns, offset into seen or -1, pass
    )
    seen: Tensor  # uint8, [rows, columns] of every rectangle in which some pairs are hidden, equal ones once


class AttentionMask:
    """Visible pairs of `queries` x `keys` tokens, the same for every clip and head.

    Args:
        seen: bool [Tq, Tk]; True where the query sees the key.
        query_tiles: passes, each a list of token lists: the queries of a rectangle, and the keys they see among the
            pairs of that pass. None takes runs of 64 tokens in one pass.
        key_tiles: the same for keys.
        query_pass: int [Tq, Tk], the pass in `query_tiles` that a pair belongs to; None if there is one pass.
        key_pass: the same for `key_tiles`.

    Raises:
        ValueError: a shape does not fit, or a visible pair is in no rectangle or in two.
    """

    def __init__(
        self,
        seen: np.ndarray,
        query_tiles: Sequence[Sequence[Tokens]] | None = None,
        key_tiles: Sequence[Sequence[Tokens]] | None = None,
        query_pass: np.ndarray | None = None,
        key_pass: np.ndarray | None = None,
    ) -> None:
        seen = np.ascontiguousarray(seen, dtype=bool)
        if seen.ndim != 2:
            raise ValueError(f"seen has {seen.ndim} dimensions: expected [Tq, Tk]")
        self.queries, self.keys = seen.shape
        self._bits = np.packbits(seen)
        flipped = None if key_pass is None else key_pass.T
        self.by_query = _rectangles(seen, query_tiles, query_pass, "query")
        self.by_key = _rectangles(np.ascontiguousarray(seen.T), key_tiles, flipped, "key")
        self.pairs = int(seen.sum())

    def __repr__(self) -> str:
        share = self.pairs / max(1, self.queries * self.keys)
        return f"AttentionMask({self.queries} x {self.keys}, {share:.1%} of pairs)"

    def dense(self) -> Tensor:
        """Visible pairs, bool [Tq, Tk]: True where the query sees the key."""
        seen = np.unpackbits(self._bits, count=self.queries * self.keys)
        return torch.from_numpy(seen.reshape(self.queries, self.keys).astype(bool))

    @property
    def rectangles(self) -> list[Tensor]:
        """Both sides' tensors in one list, as the registered ops take them."""
        return [*self.by_query, *self.by_key]

    @classmethod
    def from_dense(cls, seen: Tensor | np.ndarray) -> AttentionMask:
        """Any mask, bool [Tq, Tk], in rectangles of 64 queries by the keys that one of them sees."""
        return cls(seen.numpy() if isinstance(seen, Tensor) else seen)

    @classmethod
    def factorised(cls, f_dim: int, t_dim: int, prefix: int = 2) -> AttentionMask:
        """Frequency-time factorised attention: the patches of the same row or column, and the prefix.

        Tokens are `prefix` special ones, which see and are seen by all, then f_dim x t_dim patches, frequency the
        slower axis. A patch sees the patches of its frequency and those of its time.

        Raises:
            ValueError: a size is out of range.
        """
        return _factorised(*_sizes(f_dim, t_dim, prefix))

    @classmethod
    def time_window(cls, f_dim: int, t_dim: int, radius: int, prefix: int = 2) -> AttentionMask:
        """Local attention: the patches at most `radius` columns away in time, and the prefix.

        Tokens are as in `factorised`; `radius` 0 leaves a patch its own column.

        Raises:
            ValueError: a size is out of range.
        """
        if radius < 0:
            raise ValueError(f"radius is {radius}: expected 0 or more columns")
        return _time_window(*_sizes(f_dim, t_dim, prefix), radius)


def dense_pairs(by_query: Rectangles, queries: int, keys: int) -> Tensor:
    """Visible pairs, bool [Tq, Tk], from one side's rectangles alone."""
    pairs = torch.zeros(queries, keys, dtype=torch.bool)
    for row, num_rows, column, num_columns, offset, _ in by_query.table.tolist():
        tile = by_query.rows[row : row + num_rows].long()[:, None]
        other = by_query.columns[column : column + num_columns].long()
        if offset < 0:
            pairs[tile, other] = True
        else:
            seen = by_query.seen[offset : offset + num_rows * num_columns]
            pairs[tile, other] |= seen.view(num_rows, num_columns).bool()
    return pairs


_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_rectangles(rectangles: Sequence[Tensor], queries: int, keys: int) -> None:
    """Raise ValueError unless both sides' tensors stay within q and k of these lengths; once a mask.

    Kernels take addresses from them. That no pair is covered twice or is missing on one side is
    `AttentionMask`'s to promise; the numbers of visible pairs are compared.
    """
    table = rectangles[2]
    if _checked.get(table) == (queries, keys):
        return
    for tensor in rectangles:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"rectangles lie on {tensor.device}: expected the CPU, as AttentionMask has them"
            )
    pairs = [
        _pairs_within(Rectangles(*rectangles[:4]), queries, keys),
        _pairs_within(Rectangles(*rectangles[4:]), keys, queries),
    ]
    if pairs[0] is None or pairs[0] != pairs[1]:
        raise ValueError(
            f"the mask's rectangles do not fit {queries} x {keys} tokens: expected the rectangles of an "
            "AttentionMask of that size"
        )
    _checked[table] = (queries, keys)


def _pairs_within(side: Rectangles, rows: int, columns: int) -> int | None:
    """Visible pairs of one side, or None where a number leaves what it points into."""
    for tokens, limit in ((side.rows, rows), (side.columns, columns)):
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            return None
    seen = side.seen.numpy()
    pairs, last = 0, 0
    for row, num_rows, column, num_columns, offset, index in side.table.tolist():
        inside = (
            0 <= row <= row + num_rows <= side.rows.numel()
            and 0 <= column <= column + num_columns <= side.columns.numel()
            and num_rows >= 0
            and num_columns >= 0
            and index >= last
            and offset >= -1
        )
        area = num_rows * num_columns
        if not inside or (offset >= 0 and offset + area > len(seen)):
            return None
        pairs += area if offset < 0 else int(np.count_nonzero(seen[offset : offset + area]))
        last = index
    return pairs


def _sizes(f_dim: int, t_dim: int, prefix: int) -> tuple[int, int, int]:
    if f_dim < 1 or t_dim < 1 or prefix < 0:
        raise ValueError(
            f"f_dim {f_dim}, t_dim {t_dim}, prefix {prefix}: expected a grid of at least 1 x 1 patches and no "
            "negative prefix"
        )
    return f_dim, t_dim, prefix


def _grid(f_dim: int, t_dim: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and time of every token; the prefix has neither (-1)."""
    token = np.arange(prefix + f_dim * t_dim) - prefix
    return np.where(token < 0, -1, token // t_dim), np.where(token < 0, -1, token % t_dim)


@functools.lru_cache(maxsize=16)
def _factorised(f_dim: int, t_dim: int, prefix: int) -> AttentionMask:
    row, column = _grid(f_dim, t_dim, prefix)
    special = row < 0
    same_row, same_column = row[:, None] == row[None], column[:, None] == column[None]
    seen = same_row | same_column | special[:, None] | special[None]
    # columns first: what is left, rows with the prefix, is the larger part and ends in the result
    by_column = same_column & ~same_row & ~special[:, None] & ~special[None]
    owner = np.where(by_column, 0, 1).astype(np.int8)
    tokens = np.arange(len(row), dtype=np.int32)
    columns = [tokens[column == t] for t in range(t_dim)] if f_dim > 1 else []
    rows = [tokens[special]] if prefix else []
    rows += [tokens[row == f] for f in range(f_dim)]
    tiles = (columns, rows)
    return AttentionMask(seen, tiles, tiles, owner, owner)


@functools.lru_cache(maxsize=16)
def _time_window(f_dim: int, t_dim: int, prefix: int, radius: int) -> AttentionMask:
    row, column = _grid(f_dim, t_dim, prefix)
    special = row < 0
    near = np.abs(column[:, None] - column[None]) <= radius
    seen = near | special[:, None] | special[None]
    tokens = np.arange(len(row), dtype=np.int32)
    # whole columns side by side, so that a tile's keys are its own columns and `radius` to either side
    width = max(1, 64 // f_dim)
    tiles = [tokens[special]] if prefix else []
    for first in range(0, t_dim, width):
        part = tokens[(column >= first) & (column < first + width)]
        tiles.append(part[np.argsort(column[part], kind="stable")])
    return AttentionMask(seen, (tiles,), (tiles,))


def _rectangles(
    seen: np.ndarray,
    passes: Sequence[Sequence[Tokens]] | None,
    owner: np.ndarray | None,
    side: str,
) -> Rectangles:
    count = len(seen)
    if passes is None:
        tokens = np.arange(count, dtype=np.int32)
        passes = ([tokens[first : first + 64] for first in range(0, count, 64)],)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    table: list[tuple[int, ...]] = []
    patterns: dict[bytes, int] = {}
    covered = np.zeros(seen.shape, np.uint8)
    at_row = at_column = at_seen = 0
    for index, tiles in enumerate(passes):
        listed = np.concatenate([*tiles, np.zeros(0, np.int32)])
        if len(np.unique(listed)) != len(listed):
            raise ValueError(f"{side}_tiles: a token is twice in pass {index}")
        for tile, visible in _visible(seen, tiles, owner, index):
            keys = np.flatnonzero(visible.any(0)).astype(np.int32)
            if not len(keys):
                continue
            inside = visible[:, keys]
            covered[np.ix_(tile, keys)] += inside
            offset = -1
            if not inside.all():
                pattern = inside.tobytes()
                offset = patterns.setdefault(pattern, at_seen)
                at_seen += len(pattern) if offset == at_seen else 0
            table.append((at_row, len(tile), at_column, len(keys), offset, index))
            rows.append(tile.astype(np.int32))
            columns.append(keys)
            at_row, at_column = at_row + len(tile), at_column + len(keys)
    if not np.array_equal(covered, seen):
        raise ValueError(f"{side}_tiles: a visible pair is in no rectangle, or in more than one")
    return Rectangles(
        _tensor(rows, np.int32),
        _tensor(columns, np.int32),
        torch.tensor(table, dtype=torch.int64).reshape(-1, 6),
        torch.frombuffer(bytearray(b"".join(patterns)) or bytearray(1), dtype=torch.uint8),
    )


def _visible(
    seen: np.ndarray, tiles: Sequence[Tokens], owner: np.ndarray | None, index: int
) -> Iterator[tuple[Tokens, np.ndarray]]:
    for tile in tiles:
        visible = seen[tile]
        if owner is not None:
            visible = visible & (owner[tile] == index)
        if len(tile):
            yield tile, visible


def _tensor(parts: list[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype))
