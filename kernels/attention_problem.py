"""How an attention launch is described: its rows and clips, its configuration, its operands.

`Problem` says how rows belong to clips, `Config` which compiled form of a kernel runs. A launch picks its
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

OP = "attention"
WIDTHS: tuple[int, ...] = (32, 64, 96, 128)
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
    reduce: bool = False  # one-pass backward: dq is summed through a descriptor
    maxnreg: int | None = None  # most registers a thread; None leaves it to the compiler

    @property
    def name(self) -> str:
        """Short name for test ids: 128x64w8s3-tma-reduce."""
        chunk = f"c{self.chunk}" if self.chunk else ""
        ways = ("-tma" if self.tma else "") + ("-reduce" if self.reduce else "")
        ways += f"-r{self.maxnreg}" if self.maxnreg else ""
        return f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}{chunk}{ways}"


class Problem(NamedTuple):
    """How the rows of q and of k belong to clips."""

    clips: int
    heads: int
    width: int
    queries: int  # rows of a dense clip, or of all packed clips together
    keys: int
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

    @property
    def pairs(self) -> int:
        """Pairs of head and clip, each with its own grid over rows; packed clips share one."""
        return self.heads * (1 if self.packed else self.clips)


class BackwardTensors(NamedTuple):
    """What a backward reads and writes, rows starting on 16-element boundaries."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor  # contiguous
    dq: Tensor
    dk: Tensor
    dv: Tensor


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
def table_configs(
    capability: int, kernel: str, arithmetic: str, width: int, op: str = OP
) -> tuple[Config, ...]:
    """Configurations of one kernel in the order of the table of `op`, largest tile first."""
    # not every family has every kernel for every arithmetic and width
    entries = _tuned.configs(op, capability).get(kernel, {}).get(arithmetic, {}).get(str(width), [])
    return tuple(Config(**entry) for entry in entries)


def rising(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """An equal problem with a positive scale, as the forward kernels want."""
    if scale < 0:
        # they take the maximum before they scale
        q, scale = -q, -scale
    # they mask before they scale too, and -inf times 0 is NaN
    return q, max(scale, _SMALLEST_SCALE)


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


def writable(out: Tensor, dtype: torch.dtype, packed: bool = False) -> Tensor:
    """`out`, or fresh memory in its place where its dtype or layout does not suit the kernels."""
    # the list of packed tiles may fill it in one run
    if out.dtype == dtype and is_aligned(out) and (out.is_contiguous() or not packed):
        return out
    return torch.empty(out.shape, dtype=dtype, device=out.device)


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


def clip_arguments(problem: Problem, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index tensors; one that is not read still has to be an int32 pointer."""
    unread = lse.view(torch.int32)
    given = (problem.q_starts, problem.k_starts, problem.k_lengths)
    return tuple(unread if x is None else x.contiguous() for x in given)


def scratch_strides(lse: Tensor) -> tuple[int, int]:
    """Strides of clip and head of lse [B, H, Tpad] or packed [H, Npad]."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def options(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {**constexprs(config, width, arithmetic), **compiler_options(config)}


def compiler_options(config: Config) -> dict[str, int]:
    """Keyword arguments of a launch that the compiler reads."""
    found = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return found if config.maxnreg is None else found | {"maxnreg": config.maxnreg}


def constexprs(config: Config, width: int, arithmetic: str) -> dict[str, Any]:
    """Compile-time arguments of a kernel."""
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
