"""The correctness gate: no speed is reported for a wrong result.

A candidate's outputs are compared with float64 on the same rounded inputs. Ours may be off by what
`ast_fast.equivalence` allows in relative l2 (twice plain PyTorch's error in the same dtype, or the floor of
that kind of tensor); a peer by ten times as much (or as much as plain PyTorch is), which tells a peer
that computes something else from one that rounds more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ast_fast.equivalence import budgets
from ast_fast.equivalence.measures import ZERO

from .case import Case, Inputs, Run, Skipped
from .timing import describe

PEER_FACTOR = 10.0

_PRECISIONS: dict[str, budgets.Precision] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "bf16-amp": "bfloat16",
    "bf16-master": "bfloat16",
    "int16": "float32",
    "int8": "int8",
    "fp8": "fp8",
}


@dataclasses.dataclass
class Verdict:
    """How far the outputs of one candidate are off, in the order of the case's outputs."""

    errors: list[float]
    reason: str = ""  # why it is wrong or failed; empty when fine
    status: str = "ok"  # or wrong, failed, skipped
    # the output that comes closest to its budget, or is furthest over
    worst: str = ""
    error: float = math.inf
    budget: float = 0.0


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
    """Run once and take every output's error."""
    try:
        outputs = run(0)
        if on_gpu(expected):
            torch.cuda.synchronize()
        if len(outputs) != len(expected):
            reason = f"{len(outputs)} outputs, expected {len(expected)}"
            return Verdict([], reason, "wrong")
        errors = [error_of(o, e, case.measure) for o, e in zip(outputs, expected, strict=True)]
    except Skipped as reason:
        return Verdict([], str(reason), "skipped")
    except Exception as error:
        return Verdict([], describe(error), "failed")
    return Verdict(errors)


def on_gpu(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are on a GPU."""
    return any(tensor.is_cuda for tensor in tensors)


def allowed(case: Case, yardsticks: Sequence[Verdict]) -> list[float]:
    """What each output may be off, given those of plain PyTorch's verdicts that exist, best first."""
    plain = next((verdict.errors for verdict in yardsticks if verdict.errors), None)
    return [
        _budget(case, number, plain[number] if plain else None)
        for number in range(len(case.outputs))
    ]


def _budget(case: Case, number: int, plain: float | None) -> float:
    kind = case.kinds[number]
    if kind == "log mel":
        # absolute errors, which only another float32 front end can bound
        return max(budgets.LOG_MEL_WORST_FACTOR * (plain or 0.0), budgets.LOG_MEL_FLOOR_WORST)
    precision = "tf32" if case.tf32 and case.dtype == "f32" else _PRECISIONS[case.dtype]
    errors = None if plain is None else ZERO._replace(rel_l2=plain)
    return budgets.budget(kind, precision, errors).rel_l2


def expected_outputs(case: Case, inputs: Inputs) -> list[Tensor]:
    """The oracle's outputs, cut from their graph."""
    return [tensor.detach() for tensor in case.oracle(inputs)]


def allowed_to_peers(limits: Sequence[float], yardsticks: Sequence[Verdict]) -> list[float]:
    """What a peer's outputs may be off: ten times ours, or as much as plain PyTorch where it is poor."""
    plain = next((verdict.errors for verdict in yardsticks if verdict.errors), [0.0] * len(limits))
    return [
        max(PEER_FACTOR * limit, error if math.isfinite(error) else 0.0)
        for limit, error in zip(limits, plain, strict=True)
    ]


def decide(case: Case, verdict: Verdict, limits: Sequence[float]) -> Verdict:
    """Name the output closest to its limit, and mark the verdict wrong where that is over it."""
    if verdict.status != "ok":
        return verdict
    worst = max(range(len(limits)), key=lambda number: verdict.errors[number] / limits[number])
    verdict.worst = f"{case.outputs[worst]} {case.measure}"
    verdict.error, verdict.budget = verdict.errors[worst], limits[worst]
    if not verdict.error <= verdict.budget:
        verdict.status = "wrong"
        verdict.reason = (
            f"wrong result: {verdict.worst} {verdict.error:.3g}, budget {verdict.budget:.3g}"
        )
    return verdict
