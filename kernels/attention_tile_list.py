"""Which programs a launch has: every tile of every clip once, and for packed clips longest first.

Dense clips all have as many tiles, so a program finds its own by division. Packed clips do not, and the
host cannot know their lengths without waiting for the GPU; it knows only that clips of N rows in all
have at most N // block + B tiles, an empty clip counting as one. So a small kernel writes the list of
(clip, tile) on the GPU, and an attention kernel with a program a head for each of that many entries
returns at once where the list has ended. Clips whose tiles take longest come first: what runs
last, while other multiprocessors are already idle, is short.

The host cannot check the clips' starts either, so this kernel does. Starts that do not begin with 0, go
backwards or do not end with the number of rows give a list without an entry, so that no attention kernel
takes an address from them, and NaN in all of the results, so that nobody takes them for an answer.

Work: B^2 comparisons, spread over B programs; 8 bytes are written a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._settle import settle
from .attention_problem import Problem

# Clips compared at a time, one specialisation for any number of clips.
CLIPS_A_STEP = 1024
NUM_WARPS = 4
RESULTS = 3  # most tensors that one call computes

# twice or once, these 16 bits are a NaN of float32, of float16 and of bfloat16
_NAN_BITS = tl.constexpr(0x7FFF)


@triton.jit
def _fill_with_nan(ptr, count, program, programs, STEP: tl.constexpr):
    """One program's share of `count` halves of a tensor."""
    for start in range(program.to(tl.int64) * STEP, count, programs.to(tl.int64) * STEP):
        places = start + tl.arange(0, STEP)
        tl.store(ptr + places, tl.full([STEP], _NAN_BITS, tl.int16), mask=places < count)


@triton.jit(
    do_not_specialize=[
        *("halves_0", "halves_1", "halves_2"),
        *("rows", "walked_rows", "clips", "block", "entries"),
    ],
    do_not_specialize_on_alignment=["starts_ptr", "walked_ptr", "result_0", "result_1", "result_2"],
)
def attention_tile_list_kernel(
    list_ptr,  # [entries, 2] int32: clip and tile, -1 past the last
    starts_ptr,  # [B+1] int32, of the rows that tiles are made of
    walked_ptr,  # [B+1] int32, of the rows that a tile walks over
    result_0,  # int16: what the call computes, as halves, written if the starts are wrong
    result_1,
    result_2,
    halves_0: tl.int64,
    halves_1: tl.int64,
    halves_2: tl.int64,
    rows,  # of all clips
    walked_rows,
    clips,
    block,  # rows a tile
    entries,
    STEP: tl.constexpr,
):
    """Entries of one clip, behind those of every clip with more rows to walk over."""
    clip = tl.program_id(0)
    length = tl.load(starts_ptr + clip + 1) - tl.load(starts_ptr + clip)
    walked = tl.load(walked_ptr + clip + 1) - tl.load(walked_ptr + clip)
    tiles = (tl.maximum(length, 1) + block - 1) // block
    first = 0
    total = 0
    wrong = (tl.load(starts_ptr) != 0) | (tl.load(starts_ptr + clips) != rows)
    wrong |= (tl.load(walked_ptr) != 0) | (tl.load(walked_ptr + clips) != walked_rows)
    backwards = 0
    for start in range(0, clips, STEP):
        others = start + tl.arange(0, STEP)
        inside = others < clips
        begin = tl.load(starts_ptr + others, mask=inside, other=0)
        end = tl.load(starts_ptr + others + 1, mask=inside, other=0)
        backwards += tl.sum((end < begin).to(tl.int32))
        count = tl.where(inside, (tl.maximum(end - begin, 1) + block - 1) // block, 0)
        begin = tl.load(walked_ptr + others, mask=inside, other=0)
        end = tl.load(walked_ptr + others + 1, mask=inside, other=0)
        backwards += tl.sum((end < begin).to(tl.int32))
        others_walked = end - begin
        # of equals the earlier clip is first, so the order is total and every place is taken once
        before = (others_walked > walked) | ((others_walked == walked) & (others < clip))
        first += tl.sum(tl.where(before, count, 0))
        total += tl.sum(count)
    if wrong | (backwards > 0):
        total = 0
        _fill_with_nan(result_0, halves_0, clip, clips, STEP)
        _fill_with_nan(result_1, halves_1, clip, clips, STEP)
        _fill_with_nan(result_2, halves_2, clip, clips, STEP)
    else:
        for start in range(0, tiles, STEP):
            tile = start + tl.arange(0, STEP)
            mask = tile < tiles
            place = list_ptr + 2 * (first + tile)
            tl.store(place, tl.zeros([STEP], tl.int32) + clip, mask=mask)
            tl.store(place + 1, tile, mask=mask)
    for entry in range(total + clip, entries, clips):
        tl.store(list_ptr + 2 * entry, -1)
        tl.store(list_ptr + 2 * entry + 1, -1)


class Grid(NamedTuple):
    """What a launch needs to give every tile of every clip and head a program."""

    programs: int
    tiles: int  # of a dense clip; 1 when packed
    tile_list: Tensor  # [entries, 2] int32; unread when dense


class Grids:
    """The grids of one call: launches with the same tiles of the same clips share one list."""

    def __init__(self, problem: Problem, unread: Tensor, results: Sequence[Tensor]) -> None:
        self._problem = problem
        self._results = results
        # an argument that is not read still has to be an int32 pointer
        self._unread = unread.view(torch.int32)
        self._lists: dict[tuple[object, ...], Tensor] = {}

    def over_queries(self, block: int) -> Grid:
        """Tiles of `block` queries, each of which walks over its clip's keys."""
        problem = self._problem
        rows = (problem.queries, problem.keys)
        return self._grid(rows, block, problem.q_starts, problem.k_starts)

    def over_keys(self, block: int) -> Grid:
        """Tiles of `block` keys, each of which walks over its clip's queries."""
        problem = self._problem
        rows = (problem.keys, problem.queries)
        return self._grid(rows, block, problem.k_starts, problem.q_starts)

    def _grid(
        self, rows: tuple[int, int], block: int, starts: Tensor | None, walked: Tensor | None
    ) -> Grid:
        problem = self._problem
        if starts is None or walked is None:
            tiles = triton.cdiv(rows[0], block)
            return Grid(tiles * problem.heads * problem.clips, tiles, self._unread)
        key = (rows, block, _identity(starts), _identity(walked))
        if key not in self._lists:
            self._lists[key] = tile_list(starts, walked, *rows, block, self._results)
        found = self._lists[key]
        return Grid(found.shape[0] * problem.heads, 1, found)


def tile_list(
    starts: Tensor,
    walked: Tensor,
    rows: int,
    walked_rows: int,
    block: int,
    results: Sequence[Tensor] = (),
) -> Tensor:
    """Tiles of `block` rows of packed clips, [rows // block + B, 2] int32: clip and tile, then -1.

    `starts` [B+1] bounds the clips among the `rows` that tiles are made of, `walked` [B+1] bounds them
    among the `walked_rows` that each tile walks over, whose number decides the order. An empty clip has
    one tile. Where the starts are wrong there is no tile and `results`, contiguous, are filled with NaN.
    """
    clips = starts.numel() - 1
    entries = rows // block + clips
    found = torch.empty((entries, 2), dtype=torch.int32, device=starts.device)
    halves = [x.view(torch.int16) for x in results]
    halves += [found.view(torch.int16)] * (RESULTS - len(halves))
    counts = [x.numel() for x in halves[: len(results)]] + [0] * (RESULTS - len(results))
    with torch.cuda.device_of(starts):
        attention_tile_list_kernel[(clips,)](
            found,
            starts.contiguous(),
            walked.contiguous(),
            *halves,
            *counts,
            rows,
            walked_rows,
            clips,
            block,
            entries,
            STEP=CLIPS_A_STEP,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
    return found


def _identity(x: Tensor) -> tuple[object, ...]:
    """Tensors of one call with the same identity hold the same numbers."""
    return (x.data_ptr(), tuple(x.shape), x.stride())


settle(globals())
