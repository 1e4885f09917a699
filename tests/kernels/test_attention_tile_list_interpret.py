"""The list of tiles of packed clips: every tile once, clips with most work first, nothing past its end."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast.kernels import attention_launch, attention_tile_list, attention_varlen
from ast_fast.kernels.attention_launch import Config
from ast_fast.reference import ops as reference

pytestmark = pytest.mark.interpret

LENGTHS = {
    "one": [1],
    "one_empty": [0],
    "one_clip": [129],
    "around_the_padding": [127, 128, 129, 0, 1],
    "all_equal": [70] * 5,
    "all_empty": [0, 0, 0],
    "one_long_many_short": [3, 5, 900, 2, 0, 7, 7, 1, 64, 65, 0],
    "empty_ends": [0, 40, 0],
}


def starts(lengths):
    """cu_seqlens of clips of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def expected(lengths, walked, block):
    """The list by sorting: clips with more rows to walk over first, earlier ones first among equals."""
    order = sorted(range(len(lengths)), key=lambda clip: (-walked[clip], clip))
    return [
        [clip, tile]
        for clip in order
        for tile in range(max(1, -(-lengths[clip] // block)))
    ]  # fmt: skip


def check(lengths, walked, block):
    """The list of these clips is the sorted one, with nothing but -1 behind it."""
    rows = sum(lengths)
    bounds = (starts(lengths), starts(walked), rows, sum(walked))
    found = attention_tile_list.tile_list(*bounds, block).tolist()
    want = expected(lengths, walked, block)
    assert len(found) == rows // block + len(lengths)
    assert found[: len(want)] == want
    assert found[len(want) :] == [[-1, -1]] * (len(found) - len(want))


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_tile_is_listed_once_and_the_longest_clip_first(monkeypatch, lengths, block):
    # memory that is not -1 to begin with, which is what marks the end
    guarded = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **options: guarded(*a, **options).fill_(77))
    check(lengths, lengths, block)


def test_clips_with_most_rows_to_walk_over_come_first():
    check([5, 70, 0, 33, 70], [40, 3, 90, 0, 41], 32)


@pytest.mark.parametrize("clips", [9, 16, 17])
def test_more_clips_than_one_step_compares(monkeypatch, clips):
    monkeypatch.setattr(attention_tile_list, "CLIPS_A_STEP", 8)
    generator = torch.Generator().manual_seed(clips)
    lengths = torch.randint(0, 40, (clips,), generator=generator).tolist()
    # a clip of more tiles than one step writes
    lengths[3] = 16 * 20 + 1
    check(lengths, lengths, 16)


@given(
    clips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9)), min_size=1, max_size=8),
    block=st.sampled_from([16, 32, 64, 128]),
)
def test_any_lengths(arena, clips, block):
    lengths, walked = ([clip[side] for clip in clips] for side in (0, 1))
    check(lengths, walked, block)


def test_starts_with_a_stride_are_read_as_they_are():
    lengths = [70, 3, 129]
    strided = starts(lengths).repeat_interleave(2)[::2]
    found = attention_tile_list.tile_list(strided, strided, sum(lengths), sum(lengths), 64)
    want = expected(lengths, lengths, 64)
    assert found.tolist()[: len(want)] == want


WRONG = {
    "backwards": [0, 16, 10, 20],
    "far_outside": [0, 500, 10, 400, 20],
    "past_the_end": [0, 10, 21],
    "short_of_the_end": [0, 10, 19],
    "late_first": [1, 10, 20],
    "negative": [0, -5, 20],
    "negative_first": [-1, 10, 20],
    "extremes": [0, 2**31 - 1, -(2**31), 20],
}


@pytest.mark.parametrize("side", ["tiles", "walked"])
@pytest.mark.parametrize("broken", WRONG.values(), ids=WRONG)
def test_wrong_starts_list_nothing_and_fill_the_results_with_nan(arena, monkeypatch, broken, side):
    monkeypatch.setattr(attention_tile_list, "CLIPS_A_STEP", 2)
    wrong = torch.tensor(broken, dtype=torch.int32)
    right = starts([20, *[0] * (len(broken) - 2)])
    bounds = (wrong, right) if side == "tiles" else (right, wrong)
    # float32, float16 and bfloat16, between guard zones
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    results = [arena.put(torch.ones(3, 7, dtype=kind)) for kind in kinds]
    found = attention_tile_list.tile_list(*bounds, 20, 20, 16, results)
    assert bool((found == -1).all())
    assert all(bool(x.isnan().all()) for x in results)


def test_right_starts_leave_the_results_alone(arena):
    results = [arena.put(torch.ones(3, 7)) for _ in range(2)]
    attention_tile_list.tile_list(starts([20, 0]), starts([0, 20]), 20, 20, 16, results)
    assert all(bool((x == 1).all()) for x in results)


class Launches:
    """How many lists the launches of one call asked for."""

    def __init__(self, monkeypatch):
        self.blocks = []
        real = attention_tile_list.tile_list

        def counted(starts, walked, rows, walked_rows, block, results):
            self.blocks.append(block)
            return real(starts, walked, rows, walked_rows, block, results)

        monkeypatch.setattr(attention_tile_list, "tile_list", counted)


def run(q, k, v, do, cu_q, cu_k, dq_config, dkv_config):
    """o, lse, dq, dk, dv."""
    # wrong on purpose: the lengths that the host is told are not needed
    o, lse = attention_varlen.forward(q, k, v, cu_q, cu_k, 1, 1, 0.2, config=dq_config)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    attention_varlen.backward(
        do, q, k, v, o, lse, cu_q, cu_k, 1, 1, 0.2, True, *grads,
        dq_config=dq_config, dkv_config=dkv_config,
    )  # fmt: skip
    return o, lse, *grads


def random(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 32, generator=generator)


def test_both_passes_share_a_list_where_their_tiles_are_the_same(arena, monkeypatch):
    lengths = [40, 0, 70]
    q, k, v, do = (random(110, seed) for seed in range(4))
    launches = Launches(monkeypatch)
    cu = starts(lengths)
    run(q, k, v, do, cu, cu.view(-1), Config(64, 32, 4, 2), Config(32, 64, 4, 2))
    assert launches.blocks == [64, 64]
    launches.blocks.clear()
    # the same numbers elsewhere are not known to be the same
    run(q, k, v, do, cu, cu.clone(), Config(64, 32, 4, 2), Config(32, 64, 4, 2))
    assert launches.blocks == [64, 64, 64]
    launches.blocks.clear()
    run(q, k, v, do, cu, cu, Config(64, 32, 4, 2), Config(32, 32, 4, 2))
    assert launches.blocks == [64, 64, 32]


def test_the_order_of_clips_does_not_change_a_bit_of_any_of_them(arena):
    lengths, order = [5, 130, 0, 40, 63], [3, 1, 4, 0, 2]
    moved = [lengths[clip] for clip in order]
    cu, cu_moved = starts(lengths), starts(moved)
    tensors = [random(sum(lengths), seed) for seed in range(4)]
    clips = [x.split(lengths) for x in tensors]
    again = [torch.cat([parts[clip] for clip in order]) for parts in clips]
    tile, keys = Config(64, 32, 4, 2), Config(32, 64, 4, 2)
    first = run(*tensors, cu, cu, tile, keys)
    second = run(*again, cu_moved, cu_moved, tile, keys)
    for i in (0, 2, 3, 4):
        parts = first[i].split(lengths)
        assert torch.equal(torch.cat([parts[clip] for clip in order]), second[i])
    columns, columns_moved = (reference.varlen_offsets(x).tolist() for x in (cu, cu_moved))
    for place, clip in enumerate(order):
        n = lengths[clip]
        mine = first[1][:, columns[clip] : columns[clip] + n]
        assert torch.equal(mine, second[1][:, columns_moved[place] : columns_moved[place] + n])
    for lse, cu_x, sizes in ((first[1], columns, lengths), (second[1], columns_moved, moved)):
        padding = torch.ones(lse.shape[1], dtype=torch.bool)
        for column, n in zip(cu_x, sizes, strict=True):
            padding[column : column + n] = False
        assert bool((lse[:, padding] == torch.inf).all())


def test_a_packed_grid_is_judged_by_all_rows_together():
    cu = starts([600, 600])
    problem = attention_varlen._problem(*[torch.empty(1200, 12, 64)] * 2, cu, cu)
    assert problem.pairs == 12 and problem.queries == problem.keys == 1200
    large, small = Config(128, 64, 8, 3), Config(64, 64, 4, 3)
    chosen = attention_launch.choose((large, small), False, problem.queries, problem.pairs, 120)
    assert chosen == large
