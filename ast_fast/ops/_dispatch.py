"""Running one direction of an op by what was chosen, and by the next best where that cannot be launched.

The `backend` argument of a registered op says who chose. "triton", "cpp" and "reference" run as named, and
errors are the caller's. "auto" is Triton as `use_backend("auto")` takes it: what the tables' `use` names for
this direction, then Triton, then the op's fallbacks. "sdpa" is the fallbacks alone. The choice is made here, in
the op's body, because a backward runs on another thread and compiled or exported programs outlive the machine
they were made on.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import backend as backends

_Result = TypeVar("_Result")

# What the driver says of a kernel that it could not load or launch, and of nothing else. Whatever is not
# among these may be an earlier kernel's fault, after which no result on this device is to be trusted.
_LAUNCH_ERRORS = (
    "out of resource",
    "too many resources requested for launch",
    "invalid argument",
    "invalid configuration",
    "invalid device function",
    "invalid resource handle",
    "named symbol not found",
    "no kernel image is available",
    "device kernel image is invalid",
    "ptx jit compilation failed",
    "ptx jit compiler library not found",
    "unsupported toolchain",
    "operation not supported",
    "invalid cluster size",
    "cluster misconfiguration",
)


class Plan(NamedTuple):
    """What `dispatch` has to know where it chooses; made only there."""

    kind: tuple[object, ...] = ()  # what decides the compiled form besides the dtype
    fallbacks: Sequence[str] = ("reference",)  # after the chosen one, in order
    refuse: Callable[[str], str | None] | None = None  # why a fused kernel of PyTorch's cannot run
    problem: tuple[str, int, int, int] = ("", 0, 0, 0)  # arithmetic, head width, rows, pairs


def dispatch(
    op: str,
    direction: str,  # "forward", "backward" or "backward_any_order"
    backend: str,
    lead: Tensor,
    run: Callable[[str], _Result],
    plan: Callable[[], Plan] = Plan,
) -> _Result:
    """Call `run` with the name of an implementation; where one was not asked for, of one that can be launched.

    Args:
        op: name in `kernels/_use.py`.
        direction: of the call.
        backend: the op's argument.
        lead: gives device and dtype.
        run: computes the result by the implementation it is given, and writes all of its outputs, so that
            what one that failed has written does not matter.
        plan: gives what a choice depends on. A form that could not be launched is not tried again.
    """
    if backend not in (backends.AUTO, backends.SDPA):
        backends.saw(op, direction, backend)
        return run(backend)
    # the usual case on a GPU, where every microsecond of a launch counts
    if backend == backends.AUTO and backends.all_launched() and _unmeasured(op, direction, lead):
        try:
            result = run("triton")
        except Exception as error:
            form, able = _order(op, direction, backend, lead, plan())
            _give_up(form, "triton", able[1], lead, error)
        else:
            backends.saw(op, direction, "triton")
            return result
    form, able = _order(op, direction, backend, lead, plan())
    for name, other in zip(able, [*able[1:], None], strict=True):
        try:
            result = run(name)
        except Exception as error:
            _give_up(form, name, other, lead, error)
        else:
            backends.saw(op, direction, name)
            return result
    raise AssertionError("the last implementation returns or raises")


def _give_up(
    form: backends.Form, name: str, other: str | None, lead: Tensor, error: Exception
) -> None:
    """Note that an implementation gives way to another; raise its error where it must not."""
    # what a graph records has to be what ran before it: its caller runs eagerly, and falls back there
    if other is None or _capturing(lead) or not cannot_launch(name, error):
        raise error
    backends.record_failure(form, name, other, _first_line(error))


def _order(
    op: str, direction: str, backend: str, lead: Tensor, plan: Plan
) -> tuple[backends.Form, list[str]]:
    """The form that is asked for, and the implementations that may run it, best first."""
    names = list(plan.fallbacks)
    # a program exported on a GPU may run elsewhere
    if backend == backends.AUTO and backends.native(lead.device.type) == "triton":
        use = _tables()
        measured = "triton"
        if use is not None:
            measured = use.implementation(op, direction, lead.device, *plan.problem)
        names = [measured, "triton", *names]
    form = (op, direction, str(lead.dtype).removeprefix("torch."), plan.kind)
    able, reasons = [], []
    for name in dict.fromkeys(names):
        reason = backends.failure(form, name)
        if reason is None and plan.refuse is not None and name.startswith("sdpa"):
            reason = plan.refuse(name)
        if reason is None:
            able.append(name)
        else:
            reasons.append(f"{name}: {reason}")
    if able[0] == "reference" and op in backends.SDPA_OPS:
        backends.announce(
            f"ast_fast.{op} ({direction}) runs in plain PyTorch, which stores the scores",
            "; ".join(reasons),
        )
    return form, able


def _unmeasured(op: str, direction: str, lead: Tensor) -> bool:
    """Whether Triton is what the tables leave this direction to."""
    if backends.native(lead.device.type) != "triton":
        return False
    use = _tables()
    return use is None or bool(use.says_nothing(op, direction, lead.device))


@functools.cache
def _tables() -> ModuleType | None:
    try:
        return importlib.import_module("ast_fast.kernels._use")
    except ImportError:  # of Triton
        return None


def why_not_named(
    op: str, backend: str, lead: Tensor, load: Callable[[str], Any], *inputs: object
) -> str | None:
    """Why the backend that a registered op is given by name cannot run it, or None.

    "auto" and "sdpa" choose in the op's body.
    """
    if backend in ("reference", backends.AUTO):
        return None
    if backend == backends.SDPA and op in backends.SDPA_OPS:
        return None
    if backend not in ("triton", "cpp"):
        known: tuple[str, ...] = ("auto", "triton", "cpp", "reference")
        if op in backends.SDPA_OPS:
            known = (*known, backends.SDPA)
        return f"unknown, expected one of {', '.join(known)}"
    if backend == "cpp" and op not in backends.OPS:
        return "the C++ extension has no such op"
    reason = backends.why_not(backend, lead.device.type, lead.dtype)
    if reason is None:
        reason = load(backend).unsupported(lead, *inputs)
    return reason


def cannot_launch(name: str, error: Exception) -> bool:
    """Whether an implementation could not be compiled or launched, and the device is as it was before."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)  # since 2.8
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return False
    text = str(error).lower()
    if "triton error [" in text:
        return "out of memory" not in text and any(known in text for known in _LAUNCH_ERRORS)
    if "cuda error" in text or "out of memory" in text:
        return False
    if name.startswith("sdpa"):
        # PyTorch checks before it launches: no kernel for this GPU, no plan of cuDNN's
        return isinstance(error, RuntimeError)
    if name != "triton":
        return False
    if any(each.__module__.split(".")[0] == "triton" for each in type(error).__mro__):
        return True
    if isinstance(error, ImportError | subprocess.CalledProcessError):  # of the launcher's C build
        return True
    # a pass of the compiler that gives up, a compiler for C that is not there, a cache that cannot be written
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return isinstance(error, RuntimeError | OSError) and any(
        module.split(".")[0] == "triton" for module in modules
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Triton's compiler errors begin with the place in the source, and end with what is wrong
    said = (lines[-1] if "at " in lines[0][:3] else lines[0]) if lines else ""
    return f"{type(error).__name__}: {said}"[:300]


def _capturing(lead: Tensor) -> bool:
    return lead.is_cuda and torch.cuda.is_current_stream_capturing()
