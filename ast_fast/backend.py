"""Which backend runs an op, and why.

`auto` picks Triton for CUDA tensors and the C++ extension for CPU tensors in float32 or bfloat16.
What those cannot take runs in PyTorch: attention in its fused kernels (SDPA) where they can, the rest in
the plain reference. That is decided once per call, in the Python wrapper of the op, and travels with the op
as an argument, so that its backward follows on any thread. Within Triton's part the op's body may still take
what a measurement found faster, or the next best where a kernel cannot be launched (ops/_dispatch.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

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

AUTO = "auto"  # as an op's argument: Triton can run this, and nobody asked for it by name
SDPA = "sdpa"  # as an op's argument: PyTorch's fused attention, because our kernels cannot run this
SDPA_OPS = ("attention", "attention_biased", "attention_masked", "attention_varlen")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_log = logging.getLogger("ast_fast.backend")
_global_request = "auto"
_local_request: ContextVar[str | None] = ContextVar("ast_fast_backend", default=None)
_announced: set[tuple[str, str]] = set()
# An op, its direction, its dtype and what else decides the compiled form.
Form = tuple[str, str, str, tuple[object, ...]]
_failures: dict[tuple[Form, str], tuple[str, str]] = {}


def constant_when_compiled(function: _Function) -> _Function:
    """What `torch.compiler.assume_constant_result` does, without its import of the compiler (1.3 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def transformed() -> str | None:
    """Which derivative is being taken that only plain PyTorch has: one of torch.func, or in forward mode.

    `vmap` alone is none: registered ops have it.
    """
    if forward_ad._current_level >= 0:
        return "in forward mode (torch.func.jvp, forward_ad)"
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is not None:
        grad = torch._C._functorch.TransformType.Grad
        if any(level.key() == grad for level in stack):
            return "under torch.func (grad, vjp, jacrev, hessian)"
    return None


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
def announce(what: str, reason: str) -> None:
    """Say once, at WARNING, what does not run where it should, where it runs instead, and why."""
    if (what, reason) not in _announced:
        _announced.add((what, reason))
        _log.warning("%s: %s", what, reason)


def all_launched() -> bool:
    """Whether nothing failed to launch so far."""
    return not _failures


def failure(form: Form, name: str) -> str | None:
    """Why an implementation could not be launched before; None if it was not tried or ran."""
    known = _failures.get((form, name))
    return None if known is None else known[0]


def record_failure(form: Form, name: str, instead: str, reason: str) -> None:
    """Remember that an implementation cannot be launched, and say so the first time."""
    op, direction, dtype, kind = form
    if (form, name) not in _failures:
        _failures[form, name] = (reason, instead)
        detail = "".join(f", {each}" for each in kind)
        _log.warning(
            "ast_fast.%s (%s, %s%s) runs in %s from now on, %s could not be compiled or launched: %s",
            *(op, direction, dtype, detail, instead, name, reason),
        )


def forget_failures() -> None:
    """Try again what could not be launched, after a driver or a compiler was mended."""
    _failures.clear()


class Seen:
    """What ran while `watch` watched."""

    def __init__(self) -> None:
        self.ran: dict[tuple[str, str], str] = {}  # op and direction to implementation
        self.reasons: list[str] = []  # why calls did not go to the backend of ours

    @property
    def names(self) -> str:
        """The implementations in words; the reference where no op had a choice."""
        return ", ".join(dict.fromkeys(self.ran.values())) or "reference"


_watching: list[Seen] = []


@contextmanager
def watch() -> Iterator[Seen]:
    """Note which implementation each op runs in, on all threads, until the block ends."""
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def saw(op: str, direction: str, name: str) -> None:
    """Tell whoever watches what ran."""
    for seen in _watching:
        seen.ran[op, direction] = name


@constant_when_compiled
def _saw_refusal(reason: str) -> None:
    for seen in _watching:
        seen.reasons.append(reason)


def native(device_type: str) -> str:
    """The backend of ours for a kind of device."""
    return "triton" if device_type == "cuda" else "cpp"


def choose(op: str, load: Callable[[str], Any], lead: Tensor, *inputs: object) -> str:
    """The `backend` argument for one call: `lead` decides device and dtype, `inputs` go to `unsupported`.

    `AUTO` for Triton that nobody named, `SDPA` for what PyTorch's fused attention takes over, else the
    name of a backend.
    """
    request = requested()
    if request == "reference":
        return "reference"
    taken = transformed()
    if taken is not None:
        if request == "auto":
            return "reference"
        raise BackendUnavailableError(
            f"backend {request!r} was asked for and ast_fast.{op} has no derivatives {taken} there: take "
            "use_backend('reference'), or use_backend('auto'), which does so by itself"
        )
    device_type, dtype = lead.device.type, lead.dtype
    if device_type == "meta":  # shapes and dtypes are those of any backend
        return "reference"
    if request == "auto":
        if dtype == torch.float64:
            return "reference"
        backend = native(device_type)
    else:
        backend = request
    reason = why_not(backend, device_type, dtype)
    missing = reason is not None  # the whole backend: said once, not once an op
    if reason is None:
        reason = load(backend).unsupported(lead, *inputs)
    if reason is None:
        return AUTO if request == "auto" and backend == "triton" else backend
    if request != "auto":
        raise BackendUnavailableError(
            f"backend {backend!r} was asked for and cannot run ast_fast.{op}: {reason}; "
            "use_backend('auto') falls back by itself"
        )
    _saw_refusal(reason)
    nor = load(SDPA).unsupported(lead, *inputs) if op in SDPA_OPS else None
    if op in SDPA_OPS and nor is None:
        taken, where = SDPA, "PyTorch's fused attention (SDPA)"
    else:
        taken, where = "reference", "plain PyTorch"
        reason = reason if nor is None else f"{reason}; {nor}"
    if missing and nor is None:
        announce("ast_fast runs in plain PyTorch, attention in its fused SDPA", reason)
    else:
        announce(f"ast_fast.{op} runs in {where}", reason)
    return taken


def status() -> list[dict[str, str]]:
    """One row per op and device type: what `auto` takes in float32, and why not the others.

    "measured" is what the tables of this GPU name instead of Triton in some direction, "fallback" what runs
    where a call cannot be taken or launched, "failed" what could not be launched in this process.
    """
    rows = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in OPS:
        for device_type in devices:
            reasons = {
                name: why_not(name, device_type, torch.float32) for name in ("triton", "cpp")
            }
            ours = native(device_type)
            fallbacks = [*((SDPA,) if op in SDPA_OPS else ()), "reference"]
            chosen = ours if reasons[ours] is None else fallbacks.pop(0)
            others = "; ".join(
                f"{name}: {reason}"
                for name, reason in reasons.items()
                if name != chosen and reason is not None
            )
            rows.append(
                {
                    "op": op,
                    "device": device_type,
                    "backend": chosen,
                    "others": others,
                    "measured": _measured(op) if chosen == "triton" else "",
                    "fallback": ", ".join(fallbacks),
                    "failed": _failed(op) if device_type == "cuda" else "",
                }
            )
    return rows


def _measured(op: str) -> str:
    _use = importlib.import_module("ast_fast.kernels._use")
    return str(_use.summary(op, torch.device("cuda", torch.cuda.current_device())))


def _failed(op: str) -> str:
    return "; ".join(
        f"{form[1]} of {form[2]}: {name} ({reason}), now {instead}"
        for (form, name), (reason, instead) in _failures.items()
        if form[0] == op
    )


def explain() -> str:
    """The table of `status` as text.

    >>> import ast_fast
    >>> "attention" in ast_fast.backend.explain()
    True
    """
    rows = status()
    widths = {"op": 18, "device": 8, "backend": 11, "fallback": 17}
    lines = ["".join(f"{name:<{width}}" for name, width in widths.items()) + "why not the others"]
    for row in rows:
        line = "".join(f"{row[name]:<{width}}" for name, width in widths.items())
        notes = [row["others"]]
        notes += [f"{name}: {row[name]}" for name in ("measured", "failed") if row[name]]
        lines.append(line + "; ".join(note for note in notes if note))
    return "\n".join(lines)
