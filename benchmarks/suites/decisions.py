"""Rates that settle design decisions: the model's matrix products, and GELU on its own.

The products are the four of a block, forward and both gradients, over batch sizes. On a GPU there is no
rival, only the share of what a large square product reaches; on a CPU it is which of PyTorch's two
libraries multiplies float32, and what packed weights buy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings, forward_run, generator
from ..models import PRODUCTS, TOKENS
from ..peers import need
from . import epilogues, packed_products

ROWS_CHECKED = 128  # against float64


def _product(settings: Settings, name: str, kind: str, b: int, dtype: str) -> Case:
    width_in, width_out = (24, 48) if settings.tiny else PRODUCTS[name]
    rows = b * (10 if settings.tiny else TOKENS)
    # forward: x [R, I] w [O, I]; dgrad: dy [R, O] w; wgrad: dy^T x
    shape_a = (rows, width_out if kind != "forward" else width_in)
    shape_b = (rows, width_in) if kind == "wgrad" else (width_out, width_in)

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)
        a, other = (
            torch.randn(shape, device=settings.device, generator=draw).to(DTYPES[dtype])
            for shape in (shape_a, shape_b)
        )
        return {"a": a, "b": other}

    def multiply(a: Tensor, b: Tensor) -> tuple[Tensor]:
        if kind == "forward":
            return (a @ b.t(),)
        return (a @ b if kind == "dgrad" else a.t() @ b,)

    def chosen(a: Tensor, b: Tensor) -> tuple[Tensor]:
        matmul = need("ast_fast.cpp._gemm").matmul
        if kind == "forward":
            return (matmul(a, b.t()),)
        return (matmul(a, b) if kind == "dgrad" else matmul(a.t(), b),)

    plain = Candidate("torch", lambda inputs: forward_run(multiply, inputs), yardstick=True)
    candidates = (plain,)
    if settings.backend == "cpp":
        own = Candidate(settings.ours, lambda inputs: forward_run(chosen, inputs))
        candidates = (own, plain)

    def expected(inputs: Inputs) -> Sequence[Tensor]:
        a, other = inputs["a"], inputs["b"]
        part = a[:, :ROWS_CHECKED] if kind == "wgrad" else a[:ROWS_CHECKED]
        return multiply(part.double(), other.double())

    return Case(
        suite="decisions",
        name=f"gemm_{name}",
        mode=kind,
        shape={"B": b, "T": rows // b},
        dtype=dtype,
        outputs=("product",),
        make_inputs=make,
        oracle=expected,
        candidates=candidates,
        kinds=("product",),
        clips=b,
        flops=2.0 * rows * width_in * width_out,
    )


def gelu_case(settings: Settings, mode: str, b: int, dtype: str) -> Case:
    """GELU on its own, [B T, 3072]; backward also gives the activation again."""
    rows, width = (9, 40) if settings.tiny else (b * TOKENS, 3072)

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)
        h, dg = (
            torch.randn(rows, width, device=settings.device, generator=draw).to(DTYPES[dtype])
            for _ in range(2)
        )
        return {"h": h, "dg": dg} if mode == "backward" else {"h": h}

    def implementation():  # type: ignore[no-untyped-def]
        if settings.backend == "reference":
            return need("ast_fast.reference.ops"), need("ast_fast.reference.backward")
        module = need(
            "ast_fast.kernels.mlp" if settings.backend == "triton" else "ast_fast.cpp.mlp"
        )
        return module, module

    def own(h: Tensor, dg: Tensor | None = None) -> Sequence[Tensor]:
        forward, backward = implementation()
        if dg is None:
            return (
                forward.gelu(h) if settings.backend == "reference" else forward.gelu_forward(h),
            )
        if settings.backend == "reference":
            return eager(h, dg)
        return tuple(backward.gelu_backward(dg, h))

    def eager(h: Tensor, dg: Tensor | None = None) -> Sequence[Tensor]:
        if dg is None:
            return (F.gelu(h),)
        return torch.ops.aten.gelu_backward(dg, h), F.gelu(h)

    def run(function):  # type: ignore[no-untyped-def]
        def prepare(inputs: list[Inputs]) -> Run:
            return forward_run(function, inputs)

        return prepare

    item = DTYPES[dtype].itemsize
    return Case(
        suite="decisions",
        name="gelu",
        mode=mode,
        shape={"R": rows, "K": width},
        dtype=dtype,
        outputs=("g",) if mode == "forward" else ("dh", "g"),
        make_inputs=make,
        oracle=lambda inputs: eager(*(tensor.double() for tensor in inputs.values())),
        candidates=(
            Candidate(settings.ours, run(own)),
            Candidate("torch", run(eager), yardstick=True),
        ),
        kinds=("elementwise",) * (1 if mode == "forward" else 2),
        bytes=float((2 if mode == "forward" else 4) * rows * width * item),
        bound="copy",
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Products at the batch sizes between which a GPU fills up, GELU, and both in one kernel."""
    batches = [32, 8, 1, 64] if settings.cuda else [1]
    if settings.quick:
        batches = batches[:2]
    for dtype in (d for d in settings.dtypes if d in DTYPES):
        if settings.cuda and dtype == "f32":
            continue
        # in bfloat16 both ways are oneDNN's on a CPU
        for b in batches if settings.cuda or settings.tiny or dtype == "f32" else ():
            for kind in ("forward", "dgrad", "wgrad"):
                for name in PRODUCTS:
                    yield _product(settings, name, kind, b, dtype)
        for mode in ("forward", "backward"):
            yield gelu_case(settings, mode, 32 if settings.cuda else 1, dtype)
    yield from epilogues.cases(settings)
    if settings.backend == "cpp":
        yield from packed_products.cases(settings)
