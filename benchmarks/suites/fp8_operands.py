"""The kernels that make FP8 operands, each alone: what `benchmarks.tune` measures their configurations on.

Ours may be off by twice what the same roundings in plain PyTorch are off, against the numbers in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_fast.reference import backward as reference_backward
from ast_fast.reference import ops as reference

from ..case import DTYPES, Candidate, Case, Inputs, Kind, Run, Settings, forward_run, generator
from ..peers import need

EPS = 1e-6
# what each place of the table stores, as outputs of its case
OUTPUTS = {
    "facts": ("facts",),
    "quantise": ("rows", "columns"),
    "gelu": ("rows",),
    "gelu_backward": ("dh", "g"),
    "norm": ("rows", "total"),
}
# what is not rounded to FP8 is as exact as anywhere
_KINDS: dict[str, Kind] = {"facts": "elementwise", "total": "elementwise"}
_LARGEST = 8.0  # bounds the magnitudes of every tensor here


def _bound(x: Tensor, value: float = _LARGEST) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=x.device)


def _made(fp8: Any, kind: str, x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """What the implementation `fp8` gives, in FP8."""
    if kind == "facts":
        return fp8.facts(x)
    if kind == "quantise":
        return fp8.quantise(x, _bound(x), columns=True)
    if kind == "gelu":
        return fp8.quantise(x, _bound(x), gelu=True)
    if kind == "gelu_backward":
        return fp8.gelu_backward_quantise(other, x, _bound(x), _bound(x))
    return fp8.norm_quantise(x, other, weight, bias, EPS, False)


def _wide(kind: str, made: Any, rows: int) -> Sequence[Tensor]:
    """The same as numbers."""
    if kind == "facts":
        return (made.amax(1),)
    if kind == "gelu_backward":
        dh, g = made
        return (dh.rows.float() * dh.inverse, g.columns.float().t()[:rows] * g.inverse)
    if kind == "norm":
        operand, _, total, _, _ = made
        return (operand.rows.float() * operand.inverse, total)
    numbers = [made.rows.float() * made.inverse]
    if kind == "quantise":
        numbers.append(made.columns.float().t()[:rows] * made.inverse)
    return numbers


def _expected(kind: str, inputs: Inputs) -> Sequence[Tensor]:
    x, other, weight, bias = (inputs[name].double() for name in ("x", "other", "weight", "bias"))
    if kind == "facts":
        return (torch.stack((x.abs().amax(), x.norm(dim=1).amax())),)
    if kind == "gelu_backward":
        return reference_backward.gelu_backward(other, x), reference.gelu(x)
    if kind == "norm":
        total = x + other
        return reference.layer_norm(total, weight, bias, EPS)[0], total
    return (reference.gelu(x),) if kind == "gelu" else (x, x)


def case(settings: Settings, kind: str, dtype: str, rows: int, width: int) -> Case:
    """One of `OUTPUTS` on [rows, width]; GELU is four times as wide, as in the model."""
    cols = width * (4 if kind.startswith("gelu") and not settings.tiny else 1)

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, device=settings.device, generator=draw)
            return values.clamp(-4.0, 4.0).to(DTYPES[dtype])

        made = {"x": random(rows, cols), "other": random(rows, cols)}
        return made | {"weight": 1 + 0.1 * random(cols), "bias": 0.1 * random(cols)}

    def gate(module: str) -> Callable[[Inputs], Run]:
        def prepare(inputs: Inputs) -> Run:
            fp8 = need(module)
            return lambda _: _wide(kind, _made(fp8, kind, **inputs), rows)

        return prepare

    def timed(inputs: list[Inputs]) -> Run:
        fp8 = need("ast_fast.kernels.fp8")
        return forward_run(lambda **given: _made(fp8, kind, **given), inputs)

    ours = Candidate(settings.ours, timed, prepare_gate=gate("ast_fast.kernels.fp8"))
    plain = gate("ast_fast.reference.fp8")
    return Case(
        suite="fp8",
        name=f"fp8_{kind}",
        mode="backward" if kind == "gelu_backward" else "forward",
        shape={"R": rows, "C": cols},
        dtype="fp8",
        outputs=OUTPUTS[kind],
        make_inputs=make,
        oracle=lambda inputs: _expected(kind, inputs),
        candidates=(
            ours,
            Candidate("torch", timed, yardstick=True, prepare_gate=plain, timed=False),
        ),
        kinds=tuple(_KINDS.get(name, "product") for name in OUTPUTS[kind]),
        bound="copy",
    )
