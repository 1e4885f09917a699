"""Host side of the attention kernels, shared by dense and packed attention.

`Problem` says how rows belong to clips; everything else is the same for both. A launch picks its
configuration from tuned/attention.json by the GPU, the kind of arithmetic and the head width alone,
with two exceptions stated there: operands that a tensor-map descriptor cannot describe take the
pointer configuration, and a grid too small to fill the GPU takes the smaller tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tuned
from ._aot import AotCase
from .attention_backward import attention_dkv_kernel, attention_dq_kernel
from .attention_forward import attention_forward_kernel

OP = "attention"
WIDTHS: tuple[int, ...] = (32, 64, 96, 128)
KERNELS = {
    "forward": attention_forward_kernel,
    "dq": attention_dq_kernel,
    "dkv": attention_dkv_kernel,
}
_TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Strides and addresses are multiples of this many elements and bytes, or the operand is copied:
# one specialisation of a kernel then serves every layout, with 16-byte loads.
_ALIGNMENT = 16

# A scale that makes every score 0 as surely as 0 does.
_SMALLEST_SCALE = 1e-30


class Config(NamedTuple):
    """One compiled form of a kernel."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int
    chunk: int = 0  # columns of a score product done at a time; 0 is all
    tma: bool = False  # operands of the loop come through tensor-map descriptors

    @property
    def name(self) -> str:
        """Short name for test ids: 128x64w8s3-tma."""
        chunk = f"c{self.chunk}" if self.chunk else ""
        tma = "-tma" if self.tma else ""
        return f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}{chunk}{tma}"


class Problem(NamedTuple):
    """How the rows of q and of k belong to clips."""

    clips: int
    heads: int
    width: int
    max_queries: int  # of any clip
    max_keys: int
    q_length: int  # rows of a dense clip; 0 when packed
    k_length: int
    lse_end: int  # end of the lse columns of the last clip
    q_starts: Tensor | None = None  # [B+1] int32, packed only
    k_starts: Tensor | None = None
    k_lengths: Tensor | None = None  # [B] int32, dense only

    @property
    def packed(self) -> bool:
        """Whether clips follow one another in one run of rows."""
        return self.q_starts is not None


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels cannot take q, k, v [..., H, D]; None when they can."""
    if q.dtype not in _TRITON_TYPES:
        return f"dtype {q.dtype} is not one of float32, float16, bfloat16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k, v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    if k.shape[-2:] != q.shape[-2:] or v.shape != k.shape:
        return f"shapes do not match: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.shape[-1] not in WIDTHS:
        return f"head width {q.shape[-1]} is not one of {WIDTHS}"
    if k.device != q.device or v.device != q.device:
        return f"q, k, v are on different devices: {q.device}, {k.device}, {v.device}"
    if _tuned.INTERPRETED:
        return "the interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if not q.is_cuda:
        return f"tensors are on {q.device}, Triton needs CUDA"
    capability = _tuned.capability(q.device)
    if _tuned.family(OP, capability) is None:
        return f"compute capability {capability / 10:.1f} is older than 7.5"
    if q.dtype == torch.bfloat16 and capability < 80:
        return f"bfloat16 needs compute capability 8.0, this GPU has {capability / 10:.1f}"
    return None


def kind(dtype: torch.dtype, allow_tf32: bool, capability: int) -> str:
    """Kind of arithmetic, a key of the tuned table."""
    if dtype != torch.float32:
        return "16bit"
    return "tf32" if allow_tf32 and capability >= 80 else "f32"


@functools.cache
def table_configs(capability: int, kernel: str, arithmetic: str, width: int) -> tuple[Config, ...]:
    """Configurations of one kernel in the order of the table, largest tile first."""
    entries = _tuned.configs(OP, capability)[kernel][arithmetic][str(width)]
    return tuple(Config(**entry) for entry in entries)


def choose(
    configs: tuple[Config, ...], describable: bool, rows: int, pairs: int, sms: int
) -> Config:
    """The configuration for a grid over `rows` query or key rows of `pairs` clip-head pairs."""
    usable = [config for config in configs if config.tma] if describable else []
    usable = usable or [config for config in configs if not config.tma]
    for config in usable:
        if -(-rows // config.block_m) * pairs >= sms:
            return config
    return usable[-1]


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its layout does not suit 16-byte loads."""
    if is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def is_aligned(x: Tensor) -> bool:
    """Whether rows are contiguous and every row starts on a 16-element boundary."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % _ALIGNMENT == 0
        and all(step % _ALIGNMENT == 0 for step in strides(x))
    )


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of clip, row and head of x [B, T, H, D] or packed [N, H, D], whose clip stride is 0."""
    steps = [step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True)][:-1]
    return (0, *steps) if x.dim() == 3 else tuple(steps)


def describable(x: Tensor) -> bool:
    """Whether a tensor map can describe x: nothing is empty or expanded."""
    return x.numel() > 0 and all(
        step > 0 or size == 1 for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    )


def descriptor(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """Descriptor of x as [B, T, H, D] (B is 1 when packed) with tiles of `rows` rows of one head."""
    if not describable(x):
        raise ValueError(f"shape {list(x.shape)}, strides {x.stride()} suit no tensor map")
    shape = [1] * (4 - x.dim()) + list(x.shape)
    # a dimension of one element still needs a stride that a tensor map can hold
    steps = [step or x.shape[-1] for step in strides(x)]
    return TensorDescriptor(x, shape, [*steps, 1], [1, rows, 1, block_d])


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
) -> None:
    """Write o and lse; `config` replaces the choice from the table."""
    if scale < 0:
        # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    # it masks before it scales too, and -inf times 0 is NaN
    scale = max(scale, _SMALLEST_SCALE)
    q, k, v = aligned(q), aligned(k), aligned(v)
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    config = config or choose(
        table_configs(capability, "forward", arithmetic, problem.width),
        describable(k) and describable(v),
        problem.max_queries,
        problem.clips * problem.heads,
        _tuned.sm_count(q.device),
    )
    tiles = triton.cdiv(problem.max_queries, config.block_m)
    block_d = triton.next_power_of_2(problem.width)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(tiles * problem.heads * problem.clips,)](
            q,
            descriptor(k, config.block_n, block_d) if config.tma else k,
            descriptor(v, config.block_n, block_d) if config.tma else v,
            o,
            lse,
            *_clip_arguments(problem, lse),
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(o),
            *_scratch_strides(lse),
            scale,
            int(problem.packed),
            int(problem.k_lengths is not None),
            problem.q_length,
            problem.k_length,
            problem.heads,
            tiles,
            problem.clips,
            problem.lse_end,
            **_options(config, problem.width, arithmetic),
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
) -> None:
    """Write dq, dk, dv; the configurations replace the choice from the table."""
    q, k, v, o, do = aligned(q), aligned(k), aligned(v), aligned(o), aligned(do)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    capability = _tuned.capability(q.device)
    arithmetic = kind(q.dtype, allow_tf32, capability)
    sms = _tuned.sm_count(q.device)
    pairs = problem.clips * problem.heads
    dq_config = dq_config or choose(
        table_configs(capability, "dq", arithmetic, problem.width),
        describable(k) and describable(v),
        problem.max_queries,
        pairs,
        sms,
    )
    dkv_config = dkv_config or choose(
        table_configs(capability, "dkv", arithmetic, problem.width),
        describable(q) and describable(do),
        problem.max_keys,
        pairs,
        sms,
    )
    block_d = triton.next_power_of_2(problem.width)
    # kernels write rows that start on 16-element boundaries; other outputs get them by a copy
    results = []
    for out in (dq, dk, dv):
        direct = out.dtype == q.dtype and is_aligned(out)
        written = out if direct else torch.empty(out.shape, dtype=q.dtype, device=out.device)
        results.append((out, written))
    (_, dq_out), (_, dk_out), (_, dv_out) = results
    common = (
        int(problem.packed),
        int(problem.k_lengths is not None),
        problem.q_length,
        problem.k_length,
        problem.heads,
    )
    with torch.cuda.device_of(q):
        if problem.max_queries:
            tiles = triton.cdiv(problem.max_queries, dq_config.block_m)
            attention_dq_kernel[(tiles * pairs,)](
                q,
                descriptor(k, dq_config.block_n, block_d) if dq_config.tma else k,
                descriptor(v, dq_config.block_n, block_d) if dq_config.tma else v,
                o,
                do,
                lse,
                delta,
                dq_out,
                *_clip_arguments(problem, lse),
                *strides(q),
                *strides(k),
                *strides(v),
                *strides(o),
                *strides(do),
                *strides(dq_out),
                *_scratch_strides(lse),
                scale,
                *common,
                tiles,
                **_options(dq_config, problem.width, arithmetic),
            )
        if problem.max_keys:
            tiles = triton.cdiv(problem.max_keys, dkv_config.block_n)
            attention_dkv_kernel[(tiles * pairs,)](
                descriptor(q, dkv_config.block_m, block_d) if dkv_config.tma else q,
                k,
                v,
                descriptor(do, dkv_config.block_m, block_d) if dkv_config.tma else do,
                lse,
                delta,
                dk_out,
                dv_out,
                *_clip_arguments(problem, lse),
                *strides(q),
                *strides(k),
                *strides(v),
                *strides(do),
                *strides(dk_out),
                *strides(dv_out),
                *_scratch_strides(lse),
                scale,
                *common,
                tiles,
                **_options(dkv_config, problem.width, arithmetic),
            )
    for out, written in results:
        if written is not out:
            out.copy_(written)


def _clip_arguments(problem: Problem, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index tensors; one that is not read still has to be an int32 pointer."""
    unread = lse.view(torch.int32)
    given = (problem.q_starts, problem.k_starts, problem.k_lengths)
    return tuple(unread if x is None else x.contiguous() for x in given)


def _scratch_strides(lse: Tensor) -> tuple[int, int]:
    """Strides of clip and head of lse [B, H, Tpad] or packed [H, Npad]."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def _options(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    return {
        **_constexprs(config, width, arithmetic),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _constexprs(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    return {
        "D": width,
        "BLOCK_D": triton.next_power_of_2(width),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": config.chunk,
        # 16-bit products are exact in fp32 either way; one name keeps one specialisation
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        "TMA": config.tma,
    }


def aot_cases(arch: int) -> list[AotCase]:
    """Every specialisation that a launch on `arch` can ask for."""
    cases = []
    for kernel in KERNELS:
        for arithmetic, widths in _tuned.configs(OP, arch)[kernel].items():
            dtypes = ("fp16", "bf16") if arithmetic == "16bit" else ("fp32",)
            for width in widths:
                for config in table_configs(arch, kernel, arithmetic, int(width)):
                    for dtype in dtypes:
                        if dtype == "bf16" and arch < 80:
                            continue
                        cases.append(_case(kernel, dtype, arithmetic, int(width), config, arch))
    return cases


def _case(
    kernel: str, dtype: str, arithmetic: str, width: int, config: Config, arch: int
) -> AotCase:
    fn = KERNELS[kernel]
    constexprs = _constexprs(config, width, arithmetic)
    rows = config.block_m if kernel == "dkv" else config.block_n
    box = f"tensordesc<{dtype}[1, {rows}, 1, {constexprs['BLOCK_D']}]>"
    signature = {}
    for name in fn.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_source"):
            signature[name] = box if config.tma else f"*{dtype}"
        elif name in ("lse_ptr", "delta_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name in ("q_starts", "k_starts", "k_lengths"):
            signature[name] = "*i32"
        elif name.startswith("stride_"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    divisible = tuple(
        name
        for name, spelled in signature.items()
        if name.startswith("stride_") or (name.endswith(("_ptr", "_source")) and spelled[0] == "*")
    )
    return AotCase(
        name=f"{kernel}-{arithmetic if dtype == 'fp32' else dtype}-d{width}-{config.name}",
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        divisible=divisible,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expect=_expected(arithmetic, config, arch),
        # the models have heads of 64; for other widths one 16-bit type and one GPU a family stand for all
        twin=width != 64 and ((dtype == "fp16" and arch >= 80) or arch in (89, 120)),
    )


def _expected(arithmetic: str, config: Config, arch: int) -> tuple[str, ...]:
    """Instructions without which the kernel would not be what the table promises."""
    if arithmetic == "f32" or arch < 80:
        return ()
    matrix = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma")
    return (matrix, "tma") if config.tma else (matrix,)
