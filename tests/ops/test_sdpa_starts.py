"""Packed attention by PyTorch's kernels of a GPU: starts that bound no clips never reach one."""

import itertools

import pytest
import torch

from ast_fast import reference
from ast_fast.ops import _sdpa_varlen
from ast_fast.testing import assert_same, random_tensor


class Gpu:
    """Stands for PyTorch's packed kernels on a GPU: checks what they would take addresses from."""

    def _take(self, rows, keys, starts_q, starts_k, longest):
        for starts, count, most in zip((starts_q, starts_k), (rows, keys), longest, strict=True):
            assert starts.is_contiguous() and starts.dtype == torch.int32
            values = starts.tolist()
            assert values == sorted(values) and 0 <= values[0] <= values[-1] <= count
            assert max(b - a for a, b in itertools.pairwise(values)) <= most

    def _flash_attention_forward(self, q, k, v, starts_q, starts_k, *rest, scale):
        self._take(len(q), len(k), starts_q, starts_k, rest[:2])
        # rows of no clip are not written
        o, lse = torch.full_like(q, 77.0), torch.full((q.shape[1], len(q)), 77.0)
        made, padded = reference.ops.attention_varlen(q, k, v, starts_q, starts_k, scale)
        o[: len(made)] = made
        for clip, column in enumerate(reference.ops.varlen_offsets(starts_q).tolist()):
            rows = slice(*starts_q[clip : clip + 2].tolist())
            lse[:, rows] = padded[:, column : column + rows.stop - rows.start]
        return o, lse

    def _flash_attention_backward(self, do, q, k, v, o, lse, starts_q, starts_k, *rest, scale):
        self._take(len(q), len(k), starts_q, starts_k, rest[:2])
        return tuple(torch.full_like(x, 77.0) for x in (q, k, v))

    def _efficient_attention_forward(self, q, k, v, bias, starts_q, starts_k, *rest, scale):
        o, lse = self._flash_attention_forward(
            q[0], k[0], v[0], starts_q, starts_k, *rest, scale=scale
        )
        found = torch.full((len(starts_q) - 1, q.shape[2], -(-rest[0] // 32) * 32), torch.inf)
        for clip, (a, b) in enumerate(itertools.pairwise(starts_q.tolist())):
            found[clip, :, : b - a] = lse[:, a:b]
        return o[None], found

    def _efficient_attention_backward(
        self, do, q, k, v, bias, o, starts_q, starts_k, *rest, scale, num_splits_key
    ):
        self._take(q.shape[1], k.shape[1], starts_q, starts_k, rest[:2])
        return tuple(torch.full_like(x, 77.0) for x in (q, k, v))


def packed_on_a_gpu(name, monkeypatch, starts_q, starts_k, longest=(20, 20)):
    """What the packed kernels of a GPU give for 20 rows: o, lse and gradients."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(_sdpa_varlen, "_aten", Gpu())
    q, k, v = (random_tensor(20, 2, 32, seed=seed) for seed in range(3))
    clips = (*(torch.tensor(x, dtype=torch.int32) for x in (starts_q, starts_k)), *longest, 0.2)
    o, lse = _sdpa_varlen.forward(name, q, k, v, *clips)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    _sdpa_varlen.backward(name, o, q, k, v, o, lse, *clips, True, grads)
    return o, lse, *grads


@pytest.mark.parametrize("name", ("sdpa-flash", "sdpa-efficient"))
@pytest.mark.parametrize(
    "wrong",
    [[0, 12, 5, 20], [0, 5, 21], [0, 5, 19], [1, 5, 20], [0, -7, 20], [0, 2**31 - 1, -(2**31), 20]],
    ids=["backwards", "past", "short", "late", "before", "far"],
)
@pytest.mark.parametrize("side", ("q", "k"))
def test_wrong_starts_on_a_gpu_give_nan_everywhere_and_reach_no_kernel(
    name, wrong, side, monkeypatch
):
    right = [0, 7] + [20] * (len(wrong) - 2)
    both = (wrong, right) if side == "q" else (right, wrong)
    for result in packed_on_a_gpu(name, monkeypatch, *both):
        assert result.isnan().all()


@pytest.mark.parametrize("name", ("sdpa-flash", "sdpa-efficient"))
def test_clips_longer_than_was_said_give_nan_on_a_gpu(name, monkeypatch):
    for result in packed_on_a_gpu(name, monkeypatch, [0, 7, 20], [0, 7, 20], (13, 12)):
        assert result.isnan().all()


@pytest.mark.parametrize("name", ("sdpa-flash", "sdpa-efficient"))
def test_right_starts_on_a_gpu_give_what_the_kernels_give(name, monkeypatch):
    o, lse, *grads = packed_on_a_gpu(name, monkeypatch, [0, 7, 7, 20], [0, 9, 20, 20])
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 7, 7, 20], [0, 9, 20, 20])]
    q, k, v = (random_tensor(20, 2, 32, seed=seed) for seed in range(3))
    want, want_lse = reference.ops.attention_varlen(q, k, v, *starts, 0.2)
    assert_same(o, want)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    assert_same(lse[lse.isfinite()], want_lse[lse.isfinite()])
    assert not lse.isnan().any()
    # a clip without keys gives its queries no gradient, and one without queries its keys none
    assert (grads[0][:7] == 77.0).all() and not grads[0][7:].any()
    assert (grads[1][:9] == 77.0).all() and not grads[1][9:].any()
