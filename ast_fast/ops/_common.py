"""What every op wrapper needs: registration on both device types, autocast, gradient bookkeeping."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend
from ._checks import Checks

PLAIN = (Tensor, torch.nn.Parameter)


class _Trust(threading.local):
    """Whether the next body that this thread runs has had its arguments checked by a wrapper."""

    once = False


_trust = _Trust()


def register(name: str, checks: Checks) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.ast_fast.<name>` with kernels for CUDA and CPU.

    Whoever comes through the dispatcher is checked, with real tensors and with fake ones; `call` goes
    around it for the wrappers, which have checked before.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        checks.bind(name, function)

        @functools.wraps(function)
        def checked(*arguments: Any) -> Any:
            if _trust.once:
                _trust.once = False
            else:
                checks(arguments)
                _refuse_derivatives(name)
            return function(*arguments)

        op = torch.library.custom_op(
            f"ast_fast::{name}",
            checked,
            mutates_args=(),
            device_types="cuda",
            schema=torch.library.infer_schema(function, mutates_args=()),
        )
        op.register_kernel("cpu")(checked)
        plain = op.register_fake

        def register_fake(fake: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(fake)
            def checked_fake(*arguments: Any) -> Any:
                checks.fake(arguments)
                return fake(*arguments)

            return plain(checked_fake)

        op.register_fake = register_fake  # type: ignore[method-assign]
        op.body = function  # type: ignore[attr-defined]
        return op

    return decorate


def _refuse_derivatives(name: str) -> None:
    """Raise where a derivative would be lost in silence: a registered op has none in forward mode.

    A transform hands its levels' tensors to a kernel one by one, without their tangents, so that nothing
    tells which of them matter.
    """
    taken = backend.transformed()
    if taken is not None:
        raise RuntimeError(
            f"ast_fast::{name} has no derivative {taken}: call it by ast_fast.ops or a model under "
            "ast_fast.use_backend('reference'), or 'auto', which takes plain PyTorch there"
        )


def no_transform(name: str) -> None:
    """Raise for an op that plain PyTorch does not replace."""
    taken = backend.transformed()
    if taken is not None:
        raise RuntimeError(
            f"ast_fast.ops.{name} has no derivative {taken}: take its layers without FP8, under "
            "ast_fast.use_backend('reference')"
        )


def call(op: Any, *arguments: Any) -> Any:
    """Call a registered op; straight to its body where nobody but the dispatcher would notice.

    The dispatcher costs several times what a small kernel does. It is needed for gradients, for the
    compiler, and for whoever watches or transforms ops (modes, subclasses, functorch, profilers).
    """
    if watched(*arguments) or arguments[0].is_meta:
        return op(*arguments)
    if not torch.is_grad_enabled():
        return op.body(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            # used up by the body, before anybody else's code can run: hooks on what is saved come after it
            _trust.once = True
            try:
                return op(*arguments)
            finally:
                _trust.once = False
    return op.body(*arguments)


def traced() -> bool:
    """Whether somebody writes down or transforms the ops that run: modes, compilers, tracers."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def watched(*arguments: Any) -> bool:
    """Whether somebody but autograd must see which ops run: tracers, profilers, subclasses."""
    return (
        traced()
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(each, Tensor) and type(each) not in PLAIN for each in arguments)
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
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
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


def int32_lengths(lengths: Tensor, limit: int) -> Tensor:
    """Lengths [B] as int32, those beyond `limit` cut to it: a wider integer must not wrap."""
    if lengths.dtype == torch.int32:
        return lengths
    if lengths.dtype == torch.int64:
        lengths = lengths.clamp(0, limit)
    return lengths.to(torch.int32)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with a message that names argument, got, expected and fix."""
    if not condition:
        raise ValueError(message)
