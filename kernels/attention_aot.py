"""The attention kernels' list for the compile gate: every specialisation that a launch can ask for."""

from __future__ import annotations

from typing import Any

from . import _tuned, attention_tile_list
from ._aot import AotCase
from .attention_launch import KERNELS
from .attention_one_pass import (
    attention_delta_kernel,
    attention_one_pass_kernel,
    attention_round_kernel,
)
from .attention_one_pass_launch import ROW_WARPS, one_pass_constexprs, row_constexprs
from .attention_problem import OP, Config, constexprs, table_configs

# the small kernels around the one-pass backward
ROW_KERNELS = {"delta": attention_delta_kernel, "round": attention_round_kernel}

_FP32 = ("lse_ptr", "delta_ptr", "dq_sum", "key_bias")
_UNALIGNED = ("key_bias",)
_INDICES = ("q_starts", "k_starts", "k_lengths", "tile_list")


def aot_cases(arch: int) -> list[AotCase]:
    """Every specialisation that a launch on `arch` can ask for."""
    cases = [_tile_list_case()]
    summed = set()
    for kernel in (*KERNELS, "one_pass"):
        for arithmetic, widths in _tuned.configs(OP, arch).get(kernel, {}).items():
            for width in widths:
                for config in table_configs(arch, kernel, arithmetic, int(width)):
                    for dtype in dtypes(arithmetic, arch):
                        cases.append(
                            config_case(kernel, dtype, arithmetic, int(width), config, arch)
                        )
                        if kernel == "one_pass":
                            summed.add((dtype, int(width)))
    for dtype, width in sorted(summed):
        cases += (_row_case(name, dtype, width, arch) for name in ROW_KERNELS)
    return cases


def dtypes(arithmetic: str, arch: int) -> tuple[str, ...]:
    """Types that a kind of arithmetic is compiled for."""
    if arithmetic != "16bit":
        return ("fp32",)
    return ("fp16", "bf16") if arch >= 80 else ("fp16",)


def _tile_list_case() -> AotCase:
    numbers = range(attention_tile_list.RESULTS)
    return AotCase(
        name="tile_list",
        fn=attention_tile_list.attention_tile_list_kernel,
        signature=dict.fromkeys(("list_ptr", "starts_ptr", "walked_ptr"), "*i32")
        | dict.fromkeys((f"result_{i}" for i in numbers), "*i16")
        | dict.fromkeys((f"halves_{i}" for i in numbers), "i64")
        | dict.fromkeys(("rows", "walked_rows", "clips", "block", "entries"), "i32"),
        constexprs={"STEP": attention_tile_list.CLIPS_A_STEP},
        divisible=("list_ptr",),
        num_warps=attention_tile_list.NUM_WARPS,
        num_stages=1,
    )


def config_case(
    kernel: str,
    dtype: str,
    arithmetic: str,
    width: int,
    config: Config,
    arch: int,
    biased: bool = False,
) -> AotCase:
    """One configuration of one kernel, whether the table holds it or not."""
    one_pass = kernel == "one_pass"
    fn = attention_one_pass_kernel if one_pass else KERNELS[kernel]
    constants = (one_pass_constexprs if one_pass else constexprs)(config, width, arithmetic)
    if kernel == "forward" and not biased:
        constants["key_bias"] = None
    rows = config.block_n if kernel in ("forward", "dq") else config.block_m
    box = f"tensordesc<{dtype}[1, {rows}, 1, {constants['BLOCK_D']}]>"
    signature = _signature(fn.arg_names, constants, dtype, box if config.tma else f"*{dtype}")
    if config.reduce:
        signature["dq_sum"] = f"tensordesc<fp32[{config.block_m}, {constants['BLOCK_D']}]>"
    return AotCase(
        name=f"{'biased-' if biased else ''}{kernel}-{arithmetic if dtype == 'fp32' else dtype}-d{width}-{config.name}",
        fn=fn,
        signature=signature,
        constexprs=constants,
        divisible=_divisible(signature),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expect=_expected(arithmetic, config, arch),
        # of the form with a bias, the models' width stands for the others
        twin=(biased and width != 64) or _is_twin(dtype, width, arch),
        maxnreg=config.maxnreg,
    )


def _row_case(kernel: str, dtype: str, width: int, arch: int) -> AotCase:
    """One of the small kernels around the one-pass backward."""
    fn = ROW_KERNELS[kernel]
    constants = row_constexprs(width)
    signature = _signature(fn.arg_names, constants, dtype, f"*{dtype}")
    return AotCase(
        name=f"{kernel}-{dtype}-d{width}",
        fn=fn,
        signature=signature,
        constexprs=constants,
        divisible=_divisible(signature),
        num_warps=ROW_WARPS,
        num_stages=1,
        twin=_is_twin(dtype, width, arch),
    )


def _is_twin(dtype: str, width: int, arch: int) -> bool:
    """The models have heads of 64; for other widths one 16-bit type and one GPU a family stand for all."""
    return width != 64 and ((dtype == "fp16" and arch >= 80) or arch in (89, 120))


def _signature(
    names: list[str], constants: dict[str, Any], dtype: str, source: str
) -> dict[str, str]:
    """Types of the arguments, told from their names; `source` is what tiles are streamed from."""
    signature = {}
    for name in names:
        if name in constants:
            continue
        if name.endswith("_source"):
            signature[name] = source
        elif name in _FP32:
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name in _INDICES:
            signature[name] = "*i32"
        elif name.startswith("stride_"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return signature


def _divisible(signature: dict[str, str]) -> tuple[str, ...]:
    """Arguments that every launch makes multiples of 16."""
    return tuple(
        name
        for name, spelled in signature.items()
        if name.startswith("stride_") or (spelled[0] == "*" and name not in _INDICES + _UNALIGNED)
    )


def _expected(arithmetic: str, config: Config, arch: int) -> tuple[str, ...]:
    """Instructions without which the kernel would not be what the table promises."""
    if arithmetic == "f32" or arch < 80:
        return ()
    matrix = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma")
    extra = [("tma", config.tma), ("tma reduction", config.reduce)]
    return (matrix, *(name for name, used in extra if used))
