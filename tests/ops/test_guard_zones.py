"""The canaries of these tests tell on a kernel that reads, writes or forgets what it should not."""

import importlib

import pytest
import torch

from ast_fast import ops, use_backend
from ast_fast.backend import OPS
from ast_fast.testing import (
    Guarded,
    GuardZoneError,
    available_backends,
    random_tensor,
    small_op_cases,
)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ extension is not built")
def test_every_op_with_a_kernel_runs_between_canaries(guard_zones):
    assert {op for op, _ in guard_zones} == set(OPS)
    for case in small_op_cases().values():
        inputs = case.inputs(torch.Generator().manual_seed(0))
        leaves = {
            n: t.float().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()
        }
        with use_backend("cpp"):
            sum(y.sum() for n, y in case.ours(leaves).items()).backward()
    q = random_tensor(1, 5, 2, 32, seed=0)
    with use_backend("cpp"):
        ops.attention_biased(q, q, q, torch.zeros(1, 5))
    assert all(guarded.calls for guarded in guard_zones.values())


def beyond(x, offset):
    """Memory `offset` elements from the first of a contiguous tensor."""
    return torch.as_strided(x, (1,), (1,), x.storage_offset() + offset)


@pytest.mark.parametrize("offset", (-1, 12, -40, 50))
def test_a_write_beside_an_input_is_seen(offset):
    def kernel(x):
        beyond(x, offset).fill_(1.0)

    with pytest.raises(GuardZoneError, match="x, or memory around it"):
        Guarded(kernel)(torch.ones(3, 4))


@pytest.mark.parametrize("offset", (-1, 12))
def test_a_write_beside_an_output_is_seen_and_what_is_written_inside_arrives(offset):
    def kernel(x, out, slip):
        out.copy_(x)
        if slip:
            beyond(out, offset).fill_(1.0)

    x, out = torch.ones(3, 4), torch.zeros(3, 4)
    Guarded(kernel, ("out",))(x, out, False)
    assert torch.equal(out, x)
    with pytest.raises(GuardZoneError, match="out, or memory around it"):
        Guarded(kernel, ("out",))(x, out, True)


def test_a_write_into_an_input_is_seen():
    with pytest.raises(GuardZoneError, match="x, or"):
        Guarded(lambda x: x.add_(1))(torch.ones(3))


@pytest.mark.parametrize("offset", (-1, 12))
def test_a_read_beside_an_input_is_nan(offset):
    assert Guarded(lambda x: beyond(x, offset).clone())(torch.ones(3, 4)).isnan().all()


@pytest.mark.parametrize("offset", (-1, 12))
def test_a_write_beside_an_allocation_is_seen(offset):
    def kernel(x):
        y = torch.empty(3, 4)
        beyond(y, offset).fill_(1.0)
        return y

    with pytest.raises(GuardZoneError, match="an allocation"):
        Guarded(kernel)(torch.ones(3, 4))


def test_what_a_kernel_forgets_to_write_is_nan():
    assert Guarded(lambda x: torch.empty(3))(torch.ones(3)).isnan().all()


def test_strides_alignment_and_rows_that_repeat_are_kept():
    seen = []
    base = torch.arange(64.0)
    for x in (base[1:13].view(3, 4), base.view(8, 8)[::2, ::2], base[:4].expand(5, 4)):
        Guarded(lambda x: seen.append((x.stride(), x.data_ptr() % 64, x.clone())))(x)
        assert seen[-1][:2] == (x.stride(), x.data_ptr() % 64) and torch.equal(seen[-1][2], x)


def test_every_module_that_calls_the_kernels_is_guarded():
    # a new adapter must be named in conftest.py
    module = importlib.import_module("ast_fast.cpp")
    from pathlib import Path

    calling = {
        path.stem
        for path in Path(module.__file__).parent.glob("*.py")
        if "\n    from .. import _C" in path.read_text()
        or "\nfrom .. import _C" in path.read_text()
    }
    outside = {"_common", "_gemm", "packed"}  # sums of rows, PyTorch's products, and no op
    assert calling - outside <= set(OPS)
