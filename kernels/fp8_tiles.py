"""Tiles in FP8: scales that are powers of two, rounding, and stores with a transposed copy.

A scale is the largest power of two that brings a bound on the tensor's magnitude under the format's
largest number (448 in e4m3, 57344 in e5m2: both 1.75 times a power of two). Scaling is then exact, the
only rounding is the cast's, and every backend gets the same bits. Finite values beyond the bound
saturate; infinities and NaN become NaN, so that trouble stays visible in the row that has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# the exponent of a scale stays within these, so that it and its inverse are ordinary float32 numbers
_EXPONENT_LIMIT = tl.constexpr(100)
# partial maxima of one tensor, at most: every program that needs them reads them all
PARTIALS = 1024
_PARTIALS = tl.constexpr(PARTIALS)


@triton.jit
def highest(partial_ptr, num_partials):
    """The largest of the partial maxima of a tensor."""
    index = tl.arange(0, _PARTIALS)
    return tl.max(tl.load(partial_ptr + index, mask=index < num_partials, other=0.0), axis=0)


@triton.jit
def power_of_two(exponent):
    """2 to an integer exponent within the limits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_exponent(bound, E5M2: tl.constexpr):
    """Exponent of the scale for a tensor of magnitudes up to `bound` (a scalar, not NaN)."""
    bits = bound.to(tl.int32, bitcast=True)
    top = 15 if E5M2 else 8
    # a mantissa above 1.75 would end above the largest number
    over = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = top + 127 - (bits >> 23) - over
    return tl.minimum(tl.maximum(exponent, -_EXPONENT_LIMIT), _EXPONENT_LIMIT)


@triton.jit
def _rounded_by_hand(x, E5M2: tl.constexpr):
    """What the hardware's cast gives for |x| within the format: round to nearest, ties to even."""
    mantissa: tl.constexpr = 2 if E5M2 else 3
    lowest: tl.constexpr = -14 if E5M2 else -6  # exponent of the smallest normal number
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    binade = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 2.0**lowest)
    # adding 1.5 * 2^23 units of the last place leaves no room for anything finer
    magic = binade * (1.5 * 2.0 ** (23 - mantissa))
    size = (size + magic) - magic
    small = (size * 2.0 ** (mantissa - lowest)).to(tl.int32)
    normal = (size.to(tl.int32, bitcast=True) - ((126 + lowest) << 23)) >> (23 - mantissa)
    code = tl.where(size < 2.0**lowest, small, normal)
    code = tl.where(x != x, 0x7F, code)
    code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code.to(tl.float8e5 if E5M2 else tl.float8e4nv, bitcast=True)


@triton.jit
def to_fp8(
    x,  # float32 tile
    scale,
    E5M2: tl.constexpr,
    BY_HAND: tl.constexpr,  # for the interpreter, whose own cast neither rounds nor keeps NaN
):
    """The tile times `scale` in FP8."""
    largest: tl.constexpr = 57344.0 if E5M2 else 448.0
    scaled = tl.minimum(tl.maximum(x * scale, -largest), largest)
    scaled = tl.where(tl.abs(x) < float("inf"), scaled, float("nan"))
    if BY_HAND:
        return _rounded_by_hand(scaled, E5M2)
    return scaled.to(tl.float8e5 if E5M2 else tl.float8e4nv)


@triton.jit
def store_transposed(
    tile,  # [BLOCK_R, BLOCK_C] FP8
    out_ptr,  # [C, padded_rows]
    rows,
    cols,
    padded_rows,
    num_cols,
):
    """Store a tile into the transposed copy; rows up to `padded_rows` are part of it."""
    out_ptrs = out_ptr + cols.to(tl.int64)[:, None] * padded_rows + rows[None, :]
    mask = (cols[:, None] < num_cols) & (rows[None, :] < padded_rows)
    tl.store(out_ptrs, tl.trans(tile), mask=mask)
