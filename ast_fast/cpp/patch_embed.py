"""Patch embedding on CPU: patches gathered into bounded scratch, one GEMM straight into the tokens.

In float32 with AVX-512 kernels of ours gather and multiply block by block, because the BLAS that
PyTorch brings may stop at AVX2 (it does on AMD). Elsewhere the GEMM is PyTorch's: the scratch holds whole
clips, including zero rows for the prefix tokens, so that a GEMM with `beta = 1` completes a clip's token
matrix that was filled with bias, position and prefix before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ._common import CODES, column_sum, need, threads, why_not

# gathered patches of one block of clips; a 10 s clip at stride 10 takes 1.2 MB in float32
_SCRATCH_BYTES = 8 << 20
_OWN_GEMM = str(_C.isa()).startswith("avx512")


def unsupported(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if x.dtype != weight.dtype:
        return "the C++ patch embedding takes one dtype for x and weight"
    return why_not(x=x, weight=weight, bias=bias, pos=pos, prefix=prefix)


def _clips_per_block(tokens: int, width: int, itemsize: int) -> int:
    return max(1, _SCRATCH_BYTES // max(1, tokens * width * itemsize))


def _grid(
    x: Tensor, weight: Tensor, fstride: int, tstride: int, prefix: int
) -> tuple[int, int, int, int, int, int, int]:
    """f, t, pf, pt, fstride, tstride, prefix: the order the kernels read."""
    pf, pt = weight.shape[2], weight.shape[3]
    f = (x.shape[2] - pf) // fstride + 1
    t = (x.shape[1] - pt) // tstride + 1
    return f, t, pf, pt, fstride, tstride, prefix


def _has_own_gemm(dtype: torch.dtype, width: int, area: int) -> bool:
    return _OWN_GEMM and dtype == torch.float32 and width % 32 == 0 and area % 16 == 0


def _gather(x: Tensor, columns: Tensor, grid: tuple[int, ...]) -> None:
    _C.patch_gather(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        columns.data_ptr(),
        CODES[x.dtype],
        x.shape[0],
        x.shape[1],
        x.shape[2],
        grid,
        threads(),
    )


def _weight_gradient(dy: Tensor, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Weight gradient as [C, pt * pf], summed over all tokens in an order that no thread count changes."""
    width, area = dy.shape[2], grid[2] * grid[3]
    panels = torch.empty((width // 32, area, 32), dtype=torch.float32)
    _C.patch_weight_gradient(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        dy.data_ptr(),
        panels.data_ptr(),
        *x.shape,
        width,
        grid,
        threads(),
    )
    return panels.transpose(1, 2).reshape(width, area)


def forward(
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    bias: Tensor,  # [C]
    pos: Tensor,  # [P + f*t, C]
    prefix: Tensor,  # [P, C]
    fstride: int,
    tstride: int,
    allow_tf32: bool = False,
) -> Tensor:  # [B, P + f*t, C]
    """Return prefix tokens and projected patches, positions added."""
    clips, num_prefix, width = x.shape[0], prefix.shape[0], weight.shape[0]
    grid = _grid(x, weight, fstride, tstride, num_prefix)
    tokens, area = num_prefix + grid[0] * grid[1], grid[2] * grid[3]
    need(
        min(grid[:2]) >= 1
        and pos.shape == (tokens, width)
        and prefix.shape == (num_prefix, width)
        and bias.shape == (width,)
        and x.dtype == weight.dtype,
        f"x [B, S, F] of one patch or more, pos {(tokens, width)}, prefix [P, C] and bias [C]",
        *(x, weight, bias, pos, prefix),
    )
    table = pos.to(torch.float32, copy=True)
    table[:num_prefix] += prefix
    table[num_prefix:] += bias
    y = torch.empty((clips, tokens, width), dtype=weight.dtype)
    if not y.numel():
        return y
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    # time becomes the slower axis of a patch, as the gathered rows have it
    matrix = weight[:, 0].transpose(1, 2).reshape(width, area)
    if _has_own_gemm(x.dtype, width, area):
        _C.patch_project(
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            matrix.data_ptr(),
            table.data_ptr(),
            y.data_ptr(),
            clips,
            *x.shape[1:],
            width,
            grid,
            threads(),
        )
        return y
    matrix = matrix.t()
    block = _clips_per_block(tokens, area, x.element_size())
    columns = torch.empty((min(block, clips), tokens, area), dtype=x.dtype)
    for start in range(0, clips, block):
        part = x[start : start + block]
        rows = columns[: part.shape[0]]
        _gather(part, rows, grid)
        target = y[start : start + block]
        target.copy_(table)
        target.view(-1, width).addmm_(rows.view(-1, area), matrix)
    return y


def backward(
    dy: Tensor,  # [B, P + f*t, C]
    x: Tensor,  # [B, S, F]
    weight: Tensor,  # [C, 1, pf, pt]
    fstride: int,
    tstride: int,
    num_prefix: int,
    needs_dx: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return dweight, dbias, dpos, dprefix and, if needed, dx."""
    clips, tokens, width = dy.shape
    grid = _grid(x, weight, fstride, tstride, num_prefix)
    area = grid[2] * grid[3]
    need(
        min(grid[:2]) >= 1
        and x.shape[0] == clips
        and tokens == num_prefix + grid[0] * grid[1]
        and width == weight.shape[0]
        and dy.dtype == x.dtype == weight.dtype,
        "dy [B, P + f * t, C] of the patches of x",
        *(dy, x, weight),
    )
    dx = torch.empty(x.shape, dtype=x.dtype) if needs_dx else None
    dy = dy.contiguous()
    if clips:
        dpos = column_sum(dy.view(clips, -1)).view(tokens, width)
    else:
        dpos = torch.zeros((tokens, width))
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    own = bool(dy.numel()) and tokens > num_prefix and _has_own_gemm(x.dtype, width, area)
    own = own and dy.dtype == torch.float32
    if own:
        dweight = _weight_gradient(dy, x, grid)
    else:
        dweight = torch.zeros((width, area), dtype=torch.float32)
    block = _clips_per_block(tokens, area, x.element_size())
    columns = torch.empty((min(block, clips), tokens, area), dtype=x.dtype)
    matrix = weight[:, 0].transpose(1, 2).reshape(width, area)
    for start in range(0, clips if dy.numel() and not (own and dx is None) else 0, block):
        part = x[start : start + block]
        rows = columns[: part.shape[0]].view(-1, area)
        grads = dy[start : start + block].view(-1, width)
        if not own:
            _gather(part, rows, grid)
            dweight += grads.t() @ rows
        if dx is not None:
            torch.mm(grads, matrix, out=rows)
            _C.patch_scatter(
                rows.data_ptr(),
                dx[start : start + block].data_ptr(),
                CODES[x.dtype],
                part.shape[0],
                x.shape[1],
                x.shape[2],
                grid,
                threads(),
            )
    dtype = weight.dtype
    dbias = column_sum(dpos[num_prefix:]) if tokens > num_prefix else torch.zeros(width)
    shaped = (
        dweight.view(width, grid[3], grid[2]).transpose(1, 2).reshape(weight.shape).contiguous()
    )
    return (
        shaped.to(dtype),
        dbias.to(dtype),
        dpos.to(dtype),
        dpos[:num_prefix].to(dtype, copy=True),
        dx,
    )
