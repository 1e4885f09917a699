"""Which backend runs an op, and why.

`auto` picks Triton for CUDA tensors, the C++ extension for CPU tensors in float32 or bfloat16, and
plain PyTorch otherwise. The choice is made once per call, in the Python wrapper of the op, and
travels with the op as an argument, so that its backward uses the same backend on any thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpp", "reference")
OPS = (
    "log_mel",
    "patch_embed",
    "attention",
    "attention_biased",
    "attention_masked",
    "attention_varlen",
    "layer_norm",
    "add_layer_norm",
    "mlp",
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_log = logging.getLogger("ast_fast.backend")
_global_request = "auto"
_local_request: ContextVar[str | None] = ContextVar("ast_fast_backend", default=None)
_announced: set[tuple[str, str]] = set()


def constant_when_compiled(function: _Function) -> _Function:
    """What `torch.compiler.assume_constant_result` does, without its import of the compiler (1.3 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


class use_backend:
    """Choose the backend of every op: as a call for the whole process, in `with` for a block.

    Args:
        name: "auto", "triton", "cpp" or "reference". By name, an op that the backend cannot run
            raises `BackendUnavailableError`; under "auto" it falls back and says so once.

    >>> import ast_fast
    >>> with ast_fast.use_backend("reference"):
    ...     pass
    """

    def __init__(self, name: str) -> None:
        global _global_request
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown: expected one of {', '.join(BACKENDS)}")
        self._name = name
        self._previous = _global_request
        self._token: Token[str | None] | None = None
        _global_request = name

    def __enter__(self) -> use_backend:
        global _global_request
        _global_request = self._previous
        self._token = _local_request.set(self._name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _local_request.reset(self._token)


def requested() -> str:
    """The backend asked for in this context: `auto` unless `use_backend` said otherwise."""
    return _local_request.get() or _global_request


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@constant_when_compiled
def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on this device and dtype at all; None if it can."""
    if backend == "triton":
        if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
            return f"Triton needs CUDA tensors, got {device_type}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int16):
            return f"Triton kernels take float32, float16 and bfloat16, got {dtype}"
        return _why_no_triton()
    if device_type != "cpu":
        return f"the C++ extension needs CPU tensors, got {device_type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.int16):
        return f"the C++ extension takes float32 and bfloat16, got {dtype}"
    cpp = importlib.import_module("ast_fast.cpp")
    return cpp.why_unavailable()


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton does not import: {error}"
    if torch.version.hip is not None:
        return (
            "the Triton kernels have configurations for NVIDIA GPUs only, this PyTorch is for AMD's"
        )
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (7, 5):
            return f"Triton kernels need compute capability 7.5 or newer, got {major}.{minor}"
    return None


@constant_when_compiled
def _announce(op: str, reason: str) -> None:
    """Say once, at WARNING, what falls back to plain PyTorch and why."""
    if (op, reason) not in _announced:
        _announced.add((op, reason))
        _log.warning("%s in plain PyTorch: %s", op, reason)


def choose(op: str, load: Callable[[str], ModuleType], lead: Tensor, *inputs: object) -> str:
    """The backend for one call: `lead` decides device and dtype, `inputs` go to `unsupported`."""
    request = requested()
    if request == "reference":
        return "reference"
    device_type, dtype = lead.device.type, lead.dtype
    if request == "auto":
        if dtype == torch.float64:
            return "reference"
        backend = "triton" if device_type == "cuda" else "cpp"
    else:
        backend = request
    reason = why_not(backend, device_type, dtype)
    what = "ast_fast runs"  # the whole backend is missing: said once, not once an op
    if reason is None:
        reason = load(backend).unsupported(lead, *inputs)
        what = f"ast_fast.{op} runs"
    if reason is None:
        return backend
    if request != "auto":
        raise BackendUnavailableError(
            f"backend {backend!r} was asked for and cannot run ast_fast.{op}: {reason}; "
            "use_backend('auto') falls back by itself"
        )
    _announce(what, reason)
    return "reference"


def status() -> list[dict[str, str]]:
    """One row per op and device type: which backend `auto` takes in float32, and why not the others."""
    rows = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in OPS:
        for device_type in devices:
            reasons = {
                name: why_not(name, device_type, torch.float32) for name in ("triton", "cpp")
            }
            native = "triton" if device_type == "cuda" else "cpp"
            chosen = native if reasons[native] is None else "reference"
            others = "; ".join(
                f"{name}: {reason}"
                for name, reason in reasons.items()
                if name != chosen and reason is not None
            )
            rows.append({"op": op, "device": device_type, "backend": chosen, "others": others})
    return rows


def explain() -> str:
    """The table of `status` as text.

    >>> import ast_fast
    >>> "attention" in ast_fast.backend.explain()
    True
    """
    rows = status()
    lines = [f"{'op':<18}{'device':<8}{'backend':<11}why not the others"]
    lines += [f"{r['op']:<18}{r['device']:<8}{r['backend']:<11}{r['others']}" for r in rows]
    return "\n".join(lines)
