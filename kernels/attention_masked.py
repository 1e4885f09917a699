"""Attention under a mask of rectangles in Triton: time and memory follow the visible pairs, not T * T.

Kernels: attention_masked_forward.py, attention_masked_backward.py; tiles: attention_masked_plan.py. The
passes of a mask are launches one after another. A launch picks its configuration from
tuned/attention_masked.json by the GPU, the kind of arithmetic and the head width; of several the plan
takes the one that computes the fewest pairs. Memory beyond q, k, v, o and lse: the plan, once a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _tuned, attention_problem
from ._aot import AotCase
from .attention_masked_backward import attention_masked_dkv_kernel, attention_masked_dq_kernel
from .attention_masked_forward import attention_masked_forward_kernel
from .attention_masked_plan import Launch, Plan, Shape, plan
from .attention_problem import (
    Config,
    aligned,
    compiler_options,
    constexprs,
    kind,
    rising,
    strides,
    writable,
)
from .attention_tiles import LSE_PAD

OP = "attention_masked"
KERNELS = {
    "forward": attention_masked_forward_kernel,
    "dq": attention_masked_dq_kernel,
    "dkv": attention_masked_dkv_kernel,
}
_PLAN_ARGUMENTS = ("rows_ptr", "table_ptr", "columns_ptr", "patterns_ptr", "bits_ptr")

Configs = tuple[Config, ...]


def unsupported(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    rectangles: list[Tensor],  # rows, columns, table, seen by query, the same by key
) -> str | None:
    """Why this backend cannot take these inputs; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, expected 4: [B, T, H, D]"
    if q.shape[0] != k.shape[0]:
        return f"q has {q.shape[0]} clips, k has {k.shape[0]}"
    if len(rectangles) != 8:
        return f"rectangles has {len(rectangles)} tensors, expected 8: by query, then by key"
    if any(x.device.type != "cpu" for x in rectangles):
        return "rectangles lie on a device, expected the CPU: tiles are planned there"
    return attention_problem.unsupported(q, k, v)


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    rectangles: list[Tensor],
    scale: float,
    allow_tf32: bool = False,
    configs: Configs | None = None,
) -> tuple[Tensor, Tensor]:
    """Output o [B, Tq, H, D] and natural log-sum-exp lse [B, H, Tpad] fp32, +inf in its padding.

    A query that sees nothing has o = 0 and lse = +inf. `configs` replace those of the table.
    """
    clips, queries, heads, width = q.shape
    padded = -(-queries // LSE_PAD) * LSE_PAD
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((clips, heads, padded), dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse
    q, scale = rising(q, scale)
    q, k, v = aligned(q), aligned(k), aligned(v)
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    configs = configs or table_configs(capability, "forward", arithmetic, width)
    tiles = plan(rectangles[:4], _shapes("forward", configs), queries, k.shape[1], q.device)
    lse[..., queries:] = float("inf")
    if tiles.idle is not None:
        o.index_fill_(1, tiles.idle, 0.0)
        lse.index_fill_(2, tiles.idle, float("inf"))
    operands = (q, k, v, o, lse)
    steps = [step for x in operands[:4] for step in strides(x)] + [*lse.stride()[:2]]
    with torch.cuda.device_of(q):
        for launch, first, count in _launches(tiles, clips, capability):
            attention_masked_forward_kernel[(launch.tiles * heads * count,)](
                *operands,
                *launch.tensors,
                *steps,
                scale,
                first,
                heads,
                launch.tiles,
                **_options(configs[launch.choice], width, arithmetic),
            )
    return o, lse


def backward(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,  # [B, H, Tpad] fp32
    rectangles: list[Tensor],
    scale: float,
    deterministic: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    allow_tf32: bool = False,
    dq_configs: Configs | None = None,
    dkv_configs: Configs | None = None,
) -> None:
    """Write the gradients into dq, dk, dv.

    Both values of `deterministic` run the same launches: there are no atomics to allow.
    """
    clips, queries, heads, width = q.shape
    keys = k.shape[1]
    if not clips or not heads:
        return
    q, k, v, o, do = aligned(q), aligned(k), aligned(v), aligned(o), aligned(do)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    dq_configs = dq_configs or table_configs(capability, "dq", arithmetic, width)
    dkv_configs = dkv_configs or table_configs(capability, "dkv", arithmetic, width)
    by_query = plan(rectangles[:4], _shapes("dq", dq_configs), queries, keys, q.device)
    by_key = plan(rectangles[4:], _shapes("dkv", dkv_configs), keys, queries, q.device)
    # kernels write rows that start on 16-element boundaries; other outputs get them by a copy
    results = []
    for out, idle in ((dq, by_query.idle), (dk, by_key.idle), (dv, by_key.idle)):
        written = writable(out, q.dtype)
        if idle is not None:
            written.index_fill_(1, idle, 0.0)
        results.append((out, written))
    (_, dq_out), (_, dk_out), (_, dv_out) = results
    scratch = lse.stride()[:2]
    with torch.cuda.device_of(q):
        for name, tiles, configs, inputs, outputs in (
            ("dq", by_query, dq_configs, (q, k, v, o, do), (dq_out,)),
            ("dkv", by_key, dkv_configs, (q, k, v, do), (dk_out, dv_out)),
        ):
            steps = [step for x in (*inputs, *outputs) for step in strides(x)]
            for launch, first, count in _launches(tiles, clips, capability):
                KERNELS[name][(launch.tiles * heads * count,)](
                    *inputs,
                    lse,
                    delta,
                    *outputs,
                    *launch.tensors,
                    *steps,
                    *scratch,
                    scale,
                    first,
                    heads,
                    launch.tiles,
                    **_options(configs[launch.choice], width, arithmetic),
                )
    for out, written in results:
        if written is not out:
            out.copy_(written)


def table_configs(capability: int, kernel: str, arithmetic: str, width: int) -> Configs:
    """Configurations of one kernel in the order of the table, largest tile first."""
    return attention_problem.table_configs(capability, kernel, arithmetic, width, OP)


@functools.cache
def _shapes(kernel: str, configs: Configs) -> tuple[Shape, ...]:
    """Rows and columns of the tiles of each configuration: the dkv kernel owns keys."""
    tiles = [(config.block_m, config.block_n) for config in configs]
    return tuple(Shape(n, m) if kernel == "dkv" else Shape(m, n) for m, n in tiles)


def _launches(tiles: Plan, clips: int, capability: int) -> Iterator[tuple[Launch, int, int]]:
    """Launches in their order, each with its first clip and how many clips it takes.

    Between the passes of one run of clips their tensors stay in the L2 cache; the table says how many
    clips make a run, 0 for all of them.
    """
    step = _tuned.configs(OP, capability)["clips_per_launch"] or clips
    for first in range(0, clips, step):
        for launch in tiles.launches:
            yield launch, first, min(step, clips - first)


def _options(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    return {**_constexprs(config, width, arithmetic), **compiler_options(config)}


def _constexprs(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    # tokens are gathered: no descriptor could bring them
    constants = constexprs(config, width, arithmetic)
    del constants["TMA"]
    return constants


def aot_cases(arch: int) -> list[AotCase]:
    """Every specialisation that a launch on `arch` can ask for."""
    cases = []
    for kernel in KERNELS:
        for arithmetic, widths in _tuned.configs(OP, arch)[kernel].items():
            dtypes = ("bf16", "fp16") if arithmetic == "16bit" else ("fp32",)
            for width in map(int, widths):
                for config in table_configs(arch, kernel, arithmetic, width):
                    for dtype in dtypes:
                        if dtype == "bf16" and arch < 80:
                            continue
                        cases.append(_case(kernel, dtype, arithmetic, width, config, arch))
    return cases


def _case(
    kernel: str, dtype: str, arithmetic: str, width: int, config: Config, arch: int
) -> AotCase:
    fn = KERNELS[kernel]
    constexprs = _constexprs(config, width, arithmetic)
    signature = {}
    for name in fn.arg_names:
        if name in constexprs:
            continue
        if name in _PLAN_ARGUMENTS:
            signature[name] = "*i32"
        elif name in ("lse_ptr", "delta_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name.startswith("stride_"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return AotCase(
        name=f"{kernel}-{arithmetic if dtype == 'fp32' else dtype}-d{width}-{config.name}",
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(name for name in signature if name.endswith("_ptr") or "stride_" in name),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expect=_expected(kernel, arithmetic, config, arch),
        # the models have heads of 64, and one 16-bit type and one GPU a family stand for all
        twin=width != 64 or (dtype == "fp16" and arch >= 80) or arch in (89, 120),
        maxnreg=config.maxnreg,
    )


def _expected(kernel: str, arithmetic: str, config: Config, arch: int) -> tuple[str, ...]:
    """Instructions without which the kernel would not be what the table promises."""
    if arithmetic == "f32" or arch < 80:
        return ()
    rows = _shapes(kernel, (config,))[0].rows
    matrix = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma") if rows >= 64 else "mma"
    return (matrix,)
