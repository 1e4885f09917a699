"""Position tables on another grid, against the rule written out index by index."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ast_fast.positions import adapt_positions


def resize_axis(table: np.ndarray, axis: int, size: int, rule: str) -> np.ndarray:
    """Cut the middle, or interpolate with half-pixel centres and clamped edges."""
    length = table.shape[axis]
    if size <= length:
        start = length // 2 - size // 2
        return np.take(table, range(start, start + size), axis)
    out = []
    for i in range(size):
        if rule == "nearest":
            out.append(np.take(table, min(math.floor(i * length / size), length - 1), axis))
            continue
        centre = max((i + 0.5) * length / size - 0.5, 0.0)
        low = min(int(centre), length - 1)
        high = min(low + 1, length - 1)
        share = centre - low
        out.append((1 - share) * np.take(table, low, axis) + share * np.take(table, high, axis))
    return np.stack(out, axis)


def by_hand(pos, old_grid, new_grid, prefix, rule):
    table = pos[0, prefix:].numpy().reshape(*old_grid, -1)
    table = resize_axis(table, 1, new_grid[1], rule)  # time first
    table = resize_axis(table, 0, new_grid[0], rule)
    return np.concatenate((pos[0, :prefix].numpy(), table.reshape(-1, table.shape[-1])))


GRIDS = [
    ((24, 24), (12, 101)),  # AudioSet from a 384 image
    ((14, 14), (12, 101)),
    ((24, 24), (12, 50)),
    ((24, 24), (12, 12)),  # Speech Commands: both axes cut
    ((24, 24), (1, 512)),  # 128x2 patches
    ((24, 24), (4, 32)),
    ((24, 24), (25, 204)),  # both axes grow
    ((12, 101), (12, 50)),
    ((12, 101), (9, 73)),
    ((12, 101), (7, 204)),
    ((12, 101), (12, 101)),
    ((12, 101), (13, 9)),
    ((5, 7), (3, 4)),  # odd cut to even and back: the floors are not symmetric
    ((7, 5), (4, 3)),
    ((3, 3), (1, 1)),
]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("rule", ["bilinear", "nearest"])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_table_is_cut_and_interpolated_as_the_rule_says(old, new, rule, prefix):
    torch.manual_seed(0)
    pos = torch.randn(1, prefix + old[0] * old[1], 3, dtype=torch.float64)
    got = adapt_positions(pos, old, new, prefix, rule)
    assert got.shape == (1, prefix + new[0] * new[1], 3)
    want = by_hand(pos, old, new, prefix, rule)
    np.testing.assert_allclose(got[0].numpy(), want, rtol=0, atol=1e-12)


def test_128_mel_bins_keep_rows_6_to_17_of_a_24_grid():
    rows = torch.arange(24.0).repeat_interleave(24).view(1, 576, 1)
    pos = torch.cat((torch.zeros(1, 2, 1), rows), dim=1)
    got = adapt_positions(pos, (24, 24), (12, 101))[0, 2:, 0].view(12, 101)
    assert torch.equal(got, torch.arange(6.0, 18.0)[:, None].expand(12, 101))


def test_reinitialise_draws_a_table_of_its_own():
    pos = torch.full((1, 2 + 576, 64), 9.0)
    torch.manual_seed(1)
    got = adapt_positions(pos, (24, 24), (12, 101), 2, "reinitialise")
    assert got.shape == (1, 1214, 64)
    assert got.std().item() == pytest.approx(0.02, rel=0.02) and abs(got.mean().item()) < 1e-3


def test_wrong_rule_and_wrong_grid_are_named():
    pos = torch.zeros(1, 2 + 576, 8)
    with pytest.raises(ValueError, match="'cubic' is unknown: expected one of bilinear, nearest"):
        adapt_positions(pos, (24, 24), (12, 12), 2, "cubic")
    with pytest.raises(ValueError, match=r"pos has shape \(1, 578, 8\): expected \(1, 198, C\)"):
        adapt_positions(pos, (14, 14), (12, 12))
