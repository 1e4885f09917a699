"""CUDA graphs themselves: a recorded sequence of kernels that one launch repeats.

What is recorded has fixed addresses, so inputs are copied into buffers that stay, and whatever moves the
weights makes a recording invalid. `CudaGraphs` is the only code here that needs a GPU; everything around it
takes any object with its two methods.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[[], Any]
_log = logging.getLogger("ast_fast")


class GraphMaker(Protocol):
    """Records what a function launches."""

    def warm_up(self, function: Function) -> Any:
        """Run a function the way it will be recorded: on a side stream. Gives its result."""

    def capture(self, function: Function) -> tuple[Any, Function]:
        """Record a function without running it: its result, filled by each call of the second item."""


class CudaGraphs:
    """CUDA graphs that share one private memory pool.

    Args:
        device: where everything recorded lives; by default where the first thing recorded does.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def bind(self, device: torch.device) -> None:
        """Record on this device, the one of the weights: a stream of another would record nothing.

        Raises:
            ValueError: it is not a CUDA device, or another one was given before.
        """
        own = self._device
        if device.type != "cuda" or (own is not None and own.index not in (None, device.index)):
            raise ValueError(
                f"weights are on {device} and CUDA graphs on {own or 'CUDA devices'}: expected one "
                "CUDA device; make CudaGraphs(device of the weights), or leave them out on a CPU"
            )
        self._device = device

    def warm_up(self, function: Function) -> Any:
        """Run on the stream that records: libraries make their workspaces and kernels are compiled."""
        with torch.cuda.device(self._device):
            stream = self._side_stream()
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = function()
            current.wait_stream(stream)
        return result

    def capture(self, function: Function) -> tuple[Any, Function]:
        """Record; memory of the result belongs to the pool and is overwritten by each replay.

        Where it fails, what the function raised is raised, and the next capture starts afresh.
        """
        with torch.cuda.device(self._device):
            stream = self._side_stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            current = torch.cuda.current_stream()
            own: BaseException | None = None
            try:
                # other threads (loading, copying) may call CUDA meanwhile
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    try:
                        result = function()
                    except BaseException as error:
                        own = error
                        raise
            except BaseException as error:
                # ending a broken capture raises before torch goes back to the stream it came from
                torch.cuda.set_stream(current)
                _abandon(graph, self._pool)
                self._pool = self._stream = None
                cause = own or error  # that of the end says nothing of why
                _log.info("a CUDA graph was not recorded: %s: %s", type(cause).__name__, cause)
                raise cause from None
        return result, graph.replay

    def _side_stream(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream


# graphs that torch did not end: allocators ask them whose memory a stream gets, and hold no reference
_abandoned: list[Any] = []


def _abandon(graph: Any, pool: Any) -> None:
    """Take a capture that failed out of the caching allocator; never raises.

    Up to torch 2.11 `CUDAGraph.capture_end` raises before it ends the allocation to the pool, and
    `reset` releases only the pool of a graph that ended: the pool would stay registered as being
    recorded to, `empty_cache` would assert and later captures fail. Newer ones do both themselves; then
    the allocator says that nothing is recorded, and to release once more would take away memory of
    graphs that share the pool. The functions are private: where they are missing, torch is left alone.
    """
    _abandoned.append(graph)
    with contextlib.suppress(Exception):
        graph.reset()  # first: where torch can end it, it also counts that it did
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end is None or release is None:
        return
    with contextlib.suppress(Exception):
        device = torch.cuda.current_device()
        end(device, pool)
        release(device, pool)


class Recording:
    """A function of tensors with inputs of its own: run on them, then recorded once and repeated.

    What is recorded is what ran before, to the address: a kernel compiled for one alignment or stride is
    not compiled again, for another one, while it is recorded.

    Args:
        graphs: who records.
        function: of as many tensors as `inputs`; must not wait for the device.
        inputs: of the shapes, strides, dtypes and device to record for.
    """

    def __init__(
        self, graphs: GraphMaker, function: Callable[..., Any], inputs: Sequence[Tensor]
    ) -> None:
        self._graphs = graphs
        static = self._static = [_buffer_like(tensor) for tensor in inputs]
        self._function: Function | None = lambda: function(*static)  # no circle: freed when dropped
        self._replay: Function | None = None
        self.result: Any = None

    def warm_up(self, *inputs: Tensor) -> Any:
        """Run the function on these inputs, the way it will be recorded; gives its result."""
        assert self._function is not None, "recorded already"
        self._fill(inputs)
        return self._graphs.warm_up(self._function)

    def record(self) -> None:
        """Record the function without running it."""
        assert self._function is not None, "recorded already"
        self.result, self._replay = self._graphs.capture(self._function)
        self._function = None  # nothing it holds is needed any more

    def __call__(self, *inputs: Tensor) -> Any:
        """The function's result for these inputs, in memory that the next call overwrites."""
        assert self._replay is not None, "not recorded yet"
        self._fill(inputs)
        self._replay()
        return self.result

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        for static, tensor in zip(self._static, inputs, strict=True):
            if static.data_ptr() != tensor.data_ptr():
                static.copy_(tensor.detach(), non_blocking=True)


def _buffer_like(tensor: Tensor) -> Tensor:
    """Memory of a tensor's shape and strides; contiguous where places overlap or lie far apart."""
    room = 1  # elements that the dimensions so far reach over
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < room:
                return torch.empty_like(tensor, memory_format=torch.contiguous_format)
            room += stride * (size - 1)
    if room > 2 * tensor.numel():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def signature(*tensors: Tensor) -> tuple[Any, ...]:
    """What a recording is good for: shapes, dtypes and devices."""
    return tuple((tuple(each.shape), each.dtype, each.device) for each in tensors)


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where tensors lie: what a recording has written into it."""
    return tuple(each.data_ptr() for each in tensors)
