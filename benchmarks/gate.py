"""The correctness gate: no speed is reported for a wrong result.

A candidate's outputs are compared with float64 on the same rounded inputs. Ours may be off by twice
what plain PyTorch is off in the same dtype, or by the case's floor; a peer by ten times as much, which
tells a peer that computes something else from one that rounds more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .case import Case, Inputs, Run, Skipped
from .timing import describe

PEER_FACTOR = 10.0

# smallest budgets, relative l2: forward and gradients
FLOORS = {"f32": (1e-6, 2e-6), "f16": (1e-3, 2e-3), "bf16": (6e-3, 1e-2)}
MODEL_FLOORS = {
    "f32": (2e-6, 3e-6),
    "f16": (2e-3, 5e-3),
    "bf16": (1e-2, 2e-2),
    "bf16-amp": (1e-2, 2e-2),
}


@dataclasses.dataclass
class Verdict:
    """How far the outputs of one candidate are off."""

    error: float
    worst: str
    reason: str = ""  # why it is wrong or failed; empty when fine
    status: str = "ok"  # or wrong, failed, skipped


def error_of(out: Tensor, expected: Tensor, measure: str) -> float:
    """Relative l2 or largest absolute error; infinity where NaN or infinity differ from `expected`."""
    out = out.detach()[: expected.shape[0]] if expected.dim() else out.detach()
    if out.shape != expected.shape:
        return math.inf
    got = out.double()
    expected = expected.to(got.device)
    if measure == "max_abs":
        value = (got - expected).abs().max() if got.numel() else got.new_zeros(())
    else:
        scale = expected.norm().clamp_min(1e-30)
        value = (got - expected).norm() / scale
    result = float(value)
    return result if math.isfinite(result) else math.inf


def judge(case: Case, run: Run, expected: Sequence[Tensor]) -> Verdict:
    """Run once and take the worst output's error."""
    try:
        outputs = run(0)
        if on_gpu(expected):
            torch.cuda.synchronize()
        if len(outputs) != len(expected):
            reason = f"{len(outputs)} outputs, expected {len(expected)}"
            return Verdict(math.inf, "", reason, "wrong")
        errors = [error_of(o, e, case.measure) for o, e in zip(outputs, expected, strict=True)]
    except Skipped as reason:
        return Verdict(math.inf, "", str(reason), "skipped")
    except Exception as error:
        return Verdict(math.inf, "", describe(error), "failed")
    worst = max(range(len(errors)), key=lambda number: errors[number])
    return Verdict(errors[worst], f"{case.outputs[worst]} {case.measure}")


def on_gpu(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are on a GPU."""
    return any(tensor.is_cuda for tensor in tensors)


def budget(case: Case, yardsticks: list[float]) -> float:
    """Twice the yardstick's error, or the floor."""
    finite = [value for value in yardsticks if math.isfinite(value)]
    return max([case.floor, *(2.0 * value for value in finite)])


def expected_outputs(case: Case, inputs: Inputs) -> list[Tensor]:
    """The oracle's outputs, cut from their graph."""
    return [tensor.detach() for tensor in case.oracle(inputs)]


def decide(verdict: Verdict, allowed: float, peer: bool) -> Verdict:
    """Mark the verdict wrong where the error is over the budget."""
    limit = allowed * (PEER_FACTOR if peer else 1.0)
    if verdict.status == "ok" and not verdict.error <= limit:
        verdict.status = "wrong"
        verdict.reason = f"wrong result: {verdict.worst} {verdict.error:.3g}, budget {limit:.3g}"
    return verdict
