"""What packing a weight buys on a CPU: part of the suite `decisions`.

A linear layer of the model from its packed weight, beside the same from rows (as PyTorch holds it), the same with
a residual added by oneDNN, and the product of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings, Skipped, forward_run, generator
from ..models import PRODUCTS, num_tokens
from ..peers import need

LAYERS = ("qkv", "fc2")
FRAMES = (128, 1024)


def _rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gemm = need("ast_fast.cpp._gemm")
    return gemm.linear(x, weight, bias)


def _candidate(name: str, start: Callable[[Inputs], Callable[[Tensor], Tensor]]) -> Candidate:
    def prepare(inputs: list[Inputs]) -> Run:
        call = start(inputs[0])
        return forward_run(lambda x, **_: (call(x),), inputs)

    return Candidate(name, prepare, yardstick=name == "torch")


def _packed(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    module = need("ast_fast.cpp.packed")
    why = module.unsupported()
    if why is not None:
        raise Skipped(why)
    layer = module.PackedLinear(inputs["w"], inputs["b"])
    return lambda x: layer(x)


def _residual(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The product with a residual of zeros added by oneDNN: the same result, and its cost."""
    packed = torch.ops.mkldnn._reorder_linear_weight(inputs["w"], 1024)
    other = torch.zeros(len(inputs["x"]), len(inputs["w"]), dtype=inputs["x"].dtype)
    call = torch.ops.mkldnn._linear_pointwise.binary
    return lambda x: call(x, other, packed, inputs["b"], "add")


def _bytes(inputs: list[Inputs]) -> Run:
    """The product of bytes alone: rows are quantised beforehand, and scaled back beforehand too."""
    module = need("ast_fast.cpp.packed")
    why = module.int8_unsupported()
    if why is not None:
        raise Skipped(why)
    # the first input's weight for all, as of the other candidates
    layer = module.Int8Linear(inputs[0]["w"].float(), inputs[0]["b"])
    given = []
    for each in inputs:
        levels, scale, _ = module.int8_rows(each["x"])
        right = layer(levels, module.ZERO).float() * scale[:, None] + layer.bias
        given.append({"levels": levels, "right": right})

    def call(levels: Tensor, right: Tensor) -> tuple[Tensor]:
        layer(levels, module.ZERO)
        return (right,)

    return forward_run(call, given)


def cases(settings: Settings) -> Iterator[Case]:
    """Two layers at two lengths in each dtype."""
    for dtype in (d for d in settings.dtypes if d in ("f32", "bf16")):
        for name in LAYERS:
            for frames in FRAMES:
                yield _case(settings, name, dtype, num_tokens(frames), *PRODUCTS[name])


def _case(settings: Settings, name: str, dtype: str, rows: int, inner: int, outer: int) -> Case:
    if settings.tiny:
        rows, inner, outer = 10, 24, 48

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)
        x, w, b = (
            torch.randn(shape, generator=draw)
            for shape in ((rows, inner), (outer, inner), (outer,))
        )
        kind = DTYPES[dtype]
        return {"x": x.to(kind), "w": (w * inner**-0.5).to(kind), "b": b.to(kind)}

    peers = [
        _candidate("torch", lambda given: lambda x: F.linear(x, given["w"], given["b"])),
        _candidate("rows", lambda given: lambda x: _rows(x, given["w"], given["b"])),
        _candidate("residual by oneDNN", _residual),
    ]
    if dtype == "bf16":
        # against a budget of bfloat16 a byte is coarse: as a peer it may be ten times that
        peers.append(Candidate("bytes", _bytes))
    return Case(
        suite="decisions",
        name=f"packed_{name}",
        mode="forward",
        shape={"R": rows},
        dtype=dtype,
        outputs=("product",),
        make_inputs=make,
        oracle=lambda given: (F.linear(*(given[key].double() for key in ("x", "w", "b"))),),
        candidates=(_candidate(settings.ours, _packed), *peers),
        kinds=("product",),
        flops=2.0 * rows * inner * outer,
    )
