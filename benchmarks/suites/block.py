"""The parts of a transformer block besides attention: LayerNorm, residual + LayerNorm, GELU, MLP, and
the whole block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Case, Inputs, Kind, Run, Settings, candidate, generator, oracle
from ..case import Candidate as Entry
from ..models import SIZES, PlainBlock
from ..peers import compiled, need

MODES = ("forward", "backward")
EPS = 1e-6

Function = Callable[..., Sequence[Tensor]]


def _rows(settings: Settings) -> list[tuple[int, int, int]]:
    """B, T, C."""
    if settings.tiny:
        return [(1, 7, 48)]
    if settings.cuda:
        return (
            [(32, 1214, 768)]
            if settings.quick
            else [(32, 1214, 768), (32, 1214, 384), (1, 1214, 768)]
        )
    return [(1, 146, 768)] if settings.quick else [(4, 602, 768)]


def _entries(settings: Settings, ours: Function, plain: Function, mode: str, wrt, upstream):  # type: ignore[no-untyped-def]
    """Ours, eager PyTorch and compiled PyTorch."""

    def lazily_compiled(inputs: list[Inputs]) -> Run:
        return candidate("torch-compile", compiled(plain), mode, wrt, upstream).prepare(inputs)

    entries = [
        candidate(settings.ours, ours, mode, wrt, upstream),
        candidate("torch", plain, mode, wrt, upstream, yardstick=True),
    ]
    # compiling costs more CPU time than a quick look is worth
    if settings.cuda or not settings.quick:
        entries.append(Entry("torch-compile", lazily_compiled))
    return tuple(entries)


def _drawn(shapes: dict[str, tuple[int, ...]], dtype: str, device: str) -> Callable[[int], Inputs]:
    """Random inputs; a name with `weight` is around 1, like a trained LayerNorm's."""

    def make(seed: int) -> Inputs:
        draw = generator(seed, device)
        made = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, device=device, generator=draw)
            if name == "weight":
                values = 1 + 0.1 * values
            elif name.startswith("w"):
                values = values * shape[-1] ** -0.5
            made[name] = values.to(DTYPES[dtype])
        return made

    return make


def _layer_norm_ours(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (need("ast_fast.ops").layer_norm(x, weight, bias, EPS),)


def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)


def _add_layer_norm_ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor):  # type: ignore[no-untyped-def]
    return need("ast_fast.ops").add_layer_norm(x, residual, weight, bias, EPS)


def _add_layer_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor):  # type: ignore[no-untyped-def]
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, EPS), total


def _mlp_ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor]:
    return (need("ast_fast.ops").mlp(x, w1, b1, w2, b2),)


def _mlp_torch(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor]:
    return (F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),)


def _block_ours(heads: int) -> Function:
    """A block as the model runs it, from the public ops."""

    def run(x, n1w, n1b, wqkv, bqkv, wproj, bproj, n2w, n2b, w1, b1, w2, b2):  # type: ignore[no-untyped-def]
        ops = need("ast_fast.ops")
        b, t, c = x.shape
        qkv = F.linear(ops.layer_norm(x, n1w, n1b, EPS), wqkv, bqkv)
        o = ops.attention_qkv(qkv.view(b, t, 3, heads, c // heads))
        y, total = ops.add_layer_norm(F.linear(o.reshape(b, t, c), wproj, bproj), x, n2w, n2b, EPS)
        return (total + ops.mlp(y, w1, b1, w2, b2),)

    return run


_BLOCK_NAMES = {
    "n1w": "norm1.weight",
    "n1b": "norm1.bias",
    "wqkv": "attn.qkv.weight",
    "bqkv": "attn.qkv.bias",
    "wproj": "attn.proj.weight",
    "bproj": "attn.proj.bias",
    "n2w": "norm2.weight",
    "n2b": "norm2.bias",
    "w1": "mlp.fc1.weight",
    "b1": "mlp.fc1.bias",
    "w2": "mlp.fc2.weight",
    "b2": "mlp.fc2.bias",
}


def _block_torch(width: int, heads: int) -> Function:
    with torch.device("meta"):
        block = PlainBlock(width, heads)

    def run(x: Tensor, **given: Tensor) -> tuple[Tensor]:
        named = {_BLOCK_NAMES[name]: tensor for name, tensor in given.items()}
        return (torch.func.functional_call(block, named, (x,)),)

    return run


def _case(
    settings: Settings,
    name: str,
    mode: str,
    dtype: str,
    size: tuple[int, int, int],
    shapes: dict[str, tuple[int, ...]],
    ours: Function,
    plain: Function,
    outputs: tuple[str, ...],
    kinds: Mapping[str, Kind],
    *,
    bytes_: float | None = None,
    flops: float | None = None,
) -> Case:
    upstream = tuple(f"d{out}" for out in outputs)
    wrt = tuple(shapes)
    drawn = {**shapes, **{f"d{out}": shapes["x"] for out in outputs}}
    b, t, c = size
    named = outputs if mode == "forward" else tuple(f"d{given}" for given in wrt)
    return Case(
        suite="block",
        name=name,
        mode=mode,
        shape={"B": b, "T": t, "C": c},
        dtype=dtype,
        outputs=named,
        make_inputs=_drawn(drawn, dtype, settings.device),
        oracle=oracle(plain, mode, wrt, upstream),
        candidates=_entries(settings, ours, plain, mode, wrt, upstream),
        kinds=tuple(kinds[name] for name in named),
        clips=b,
        flops=flops,
        bytes=bytes_,
        bound="gemm" if flops else "copy",
    )


def cases(settings: Settings) -> Iterator[Case]:
    """LayerNorms and MLP, then whole blocks."""
    for dtype in (d for d in settings.dtypes if d in DTYPES):
        for size in _rows(settings):
            for mode in MODES:
                for name in OPS:
                    yield op_case(settings, name, dtype, size, mode)
        yield from _blocks(settings, dtype)


OPS = ("layer_norm", "add_layer_norm", "mlp")
_NORM_KINDS: dict[str, Kind] = {
    "y": "normalised",
    "total": "elementwise",
    "dx": "normalised",
    "dresidual": "normalised",
    "dweight": "row sum",
    "dbias": "row sum",
}
_MLP_KINDS: dict[str, Kind] = {
    "y": "product",
    "dx": "product",
    "dw1": "product",
    "db1": "product",
    "dw2": "product",
    "db2": "row sum",
}


def op_case(
    settings: Settings, name: str, dtype: str, size: tuple[int, int, int], mode: str
) -> Case:
    """One of `OPS` on [B, T, C]."""
    b, t, c = size
    vector, back = (c,), mode == "backward"
    one = float(b * t * c * DTYPES[dtype].itemsize)
    if name == "layer_norm":
        return _case(
            *(settings, name, mode, dtype, size, {"x": size, "weight": vector, "bias": vector}),
            *(_layer_norm_ours, _layer_norm_torch, ("y",), _NORM_KINDS),
            bytes_=(3 if back else 2) * one,
        )
    if name == "add_layer_norm":
        added = {"x": size, "residual": size, "weight": vector, "bias": vector}
        return _case(
            *(settings, name, mode, dtype, size, added),
            *(_add_layer_norm_ours, _add_layer_norm_torch, ("y", "total")),
            # the statistics are of the rounded sum, which float64 does not round
            {**_NORM_KINDS, "dweight": "product"},
            bytes_=4 * one,
        )
    mlp = {"x": size, "w1": (4 * c, c), "b1": (4 * c,), "w2": (c, 4 * c), "b2": vector}
    return _case(
        *(settings, name, mode, dtype, size, mlp),
        *(_mlp_ours, _mlp_torch, ("y",), _MLP_KINDS),
        flops=(32.0 if back else 16.0) * b * t * c * c,
    )


def _blocks(settings: Settings, dtype: str) -> Iterator[Case]:
    picked = [
        ("base", 8 if settings.cuda else 1, 1214),
        ("small", 32 if settings.cuda else 1, 1214),
    ]
    if settings.quick or settings.tiny:
        picked = [("tiny", 1, 12 if settings.tiny else 146)]
    for size, b, t in picked:
        c, heads = SIZES[size]
        shapes = {
            "x": (b, t, c),
            **dict.fromkeys(("n1w", "n1b", "n2w", "n2b", "bproj", "b2"), (c,)),
            **{"wqkv": (3 * c, c), "bqkv": (3 * c,), "wproj": (c, c)},
            **{"w1": (4 * c, c), "b1": (4 * c,), "w2": (c, 4 * c)},
        }
        ordered = {name: shapes[name] for name in ("x", *_BLOCK_NAMES)}
        # a small model: many roundings follow one another
        kinds = {"y": "logits", **dict.fromkeys((f"d{name}" for name in ordered), "whole gradient")}
        products = 24.0 * b * t * c * c + 4.0 * b * t * t * c
        for mode in MODES:
            yield _case(
                *(settings, f"block_{size}", mode, dtype, (b, t, c), ordered),
                *(_block_ours(heads), _block_torch(c, heads), ("y",), kinds),
                # backward: two products for each of forward's; attention recomputes one
                flops=products * 2 + 2.0 * b * t * t * c if mode == "backward" else products,
            )
