"""What the C++ kernel tests share: skip without the extension, seeds, and the error budget."""

import pytest
import torch

import ast_fast.cpp


@pytest.fixture(autouse=True)
def _extension_and_seed():
    reason = ast_fast.cpp.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _relative(value: torch.Tensor, oracle: torch.Tensor) -> float:
    scale = oracle.norm().item()
    return (value.double() - oracle).norm().item() / (scale if scale > 0 else 1.0)


@pytest.fixture
def within():
    """within(ours, torch's, fp64 oracle, floor): relative L2 error at most max(2 x torch's, floor)."""

    def check(ours, theirs, oracle, floor, name=""):
        assert ours.shape == oracle.shape, name
        assert ours.isfinite().all(), name
        error = _relative(ours, oracle)
        budget = max(2 * _relative(theirs, oracle), floor) if theirs is not None else floor
        assert error <= budget, (
            f"{name}: relative L2 error {error:.2e} over the budget {budget:.2e}"
        )

    return check


@pytest.fixture
def guarded():
    """guarded(shape, dtype): a tensor cut from a larger buffer, and a check that its edges are intact."""
    made = []

    def make(shape, dtype=torch.float32):
        count = 1
        for size in shape:
            count *= size
        buffer = torch.full((count + 8192,), 123.0, dtype=dtype)
        made.append((buffer, count))
        return buffer[4096 : 4096 + count].view(shape)

    yield make
    for buffer, count in made:
        assert (buffer[:4096] == 123.0).all() and (buffer[4096 + count :] == 123.0).all()
