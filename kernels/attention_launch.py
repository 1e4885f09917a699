"""Host side of the attention kernels, shared by dense and packed attention.

`Problem` (attention_problem.py) says how rows belong to clips; everything else is the same for both.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import _tuned
from .attention_backward import attention_dkv_kernel, attention_dq_kernel
from .attention_forward import attention_forward_kernel
from .attention_one_pass_launch import one_pass, one_pass_choice
from .attention_problem import (
    OP,
    WIDTHS,
    BackwardTensors,
    Config,
    Problem,
    aligned,
    choose,
    clip_arguments,
    describable,
    descriptor,
    is_aligned,
    kind,
    options,
    rising,
    scratch_strides,
    strides,
    table_configs,
    unsupported,
    writable,
)
from .attention_tile_list import Grids

__all__ = [
    "KERNELS",
    "OP",
    "WIDTHS",
    "Config",
    "Problem",
    "aligned",
    "backward",
    "choose",
    "describable",
    "descriptor",
    "forward",
    "is_aligned",
    "kind",
    "strides",
    "table_configs",
    "unsupported",
]

KERNELS = {
    "forward": attention_forward_kernel,
    "dq": attention_dq_kernel,
    "dkv": attention_dkv_kernel,
}


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    allow_tf32: bool,
    config: Config | None = None,
    key_bias: Tensor | None = None,
) -> None:
    """Write o and lse; `config` replaces the choice from the table.

    `key_bias`, [B, Tk] float32 and contiguous, is added to the scores of dense clips: without it the
    kernel has no such argument.
    """
    q, scale = rising(q, scale)
    q, k, v = aligned(q), aligned(k), aligned(v)
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    config = config or choose(
        table_configs(capability, "forward", arithmetic, problem.width),
        describable(k) and describable(v),
        problem.queries,
        problem.pairs,
        _tuned.sm_count(q.device),
    )
    block_d = triton.next_power_of_2(problem.width)
    with torch.cuda.device_of(q):
        grid = Grids(problem, lse, (o, lse)).over_queries(config.block_m)
        attention_forward_kernel[(grid.programs,)](
            q,
            descriptor(k, config.block_n, block_d) if config.tma else k,
            descriptor(v, config.block_n, block_d) if config.tma else v,
            o,
            lse,
            *clip_arguments(problem, lse),
            grid.tile_list,
            key_bias,
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(o),
            *scratch_strides(lse),
            scale,
            int(problem.packed),
            int(problem.k_lengths is not None),
            problem.q_length,
            problem.k_length,
            problem.heads,
            grid.tiles,
            problem.clips,
            problem.lse_end,
            **options(config, problem.width, arithmetic),
        )


def backward(
    problem: Problem,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    allow_tf32: bool,
    dq_config: Config | None = None,
    dkv_config: Config | None = None,
    deterministic: bool = True,
    one_pass_config: Config | None = None,
) -> None:
    """Write dq, dk, dv; the configurations replace the choice from the table.

    One pass is taken only if the caller does not need the same bits twice, and either gives its
    configuration or has a GPU whose table has one.
    """
    if deterministic and one_pass_config is not None:
        raise ValueError(
            "one_pass_config was given together with deterministic=True: the one-pass backward adds in "
            "whatever order programs run; pass deterministic=False or no configuration"
        )
    q, k, v, o, do = aligned(q), aligned(k), aligned(v), aligned(o), aligned(do)
    # kernels write rows that start on 16-element boundaries; other outputs get them by a copy
    results = [(out, writable(out, q.dtype, problem.packed)) for out in (dq, dk, dv)]
    tensors = BackwardTensors(do, q, k, v, o, lse.contiguous(), *(out for _, out in results))
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    if not deterministic and one_pass_config is None and dq_config is None and dkv_config is None:
        one_pass_config = one_pass_choice(problem, tensors, capability, arithmetic)
    with torch.cuda.device_of(q):
        # without queries or without keys there is nothing to sum
        if one_pass_config is not None and problem.queries and problem.keys:
            one_pass(problem, tensors, scale, arithmetic, one_pass_config)
        else:
            _two_passes(problem, tensors, scale, capability, arithmetic, dq_config, dkv_config)
    for out, written in results:
        if written is not out:
            out.copy_(written)


def _two_passes(
    problem: Problem,
    tensors: BackwardTensors,
    scale: float,
    capability: int,
    arithmetic: str,
    dq_config: Config | None,
    dkv_config: Config | None,
) -> None:
    do, q, k, v, o, lse, dq, dk, dv = tensors
    delta = torch.empty_like(lse)
    sms = _tuned.sm_count(q.device)
    dq_config = dq_config or choose(
        table_configs(capability, "dq", arithmetic, problem.width),
        describable(k) and describable(v),
        problem.queries,
        problem.pairs,
        sms,
    )
    dkv_config = dkv_config or choose(
        table_configs(capability, "dkv", arithmetic, problem.width),
        describable(q) and describable(do),
        problem.keys,
        problem.pairs,
        sms,
    )
    block_d = triton.next_power_of_2(problem.width)
    common = (
        int(problem.packed),
        int(problem.k_lengths is not None),
        problem.q_length,
        problem.k_length,
        problem.heads,
    )
    grids = Grids(problem, lse, (dq, dk, dv))
    if problem.queries:
        grid = grids.over_queries(dq_config.block_m)
        attention_dq_kernel[(grid.programs,)](
            q,
            descriptor(k, dq_config.block_n, block_d) if dq_config.tma else k,
            descriptor(v, dq_config.block_n, block_d) if dq_config.tma else v,
            o,
            do,
            lse,
            delta,
            dq,
            *clip_arguments(problem, lse),
            grid.tile_list,
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(o),
            *strides(do),
            *strides(dq),
            *scratch_strides(lse),
            scale,
            *common,
            grid.tiles,
            **options(dq_config, problem.width, arithmetic),
        )
    if problem.keys:
        grid = grids.over_keys(dkv_config.block_n)
        attention_dkv_kernel[(grid.programs,)](
            descriptor(q, dkv_config.block_m, block_d) if dkv_config.tma else q,
            k,
            v,
            descriptor(do, dkv_config.block_m, block_d) if dkv_config.tma else do,
            lse,
            delta,
            dk,
            dv,
            *clip_arguments(problem, lse),
            grid.tile_list,
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(do),
            *strides(dk),
            *strides(dv),
            *scratch_strides(lse),
            scale,
            *common,
            grid.tiles,
            **options(dkv_config, problem.width, arithmetic),
        )
