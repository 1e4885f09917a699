"""How far a result is from its oracle: the measures that budgets are stated in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

INFINITE = math.inf


class Errors(NamedTuple):
    """Distances of a tensor from its oracle, all in float64.

    Attributes:
        worst: largest |result - oracle| over max(|oracle|, root mean square of the oracle): entry
            by entry, relative for large entries and relative to the tensor's scale for small ones.
        rel_l2: norm of the difference over the norm of the oracle.
        max_abs: largest |result - oracle|.
        mean_abs: mean of |result - oracle|.
    """

    worst: float
    rel_l2: float
    max_abs: float
    mean_abs: float


ZERO = Errors(0.0, 0.0, 0.0, 0.0)
_WRONG = Errors(INFINITE, INFINITE, INFINITE, INFINITE)


def measure(result: Tensor, oracle: Tensor) -> Errors:
    """Distances of `result` from `oracle`; infinite where NaN or Inf do not stand in the same places.

    Raises:
        ValueError: the shapes differ.

    >>> measure(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])).max_abs
    0.5
    """
    if result.shape != oracle.shape:
        raise ValueError(f"result has shape {tuple(result.shape)}, oracle {tuple(oracle.shape)}")
    if not oracle.numel():
        return ZERO
    got, want = result.detach().double(), oracle.detach().double().to(result.device)
    finite = want.isfinite()
    if not bool(finite.all()):
        same = torch.where(want.isnan(), got.isnan(), (got == want) | finite)
        if not bool(same.all()):
            return _WRONG
        got, want = got[finite], want[finite]
        if not want.numel():
            return ZERO
    if not bool(got.isfinite().all()):
        return _WRONG
    difference = (got - want).abs()
    norm = float(want.norm())
    # a tensor of zeros has no scale: its errors are absolute, as if its entries were of order one
    size = math.sqrt(want.numel())
    norm = norm or size
    scale = norm / size
    return Errors(
        worst=float((difference / want.abs().clamp(min=scale)).max()),
        rel_l2=float(difference.norm()) / norm,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
    )


def measure_all(results: Iterable[Tensor], oracles: Iterable[Tensor]) -> tuple[Errors, float]:
    """Errors over several tensors taken as one long vector, and one minus their cosine."""
    got = torch.cat([tensor.detach().double().flatten() for tensor in results])
    want = torch.cat([tensor.detach().double().flatten() for tensor in oracles]).to(got.device)
    errors = measure(got, want)
    norms = float(got.norm()) * float(want.norm())
    if not math.isfinite(norms):
        return errors, INFINITE
    return errors, 1.0 - float(got @ want) / norms if norms else 0.0
