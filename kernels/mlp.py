"""Feed-forward block: linear, exact GELU, linear; GEMMs by PyTorch (or gemm.py), the GELU here.

    gelu(h) = h * Phi(h) = max(h, 0) - |h| Phi(-|h|),    gelu'(h) = Phi(h) + h * phi(h)

Phi is 0.5 * exp(-h^2 / 2) * t * poly(t) with t = 1 / (1 + p |h|) on the negative side, a fit of the
scaled complementary error function with relative error 2e-7 (Abramowitz & Stegun 7.1.26 is the same
form with five terms: three instructions fewer, and no digits left in the tail). Evaluated in float32 the
error is 2e-7 of max(1, |gelu|) and 4e-7 in the derivative, at 19 instructions an element on sm_90 where
libdevice's erf takes 34. Limits: +inf gives inf, -inf gives 0, NaN stays.

Forward moves 2*R*K elements. Backward recomputes g (never stored) in the pass that computes dh and
sums db1: it reads dg and h once and writes dh and g. The column sums are added in float32 over a
fixed set of rows per program and then over programs, always in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned, gemm
from ._aot import AotCase
from ._launch import DTYPE_NAMES, ceil_div, guard, last_dim_contiguous, why_not
from ._settle import settle
from .gelu_tiles import gelu, gelu_and_slope


@triton.jit
def _gelu_forward_kernel(
    h_ptr,  # [N]
    g_ptr,  # [N], may be h_ptr
    num_elements: tl.int64,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + offsets, gelu(h).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gelu_backward_kernel(
    dg_ptr,  # [R, K]
    h_ptr,  # [R, K]
    dh_ptr,  # [R, K]
    g_ptr,  # [R, K]
    partial_ptr,  # [num_row_programs, K] float32: column sums of dh
    num_rows,
    num_cols,
    stride_dgr,
    stride_hr,
    stride_dhr,
    stride_gr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid_k = tl.program_id(0)
    pid_r = tl.program_id(1)
    cols = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    # without products in the loop only a number of stages of its own makes the compiler load ahead
    for block in tl.range(pid_r, tl.cdiv(num_rows, BLOCK_R), tl.num_programs(1), num_stages=STAGES):
        rows = (block + tl.zeros([BLOCK_R], tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
        h_ptrs = h_ptr + rows[:, None] * stride_hr + cols[None, :]
        dg_ptrs = dg_ptr + rows[:, None] * stride_dgr + cols[None, :]
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        dg = tl.load(dg_ptrs, mask=mask, other=0.0).to(tl.float32)
        g, slope = gelu_and_slope(h)
        dh = dg * slope
        g_ptrs = g_ptr + rows[:, None] * stride_gr + cols[None, :]
        dh_ptrs = dh_ptr + rows[:, None] * stride_dhr + cols[None, :]
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        sums += dh
    partial_ptrs = partial_ptr + pid_r.to(tl.int64) * num_cols + cols
    tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=cols < num_cols)


def unsupported(
    x: Tensor,  # [R, C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    if not x.dtype == w1.dtype == b1.dtype == w2.dtype == b2.dtype:
        return (
            "Triton's mlp takes tensors of one dtype, got "
            f"{x.dtype}, {w1.dtype}, {b1.dtype}, {w2.dtype}, {b2.dtype}"
        )
    return why_not(x.dtype, device=x.device)


def gelu_forward(h: Tensor, out: Tensor | None = None) -> Tensor:
    """Exact GELU of any shape; `out` may be `h` itself."""
    h = h.contiguous()
    g = torch.empty_like(h) if out is None else out
    if h.numel() == 0:
        return g
    block = _tuned.configs("mlp", _tuned.capability(h.device))["gelu_forward"]
    with guard(h):
        _gelu_forward_kernel[(ceil_div(h.numel(), block["elements"]),)](
            h, g, h.numel(), BLOCK=block["elements"], num_warps=block["warps"]
        )
    return g


def gelu_backward(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of h and the recomputed g, both in h's shape and dtype."""
    shape = h.shape
    width = shape[-1] if h.dim() else 1
    dh, g, _ = gelu_backward_with_sums(dg.reshape(-1, width), h.reshape(-1, width))
    return dh.view(shape), g.view(shape)


def gelu_backward_with_sums(
    dg: Tensor,  # [R, K]
    h: Tensor,  # [R, K]
) -> tuple[Tensor, Tensor, Tensor]:  # [R, K], [R, K], [K] float32
    """Gradient of h, the recomputed g, and the gradient's column sums before rounding."""
    num_rows, num_cols = h.shape
    dh = torch.empty((num_rows, num_cols), dtype=h.dtype, device=h.device)
    g = torch.empty_like(dh)
    if h.numel() == 0:
        return dh, g, torch.zeros(num_cols, dtype=torch.float32, device=h.device)
    dg, h = last_dim_contiguous(dg), last_dim_contiguous(h)
    tile = _tuned.configs("mlp", _tuned.capability(h.device))["gelu_backward"]
    col_blocks = ceil_div(num_cols, tile["cols"])
    wanted = ceil_div(tile["programs_per_sm"] * _tuned.sm_count(h.device), col_blocks)
    row_programs = min(wanted, ceil_div(num_rows, tile["rows"]))
    partial = torch.empty((row_programs, num_cols), dtype=torch.float32, device=h.device)
    with guard(h):
        _gelu_backward_kernel[(col_blocks, row_programs)](
            dg,
            h,
            dh,
            g,
            partial,
            num_rows,
            num_cols,
            dg.stride(0),
            h.stride(0),
            dh.stride(0),
            g.stride(0),
            BLOCK_R=tile["rows"],
            BLOCK_K=tile["cols"],
            STAGES=tile["stages"],
            num_warps=tile["warps"],
        )
    return dh, g, partial.sum(0)


def forward(
    x: Tensor,  # [R, C]
    w1: Tensor,  # [K, C]
    b1: Tensor,  # [K]
    w2: Tensor,  # [C2, K]
    b2: Tensor,  # [C2]
    save: bool,
) -> tuple[Tensor, Tensor | None]:  # [R, C2], [R, K]
    """Output, and the pre-activation when `save` asks for it."""
    h: Tensor | None
    if gemm.chosen("gelu", x, w1):
        g, h = gemm.linear_gelu(x, w1, b1, save)
    else:
        h = torch.addmm(b1, x, w1.t())
        # without a backward to come, the activation may overwrite its input
        g = gelu_forward(h, None if save else h)
    y = torch.addmm(b2, g, w2.t())
    return y, h if save else None


def backward(
    dy: Tensor,  # [R, C2]
    x: Tensor,  # [R, C]
    h: Tensor,  # [R, K]
    w1: Tensor,  # [K, C]
    w2: Tensor,  # [C2, K]
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w1, b1, w2 and b2; None where `needs` says so."""
    dx = dw1 = db1 = dw2 = db2 = None
    if any(needs[:3]):
        if gemm.chosen("gelu_backward", dy, w2):
            dh, g, sums = gemm.gelu_backward(dy, w2, h)
        else:
            dh, g, sums = gelu_backward_with_sums(torch.mm(dy, w2), h)
        dx = torch.mm(dh, w1) if needs[0] else None
        dw1 = torch.mm(dh.t(), x) if needs[1] else None
        db1 = sums.to(w1.dtype) if needs[2] else None
        dw2 = torch.mm(dy.t(), g) if needs[3] else None
    elif needs[3]:
        dw2 = torch.mm(dy.t(), gelu_forward(h))
    if needs[4]:
        db2 = dy.sum(0, dtype=torch.float32).to(w2.dtype)
    return dx, dw1, db1, dw2, db2


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves."""
    tuned = _tuned.configs("mlp", arch)
    cases = []
    for dtype, name in DTYPE_NAMES.items():
        if arch < 80 and dtype == torch.bfloat16:
            continue
        pointer = f"*{name}"
        block = tuned["gelu_forward"]
        cases.append(
            AotCase(
                f"gelu-forward-{name}",
                _gelu_forward_kernel,
                {"h_ptr": pointer, "g_ptr": pointer, "num_elements": "i64"},
                {"BLOCK": block["elements"]},
                ("h_ptr", "g_ptr", "num_elements"),
                block["warps"],
            )
        )
        tile = tuned["gelu_backward"]
        signature = dict.fromkeys(("dg_ptr", "h_ptr", "dh_ptr", "g_ptr"), pointer)
        signature |= {"partial_ptr": "*fp32", "num_rows": "i32", "num_cols": "i32"}
        signature |= {f"stride_{name}r": "i32" for name in ("dg", "h", "dh", "g")}
        cases.append(
            AotCase(
                f"gelu-backward-{name}",
                _gelu_backward_kernel,
                signature,
                {"BLOCK_R": tile["rows"], "BLOCK_K": tile["cols"], "STAGES": tile["stages"]},
                tuple(argument for argument in signature if argument != "num_rows"),
                tile["warps"],
            )
        )
    return cases


settle(globals())
