"""CUDA graphs: a recorded sequence of kernels that one launch repeats.

A launch costs the CPU microseconds and a small kernel less than that: recorded, a forward pass at batch 1
or a whole training step runs back to back. What is recorded has fixed addresses, so inputs are copied into
buffers that stay, and whatever moves the weights makes a recording invalid.

`CudaGraphs` is the only code here that needs a GPU; everything around it takes any object with its two
methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

Function = Callable[[], Any]


class GraphMaker(Protocol):
    """Records what a function launches."""

    def warm_up(self, function: Function) -> Any:
        """Run a function the way it will be recorded: on a side stream. Gives its result."""

    def capture(self, function: Function) -> tuple[Any, Function]:
        """Record a function without running it: its result, filled by each call of the second item."""


class CudaGraphs:
    """CUDA graphs that share one private memory pool.

    Args:
        device: where everything recorded lives.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def warm_up(self, function: Function) -> Any:
        """Run on the stream that records: libraries make their workspaces and kernels are compiled."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = function()
            current.wait_stream(self._stream)
        return result

    def capture(self, function: Function) -> tuple[Any, Function]:
        """Record; memory of the result belongs to the pool and is overwritten by each replay."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads (loading, copying) may call CUDA meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = function()
        return result, graph.replay


class Recording:
    """One recorded function of tensors: copies its inputs into place and repeats it.

    Args:
        graphs: who records.
        function: of as many tensors as `inputs`; must not wait for the device.
        inputs: of the shapes, dtypes and device to record for.
        warm_ups: runs before recording.
    """

    def __init__(
        self,
        graphs: GraphMaker,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        warm_ups: int = 0,
    ) -> None:
        self._static = [tensor.detach().clone() for tensor in inputs]
        for _ in range(warm_ups):
            graphs.warm_up(lambda: function(*self._static))
        self.result, self._replay = graphs.capture(lambda: function(*self._static))

    def __call__(self, *inputs: Tensor) -> Any:
        """The function's result for these inputs, in memory that the next call overwrites."""
        for static, tensor in zip(self._static, inputs, strict=True):
            if static.data_ptr() != tensor.data_ptr():
                static.copy_(tensor, non_blocking=True)
        self._replay()
        return self.result


def signature(*tensors: Tensor) -> tuple[Any, ...]:
    """What a recording is good for: shapes, dtypes and devices."""
    return tuple((tuple(each.shape), each.dtype, each.device) for each in tensors)


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where tensors lie: what a recording has written into it."""
    return tuple(each.data_ptr() for each in tensors)


def watched_module(model: nn.Module) -> str | None:
    """The first module whose hooks a replay would leave out; None if there is none."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module of the process"
    for name, module in model.named_modules():
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return name or "the model"
    return None
