"""How a training step runs: as it is, recorded as one CUDA graph, or with its blocks compiled.

`GraphedStep` records a `TrainingStep` and replays it. `compile_blocks` compiles the identical blocks of a
model once. `prepared_step` does what `TrainConfig.compile` asks for.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn

from ..config import TrainConfig
from ..cuda_graphs import CudaGraphs, GraphMaker, Recording, addresses, signature
from ..graphs import watched_module
from ..optimized import note_step
from .errors import TrainingError
from .step import TrainingStep, empty_cache, is_out_of_memory

_log = logging.getLogger("ast_fast.training")


class GraphedStep:
    """A training step recorded once and replayed; to the bit what the step itself computes.

    The first steps of a shape run as they are, on the stream and in the buffers that will be recorded: they
    are steps like any other, and see to it that every kernel is compiled. Then the step is recorded and from there on
    replayed. Batches of other shapes (the short last one of an epoch), and all batches while a module of
    the model, a weight or the optimiser carries hooks, run unrecorded, which is said once. Weights that moved are recorded anew.

    Args:
        step: must not depend on anything but its two tensors and what lies at fixed addresses.
        graphs: who records; `CudaGraphs` on a GPU.
        model: whose weights and hooks to watch.
        warm_ups: steps of one shape in a row before it is recorded.

    Raises:
        ValueError: `graphs` records on another device than that of the weights.
    """

    def __init__(
        self, step: TrainingStep, graphs: GraphMaker, model: nn.Module, warm_ups: int = 3
    ) -> None:
        bind = getattr(graphs, "bind", None)  # of `CudaGraphs`
        if bind is not None:
            bind(step.weights[0].device)
        self.step = step
        self._graphs, self._model, self._warm_ups = graphs, model, warm_ups
        self._recording: Recording | None = None
        self._warming: Recording | None = None  # before it is recorded
        self._key: tuple[Any, ...] | None = None
        self._places: tuple[Any, ...] = ()
        self._seen = 0
        self._failed = False
        self._said: set[str] = set()

    def __call__(self, features: Tensor, targets: Tensor) -> Tensor:
        """As `TrainingStep`; the result is a copy that later steps leave alone."""
        if self._failed:
            return self.step(features, targets)
        hooked = (
            watched_module(self._model)
            or _hooked_parameter(self._model)
            or _hooked_optimizer(self.step.optimizer)
        )
        if hooked is not None:
            return self._unrecorded("hooks", f"{hooked} carries hooks", features, targets)
        key = signature(features, targets)
        if self._recording is not None and self._places != self._now():
            _log.info("the weights moved: the training step is recorded anew")
            self.reset()
        if self._recording is None:
            if key != self._key or self._warming is None:
                self._warming = Recording(self._graphs, self.step, (features, targets))
                self._key, self._seen = key, 0
            if self._seen < self._warm_ups:
                self._seen += 1
                result: Tensor = self._warming.warm_up(features, targets)
                return result
            if not self._record(self._warming):
                return self.step(features, targets)
        elif key != self._key:
            shape = f"a batch of shape {tuple(features.shape)} is not the recorded one"
            return self._unrecorded("shape", shape, features, targets)
        assert self._recording is not None
        values: Tensor = self._recording(features, targets)
        note_step()
        return values.clone()

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self.step.set_lr(lr)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.step.zero_grad()

    def reset(self) -> None:
        """Forget the recording and free its memory; the next steps record again."""
        self._recording, self._warming, self._key, self._seen = None, None, None, 0
        self.step.zero_grad()

    def _record(self, recording: Recording) -> bool:
        self._warming = None
        self.step.zero_grad()
        draws = torch.get_rng_state()
        try:
            recording.record()
            if not torch.equal(draws, torch.get_rng_state()):
                torch.set_rng_state(draws)
                raise TrainingError(
                    "the step draws random numbers on the host, which a replay would repeat"
                )
        except Exception as error:
            _log.warning(
                "the training step could not be recorded as a CUDA graph and runs unrecorded: %s: %s",
                type(error).__name__,
                error,
            )
            self._failed = True
            error.__traceback__ = None  # holds every activation
        if self._failed:
            # nothing ran while it was recorded: the weights are as they were
            del recording
            self.step.zero_grad()
            empty_cache(self.step.weights[0].device)
            return False
        self._recording, self._places = recording, self._now()
        return True

    def _now(self) -> tuple[Any, ...]:
        """Everything whose change a replay would not see."""
        optimizer = self.step.optimizer
        tensors: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        for weight in self.step.weights:
            tensors.append(weight)
            tensors += [v for v in optimizer.state[weight].values() if isinstance(v, Tensor)]
        tensors += [g["lr"] for g in optimizer.param_groups if isinstance(g["lr"], Tensor)]
        wanted = tuple(p.requires_grad for p in self._model.parameters())
        settings = [  # numbers are written into the recording
            (name, value)
            for group in optimizer.param_groups
            for name, value in group.items()
            if name != "params" and not isinstance(value, Tensor)
        ]
        return addresses(tensors), wanted, self._model.training, settings

    def _unrecorded(self, kind: str, reason: str, features: Tensor, targets: Tensor) -> Tensor:
        if kind not in self._said:
            self._said.add(kind)
            _log.warning("training step not replayed from its CUDA graph: %s; said once", reason)
        counters = None
        try:
            if self._recording is not None:
                # which patches a step leaves out is counted there
                counters = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
            return self.step(features, targets)
        except Exception as error:
            if self._recording is None or counters is None or not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # holds every activation
        # the recording keeps the memory of a whole step to itself
        _log.warning("memory ran out beside the recorded step: it is dropped, to be recorded again")
        self.reset()
        empty_cache(features.device)
        with torch.no_grad():
            for buffer, before in counters:
                buffer.copy_(before)
        return self.step(features, targets)


def _hooked_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return name
    return None


def _hooked_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    everywhere = list(torch_optimizer._global_optimizer_pre_hooks.values())
    everywhere += torch_optimizer._global_optimizer_post_hooks.values()
    # a replay does itself what that one is for
    everywhere = [hook for hook in everywhere if hook is not note_step]
    return "the optimizer" if own or everywhere else None


class _CompiledInTraining:
    """A method compiled where autograd records, as it is elsewhere: evaluation has other shapes."""

    def __init__(self, method: Callable[..., Any], backend: Any) -> None:
        self._plain = method
        self._backend = backend
        self._compiled = torch.compile(method, fullgraph=True, backend=backend)
        functools.update_wrapper(self, method)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CompiledInTraining:
        # a method is copied with its object, a compiled function would stay that of the original
        return _CompiledInTraining(copy.deepcopy(self._plain, memo), self._backend)

    def __reduce__(self) -> Any:
        return _CompiledInTraining, (self._plain, self._backend)

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._plain)(*arguments)


def compile_blocks(blocks: Iterable[nn.Module], backend: Any = "inductor") -> int:
    """Compile the fused halves of identical transformer blocks in place; returns how many.

    Attributes, parameters and keys of the blocks stay. Blocks of other classes are left alone.

    Args:
        blocks: `model.v.blocks`.
        backend: of torch.compile.
    """
    count = 0
    for block in blocks:
        halves = getattr(block, "halves", None)
        if halves is not None and not isinstance(halves, _CompiledInTraining):
            block.halves = _CompiledInTraining(halves, backend)  # type: ignore[assignment]
            count += 1
    return count


def chosen_mode(config: TrainConfig, device: torch.device) -> str:
    """`off`, `regional` or `graph` for what a configuration asks on a device.

    Raises:
        TrainingError: a CUDA graph where there can be none.
    """
    fits = device.type == "cuda" and config.devices == 1
    if config.compile == "auto":
        # what a GPU measured as fastest: none has yet, and unproven speed is no default
        return "off"
    if config.compile == "graph" and not fits:
        where = f"{config.devices} devices" if device.type == "cuda" else f"a {device.type} device"
        raise TrainingError(
            f"compile='graph' on {where}: expected one CUDA device; use auto, regional or off"
        )
    return config.compile


def prepared_step(
    step: TrainingStep, mode: str, model: nn.Module, graphs: GraphMaker | None = None
) -> TrainingStep | GraphedStep:
    """The step as `mode` runs it: as it is, with compiled blocks, or recorded."""
    if mode == "regional":
        trunk: Any = getattr(model, "v", None)
        if trunk is None or not compile_blocks(trunk.blocks):
            raise TrainingError(
                f"compile='regional': {type(model).__name__} has no blocks of ours; use off or graph"
            )
    if mode == "graph":
        return GraphedStep(step, graphs or CudaGraphs(step.weights[0].device), model)
    return step
