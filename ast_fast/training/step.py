"""One training step as a function of device tensors alone.

`TrainingStep` computes loss and gradient, clips, and updates the weights unless loss or gradient is not
finite. It never waits for the device: that decision is taken there, and the caller reads loss and norm
afterwards. So the whole step can be recorded and replayed (`modes.py`). Where memory runs out, the step
is whole or has not happened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StepOutOfMemoryError, TrainingError
from .scaling import LossScaler
from .weights import Masters, Norm, total_norm

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
        optimizer: a fused one of PyTorch's that counts its steps (AdamW, Adam), which skips a step and
            scales gradients by itself. Its step hooks run once for each parameter group.
        masters: the masters or parts that the optimiser updates, if it does not update the model's own
            weights.
        max_norm: largest gradient norm; 0 switches clipping off.
        backward: how to run backward; `Tensor.backward` by default.
        reduce: mean of a tensor over the processes, if there are several.
        parts: parts of a batch that are computed one after the other; their gradients add up to that
            of the batch.
        hold: a context in which gradients are not yet sent to other processes: around the backward of
            all parts but the last.
        scaler: scale of the loss for float16, whose small gradients vanish otherwise.
        norm: of gradients as one vector, over all processes if each has a part of them.
        every_part: compute parts without clips too, because other processes wait for this one.

    Raises:
        TypeError: the optimiser is not a fused one, or counts no steps (SGD).
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        *,
        masters: Masters | None = None,
        max_norm: float = 0.0,
        backward: Callable[[Tensor], None] = Tensor.backward,
        reduce: Callable[[Tensor], Tensor] | None = None,
        parts: int = 1,
        hold: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        scaler: LossScaler | None = None,
        norm: Norm = total_norm,
        every_part: bool = False,
    ) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__} without fused=True: expected one that skips "
                "a step on the device; pass fused=True"
            )
        self._call, self._loss_fn = call, loss_fn
        self.optimizer, self.masters = optimizer, masters
        self._max_norm, self._backward, self._reduce = max_norm, backward, reduce
        self._parts, self._hold, self.scaler = parts, hold, scaler
        self._norm, self._split = norm, torch.tensor_split if every_part else torch.chunk
        _fill_state(optimizer)
        if any("step" not in optimizer.state[weight] for weight in self.weights):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, which counts no steps: expected AdamW or "
                "Adam with fused=True; without a count a step half done cannot be told from a whole one"
            )

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the optimiser updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on; lives on the device, where a recording finds it.

        A group with a `rate` of its own learns so many times as fast.
        """
        for group in self.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                device = group["params"][0].device
                group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
            group["lr"].fill_(lr * group.get("rate", 1.0))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        if self.masters is not None:
            self.masters.zero_grad()
        self.optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Let go of what a step that failed still holds."""
        self.zero_grad()

    def __call__(self, features: Tensor, targets: Tensor) -> Tensor:
        """One step; returns loss and gradient norm before clipping, [2] float32 on the device.

        Where one of them is not finite the weights and the optimiser are left as they were.
        """
        self.zero_grad()
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        rows = max(1, len(features))
        pieces = (self._split(each, self._parts) for each in (features, targets))
        parts = list(zip(*pieces, strict=True))
        for number, (part, wanted) in enumerate(parts, start=1):
            with self._hold() if number < len(parts) else contextlib.nullcontext():
                loss += self._part(part, wanted, len(part) / rows if len(parts) > 1 else 1.0)
        return self._update(loss)

    def _part(self, features: Tensor, targets: Tensor, share: float) -> Tensor:
        """Add a part's gradient; returns its share of the loss."""
        loss = self._loss_fn(self._call(features).float(), targets)
        loss = loss if share == 1.0 else loss * share
        self._backward(loss if self.scaler is None else loss * self.scaler.scale)
        return loss.detach().float()

    @torch.no_grad()
    def _update(self, loss: Tensor) -> Tensor:
        if self.masters is None:
            grads = [p.grad for p in self.weights if p.grad is not None]
        else:
            grads = self.masters.gather()
        norm = self._norm(grads)
        if self.scaler is not None:
            norm = norm / self.scaler.scale
        values = torch.stack((loss, norm))
        if self._reduce is not None:
            # the mean is NaN everywhere if it is NaN anywhere
            values = self._reduce(values)
        optimizer: Any = self.optimizer
        optimizer.found_inf = values.isfinite().all().logical_not().float()
        scale = ((norm + 1e-6) / self._max_norm).clamp_(min=1.0) if self._max_norm else None
        if self.scaler is not None:
            scale = self.scaler.scale.clone() if scale is None else scale * self.scaler.scale
        optimizer.grad_scale = scale
        try:
            self._update_groups()
            if self.scaler is not None:
                self.scaler.update(optimizer.found_inf)
        finally:
            optimizer.found_inf = optimizer.grad_scale = None
        if self.masters is not None:
            self._scatter(self.masters)
        return values

    def _scatter(self, masters: Masters) -> None:
        try:
            masters.scatter()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the masters have been updated: the model must follow
            empty_cache(self.weights[0].device)
            with _memory_twice():
                masters.scatter()

    def _update_groups(self) -> None:
        """One group after the other, so that memory running out leaves no update half done."""
        groups = self.optimizer.param_groups
        if not all(self.optimizer.state[weight] for weight in self.weights):
            _fill_state(self.optimizer)  # a checkpoint of weights that had no gradient yet
        with_grads = [[p for p in group["params"] if p.grad is not None] for group in groups]
        # all before the first update: until then nothing has changed where memory runs out
        counts = [
            self.optimizer.state[used[0]]["step"].clone() if used else None for used in with_grads
        ]
        try:
            for group, used, before in zip(groups, with_grads, counts, strict=True):
                if before is None:
                    continue
                self.optimizer.param_groups = [group]
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
        empty_cache(steps[0].device)
        with _memory_twice():
            if not torch.equal(steps[0], before):
                torch._foreach_sub_(steps, 1.0)
            self.optimizer.step()


@contextlib.contextmanager
def _memory_twice() -> Iterator[None]:
    """Say that an update may be half done where memory runs out in its second try."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out twice while the weights were updated: some may be those after the step; "
            f"go on from the last checkpoint; {_LOWER}"
        ) from error


def empty_cache(device: torch.device) -> None:
    """Give memory that nothing uses back to the device; never raises: it is called where something failed."""
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            _log.info("memory could not be given back to the device: %s", error)


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


def run_step(step: Any, features: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """Run a `TrainingStep` or a `GraphedStep`; if memory runs out, free what it held and say what to lower.

    Raises:
        StepOutOfMemoryError: the weights are those before the step.
    """
    try:
        values: Tensor = step(features, targets)
        return values
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # the traceback holds every activation of the failed step
        message = str(error).split("\n")[0]
        error.__traceback__ = None
    step.reset()
    empty_cache(features.device)
    raise StepOutOfMemoryError(
        f"batch_size={batch_size}: a training step does not fit into memory ({message}); the weights are "
        f"unchanged; {_LOWER}"
    )
