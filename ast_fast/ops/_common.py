"""What every op wrapper needs: registration on both device types, autocast, gradient bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def register(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.ast_fast.<name>` with kernels for CUDA and CPU."""

    def decorate(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(
            f"ast_fast::{name}", function, mutates_args=(), device_types="cuda"
        )
        op.register_kernel("cpu")(function)
        return op

    return decorate


def call(op: Any, *arguments: Any) -> Any:
    """Call a registered op; straight to its body where nobody but the dispatcher would notice.

    The dispatcher costs several times what a small kernel does. It is needed for gradients, for the
    compiler, and for whoever watches or transforms ops (modes, subclasses, functorch, profilers).
    """
    if watched(*arguments):
        return op(*arguments)
    recording = torch.is_grad_enabled()
    for argument in arguments:
        if recording and isinstance(argument, Tensor) and argument.requires_grad:
            return op(*arguments)
    return op._init_fn(*arguments)


def traced() -> bool:
    """Whether somebody writes down or transforms the ops that run: modes, compilers, tracers."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def watched(*arguments: Any) -> bool:
    """Whether somebody but autograd must see which ops run: tracers, profilers, subclasses."""
    return (
        traced()
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(each, Tensor) and type(each) not in _PLAIN for each in arguments)
    )


def no_second_gradient(op: Any) -> None:
    """Let a gradient of a gradient fail with a message that says what to do."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op._qualname} has no gradient of its own: for second derivatives run the forward pass "
            "under ast_fast.use_backend('reference')"
        )

    op.register_autograd(backward)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device, or None outside autocast."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a matrix product in autocast's dtype; unchanged outside autocast and in float64."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def without_autocast(function: Callable[..., Any], lead: Tensor, *arguments: Any) -> Any:
    """Call a function of plain PyTorch whose inner products autocast must not round."""
    if autocast_dtype(lead.device.type) is None:
        return function(lead, *arguments)
    with torch.autocast(lead.device.type, enabled=False):
        return function(lead, *arguments)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, and float64 for the oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def allow_tf32(device_type: str) -> bool:
    """Whether the user allowed TF32 in float32 matrix products on this device."""
    return device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def require(condition: bool, message: str) -> None:
    """Raise ValueError with a message that names argument, got, expected and fix."""
    if not condition:
        raise ValueError(message)
