"""The error budgets: the only place where the project says how far a result may be from its oracle.

The oracle is the reference in float64 on the same rounded inputs. A result passes when

    err(ours) <= max(2 * err(plain PyTorch, same dtype and device), floor)

for the worst entry and for the relative L2 norm. Sums over rows (gradients of LayerNorm's weight and
of biases) have only the floor: PyTorch adds them in bfloat16 on a CPU and is 5 % off, so that twice
its error would let garbage pass. The numbers are the same on every machine; NUMERICS.md explains them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from .measures import Errors

Kind = Literal[
    "elementwise",
    "normalised",
    "row sum",
    "product",
    "attention",
    "attention gradient",
    "logits",
    "whole gradient",
    "waveform gradient",
]
Precision = Literal["float32", "tf32", "float16", "bfloat16", "int8"]

TORCH_FACTOR = 2.0


class Floor(NamedTuple):
    """Errors that always pass: of the worst entry and in relative L2."""

    worst: float
    rel_l2: float


# PyTorch's own error can widen a budget to this many floors at most: where plain PyTorch is poor, we must
# not be. A single entry may be the rest of a sum that cancels, so that the worst one has more room
CEILING = Floor(32.0, 8.0)


# unit roundoff: float32 6e-8, tf32 and float16 4.9e-4, bfloat16 3.9e-3
FLOORS: dict[Kind, dict[Precision, Floor]] = {
    # a result rounded once or twice: sums of two tensors, GELU
    "elementwise": {
        "float32": Floor(2e-6, 1e-6),
        "tf32": Floor(2e-6, 1e-6),
        "float16": Floor(1e-3, 5e-4),
        "bfloat16": Floor(8e-3, 4e-3),
    },
    # LayerNorm's output and its gradient by the input: statistics over a row, then one rounding
    "normalised": {
        "float32": Floor(5e-6, 5e-7),
        "tf32": Floor(5e-6, 5e-7),
        "float16": Floor(2e-3, 5e-4),
        "bfloat16": Floor(1.6e-2, 4e-3),
    },
    # sums over all rows in float32, rounded once: gradients of LayerNorm's parameters and of biases
    "row sum": {
        "float32": Floor(1e-5, 2e-6),
        "tf32": Floor(1e-5, 2e-6),
        "float16": Floor(2e-3, 1e-3),
        "bfloat16": Floor(8e-3, 5e-3),
    },
    # chains of one to three matrix products with 16-bit tensors between them
    "product": {
        "float32": Floor(1e-5, 2e-6),
        "tf32": Floor(5e-3, 1e-3),
        "float16": Floor(5e-3, 1e-3),
        "bfloat16": Floor(3e-2, 6e-3),
    },
    "attention": {
        "float32": Floor(5e-6, 1e-6),
        "tf32": Floor(5e-3, 1e-3),
        "float16": Floor(5e-3, 1e-3),
        "bfloat16": Floor(3e-2, 6e-3),
    },
    "attention gradient": {
        "float32": Floor(1e-5, 2e-6),
        "tf32": Floor(1e-2, 2e-3),
        "float16": Floor(1e-2, 2e-3),
        "bfloat16": Floor(5e-2, 1e-2),
    },
    # through the logarithm, whose slope is 1/energy: as ill-conditioned as the quietest bin
    "waveform gradient": {
        "float32": Floor(1e-5, 2e-6),
        "tf32": Floor(1e-5, 2e-6),
        "float16": Floor(5e-3, 1e-3),
        "bfloat16": Floor(3e-2, 6e-3),
    },
    # a whole model; `worst` is the largest error of a logit over max(|logit|, rms)
    "logits": {
        "float32": Floor(5e-6, 2e-6),
        "tf32": Floor(5e-3, 1e-3),
        "float16": Floor(5e-3, 2e-3),
        "bfloat16": Floor(2.5e-2, 1e-2),
        "int8": Floor(1.5e-1, 4e-2),
    },
    # all parameters as one vector; `worst` is one minus the cosine
    "whole gradient": {
        "float32": Floor(1e-6, 3e-6),
        "tf32": Floor(1e-5, 2e-3),
        "float16": Floor(1e-4, 5e-3),
        "bfloat16": Floor(5e-4, 2e-2),
    },
}

# log-mel: no fixed number can hold, since a clean tone's empty bins are rounding noise of the transform
# (torchaudio itself is 4e-2 off on a chirp); so both limits are torchaudio's, with room for the rounding
# of values up to 16 to float32
LOG_MEL_WORST_FACTOR = 2.0
LOG_MEL_MEAN_FACTOR = 1.0
LOG_MEL_FLOOR_WORST = 4e-6
LOG_MEL_FLOOR_MEAN = 5e-7

_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
# spacing of numbers just above 1, halved: the largest relative error of one rounding
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Budget(NamedTuple):
    """What the worst entry (or one minus the cosine) and the relative L2 error may be."""

    worst: float
    rel_l2: float

    def admits(self, errors: Errors) -> bool:
        """Whether errors are within the budget; NaN never is."""
        return errors.worst <= self.worst and errors.rel_l2 <= self.rel_l2


def precision_of(dtype: torch.dtype, tf32: bool = False) -> Precision:
    """Name of the column of `FLOORS` for a dtype.

    Raises:
        ValueError: there is no budget for the dtype.
    """
    if dtype not in _PRECISIONS:
        raise ValueError(
            f"dtype {dtype} has no error budget: expected float32, float16 or bfloat16 "
            "(float64 runs the reference, which is the oracle itself)"
        )
    return "tf32" if tf32 and dtype == torch.float32 else _PRECISIONS[dtype]


def budget(kind: Kind, precision: Precision, plain: Errors | None = None) -> Budget:
    """Budget of one tensor, given plain PyTorch's errors on the same inputs where they count."""
    floor = FLOORS[kind][precision]
    if plain is None or kind == "row sum":
        return Budget(*floor)
    # nothing fixed bounds what goes through the logarithm of the energies: only torchaudio's error does
    ceiling = Floor(math.inf, math.inf) if kind == "waveform gradient" else CEILING
    triples = zip(floor, (plain.worst, plain.rel_l2), ceiling, strict=True)
    return Budget(*(_widened(*triple) for triple in triples))


def _widened(floor: float, plain: float, ceiling: float) -> float:
    if not math.isfinite(plain):
        return floor
    return max(floor, min(TORCH_FACTOR * plain, ceiling * floor))


def log_mel_budget(
    plain: Errors, largest: float, scale: float, out_dtype: torch.dtype
) -> tuple[float, float]:
    """Budgets of log-mel features: absolute error of the worst entry, and the mean.

    Args:
        plain: torchaudio's errors (the reference's in float32 where it is absent), on raw energies.
        largest: largest magnitude among the features.
        scale: features per nat: 1 / (2 std).
        out_dtype: 16-bit outputs add their own rounding.
    """
    rounding = 0.0 if out_dtype == torch.float32 else ROUNDOFF[out_dtype] * largest
    worst = max(LOG_MEL_WORST_FACTOR * plain.max_abs, LOG_MEL_FLOOR_WORST) * scale
    mean = max(LOG_MEL_MEAN_FACTOR * plain.mean_abs, LOG_MEL_FLOOR_MEAN) * scale
    return worst + rounding, mean + rounding


def table() -> str:
    """The floors as a Markdown table, for NUMERICS.md."""
    precisions: tuple[Precision, ...] = ("float32", "tf32", "float16", "bfloat16", "int8")
    lines = [
        "| what | " + " | ".join(precisions) + " |",
        "|---|" + "---|" * len(precisions),
    ]
    for kind, row in FLOORS.items():
        cells = (
            f"{row[p].worst:.1e} / {row[p].rel_l2:.1e}" if p in row else "-" for p in precisions
        )
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
