"""One small forward and backward of every op against float64, with a digest of the bits it gave.

The quickest answer to "do the kernels run here at all". Run twice with two assemblers (ptxas), the digests tell
whether both made the same program of the same PTX: ptxas 12.8 and some of 13.0 are known not to on Hopper.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_fast.equivalence import cases, cases_fp8, run_log_mel, run_ops
from ast_fast.equivalence.report import Row as CheckRow

from .case import DTYPES, Settings
from .peers import need

Check = Callable[[torch.device, torch.dtype, str, dict[str, Tensor]], list[CheckRow]]
_SECONDS = 1.0


def _of(case: cases.OpCase) -> Check:
    def run(
        device: torch.device, dtype: torch.dtype, backend: str, keep: dict[str, Tensor]
    ) -> list[CheckRow]:
        return run_ops.run_op_case(case, device, dtype, backend, keep=keep)

    return run


def _log_mel(
    device: torch.device, dtype: torch.dtype, backend: str, keep: dict[str, Tensor]
) -> list[CheckRow]:
    signal = run_log_mel.LogMelCase(run_log_mel.voice)
    return [
        *run_log_mel.run_log_mel_case(signal, device, _SECONDS, backend, keep),
        *run_log_mel.run_log_mel_gradient(device, _SECONDS, backend, keep),
    ]


def _one_pass() -> cases.OpCase:
    """Attention whose gradients may be added up in any order."""
    exact = cases.attention(2, 146, 2)
    ops = need("ast_fast.ops")
    return dataclasses.replace(
        exact,
        op="attention_one_pass",
        ours=lambda t: {"o": ops.attention(t["q"], t["k"], t["v"], deterministic=False)},
    )


def _gemm(kind: str) -> cases.OpCase:
    """One of the products with a fused epilogue, whatever the table says of its use."""
    rows, width, out = 202, 192, 256
    wide = out if kind == "gelu_backward" else width

    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        made = {
            "a": cases.normal(generator, rows, wide),
            "w": cases.normal(generator, out, width) * width**-0.5,
            "bias": cases.normal(generator, out),
        }
        extra = {"residual": out, "gelu_backward": width}.get(kind)
        return made | ({"extra": cases.normal(generator, rows, extra)} if extra else {})

    def ours(t: dict[str, Tensor]) -> dict[str, Tensor]:
        gemm = need("ast_fast.kernels.gemm")
        if kind == "gelu_backward":
            return dict(zip(("dh", "g", "sums"), gemm.gelu_backward(*_three(t)), strict=True))
        if kind == "gelu":
            g, h = gemm.linear_gelu(t["a"], t["w"], t["bias"], True)
            return {"g": g, "h": h}
        if kind == "residual":
            return {"y": gemm.linear_residual(t["a"], t["w"], t["bias"], t["extra"])}
        return {"y": gemm.linear(t["a"], t["w"], t["bias"])}

    def simple(t: dict[str, Tensor]) -> dict[str, Tensor]:
        if kind == "gelu_backward":
            dg = t["a"] @ t["w"]
            dh = torch.ops.aten.gelu_backward(dg, t["extra"])
            return {"dh": dh, "g": F.gelu(t["extra"]), "sums": dh.sum(0)}
        h = F.linear(t["a"], t["w"], t["bias"])
        if kind == "gelu":
            return {"g": F.gelu(h), "h": h}
        return {"y": h + t["extra"] if kind == "residual" else h}

    outputs = {"gelu": ("g", "h"), "gelu_backward": ("dh", "g", "sums")}.get(kind, ("y",))
    return cases.OpCase(
        op=f"gemm_{kind}",
        shape=f"{rows}x{width}x{out}",
        inputs=inputs,
        ours=ours,
        plain=simple,
        oracle=simple,
        kinds=dict.fromkeys(outputs, "product"),
        inference=True,
    )


def _three(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return t["a"], t["w"], t["extra"]


@functools.cache
def checks(backend: str) -> dict[str, Check]:
    """Every op by name; FP8 has no C++ kernels, and fused products exist as Triton kernels only."""
    listed = [
        cases.attention_qkv(2, 146, 3),
        cases.attention(3, 146, 2, lengths=[146, 77, 1]),
        _one_pass(),
        cases.attention_varlen([146, 74, 1], 2),
        cases.attention_masked(1, (12, 12), 2),
        cases.attention_biased(2, 129, 2),
        cases.layer_norm(202, 768),
        cases.add_layer_norm(202, 768),
        cases.mlp(202, 192),
        cases.patch_embed(2, 128, 192),
    ]
    if backend != "cpp":
        listed += cases_fp8.fp8_cases(full=False)
    if backend == "triton":
        listed += [_gemm(kind) for kind in ("linear", "residual", "gelu", "gelu_backward")]
    found = {case.op: _of(case) for case in listed}
    return {**found, "log_mel": _log_mel}


def digest(tensor: Tensor) -> str:
    """The bits of a tensor in 16 hexadecimal digits."""
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def run(name: str, settings: Settings, dtype: str) -> tuple[list[CheckRow], dict[str, str]]:
    """Rows of one op, and the digest of each of our results that should come out the same again."""
    keep: dict[str, Tensor] = {}
    device = torch.device(settings.device)
    rows = checks(settings.backend)[name](device, DTYPES[dtype], settings.backend, keep)
    if name == "attention_one_pass":
        keep = {}  # sums by atomics come out differently each time
    return rows, {key: digest(tensor) for key, tensor in keep.items()}


def differences(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Names of results whose bits are not those of before."""
    return sorted(name for name, bits in now.items() if before.get(name, bits) != bits)
