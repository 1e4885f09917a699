"""Matrix products with what follows them in the epilogue, for where that beats cuBLAS and a kernel after it.

    linear            a w^T + bias
    linear_residual   a w^T + bias + residual
    linear_gelu       gelu(h), h = a w^T + bias; h is stored too if a backward will come
    gelu_backward     dh = (dy w) gelu'(h), g = gelu(h), and column sums of dh (the bias gradient)

With R rows, K = 4 C and 16-bit tensors, fc1 with GELU writes 2 R K elements rather than 2 and reads one
fewer (8 R C bytes saved), fc2's input gradient saves the round trip of dg (16 R C bytes). Accumulators
are float32, column sums are added per row tile and then over tiles, always in one order.

cuBLAS stays the default: `chosen` says yes only where a row of the tuned table has "use": true, which a
measurement has to put there. `force(True)` takes these kernels wherever they can run, for benchmarks and tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tuned
from ._aot import AotCase
from ._launch import DTYPE_NAMES, ceil_div, guard, last_dim_contiguous, why_not
from .gemm_kernels import gemm_kernel

KINDS = ("linear", "residual", "gelu", "gelu_backward")
_EPILOGUES = {
    "linear": "none",
    "residual": "residual",
    "gelu": "gelu",
    "gelu_backward": "gelu backward",
}
OLDEST = 80  # Triton has no tensor cores on older GPUs
_forced: ContextVar[bool | None] = ContextVar("ast_fast_gemm", default=None)


@contextmanager
def force(use: bool) -> Iterator[None]:
    """Take these kernels wherever they can run (True) or nowhere (False), whatever the table says."""
    token = _forced.set(use)
    try:
        yield
    finally:
        _forced.reset(token)


def unsupported(a: Tensor, b: Tensor) -> str | None:
    """Why these kernels cannot multiply a [M, K] by b; None when they can."""
    if a.dtype != b.dtype:
        return f"Triton's products take tensors of one dtype, got {a.dtype}, {b.dtype}"
    if _tuned.capability(a.device) < OLDEST:
        return "Triton's products need compute capability 8.0 or newer"
    if a.dtype == torch.float32 and not _tuned.INTERPRETED:
        return "Triton's products are for 16-bit tensors, got torch.float32"
    return why_not(a.dtype, device=a.device)


def chosen(kind: str, a: Tensor, b: Tensor) -> bool:
    """Whether a product with this epilogue is to run here rather than in cuBLAS."""
    wanted = _forced.get()
    if wanted is None:
        # older GPUs have no row
        capability = _tuned.capability(a.device)
        wanted = capability >= OLDEST and bool(_tuned.configs("gemm", capability)[kind]["use"])
    return wanted and unsupported(a, b) is None


def linear(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    config: dict[str, Any] | None = None,
) -> Tensor:  # [M, N]
    """`a weight^T + bias`; `config` replaces the table's."""
    return _launch("linear", a, weight, bias, config=config)[0]


def linear_residual(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    residual: Tensor,  # [M, N]
    config: dict[str, Any] | None = None,
) -> Tensor:  # [M, N]
    """`a weight^T + bias + residual`, rounded once."""
    return _launch("residual", a, weight, bias, last_dim_contiguous(residual), config=config)[0]


def linear_gelu(
    a: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    save: bool,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:  # [M, N], [M, N]
    """GELU of `a weight^T + bias`, and the pre-activation if it is to be saved."""
    g, h, _ = _launch("gelu", a, weight, bias, second=save, config=config)
    return g, h


def gelu_backward(
    dy: Tensor,  # [M, C]
    weight: Tensor,  # [C, K]
    h: Tensor,  # [M, K]
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [M, K], [M, K], [K] float32
    """Gradient of h, the recomputed activation, and the gradient's column sums before rounding."""
    dh, g, partial = _launch(
        "gelu_backward", dy, weight, None, last_dim_contiguous(h), second=True, config=config
    )
    assert g is not None and partial is not None
    return dh, g, partial.sum(0)


def _config(kind: str, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = _tuned.configs("gemm", _tuned.capability(device))[kind]
    return found


def _describable(x: Tensor) -> bool:
    """Whether rows start on 16-byte boundaries, as a tensor map needs."""
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _launch(
    kind: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    extra: Tensor | None = None,
    second: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Result, the other tensor the epilogue stores, and partial column sums."""
    sums_rows = kind == "gelu_backward"
    (num_rows, depth), num_cols = a.shape, b.shape[1] if sums_rows else b.shape[0]
    config = config or _config(kind, a.device)
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    out = torch.empty((num_rows, num_cols), dtype=a.dtype, device=a.device)
    other = torch.empty_like(out) if second else None
    tiles_m, tiles_n = ceil_div(num_rows, block_m), ceil_div(num_cols, block_n)
    partial = None
    if sums_rows:
        partial = torch.empty((tiles_m, num_cols), dtype=torch.float32, device=a.device)
    if out.numel() == 0:
        return out, other, partial
    a, b = last_dim_contiguous(a), last_dim_contiguous(b)
    # an expanded operand has no rows of its own, which kernels and tensor maps count on
    a, b = (x.contiguous() if x.stride(0) < x.shape[1] else x for x in (a, b))
    tma = config["tma"] and _describable(a) and _describable(b)
    b_box = [block_k, block_n] if sums_rows else [block_n, block_k]
    programs = min(tiles_m * tiles_n, _tuned.sm_count(a.device) * config["programs_per_sm"])
    with guard(a):
        gemm_kernel[(programs,)](
            TensorDescriptor.from_tensor(a, [block_m, block_k]) if tma else a,
            TensorDescriptor.from_tensor(b, b_box) if tma else b,
            None if bias is None else bias.contiguous(),
            extra,
            out,
            other,
            partial,
            num_rows,
            num_cols,
            depth,
            a.stride(0),
            b.stride(0),
            0 if extra is None else extra.stride(0),
            EPILOGUE=_EPILOGUES[kind],
            B_SUMS_ROWS=sums_rows,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=config["group_m"],
            SPLIT=config["split"],
            PRECISION="ieee",
            TMA=tma,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )
    return out, other, partial


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch`; none where there are no tensor cores for it."""
    cases: list[AotCase] = []
    if arch < OLDEST:
        return cases
    for kind in KINDS:
        config = _tuned.configs("gemm", arch)[kind]
        for dtype in (torch.bfloat16, torch.float16):
            # where rows do not start on 16 bytes, descriptors give way to pointers
            for tma in dict.fromkeys((config["tma"], False)):
                for second in (False, True) if kind == "gelu" else (kind == "gelu_backward",):
                    twin = dtype == torch.float16
                    cases.append(
                        _aot_case(kind, config, DTYPE_NAMES[dtype], arch, tma, second, twin)
                    )
    return cases


def _aot_case(
    kind: str, config: dict[str, Any], name: str, arch: int, tma: bool, second: bool, twin: bool
) -> AotCase:
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    backward = kind == "gelu_backward"
    b_box = f"{block_k}, {block_n}" if backward else f"{block_n}, {block_k}"
    pointer = f"*{name}"
    signature = {"a_source": pointer, "b_source": pointer, "out_ptr": pointer}
    if tma:
        signature["a_source"] = f"tensordesc<{name}[{block_m}, {block_k}]>"
        signature["b_source"] = f"tensordesc<{name}[{b_box}]>"
    constexprs: dict[str, Any] = {
        "EPILOGUE": _EPILOGUES[kind],
        "B_SUMS_ROWS": backward,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": config["group_m"],
        "SPLIT": config["split"],
        "PRECISION": "ieee",
        "TMA": tma,
    }
    for argument, there, kind_of in (
        ("bias_ptr", not backward, pointer),
        ("extra_ptr", backward or kind == "residual", pointer),
        ("second_ptr", second, pointer),
        ("partial_ptr", backward, "*fp32"),
    ):
        if there:
            signature[argument] = kind_of
        else:
            constexprs[argument] = None
    integers = ("num_rows", "num_cols", "depth", "stride_a", "stride_b", "stride_extra")
    signature |= dict.fromkeys(integers, "i32")
    expect = {90: ("wgmma",), 100: ("tcgen05",)}.get(arch, ("mma", "cp.async"))
    return AotCase(
        f"gemm-{kind}-{name}{'-saved' if kind == 'gelu' and second else ''}-{'tma' if tma else 'pointers'}",
        gemm_kernel,
        signature,
        constexprs,
        tuple(
            n for n, t in signature.items() if n != "num_rows" and not t.startswith("tensordesc")
        ),
        config["warps"],
        config["stages"],
        (*expect, "tma") if tma else expect,
        twin=twin,
    )
