"""Kernels that turn wide tensors into FP8 operands: see fp8.py for what they compute and why.

A tile is read once and stored twice, as rows and transposed. Scales come from bounds that earlier
kernels left on the device as partial maxima: every program reduces them itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._settle import settle
from .fp8_tiles import highest, power_of_two, scale_exponent, store_transposed, to_fp8
from .gelu_tiles import gelu, gelu_and_slope

_LONGEST = tl.constexpr(1e18)  # the product of two row lengths stays finite


@triton.jit(do_not_specialize=["num_rows"])
def facts_kernel(
    x_ptr,  # [R, C]
    facts_ptr,  # [2, num_programs] float32: largest magnitude, longest row
    num_rows,
    num_cols,
    stride_xr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Largest finite magnitude and longest row of a tensor, as partial maxima."""
    pid = tl.program_id(0)
    peak = tl.zeros([BLOCK_R], tl.float32)
    longest = tl.zeros([BLOCK_R], tl.float32)
    for block in range(pid, tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = (block + tl.zeros([BLOCK_R], tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
        squares = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, num_cols, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
            x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
            size = tl.abs(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32))
            # what is not finite stays out: one bad clip must not cost the others their digits
            size = tl.where(size < float("inf"), size, 0.0)
            peak = tl.maximum(peak, tl.max(size, axis=1))
            squares += tl.sum(size * size, axis=1)
        longest = tl.maximum(longest, tl.sqrt(squares))
    top = tl.max(peak, axis=0)
    tl.store(facts_ptr + pid, top)
    # squares of tiny numbers vanish, their size does not
    longest_row = tl.maximum(tl.max(longest, axis=0), top)
    tl.store(facts_ptr + tl.num_programs(0) + pid, tl.minimum(longest_row, _LONGEST))


@triton.jit(do_not_specialize=["num_a", "num_b", "num_bias"])
def bound_kernel(
    a_ptr,  # [num_a] float32
    b_ptr,  # [num_b] float32
    bias_ptr,  # [num_bias], or None
    bound_ptr,  # [1] float32
    num_a,
    num_b,
    num_bias,
    factor,
    BLOCK: tl.constexpr,
):
    """`max(a) max(b) factor + max |bias|`, in one program."""
    product = highest(a_ptr, num_a) * factor * highest(b_ptr, num_b)
    if bias_ptr is not None:
        peak = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_bias, BLOCK):
            index = start + tl.arange(0, BLOCK)
            size = tl.abs(tl.load(bias_ptr + index, mask=index < num_bias, other=0.0))
            peak = tl.maximum(peak, tl.where(size < float("inf"), size, 0.0).to(tl.float32))
        product += tl.max(peak, axis=0)
    tl.store(bound_ptr, product)


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def quantise_kernel(
    x_ptr,  # [R, C]
    rows_ptr,  # [R, C] FP8
    columns_ptr,  # [C, padded_rows] FP8, or None
    bound_ptr,  # [num_partials] float32
    inverse_ptr,  # [1] float32
    partial_ptr,  # [row blocks, C] float32: column sums of a tile, or None
    num_rows,
    num_cols,
    padded_rows,
    num_partials,
    stride_xr,
    E5M2: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """One tile of x, or of GELU of x, in FP8."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * num_cols + cols
        tl.store(partial_ptrs, tl.sum(x, axis=0), mask=cols < num_cols)
    if GELU:
        x = gelu(x)
    exponent = scale_exponent(highest(bound_ptr, num_partials), E5M2)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_ptr, power_of_two(-exponent))
    tile = to_fp8(x, power_of_two(exponent), E5M2, BY_HAND)
    tl.store(rows_ptr + rows[:, None] * num_cols + cols[None, :], tile, mask=mask)
    if columns_ptr is not None:
        store_transposed(tile, columns_ptr, rows, cols, padded_rows, num_cols)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_backward_kernel(
    dg_ptr,  # [R, K]
    h_ptr,  # [R, K]
    dh_rows_ptr,  # [R, K] e5m2
    dh_columns_ptr,  # [K, padded_rows] e5m2
    g_columns_ptr,  # [K, padded_rows] e4m3
    dh_bound_ptr,  # [1] float32
    g_bound_ptr,  # [1] float32
    inverse_ptr,  # [2] float32: of dh, of g
    partial_ptr,  # [row blocks, K] float32: column sums of dh
    num_rows,
    num_cols,
    padded_rows,
    stride_dgr,
    stride_hr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """One tile of GELU's gradient, and of its recomputed output, in FP8."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    h_ptrs = h_ptr + rows[:, None] * stride_hr + cols[None, :]
    dg_ptrs = dg_ptr + rows[:, None] * stride_dgr + cols[None, :]
    h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    dg = tl.load(dg_ptrs, mask=mask, other=0.0).to(tl.float32)
    g, slope = gelu_and_slope(h)
    dh = dg * slope
    partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * num_cols + cols
    tl.store(partial_ptrs, tl.sum(dh, axis=0), mask=cols < num_cols)
    dh_exponent = scale_exponent(tl.load(dh_bound_ptr), True)
    g_exponent = scale_exponent(tl.load(g_bound_ptr), False)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_ptr, power_of_two(-dh_exponent))
        tl.store(inverse_ptr + 1, power_of_two(-g_exponent))
    tile = to_fp8(dh, power_of_two(dh_exponent), True, BY_HAND)
    tl.store(dh_rows_ptr + rows[:, None] * num_cols + cols[None, :], tile, mask=mask)
    store_transposed(tile, dh_columns_ptr, rows, cols, padded_rows, num_cols)
    tile = to_fp8(g, power_of_two(g_exponent), False, BY_HAND)
    store_transposed(tile, g_columns_ptr, rows, cols, padded_rows, num_cols)


@triton.jit(do_not_specialize=["num_rows"])
def norm_quantise_kernel(
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    total_ptr,  # [R, C]
    rows_ptr,  # [R, C] e4m3
    columns_ptr,  # [C, padded_rows] e4m3, or None
    mean_ptr,  # [R] float32
    rstd_ptr,  # [R] float32
    facts_ptr,  # [2, num_programs] float32: bound of the normalised rows, longest of them
    inverse_ptr,  # [1] float32
    num_rows,
    padded_rows,
    stride_xr,
    stride_residualr,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Whole rows of a residual sum, and their LayerNorm in FP8."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    w = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    # a normalised row has length sqrt(C), so none of its entries is longer
    reach = tl.abs(w) * (C**0.5) + tl.abs(b)
    reach = tl.max(tl.where(reach < float("inf"), reach, 0.0), axis=0)
    exponent = scale_exponent(reach, False)
    longest = tl.zeros([BLOCK_R], tl.float32)
    for block in range(pid, tl.cdiv(padded_rows, BLOCK_R), tl.num_programs(0)):
        rows = (block + tl.zeros([BLOCK_R], tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows[:, None] < num_rows) & (cols[None, :] < C)
        x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
        residual_ptrs = residual_ptr + rows[:, None] * stride_residualr + cols[None, :]
        total = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows[:, None] * C + cols[None, :], rounded, mask=mask)
        total = rounded.to(tl.float32)
        mean = tl.sum(total, axis=1) / C
        centred = tl.where(cols[None, :] < C, total - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        # read again rather than kept in registers, of which the rows need all
        w = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        b = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = tl.where(mask, centred * rstd[:, None] * w[None, :] + b[None, :], 0.0)
        size = tl.sqrt(tl.sum(y * y, axis=1))
        longest = tl.maximum(longest, tl.where(size < float("inf"), size, 0.0))
        tile = to_fp8(y, power_of_two(exponent), False, BY_HAND)
        tl.store(rows_ptr + rows[:, None] * C + cols[None, :], tile, mask=mask)
        if columns_ptr is not None:
            store_transposed(tile, columns_ptr, rows, cols, padded_rows, C)
    if pid == 0:
        tl.store(inverse_ptr, power_of_two(-exponent))
    tl.store(facts_ptr + pid, reach)
    tl.store(facts_ptr + tl.num_programs(0) + pid, tl.minimum(tl.max(longest, axis=0), _LONGEST))


settle(globals())
