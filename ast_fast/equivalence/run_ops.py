"""Running the cases of the ops: three evaluations on the same rounded inputs, one row per tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .. import backend as backends
from .budgets import budget, precision_of
from .cases import Function, OpCase, Tensors
from .measures import measure
from .report import Row, make_row

SEED = 20211010


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions; the settings before come back."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def place(tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Tensors on a device, the floating ones in a dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def evaluate(function: Function, inputs: Tensors, upstream: Tensors | None = None) -> Tensors:
    """Outputs of a function and, with upstream gradients given, "d" + name for every float input."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in inputs.items()
    }
    outputs = function(leaves)
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    if upstream is None:
        return results
    names = [name for name, tensor in leaves.items() if tensor.requires_grad]
    grads = torch.autograd.grad(
        list(outputs.values()),
        [leaves[name] for name in names],
        [upstream[name].to(outputs[name].dtype) for name in outputs],
    )
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def native_backend(device: torch.device) -> str:
    """The fast backend of a device."""
    return "triton" if device.type == "cuda" else "cpp"


def evaluate_ours(
    case_name: str, function: Function, inputs: Tensors, upstream: Tensors | None, backend: str
) -> tuple[Tensors, str, str]:
    """Results, what gave them, and why it was not the fast backend (empty if it was).

    Under "auto" that is what a user gets: whatever the tables name, or what a call fell back to.
    """
    if backend != "auto":
        with backends.use_backend(backend):
            return evaluate(function, inputs, upstream), backend, ""
    with backends.use_backend("auto"), backends.watch() as seen:
        results = evaluate(function, inputs, upstream)
    note = f"{case_name} ran in {seen.names}: {seen.reasons[0]}" if seen.reasons else ""
    return results, seen.names, note


def draw_upstream(outputs: Tensors, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Random upstream gradients in float64 that a dtype holds exactly."""
    draws: Tensors = {}
    for name, output in outputs.items():
        draw = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        draws[name] = draw.to(dtype).double().to(output.device)
    return draws


def run_op_case(
    case: OpCase,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    allow_tf32: bool = False,
    keep: Tensors | None = None,
) -> list[Row]:
    """Rows of one case: every output and every gradient; our results also go into `keep`."""
    generator = torch.Generator().manual_seed(SEED)
    precision = case.precision or precision_of(dtype, allow_tf32)
    inputs = place(case.inputs(generator), device, dtype)
    wide = place(inputs, device, torch.float64)
    shapes = evaluate(case.oracle, wide)
    upstream = None if case.inference else draw_upstream(shapes, generator, dtype)
    oracle = evaluate(case.oracle, wide, upstream)
    with tf32(allow_tf32):
        simple = evaluate(case.plain, inputs, upstream)
        ours, ran, note = evaluate_ours(case.op, case.ours, inputs, upstream, backend)
    if keep is not None:
        keep.update(ours)
    rows = []
    for name, kind in case.kinds.items():
        plain_errors = measure(simple[name], oracle[name])
        errors = measure(ours[name], oracle[name])
        allowed = budget(kind, precision, plain_errors)
        what = f"{case.op} {name}"
        rows.append(make_row(what, case.shape, precision, ran, errors, plain_errors, allowed, note))
    return rows
