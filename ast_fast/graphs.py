"""CUDA graphs: a recorded sequence of kernels that one launch repeats.

A launch costs the CPU microseconds and a small kernel less than that: recorded, a forward pass at batch 1
or a whole training step runs back to back. What is recorded has fixed addresses, so inputs are copied into
buffers that stay, and whatever moves the weights makes a recording invalid.

`CudaGraphs` is the only code here that needs a GPU; everything around it takes any object with its two
methods.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import backend
from .layers import all_are_hooked, hooks_of
from .ops._common import traced

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
            current = torch.cuda.current_stream()
            own: BaseException | None = None
            try:
                # other threads (loading, copying) may call CUDA meanwhile
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    try:
                        result = function()
                    except BaseException as error:
                        own = error
                        raise
            except BaseException as error:
                # ending a broken capture raises before torch goes back to the stream it came from
                torch.cuda.set_stream(current)
                self._pool = self._stream = None
                cause = own or error  # that of the end says nothing of why
                _log.info("a CUDA graph was not recorded: %s: %s", type(cause).__name__, cause)
                raise cause from None
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
    if all_are_hooked():
        return "every module of the process"
    for name, module in model.named_modules():
        if any(hooks_of(module)):
            return name or "the model"
    return None


# attributes of our modules, and what is set after a model is built, that decide what a call computes
_OPTIONS = ("fp8", "merging", "deterministic", "config", "frontend_config")


class _Watch:
    """Whether a model is still the one that was recorded, asked in microseconds.

    Walking a model's modules takes as long as some kernels; the dicts that a module keeps its parts,
    weights and hooks in stay the same objects, and are collected once.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model, self._modules = model, modules
        self._options = [(m, name) for m in modules for name in _OPTIONS if hasattr(m, name)]
        self._hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self._parts = [module._modules for module in modules if module._modules]
        self._held = [held for m in modules for held in (m._parameters, m._buffers) if held]

    def hooked(self) -> bool:
        """Whether a hook sits anywhere."""
        return any(self._hooks) or all_are_hooked()

    def state(self) -> tuple[list[Any], ...]:
        """Modules, options, and place and version of weights and buffers; equal: nothing changed."""
        parts = [part for parts in self._parts for part in parts.values()]
        tensors = [each for held in self._held for each in held.values() if each is not None]
        options = [getattr(module, name) for module, name in self._options]
        training = self._model.training
        odd = [module for module in self._modules if module.training != training]
        # a tensor made in inference mode counts no versions
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        return parts, options, odd, versions


class GraphedForward:
    """A model's `forward` and `forward_waveform` from recordings, one for each shape that comes back.

    The first calls of a shape run as they are; then the call is recorded, and later ones are replayed. A
    recording belongs to shapes, dtypes, autocast, backend and train mode; all are dropped when a weight
    moves or changes, or an option is set (a weight made in inference mode changes unseen: `clear`). Where nothing can be recorded (a CPU, autograd, hooks) the model is called itself,
    which is said once for each reason. Calls from several threads wait for each other; use one stream.

    Args:
        model: with `forward(x)` and, for waveforms, `forward_waveform(wave, lengths)`.
        max_graphs: recordings kept; the one unused for longest goes first.
        graphs: who records; CUDA graphs by default.
        warm_ups: calls of a shape before it is recorded.

    >>> import ast_fast
    >>> model = ast_fast.create_model("ast_mini_p16_s10", num_classes=3)
    >>> with torch.no_grad():
    ...     GraphedForward(model)(torch.randn(1, 64, 64)).shape  # on a CPU: the model itself
    torch.Size([1, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        max_graphs: int = 8,
        graphs: GraphMaker | None = None,
        warm_ups: int = 2,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs}: expected at least 1")
        self.model: Any = model
        self._max_graphs, self._graphs, self._warm_ups = max_graphs, graphs, warm_ups
        self._recordings: OrderedDict[Any, Recording | None] = OrderedDict()
        self._seen: dict[Any, int] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._watch = _Watch(model)
        self._state = self._watch.state()

    def __call__(self, x: Tensor) -> Tensor:
        """`model(x)`."""
        return self._run("forward", x)

    def forward_waveform(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`model.forward_waveform(wave, lengths)`."""
        if lengths is None:
            return self._run("forward_waveform", wave)
        return self._run("forward_waveform", wave, lengths.to(wave.device, non_blocking=True))

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return sum(recording is not None for recording in self._recordings.values())

    def clear(self) -> None:
        """Drop all recordings and look at the model anew."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._recordings.clear()
        self._seen.clear()
        self._watch = _Watch(self.model)
        self._state = self._watch.state()

    def _run(self, name: str, *tensors: Tensor) -> Tensor:
        function = self.model if name == "forward" else getattr(self.model, name)
        with self._lock:
            result = self._replayed(name, function, tensors)
        return function(*tensors) if result is None else result

    def _replayed(
        self, name: str, function: Callable[..., Any], tensors: tuple[Tensor, ...]
    ) -> Tensor | None:
        """The result from a recording; None if the model itself is to be called."""
        device = tensors[0].device
        reason = self._why_not(device, tensors)
        if reason is not None:
            self._say(reason)
            return None
        if traced() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None
        if self._state != self._watch.state():
            self._clear()
        key = name, signature(*tensors), _surroundings(device), self.model.training
        function = _uncached(function, device)
        if key not in self._recordings:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._graphs is None:
                self._graphs = CudaGraphs(device)
            if self._seen[key] <= self._warm_ups:
                if len(self._seen) > 64 * self._max_graphs:  # shapes that never come back
                    self._seen.clear()
                warmed: Tensor = self._graphs.warm_up(lambda: function(*tensors))
                return warmed
            self._recordings[key] = self._record(function, tensors)
            self._seen.pop(key, None)
            if len(self._recordings) > self._max_graphs:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        # a copy: the recording's own result is overwritten by the next call
        return None if recording is None else recording(*tensors).clone()

    def _record(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...]
    ) -> Recording | None:
        assert self._graphs is not None
        try:
            return Recording(self._graphs, function, tensors)
        except torch.OutOfMemoryError:
            self._say("memory ran out while a call was recorded")
        except RuntimeError as error:
            self._say(f"a call could not be recorded ({error})")
        return None

    def _why_not(self, device: torch.device, tensors: tuple[Tensor, ...]) -> str | None:
        if self._graphs is None and device.type != "cuda":
            return f"inputs are on a {device.type} device"
        if torch.is_grad_enabled() and (
            any(each.requires_grad for each in tensors)
            or any(each.requires_grad for each in self.model.parameters())
        ):
            return "autograd records; call it under torch.no_grad() or torch.inference_mode()"
        if self._watch.hooked():
            return f"{watched_module(self.model)} carries hooks"
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("model called without CUDA graphs: %s; said once", reason)


def _uncached(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function without the caller's autocast cache: that frees, on leaving, copies a recording reads."""

    def run(*tensors: Tensor) -> Any:
        if not torch.is_autocast_enabled(device.type):
            return function(*tensors)
        dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return function(*tensors)

    return run


def _surroundings(device: torch.device) -> tuple[Any, ...]:
    """Everything outside the arguments that decides what a call computes."""
    autocast = torch.is_autocast_enabled(device.type)
    return (
        torch.get_autocast_dtype(device.type) if autocast else None,
        backend.requested(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        # buffers made in inference mode cannot be filled outside it
        torch.is_inference_mode_enabled(),
    )
