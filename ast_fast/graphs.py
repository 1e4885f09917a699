"""Inference from CUDA graphs: a model's own results, for shapes that come back, until something changes.

A launch costs the CPU microseconds and a small kernel less than that: recorded, a forward pass at batch 1
or a whole training step runs back to back. `cuda_graphs.py` records and repeats; here is when a recording
may stand for the model.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .cuda_graphs import CudaGraphs, GraphMaker, Recording, signature
from .layers import all_are_hooked, hooks_of
from .ops._common import traced

__all__ = ["CudaGraphs", "GraphMaker", "GraphedForward", "watched_module"]
_log = logging.getLogger("ast_fast")


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
        self._warming: OrderedDict[Any, Recording] = OrderedDict()  # of shapes seen too rarely yet
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
        self._warming.clear()
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
        if key not in self._recordings:
            warmed = self._warmed(key, _uncached(function, device), tensors)
            if warmed is not None:
                return warmed
            self._recordings[key] = self._recorded(self._warming.pop(key))
            self._seen.pop(key, None)
            if len(self._recordings) > self._max_graphs:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        # a copy: the recording's own result is overwritten by the next call
        return None if recording is None else recording(*tensors).clone()

    def _warmed(
        self, key: Any, function: Callable[..., Any], tensors: tuple[Tensor, ...]
    ) -> Tensor | None:
        """The result of a call before it is recorded; None when it is time to record."""
        self._seen[key] = self._seen.get(key, 0) + 1
        due = self._seen[key] > self._warm_ups and (key in self._warming or not self._warm_ups)
        if key not in self._warming:
            if self._graphs is None:
                self._graphs = CudaGraphs(tensors[0].device)
            self._warming[key] = Recording(self._graphs, function, tensors)
        self._warming.move_to_end(key)
        if due:
            return None
        if len(self._seen) > 64 * self._max_graphs:  # shapes that never come back
            self._seen.clear()
        if len(self._warming) > self._max_graphs:
            # the buffers of what came least often go; its count stays
            others = (other for other in self._warming if other != key)
            del self._warming[min(others, key=lambda other: self._seen.get(other, 0))]
        # a copy: the result may be a view of an input
        warmed: Tensor = self._warming[key].warm_up(*tensors).clone()
        return warmed

    def _recorded(self, recording: Recording) -> Recording | None:
        try:
            recording.record()
            return recording
        except Exception as error:
            # whatever it was: the model itself is called, and raises what it has to
            if isinstance(error, torch.OutOfMemoryError):
                self._say("memory ran out while a call was recorded")
            else:
                self._say(f"a call could not be recorded ({type(error).__name__}: {error})")
            error.__traceback__ = None  # holds every activation
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
