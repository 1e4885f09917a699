"""What the compile gate builds of the FP8 kernels."""

from __future__ import annotations

import torch

from . import _tuned
from ._aot import AotCase
from ._launch import DTYPE_NAMES, next_power_of_2
from .fp8 import OLDEST, norm_rows
from .fp8_kernels import (
    bound_kernel,
    facts_kernel,
    gelu_backward_kernel,
    norm_quantise_kernel,
    quantise_kernel,
)


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration tuned for `arch` in the dtypes it serves; none where FP8 is missing."""
    if arch < OLDEST:
        return []
    cases = []
    for dtype, name in DTYPE_NAMES.items():
        cases += _tile_cases(name, arch, twin=dtype == torch.float16)
        cases += _norm_cases(dtype, arch, twin=dtype == torch.float16)
    return cases


def _case(
    name: str,
    fn: object,
    signature: dict[str, str],
    constexprs: dict[str, object],
    indivisible: tuple[str, ...],
    warps: int,
    twin: bool,
) -> AotCase:
    divisible = tuple(n for n, t in signature.items() if n not in indivisible and t != "fp32")
    return AotCase(name, fn, signature, constexprs, divisible, warps, twin=twin)


def _tile_cases(name: str, arch: int, twin: bool) -> list[AotCase]:
    tuned, cases = _tuned.configs("fp8", arch), []
    tile = tuned["facts"]
    cases.append(
        _case(
            f"facts-{name}",
            facts_kernel,
            {"x_ptr": f"*{name}", "facts_ptr": "*fp32"}
            | dict.fromkeys(("num_rows", "num_cols", "stride_xr"), "i32"),
            {"BLOCK_R": tile["rows"], "BLOCK_C": tile["cols"]},
            ("num_rows",),
            tile["warps"],
            twin,
        )
    )
    for has_bias in (False, True):
        signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "bound_ptr": "*fp32", "factor": "fp32"}
        signature |= dict.fromkeys(("num_a", "num_b", "num_bias"), "i32")
        signature |= {"bias_ptr": f"*{name}"} if has_bias else {}
        constexprs: dict[str, object] = {"BLOCK": 1024}
        constexprs |= {} if has_bias else {"bias_ptr": None}
        cases.append(
            _case(
                f"bound-{name}-{'bias' if has_bias else 'plain'}",
                bound_kernel,
                signature,
                constexprs,
                ("num_a", "num_b", "num_bias"),
                4,
                twin,
            )
        )
    for gradient, columns, sums, gelu in (
        (False, False, False, False),
        (False, True, False, False),
        (False, False, False, True),
        (True, True, True, False),
        (True, False, False, False),
    ):
        tile = tuned["gelu" if gelu else "quantise"]
        block = {"BLOCK_R": tile["rows"], "BLOCK_C": tile["cols"], "BY_HAND": False}
        kind = "fp8e5" if gradient else "fp8e4nv"
        signature = {"x_ptr": f"*{name}", "rows_ptr": f"*{kind}", "columns_ptr": f"*{kind}"}
        signature |= {"bound_ptr": "*fp32", "inverse_ptr": "*fp32", "partial_ptr": "*fp32"}
        integers = ("num_rows", "num_cols", "padded_rows", "num_partials", "stride_xr")
        signature |= dict.fromkeys(integers, "i32")
        constexprs = {"E5M2": gradient, "GELU": gelu, **block}
        for present, argument in ((columns, "columns_ptr"), (sums, "partial_ptr")):
            if not present:
                constexprs[argument] = signature.pop(argument) and None
        words = [
            kind,
            *(w for w, on in (("columns", columns), ("sums", sums), ("gelu", gelu)) if on),
        ]
        cases.append(
            _case(
                f"quantise-{name}-{'-'.join(words)}",
                quantise_kernel,
                signature,
                constexprs,
                ("num_rows", "num_partials"),
                tile["warps"],
                twin,
            )
        )
    tile = tuned["gelu_backward"]
    signature = {"dg_ptr": f"*{name}", "h_ptr": f"*{name}"}
    signature |= {"dh_rows_ptr": "*fp8e5", "dh_columns_ptr": "*fp8e5", "g_columns_ptr": "*fp8e4nv"}
    pointers = ("dh_bound_ptr", "g_bound_ptr", "inverse_ptr", "partial_ptr")
    signature |= dict.fromkeys(pointers, "*fp32")
    integers = ("num_rows", "num_cols", "padded_rows", "stride_dgr", "stride_hr")
    signature |= dict.fromkeys(integers, "i32")
    cases.append(
        _case(
            f"gelu-backward-{name}",
            gelu_backward_kernel,
            signature,
            {"BLOCK_R": tile["rows"], "BLOCK_C": tile["cols"], "BY_HAND": False},
            ("num_rows",),
            tile["warps"],
            twin,
        )
    )
    return cases


def _norm_cases(dtype: torch.dtype, arch: int, twin: bool) -> list[AotCase]:
    cases, name = [], DTYPE_NAMES[dtype]
    widths = {256: 192, 512: 384, 1024: 768}
    for entry in _tuned.configs("fp8", arch)["norm"]:
        width = widths.get(entry["max_width"], entry["max_width"])
        # autocast: a 16-bit update meets a float32 stream; everywhere else all are of one dtype
        for stream in dict.fromkeys((name, "fp32")) if width == 768 else (name,):
            for columns in (False, True):
                signature = {"x_ptr": f"*{name}", "residual_ptr": f"*{stream}"}
                signature |= {"weight_ptr": f"*{stream}", "bias_ptr": f"*{stream}"}
                signature |= {"total_ptr": f"*{stream}", "rows_ptr": "*fp8e4nv"}
                pointers = ("mean_ptr", "rstd_ptr", "facts_ptr", "inverse_ptr", "eps")
                signature |= dict.fromkeys(pointers, "*fp32") | {"eps": "fp32"}
                integers = ("num_rows", "padded_rows", "stride_xr", "stride_residualr")
                signature |= dict.fromkeys(integers, "i32")
                constexprs: dict[str, object] = {
                    "C": width,
                    "BLOCK_R": norm_rows(entry, dtype),
                    "BLOCK_C": next_power_of_2(width),
                    "BY_HAND": False,
                }
                if columns:
                    signature["columns_ptr"] = "*fp8e4nv"
                else:
                    constexprs["columns_ptr"] = None
                cases.append(
                    _case(
                        f"norm-{width}-{name}-{stream}-{'columns' if columns else 'rows'}",
                        norm_quantise_kernel,
                        signature,
                        constexprs,
                        ("num_rows",),
                        entry["warps"],
                        twin,
                    )
                )
    return cases
