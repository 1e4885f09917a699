"""What this machine can do at all: the rate of a large matrix product and of a large copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .case import DTYPES, generator
from .timing import Limits, clock_for, warm_up


def measure(
    device: str, dtypes: tuple[str, ...], tiny: bool = False, quick: bool = False
) -> dict[str, float]:
    """TFLOP/s of a square matrix product per dtype and GB/s of a copy (read plus written).

    Random numbers: a GPU runs faster on zeros.
    """
    cuda = device == "cuda"
    size = 128 if tiny else 8192 if cuda else 1024 if quick else 2048
    clock = clock_for(device)
    brief = tiny or quick
    limits = Limits(sample_ms=1.0 if brief else 60.0, warmup_ms=1.0 if brief else 100.0)
    found = {}
    for name in dtypes:
        if name not in DTYPES:
            continue
        a, b = (
            torch.randn(size, size, device=device, generator=generator(seed, device)).to(
                DTYPES[name]
            )
            for seed in (1, 2)
        )
        best = min(
            _best(lambda _, a=a, b=b, mm=mm: mm(a, b), clock, limits) for mm in _products(device)
        )
        found[f"gemm_{name}_tflops"] = 2 * size**3 / (best * 1e-3) / 1e12
    count = (1 if tiny else 1024 if cuda else 64 if quick else 256) * 2**20 // 4
    source = torch.randn(count, device=device, generator=generator(3, device))
    target = torch.empty_like(source)
    best = _best(lambda _: target.copy_(source), clock, limits)
    found["copy_gbps"] = 2 * count * 4 / (best * 1e-3) / 1e9
    return found


def _products(device: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """PyTorch's matrix product, and on a CPU the one that our ops take."""
    if device == "cpu":
        with contextlib.suppress(ImportError):
            from ast_fast.cpp import _gemm

            return [torch.mm, _gemm.matmul]
    return [torch.mm]


def _best(call, clock, limits) -> float:  # type: ignore[no-untyped-def]
    """Median of the faster half of nine samples: a ceiling, but not one lucky sample."""
    calls = warm_up(call, clock, limits)
    samples = sorted(clock.sample(call, calls, 0) for _ in range(9))
    return samples[2]
