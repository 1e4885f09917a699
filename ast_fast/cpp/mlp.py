"""The MLP on CPU: PyTorch's GEMMs around one pass of exact GELU by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from . import _gemm
from ._common import CODES, column_sum, need, row_chunks, rows_of, threads, why_not

# Without gradients the hidden activation is made in blocks of rows that stay in cache.
_BLOCK_ELEMENTS = 1 << 20


def unsupported(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if not (x.dtype == w1.dtype == b1.dtype == w2.dtype == b2.dtype):
        return "the C++ MLP takes one dtype for x, weights and biases"
    return why_not(x=x, w1=w1, b1=b1, w2=w2, b2=b2)


def forward(
    x: Tensor,  # [R, C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
    save: bool,
) -> tuple[Tensor, Tensor | None]:  # [R, C2], [R, K]
    """Return y and, if `save`, the pre-activation."""
    rows, hidden = x.shape[0], w1.shape[0]
    if save:
        h = _gemm.linear(x, w1, b1)
        return _gemm.linear(gelu_forward(h), w2, b2), h
    block = max(256, _BLOCK_ELEMENTS // max(1, hidden))
    if rows <= block or _gemm.takes_onednn(x, w1):
        h = _gemm.linear(x, w1, b1)
        return _gemm.linear(gelu_forward(h, out=h), w2, b2), None
    y = torch.empty((rows, w2.shape[0]), dtype=x.dtype)
    buffer = torch.empty((block, hidden), dtype=x.dtype)
    w1_t, w2_t = w1.t(), w2.t()
    for start in range(0, rows, block):
        part = x[start : start + block]
        h = torch.addmm(b1, part, w1_t, out=buffer[: part.shape[0]])
        torch.addmm(b2, gelu_forward(h, out=h), w2_t, out=y[start : start + block])
    return y, None


def gelu_forward(h: Tensor, out: Tensor | None = None) -> Tensor:  # [R, K] -> [R, K]
    """Exact (erf) GELU: h * Phi(h), with +inf -> inf, -inf -> 0 and NaN -> NaN.

    Within 2e-6 in float32 and, before the rounding, 2.5e-4 in bfloat16, relatively.
    """
    h = rows_of(h)
    rows, cols = h.shape
    if out is not None:
        fits = out.shape == h.shape and out.dtype == h.dtype and out.is_contiguous()
        need(fits, "a contiguous out like h", h, out)
    g = torch.empty((rows, cols), dtype=h.dtype) if out is None else out
    if rows and cols:
        _C.gelu_forward(
            h.data_ptr(), h.stride(0), g.data_ptr(), CODES[h.dtype], rows, cols, threads()
        )
    return g


def gelu_backward(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # [R, K], [R, K]
    """Return dh = dg * gelu'(h), and g = gelu(h)."""
    return _gelu_backward(dg, h)[:2]


def _gelu_backward(
    dg: Tensor, h: Tensor, reuse_dg: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # [R, K], [R, K], [K]
    need(dg.shape == h.shape and dg.dtype == h.dtype, "dg like h", h, dg)
    dg, h = rows_of(dg), rows_of(h)
    rows, cols = h.shape
    # in place only where the rows follow one another, as the kernel writes them
    dh = dg if reuse_dg and dg.is_contiguous() else torch.empty((rows, cols), dtype=h.dtype)
    g = torch.empty((rows, cols), dtype=h.dtype)
    if not rows or not cols:
        return dh, g, torch.zeros(cols)
    chunks = row_chunks(rows)
    partial = torch.empty((chunks, cols), dtype=torch.float32)
    sums = torch.empty(cols, dtype=torch.float32)
    _C.gelu_backward(
        dg.data_ptr(),
        dg.stride(0),
        h.data_ptr(),
        h.stride(0),
        dh.data_ptr(),
        g.data_ptr(),
        partial.data_ptr(),
        chunks,
        sums.data_ptr(),
        CODES[h.dtype],
        rows,
        cols,
        threads(),
    )
    return dh, g, sums


def backward(
    dy: Tensor,  # [R, C2]
    x: Tensor,  # [R, C]
    h: Tensor,  # [R, K]
    w1: Tensor,  # [K, C]
    w2: Tensor,  # [C2, K]
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dw1, db1, dw2 and db2, None where not needed; GELU is computed again."""
    dy = rows_of(dy)
    dx = dw1 = db1 = dw2 = db2 = None
    if needs[4]:
        db2 = column_sum(dy).to(w2.dtype) if dy.shape[0] else w2.new_zeros(w2.shape[0])
    if any(needs[:4]):
        # the fresh GEMM result is overwritten in place: dh never needs memory of its own
        dh, g, sums = _gelu_backward(_gemm.matmul(dy, w2), h, reuse_dg=True)
        if needs[3]:
            dw2 = _gemm.matmul(dy.t(), g)
        if needs[2]:
            db1 = sums.to(w1.dtype)
        if needs[0]:
            dx = _gemm.matmul(dh, w1)
        if needs[1]:
            dw1 = _gemm.matmul(dh.t(), x)
    return dx, dw1, db1, dw2, db2
