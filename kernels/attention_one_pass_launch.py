"""Host side of the one-pass backward: when the table has it, and its three launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tuned
from .attention_one_pass import (
    attention_delta_kernel,
    attention_one_pass_kernel,
    attention_round_kernel,
)
from .attention_problem import (
    BackwardTensors,
    Config,
    Problem,
    choose,
    clip_arguments,
    compiler_options,
    constexprs,
    describable,
    descriptor,
    scratch_strides,
    strides,
    table_configs,
)
from .attention_tile_list import Grids
from .attention_tiles import LSE_PAD

# Elements a program of the small kernels; its rows divide LSE_PAD, so they lie in one clip's padding.
_ELEMENTS = 128 * 64
ROW_WARPS = 8


def one_pass_choice(
    problem: Problem, tensors: BackwardTensors, capability: int, arithmetic: str
) -> Config | None:
    """The table's configuration for this GPU, arithmetic and width; None where it has none."""
    configs = table_configs(capability, "one_pass", arithmetic, problem.width)
    if not configs:
        return None
    return choose(
        configs,
        describable(tensors.q) and describable(tensors.do),
        problem.keys,
        problem.pairs,
        _tuned.sm_count(tensors.q.device),
    )


def one_pass_constexprs(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    """Compile-time arguments of the kernel that owns tiles of keys."""
    constants = constexprs(config, width, arithmetic)
    if constants.pop("CHUNK"):
        raise ValueError(f"{config.name}: the one-pass backward computes scores in one piece")
    return constants | {"REDUCE": config.reduce}


def row_constexprs(width: int) -> dict[str, Any]:
    """Compile-time arguments of the small kernels."""
    block_d = triton.next_power_of_2(width)
    return {"D": width, "BLOCK_D": block_d, "BLOCK_M": min(LSE_PAD, _ELEMENTS // block_d)}


def one_pass(
    problem: Problem, tensors: BackwardTensors, scale: float, arithmetic: str, config: Config
) -> None:
    """Write dq, dk, dv by atomic sums; some query and some key exist, and the device is current."""
    do, q, k, v, o, lse, dq, dk, dv = tensors
    width = problem.width
    block_d = triton.next_power_of_2(width)
    delta = torch.empty_like(lse)
    # a row a column of lse; rows that are nobody's query are never read
    dq_sum = torch.empty((lse.numel(), width), dtype=torch.float32, device=q.device)
    summed = (
        TensorDescriptor(dq_sum, [lse.numel(), width], [width, 1], [config.block_m, block_d])
        if config.reduce and not _tuned.INTERPRETED
        else dq_sum
    )
    indices = clip_arguments(problem, lse)
    grids = Grids(problem, lse, (dq, dk, dv))
    small = {**row_constexprs(width), "num_warps": ROW_WARPS, "num_stages": 1}
    rows = grids.over_queries(small["BLOCK_M"])
    # the same for the small kernels, but for scale
    layout = (int(problem.packed), problem.q_length, problem.heads, rows.tiles)
    attention_delta_kernel[(rows.programs,)](
        o,
        do,
        delta,
        dq_sum,
        indices[0],
        rows.tile_list,
        *strides(o),
        *strides(do),
        *scratch_strides(lse),
        *layout,
        **small,
    )
    keys = grids.over_keys(config.block_n)
    attention_one_pass_kernel[(keys.programs,)](
        descriptor(q, config.block_m, block_d) if config.tma else q,
        k,
        v,
        descriptor(do, config.block_m, block_d) if config.tma else do,
        lse,
        delta,
        summed,
        dk,
        dv,
        *indices,
        keys.tile_list,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(do),
        *strides(dk),
        *strides(dv),
        *scratch_strides(lse),
        scale,
        int(problem.packed),
        int(problem.k_lengths is not None),
        problem.q_length,
        problem.k_length,
        problem.heads,
        keys.tiles,
        **one_pass_constexprs(config, width, arithmetic),
        **compiler_options(config),
    )
    attention_round_kernel[(rows.programs,)](
        dq_sum,
        dq,
        indices[0],
        rows.tile_list,
        *strides(dq),
        *scratch_strides(lse),
        scale,
        *layout,
        **small,
    )
