"""Matrix products with fused epilogues against cuBLAS and a kernel after it, at the model's four shapes.

Where ours is faster for a kind of epilogue at the shapes that have it, `python -m benchmarks.tune gemm --write`
gives its row in `kernels/tuned/gemm.json` "use": true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings, forward_run, generator
from ..models import PRODUCTS, TOKENS
from ..peers import need

# which products of a block end in which epilogue
KINDS = {
    "linear": ("qkv", "proj", "fc1", "fc2"),
    "residual": ("proj", "fc2"),
    "gelu": ("fc1",),
    "gelu_saved": ("fc1",),
    "gelu_backward": ("fc2",),
}
ROWS_CHECKED = 128  # against float64
Function = Callable[..., Sequence[Tensor]]


def _ours(kind: str) -> Function:
    """The fused kernel, whatever the table says."""
    gemm = need("ast_fast.kernels.gemm")
    return {
        "linear": lambda a, w, bias: (gemm.linear(a, w, bias),),
        "residual": lambda a, w, bias, extra: (gemm.linear_residual(a, w, bias, extra),),
        "gelu": lambda a, w, bias: (gemm.linear_gelu(a, w, bias, False)[0],),
        "gelu_saved": lambda a, w, bias: gemm.linear_gelu(a, w, bias, True),
        "gelu_backward": lambda a, w, extra: gemm.gelu_backward(a, w, extra),
    }[kind]


def _apart(kind: str) -> Function:
    """cuBLAS, then the kernel that stands in use today."""
    mlp = need("ast_fast.kernels.mlp")

    def gelu(a: Tensor, w: Tensor, bias: Tensor) -> Sequence[Tensor]:
        h = torch.addmm(bias, a, w.t())
        return (mlp.gelu_forward(h, h),)

    def gelu_saved(a: Tensor, w: Tensor, bias: Tensor) -> Sequence[Tensor]:
        h = torch.addmm(bias, a, w.t())
        return mlp.gelu_forward(h), h

    return {
        "linear": lambda a, w, bias: (torch.addmm(bias, a, w.t()),),
        "residual": lambda a, w, bias, extra: (torch.addmm(bias, a, w.t()) + extra,),
        "gelu": gelu,
        "gelu_saved": gelu_saved,
        "gelu_backward": lambda a, w, extra: mlp.gelu_backward_with_sums(torch.mm(a, w), extra),
    }[kind]


def _expected(kind: str, inputs: Inputs) -> Sequence[Tensor]:
    """float64 of the first rows; column sums need them all."""
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    if kind == "gelu_backward":
        dh = reference_backward.gelu_backward(wide["a"] @ wide["w"], wide["extra"])
        return dh, reference.gelu(wide["extra"]), dh.sum(0)
    h = F.linear(wide["a"][:ROWS_CHECKED], wide["w"], wide["bias"])
    if kind == "residual":
        return (h + wide["extra"][:ROWS_CHECKED],)
    return {"linear": (h,), "gelu": (reference.gelu(h),), "gelu_saved": (reference.gelu(h), h)}[
        kind
    ]


def case(settings: Settings, kind: str, name: str, b: int, dtype: str) -> Case:
    """One product of a block with one of `KINDS` of epilogue, ours first."""
    width_in, width_out = (24, 48) if settings.tiny else PRODUCTS[name]
    rows = b * (10 if settings.tiny else TOKENS)
    backward = kind == "gelu_backward"

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)

        def random(*shape: int) -> Tensor:
            made = torch.randn(shape, device=settings.device, generator=draw)
            return made.to(DTYPES[dtype])

        weight = random(width_out, width_in) * width_in**-0.5
        if backward:
            return {"a": random(rows, width_out), "w": weight, "extra": random(rows, width_in)}
        made = {"a": random(rows, width_in), "w": weight, "bias": random(width_out)}
        return made | ({"extra": random(rows, width_out)} if kind == "residual" else {})

    def run(choose: Callable[[str], Function]) -> Callable[[list[Inputs]], Run]:
        return lambda inputs: forward_run(choose(kind), inputs)

    item = DTYPES[dtype].itemsize
    outputs = {"gelu_saved": ("g", "h"), "gelu_backward": ("dh", "g", "sums")}.get(kind, ("y",))
    wide = width_in if backward else width_out
    moved = rows * (width_in + width_out + (wide if kind not in ("linear", "gelu") else 0))
    moved += rows * wide if backward else 0
    return Case(
        suite="decisions",
        name=f"epilogue_{kind}_{name}",
        mode="backward" if backward else "forward",
        shape={"B": b, "T": rows // b},
        dtype=dtype,
        outputs=outputs,
        make_inputs=make,
        oracle=lambda inputs: _expected(kind, inputs),
        candidates=(
            Candidate(f"{settings.ours} fused", run(_ours)),
            Candidate("torch", run(_apart), yardstick=True),
        ),
        kinds=("product",) * len(outputs),
        clips=b,
        flops=2.0 * rows * width_in * width_out,
        bytes=float(item * (moved + width_in * width_out)),
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Every epilogue at the shapes that have it; on a GPU only."""
    if not (settings.cuda and settings.backend == "triton"):
        return
    batches = [64, 1] if settings.quick else [64, 8, 1]
    for dtype in (d for d in settings.dtypes if d in ("bf16", "f16")):
        for b in batches:
            for kind, names in KINDS.items():
                for name in names:
                    yield case(settings, kind, name, b, dtype)
