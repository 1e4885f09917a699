"""LayerNorm forward and backward (Ba et al. 2016), statistics in float32.

    y = (x - mean) * rstd * w + b,    rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    dx = rstd * (g - mean(g) - n * mean(g * n)),   g = dy * w,  n = (x - mean) * rstd
    dw = sum(dy * n),  db = sum(dy) over rows

A row stays in registers between the two passes of the variance, so every input is read once:
forward moves R*C*(in + out) bytes, backward R*C*(dy + x + dx). The weight gradients are summed by
each program in float32 over a fixed set of rows and then over programs, always in one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._aot import AotCase
from ._launch import ceil_div, guard, last_dim_contiguous, next_power_of_2, why_not
from ._settle import settle

MAX_WIDTH = 8192  # a row has to fit the registers of one block


@triton.jit
def normalise_rows(
    x,  # [BLOCK_R, BLOCK_C] float32, zero outside the mask
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [R, C]
    mean_ptr,  # [R] float32
    rstd_ptr,  # [R] float32
    rows,
    cols,
    num_rows,
    stride_yr,
    eps,
    C: tl.constexpr,
):
    """Statistics and normalised output of a tile of rows that is already in registers."""
    mask = (rows[:, None] < num_rows) & (cols[None, :] < C)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(cols[None, :] < C, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    w = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_yr + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,  # [R, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [R, C]
    mean_ptr,  # [R] float32
    rstd_ptr,  # [R] float32
    num_rows,
    stride_xr,
    stride_yr,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < C)
    x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    normalise_rows(
        x, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, cols, num_rows, stride_yr, eps, C
    )


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr,  # [R, C]
    dtotal_ptr,  # [R, C] gradient that joins dx, or None
    x_ptr,  # [R, C]
    weight_ptr,  # [C]
    mean_ptr,  # [R] float32
    rstd_ptr,  # [R] float32
    dx_ptr,  # [R, C]
    partial_ptr,  # [2, num_programs, C] float32: dweight, dbias
    num_rows,
    stride_dyr,
    stride_dtotalr,
    stride_xr,
    stride_dxr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    w = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # without products in the loop only a number of stages of its own makes the compiler load ahead
    for block in tl.range(pid, tl.cdiv(num_rows, BLOCK_R), num_programs, num_stages=STAGES):
        rows = (block + tl.zeros([BLOCK_R], tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows[:, None] < num_rows) & (cols[None, :] < C)
        x_ptrs = x_ptr + rows[:, None] * stride_xr + cols[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dyr + cols[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normal = tl.where(cols[None, :] < C, (x - mean[:, None]) * rstd[:, None], 0.0)
        scaled = dy * w[None, :]
        along = tl.sum(scaled * normal, axis=1) / C
        offset = tl.sum(scaled, axis=1) / C
        dx = (scaled - offset[:, None] - normal * along[:, None]) * rstd[:, None]
        if dtotal_ptr is not None:
            dtotal_ptrs = dtotal_ptr + rows[:, None] * stride_dtotalr + cols[None, :]
            dx += tl.load(dtotal_ptrs, mask=mask, other=0.0).to(tl.float32)
        dx_ptrs = dx_ptr + rows[:, None] * stride_dxr + cols[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normal
        dbias += dy
    partial_ptrs = partial_ptr + pid.to(tl.int64) * C + cols
    tl.store(partial_ptrs, tl.sum(dweight, axis=0), mask=cols < C)
    partial_ptrs += num_programs.to(tl.int64) * C
    tl.store(partial_ptrs, tl.sum(dbias, axis=0), mask=cols < C)


def config(op: str, direction: str, width: int, capability: int) -> dict[str, int]:
    """Tuned configuration of `op` for rows of `width`: rows a tile, warps, programs a processor, stages."""
    for entry in _tuned.configs(op, capability)[direction]:
        if width <= entry["max_width"]:
            return entry
    raise ValueError(f"{op}: rows of {width} elements are too wide, expected at most {MAX_WIDTH}")


def width_reason(width: int) -> str | None:
    """Why rows of `width` elements cannot be taken; None when they can."""
    if not 1 <= width <= MAX_WIDTH:
        return f"Triton's LayerNorm takes rows of 1 to {MAX_WIDTH} elements, got {width}"
    return None


def unsupported(
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    out_dtype: torch.dtype,
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    return width_reason(x.shape[-1]) or why_not(
        x.dtype, weight.dtype, bias.dtype, out_dtype, device=x.device
    )


def forward(
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [R] float32, [R] float32
    """Normalised rows, their means and their 1/std."""
    num_rows, width = x.shape
    y = torch.empty((num_rows, width), dtype=out_dtype, device=x.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if num_rows == 0:
        return y, mean, rstd
    x = last_dim_contiguous(x)
    chosen = config("layer_norm", "forward", width, _tuned.capability(x.device))
    with guard(x):
        _forward_kernel[(ceil_div(num_rows, chosen["rows"]),)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            y,
            mean,
            rstd,
            num_rows,
            x.stride(0),
            y.stride(0),
            eps,
            C=width,
            BLOCK_R=chosen["rows"],
            BLOCK_C=next_power_of_2(width),
            num_warps=chosen["warps"],
        )
    return y, mean, rstd


def backward(
    dy: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R] float32
    rstd: Tensor,  # [R] float32
) -> tuple[Tensor, Tensor, Tensor]:  # [R, C], [C] float32, [C] float32
    """Gradients of x, weight and bias."""
    return launch_backward("layer_norm", dy, None, x, weight, mean, rstd)


def launch_backward(
    op: str,
    dy: Tensor,  # [R, C]
    dtotal: Tensor | None,  # [R, C]
    x: Tensor,  # [R, C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [R] float32
    rstd: Tensor,  # [R] float32
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward kernel and the sum of its partial weight gradients, configured for `op`."""
    num_rows, width = x.shape
    dx = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        zeros = torch.zeros((2, width), dtype=torch.float32, device=x.device)
        return dx, zeros[0], zeros[1].clone()
    dy, x = last_dim_contiguous(dy), last_dim_contiguous(x)
    if dtotal is not None:
        dtotal = last_dim_contiguous(dtotal)
    chosen = config(op, "backward", width, _tuned.capability(x.device))
    num_programs = min(
        chosen["programs_per_sm"] * _tuned.sm_count(x.device), ceil_div(num_rows, chosen["rows"])
    )
    partial = torch.empty((2, num_programs, width), dtype=torch.float32, device=x.device)
    with guard(x):
        _backward_kernel[(num_programs,)](
            dy,
            dtotal,
            x,
            weight.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            dx,
            partial,
            num_rows,
            dy.stride(0),
            0 if dtotal is None else dtotal.stride(0),
            x.stride(0),
            dx.stride(0),
            C=width,
            BLOCK_R=chosen["rows"],
            BLOCK_C=next_power_of_2(width),
            STAGES=chosen["stages"],
            num_warps=chosen["warps"],
        )
    dweight, dbias = partial.sum(1).unbind(0)
    return dx, dweight, dbias.clone()


# Input dtype, parameter dtype, output dtype of the calls a model makes: pure float32, pure 16-bit,
# autocast (float32 parameters, 16-bit stream), and a float32 stream cast on the way out.
AOT_DTYPES = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("bf16", "fp32", "bf16"),
    ("fp32", "fp32", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp16", "fp32", "fp16"),
)


def aot_combinations(
    op: str, direction: str, arch: int
) -> list[tuple[int, dict[str, int], str, str, str]]:
    """Width, configuration and dtypes (x, parameters, y) of every case to compile for `arch`."""
    combinations = []
    # the model's widths stand for their class; above them only the widest row is compiled
    widths = {256: 192, 512: 384, 1024: 768}
    for entry in _tuned.configs(op, arch)[direction]:
        width = widths.get(entry["max_width"], entry["max_width"])
        for x, parameter, y in AOT_DTYPES:
            if arch < 80 and "bf16" in (x, y):
                continue
            if x == parameter == y or width == 768:
                combinations.append((width, entry, x, parameter, y))
    return combinations


def aot_backward_cases(op: str, arch: int, has_dtotal: bool) -> list[AotCase]:
    """The backward kernel in every configuration tuned for `op` on `arch`."""
    cases = []
    for width, entry, x, parameter, y in aot_combinations(op, "backward", arch):
        signature = {
            "dy_ptr": f"*{y}",
            "x_ptr": f"*{x}",
            "weight_ptr": f"*{parameter}",
            "mean_ptr": "*fp32",
            "rstd_ptr": "*fp32",
            "dx_ptr": f"*{x}",
            "partial_ptr": "*fp32",
            "num_rows": "i32",
            "stride_dyr": "i32",
            "stride_dtotalr": "i32",
            "stride_xr": "i32",
            "stride_dxr": "i32",
        }
        constexprs: dict[str, Any] = {
            "C": width,
            "BLOCK_R": entry["rows"],
            "BLOCK_C": next_power_of_2(width),
            "STAGES": entry["stages"],
        }
        if has_dtotal:
            signature["dtotal_ptr"] = f"*{x}"
        else:
            constexprs["dtotal_ptr"] = None
        cases.append(
            AotCase(
                f"{op}-backward-{width}-{x}-{parameter}-{y}",
                _backward_kernel,
                signature,
                constexprs,
                tuple(name for name in signature if name != "num_rows"),
                entry["warps"],
            )
        )
    return cases


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves."""
    cases = []
    for width, entry, x, parameter, y in aot_combinations("layer_norm", "forward", arch):
        signature = {
            "x_ptr": f"*{x}",
            "weight_ptr": f"*{parameter}",
            "bias_ptr": f"*{parameter}",
            "y_ptr": f"*{y}",
            "mean_ptr": "*fp32",
            "rstd_ptr": "*fp32",
            "num_rows": "i32",
            "stride_xr": "i32",
            "stride_yr": "i32",
            "eps": "fp32",
        }
        constexprs = {
            "C": width,
            "BLOCK_R": entry["rows"],
            "BLOCK_C": next_power_of_2(width),
        }
        divisible = tuple(name for name in signature if name not in ("num_rows", "eps"))
        cases.append(
            AotCase(
                f"layer_norm-forward-{width}-{x}-{parameter}-{y}",
                _forward_kernel,
                signature,
                constexprs,
                divisible,
                entry["warps"],
            )
        )
    return cases + aot_backward_cases("layer_norm", arch, has_dtotal=False)


settle(globals())
