"""GELU of a tile that is in registers, shared by every kernel that has one: see mlp.py for the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

# Beyond this both tails have reached their limit in float32, so infinities may be cut to it.
LIMIT = tl.constexpr(20.0)
_NEGATIVE_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)


@triton.jit
def normal_cdf(x):
    """Phi(x) and exp(-x^2 / 2) of a finite float32 tile."""
    t = 1.0 / (1.0 + 0.31 * tl.abs(x))
    poly = 0.03588968619746909
    poly = poly * t - 0.14181530169260204
    poly = poly * t + 0.15545246738526663
    poly = poly * t - 0.0152801444324021
    poly = poly * t + 0.11032319145790669
    poly = poly * t + 0.10770178443409592
    poly = poly * t + 0.12407226508106571
    poly = poly * t + 0.1236560195684433
    gauss = tl.exp2(x * x * _NEGATIVE_HALF_LOG2_E)
    tail = poly * t * gauss
    return tl.where(x < 0.0, tail, 1.0 - tail), gauss


@triton.jit
def gelu(h):
    """GELU of a float32 tile."""
    low = tl.where(h < -LIMIT, -LIMIT, h)
    cdf, _ = normal_cdf(low)
    return low * cdf


@triton.jit
def gelu_and_slope(h):
    """GELU and its derivative of a float32 tile."""
    low = tl.where(h < -LIMIT, -LIMIT, h)
    cut = tl.where(low > LIMIT, LIMIT, low)
    cdf, gauss = normal_cdf(cut)
    # above the limit Phi is 1, so low * cdf is low itself, infinity included
    return low * cdf, cdf + cut * gauss * DENSITY_AT_ZERO
