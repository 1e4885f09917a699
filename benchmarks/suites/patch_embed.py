"""Patch embedding: overlapping patches to tokens, against the convolution the original uses and against
unfolding plus one matrix product."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Case, Inputs, Kind, Run, Settings, candidate, generator, oracle
from ..case import Candidate as Entry
from ..peers import need

STRIDE = 10
PATCH = 16
WRT = ("weight", "bias", "pos", "prefix")
# of the gradients
KINDS: dict[str, Kind] = {
    "x": "product",
    "weight": "product",
    "bias": "row sum",
    "pos": "row sum",
    "prefix": "row sum",
}


def _ours(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> tuple[Tensor]:
    return (need("ast_fast.ops").patch_embed(x, weight, bias, pos, prefix, STRIDE, STRIDE),)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> tuple[Tensor]:
    """The original's: convolution, flatten, transpose, concatenate, add."""
    tokens = F.conv2d(x[:, None].transpose(2, 3), weight, bias, stride=STRIDE)
    tokens = tokens.flatten(2).transpose(1, 2)
    return (torch.cat((prefix.expand(len(x), -1, -1), tokens), dim=1) + pos,)


def _unfold(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> tuple[Tensor]:
    """Patches copied out, then one matrix product."""
    patches = x.transpose(1, 2).unfold(1, PATCH, STRIDE).unfold(2, PATCH, STRIDE)
    b, f, t = patches.shape[:3]
    tokens = torch.addmm(bias, patches.reshape(b * f * t, -1), weight.flatten(1).t())
    tokens = tokens.view(b, f * t, -1)
    return (torch.cat((prefix.expand(b, -1, -1), tokens), dim=1) + pos,)


@contextlib.contextmanager
def _search(enabled: bool):  # type: ignore[no-untyped-def]
    """cuDNN's search for the fastest algorithm, switched for a while."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _searched(mode: str) -> Entry:
    def prepare(inputs: list[Inputs]) -> Run:
        with _search(True):
            inner = candidate("", _conv, mode, WRT, ("dy",)).prepare(inputs)

        def run(index: int):  # type: ignore[no-untyped-def]
            with _search(True):
                return inner(index)

        return run

    return Entry("torch-cudnn-search", prepare)


def cases(settings: Settings) -> Iterator[Case]:
    """Base and tiny widths; the input gradient is not asked for, as in training on spectrograms."""
    sizes = [(32, 1024, 768), (1, 1024, 768)] if settings.cuda else [(4, 1024, 768), (4, 1024, 192)]
    if settings.quick:
        sizes = sizes[:1] if settings.cuda else [(1, 1024, 192)]
    if settings.tiny:
        sizes = [(1, 36, 32)]
    for dtype in (d for d in settings.dtypes if d in DTYPES):
        for size in sizes:
            for mode in ("forward", "backward"):
                yield patch_case(settings, dtype, *size, mode)


def patch_case(
    settings: Settings, dtype: str, b: int, s: int, c: int, mode: str, with_dx: bool = False
) -> Case:
    """One shape; `with_dx` asks for the spectrogram's gradient too."""
    mels = 36 if settings.tiny else 128
    f, t = ((side - PATCH) // STRIDE + 1 for side in (mels, s))
    wrt = ("x", *WRT) if with_dx else WRT
    entries = [
        candidate(settings.ours, _ours, mode, wrt, ("dy",)),
        candidate("torch", _conv, mode, wrt, ("dy",), yardstick=True),
        candidate("torch-unfold", _unfold, mode, wrt, ("dy",)),
    ]
    if settings.cuda:
        entries.append(_searched(mode))
    return Case(
        suite="patch_embed",
        name="patch_embed",
        mode=mode,
        shape={"B": b, "S": s, "C": c},
        dtype=dtype,
        outputs=("y",) if mode == "forward" else tuple(f"d{name}" for name in wrt),
        make_inputs=_inputs(dtype, settings.device, b, s, mels, c, f * t),
        oracle=oracle(_unfold, mode, wrt, ("dy",)),
        candidates=tuple(entries),
        kinds=("product",) if mode == "forward" else tuple(KINDS[name] for name in wrt),
        clips=b,
        flops=2.0 * b * f * t * c * PATCH**2,
        bytes=float(b * (s * mels + (2 + f * t) * c) * DTYPES[dtype].itemsize),
        bound="copy",
    )


def _inputs(dtype: str, device: str, b: int, s: int, mels: int, c: int, patches: int):  # type: ignore[no-untyped-def]
    def make(seed: int) -> Inputs:
        draw = generator(seed, device)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, device=device, generator=draw) * scale
            return values.to(DTYPES[dtype])

        return {
            "x": normal(b, s, mels, scale=0.5),
            "weight": normal(c, 1, PATCH, PATCH, scale=1 / PATCH),
            "bias": normal(c, scale=0.02),
            "pos": normal(2 + patches, c, scale=0.02),
            "prefix": normal(2, c, scale=0.02),
            "dy": normal(b, 2 + patches, c),
        }

    return make
