"""One training step as a function of device tensors alone, and three ways to run it.

`TrainingStep` computes loss and gradient, clips, and updates the weights unless loss or gradient is not
finite. It never waits for the device: that decision is taken there, and the caller reads loss and norm
afterwards. So the whole step can be recorded and replayed by `GraphedStep`. `compile_blocks` compiles the
identical blocks of a model once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..graphs import CudaGraphs, GraphMaker, Recording, addresses, signature, watched_module
from .errors import StepOutOfMemoryError, TrainingError
from .master import MasterWeights

LossFunction = Callable[[Tensor, Tensor], Tensor]

_log = logging.getLogger("ast_fast.training")
_LOWER = (
    "lower batch_size, or set activation_memory to 'less' (LayerNorms computed again in backward) or "
    "'least' (whole blocks computed again)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in PyTorch's CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class TrainingStep:
    """Forward, loss, backward, clipping and update of all weights.

    Args:
        call: features [B, S, F] to logits [B, C]; a model or a wrapper of one.
        loss_fn: of float32 logits and targets.
        optimizer: a fused one of PyTorch's, which skips a step and scales gradients by itself.
        masters: the masters that the optimiser updates, if it does not update the model's own weights.
        max_norm: largest gradient norm; 0 switches clipping off.
        backward: how to run backward; `Tensor.backward` by default.
        reduce: mean of a tensor over the processes, if there are several.

    Raises:
        TypeError: the optimiser is not a fused one.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        *,
        masters: MasterWeights | None = None,
        max_norm: float = 0.0,
        backward: Callable[[Tensor], None] = Tensor.backward,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__} without fused=True: expected one that skips "
                "a step on the device; pass fused=True"
            )
        self._call, self._loss_fn = call, loss_fn
        self.optimizer, self.masters = optimizer, masters
        self._max_norm, self._backward, self._reduce = max_norm, backward, reduce
        _fill_state(optimizer)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the optimiser updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on; lives on the device, where a recording finds it."""
        for group in self.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                device = group["params"][0].device
                group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
            group["lr"].fill_(lr)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        if self.masters is not None:
            self.masters.zero_grad()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, features: Tensor, targets: Tensor) -> Tensor:
        """One step; returns loss and gradient norm before clipping, [2] float32 on the device.

        Where one of them is not finite the weights and the optimiser are left as they were.
        """
        self.zero_grad()
        loss = self._loss_fn(self._call(features).float(), targets)
        self._backward(loss)
        return self._update(loss.detach())

    @torch.no_grad()
    def _update(self, loss: Tensor) -> Tensor:
        if self.masters is None:
            grads = [p.grad for p in self.weights if p.grad is not None]
        else:
            grads = self.masters.gather()
        norm = nn.utils.get_total_norm(grads)
        values = torch.stack((loss.float(), norm.float()))
        if self._reduce is not None:
            # the mean is NaN everywhere if it is NaN anywhere
            values = self._reduce(values)
        optimizer: Any = self.optimizer
        optimizer.found_inf = values.isfinite().all().logical_not().float()
        optimizer.grad_scale = (
            ((norm.float() + 1e-6) / self._max_norm).clamp_(min=1.0) if self._max_norm else None
        )
        try:
            self._update_groups()
        finally:
            optimizer.found_inf = optimizer.grad_scale = None
        if self.masters is not None:
            self.masters.scatter()
        return values

    def _update_groups(self) -> None:
        """One group after the other, so that memory running out leaves no update half done."""
        groups = self.optimizer.param_groups
        try:
            for group in groups:
                used = [p for p in group["params"] if p.grad is not None]
                if not used:
                    continue
                self.optimizer.param_groups = [group]
                before = self.optimizer.state[used[0]]["step"].clone()
                try:
                    self.optimizer.step()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    _log.warning("memory ran out while the weights were updated: trying once more")
                    self._once_more(used, before)
        finally:
            self.optimizer.param_groups = groups

    def _once_more(self, used: list[nn.Parameter], before: Tensor) -> None:
        # the optimiser counts a step before it takes it
        steps = [self.optimizer.state[p]["step"] for p in used]
        if not torch.equal(steps[0], before):
            torch._foreach_sub_(steps, 1.0)
        if steps[0].is_cuda:
            torch.cuda.empty_cache()
        self.optimizer.step()


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Make Adam's moments now: later, memory could run out between two of them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "betas" in group and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
                if group.get("amsgrad"):
                    optimizer.state[parameter]["max_exp_avg_sq"] = torch.zeros_like(parameter.data)


class GraphedStep:
    """A training step recorded once and replayed; to the bit what the step itself computes.

    The first steps of a shape run as they are, on the stream that will record: they are steps like any
    other, and see to it that every kernel is compiled. Then the step is recorded and from there on
    replayed. Batches of other shapes (the short last one of an epoch), and all batches while a module of
    the model carries hooks, run unrecorded, which is said once. Weights that moved are recorded anew.

    Args:
        step: must not depend on anything but its two tensors and what lies at fixed addresses.
        graphs: who records; `graphs.CudaGraphs` on a GPU.
        model: whose weights and hooks to watch.
        warm_ups: steps of one shape in a row before it is recorded.
    """

    def __init__(
        self, step: TrainingStep, graphs: GraphMaker, model: nn.Module, warm_ups: int = 3
    ) -> None:
        self.step = step
        self._graphs, self._model, self._warm_ups = graphs, model, warm_ups
        self._recording: Recording | None = None
        self._key: tuple[Any, ...] | None = None
        self._places: tuple[Any, ...] = ()
        self._seen = 0
        self._failed = False
        self._said: set[str] = set()

    def __call__(self, features: Tensor, targets: Tensor) -> Tensor:
        """As `TrainingStep`; the result is a copy that later steps leave alone."""
        if self._failed:
            return self.step(features, targets)
        hooked = watched_module(self._model)
        if hooked is not None:
            return self._unrecorded("hooks", f"{hooked} carries hooks", features, targets)
        key = signature(features, targets)
        if self._recording is not None and self._places != self._now():
            _log.info("the weights moved: the training step is recorded anew")
            self.reset()
        if self._recording is None:
            if key != self._key:
                self._key, self._seen = key, 0
            if self._seen < self._warm_ups:
                self._seen += 1
                result: Tensor = self._graphs.warm_up(lambda: self.step(features, targets))
                return result
            if not self._record(features, targets):
                return self.step(features, targets)
        elif key != self._key:
            shape = f"a batch of shape {tuple(features.shape)} is not the recorded one"
            return self._unrecorded("shape", shape, features, targets)
        assert self._recording is not None
        values: Tensor = self._recording(features, targets)
        return values.clone()

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self.step.set_lr(lr)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.step.zero_grad()

    def reset(self) -> None:
        """Forget the recording and free its memory; the next steps record again."""
        self._recording, self._key, self._seen = None, None, 0
        self.step.zero_grad()

    def _record(self, features: Tensor, targets: Tensor) -> bool:
        self.step.zero_grad()
        try:
            self._recording = Recording(self._graphs, self.step, (features, targets))
        except Exception as error:
            # nothing ran while it was recorded: the weights are as they were
            self.step.zero_grad()
            if is_out_of_memory(error):
                raise
            self._failed = True
            _log.warning(
                "the training step could not be recorded as a CUDA graph and runs unrecorded: %s: %s",
                type(error).__name__,
                error,
            )
            return False
        self._places = self._now()
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
        return addresses(tensors), wanted, self._model.training

    def _unrecorded(self, kind: str, reason: str, features: Tensor, targets: Tensor) -> Tensor:
        if kind not in self._said:
            self._said.add(kind)
            _log.warning("training step not replayed from its CUDA graph: %s; said once", reason)
        return self.step(features, targets)


def run_step(
    step: TrainingStep | GraphedStep, features: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """Run a step; if memory runs out, free what it held and say what to lower.

    Raises:
        StepOutOfMemoryError: the weights are those before the step.
    """
    try:
        return step(features, targets)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # the traceback holds every activation of the failed step
        message = str(error).split("\n")[0]
        error.__traceback__ = None
    if isinstance(step, GraphedStep):
        step.reset()
    else:
        step.zero_grad()
    if features.is_cuda:
        torch.cuda.empty_cache()
    raise StepOutOfMemoryError(
        f"batch_size={batch_size}: a training step does not fit into memory ({message}); the weights are "
        f"unchanged; {_LOWER}"
    )


class _CompiledInTraining:
    """A method compiled where autograd records, as it is elsewhere: evaluation has other shapes."""

    def __init__(self, method: Callable[..., Any], backend: Any) -> None:
        self._plain = method
        self._compiled = torch.compile(method, fullgraph=True, backend=backend)
        functools.update_wrapper(self, method)

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
        return "graph" if fits else "off"
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
        return GraphedStep(step, graphs or CudaGraphs(), model)
    return step
