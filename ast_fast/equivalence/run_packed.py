"""Inference with packed weights against the reference: logits in each precision that this CPU has."""

from __future__ import annotations

import copy
from typing import get_args

import torch
from torch import Tensor, nn

from .. import backend
from ..optimized import Precision, optimize_for_inference, why_not
from . import budgets, whole
from .budgets import budget
from .measures import measure
from .report import Row, make_row
from .run_models import random_inputs

# the column of the budgets that each is held to, for a model in float32
BUDGETS: dict[Precision, budgets.Precision] = {
    "exact": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
}


def packed_precisions() -> list[Precision]:
    """The precisions that `optimize_for_inference` has on this machine."""
    return [precision for precision in get_args(Precision) if why_not(precision) is None]


def packed_rows(name: str, model: nn.Module, precision: Precision) -> list[Row]:
    """Rows of one model with packed weights on the CPU.

    Args:
        name: for the table.
        model: an `ast_fast.ASTModel`.
        precision: see `optimize_for_inference`.
    """
    fast = copy.deepcopy(whole.unwrap(model)).to("cpu", torch.float32).eval()
    inputs: Tensor = random_inputs(fast)
    column = BUDGETS[precision]
    cast = torch.bfloat16 if precision == "bf16" else None
    with torch.no_grad():
        oracle, _ = whole.run_oracle(fast, inputs, None, None, torch.float64, False)
        simple = whole.run_plain(fast, inputs, None, None, None, cast)
        with backend.use_backend("auto"):
            made = whole.run_fast(
                optimize_for_inference(fast, precision), inputs, None, None, None, None
            )
    ours, plain = measure(made.logits, oracle.logits), measure(simple.logits, oracle.logits)
    # plain PyTorch has no bytes of its own here: its float32 error stands beside ours for the record
    allowed = budget("logits", column, None if precision == "int8" else plain)
    note = ""
    if not fast.v.runner.ran:  # the usual way is no proof of the packed one
        allowed, note = budgets.Budget(0.0, 0.0), "packed weights were not used"
    shape = "x".join(map(str, inputs.shape))
    what = f"{name}: logits, packed weights"
    return [make_row(what, shape, f"packed {precision}", "cpp", ours, plain, allowed, note)]
