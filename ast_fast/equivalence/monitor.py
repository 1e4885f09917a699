"""The equivalence monitor: during training, the reference runs beside the fast model and must agree.

One check costs a reference forward and backward of at most `max_clips` clips (float64 by default), one
of the fast model on the same clips, and, only where an error exceeds the fixed floor, one of plain
PyTorch to learn how large the unavoidable error is. On a GPU float64 runs at half the float32 rate or
far less: choose `check_every` so that the reported `seconds` stay small against a step times N.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MonitorConfig
from ..finite import blame, count_not_finite
from ..optimized import stale_packs
from . import whole
from .budgets import Budget, Precision, budget, precision_of
from .measures import Errors, measure, measure_all
from .run_ops import tf32
from .run_packed import BUDGETS

_log = logging.getLogger("ast_fast.equivalence")


class EquivalenceError(RuntimeError):
    """The fast path left its error budget."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MonitorRow:
    """One check.

    Attributes:
        step: as the caller counted, else the number of the check.
        clips: clips compared.
        precision: precision of the fast path, which chose the budgets.
        logits: largest error over max(|logit|, rms), and relative L2 error.
        logits_budget: what they may be.
        loss: the oracle's loss.
        loss_error: distance of the fast path's loss from it.
        loss_budget: what it may be; None under `torch.inference_mode`.
        gradient: one minus the cosine, and relative L2 error, over all trainable parameters as one
            vector; None without gradients.
        gradient_budget: what they may be.
        torch_ran: whether plain PyTorch had to run because a floor was exceeded.
        seconds: what the check cost.
        ok: whether everything is within budget.
    """

    step: int
    clips: int
    precision: str
    logits: tuple[float, float]
    logits_budget: tuple[float, float]
    loss: float | None
    loss_error: float | None
    loss_budget: float | None
    gradient: tuple[float, float] | None
    gradient_budget: tuple[float, float] | None
    torch_ran: bool
    seconds: float
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a log."""
        return dataclasses.asdict(self)

    def complaint(self) -> str:
        """What is over its budget, in words; empty if nothing is."""
        parts = []
        pairs = [("logits (worst, relative L2)", self.logits, self.logits_budget)]
        if self.gradient is not None and self.gradient_budget is not None:
            name = "gradient (1 - cosine, relative L2)"
            pairs.append((name, self.gradient, self.gradient_budget))
        for name, got, allowed in pairs:
            if not (got[0] <= allowed[0] and got[1] <= allowed[1]):
                parts.append(f"{name} {_pair(got)}, budget {_pair(allowed)}")
        loss = self.loss_error, self.loss_budget
        if loss[0] is not None and loss[1] is not None and not loss[0] <= loss[1]:
            parts.append(f"loss {loss[0]:.2e}, budget {loss[1]:.2e}")
        return "; ".join(parts)


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2e} {values[1]:.2e}"


class EquivalenceMonitor:
    """Compares a fast model with its reference on the user's own batches and weights.

    Args:
        model: an `ast_fast.ASTModel` on any device, or a wrapper (torch.compile, DDP, Fabric) of one.
        config: how often, on how many clips, in which dtype; and whether to stop the run.
        autocast_dtype: dtype of the autocast that the training step uses, if it does; by default what
            autocast is on when `step` is called.

    Attributes:
        rows: every check so far.
        seconds: what they cost together.

    >>> import ast_fast
    >>> model = ast_fast.create_model("ast_mini_p16_s10", num_classes=3, input_tdim=64)
    >>> monitor = EquivalenceMonitor(model)
    >>> monitor.step(torch.randn(2, 64, 128), lambda logits: logits.logsumexp(-1).mean()).ok
    True
    """

    def __init__(
        self,
        model: nn.Module,
        config: MonitorConfig | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config or MonitorConfig()
        self._call = model
        self._model = whole.unwrap(model)
        self._autocast_dtype = autocast_dtype
        self.rows: list[MonitorRow] = []
        self.seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether a check falls on this step."""
        every = self.config.check_every
        return every > 0 and step % every == 0

    def step(
        self,
        batch: Tensor | tuple[Tensor, Tensor],
        loss_fn: whole.LossFunction | None = None,
        *,
        step: int | None = None,
        gradients: bool | None = None,
    ) -> MonitorRow:
        """Run one check on the first clips of a batch.

        Weights, `.grad` fields, optimiser, train mode and random state are left as they were.

        Args:
            batch: features [B, S, F], waveforms [B, N], or (waveforms, lengths [B]).
            loss_fn: logits of the first clips of the batch to a scalar. Without one, only logits and
                a gradient for random upstream are compared.
            step: number for the log; the count of checks by default.
            gradients: whether to compare gradients; by default whether autograd is on and a parameter
                wants one.

        Raises:
            EquivalenceError: over budget, or packed weights are out of date, and the settings say to stop; or the
                reference gives NaN.
            ValueError: the batch is empty.
        """
        started = time.perf_counter()
        inputs, lengths = batch if isinstance(batch, tuple) else (batch, None)
        if not inputs.shape[0]:
            raise ValueError("batch holds no clips: expected at least one")
        clips = min(self.config.max_clips, inputs.shape[0])
        inputs = inputs[:clips].detach()
        lengths = None if lengths is None else lengths[:clips]
        if gradients is None:
            gradients = torch.is_grad_enabled() and bool(whole.trainable(self._model))
        self._check_packs()
        device = inputs.device
        with whole.kept_random_state(device):
            row = self._check(inputs, lengths, loss_fn, gradients, step, started)
        self.rows.append(row)
        self.seconds += row.seconds
        return self._judge(row)

    def _check_packs(self) -> None:
        stale = stale_packs(self._model)
        if not stale:
            return
        message = (
            f"packed weights of {len(stale)} blocks ({', '.join(stale[:3])}) are out of date: weights were written to "
            "past autograd (through .data, .numpy() or a pointer); call ast_fast.refresh_packed(model) after such "
            "writes"
        )
        if self.config.stop:
            raise EquivalenceError(message)
        _log.warning("%s", message)

    def _check(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        loss_fn: whole.LossFunction | None,
        gradients: bool,
        step: int | None,
        started: float,
    ) -> MonitorRow:
        model, autocast = self._model, self._current_autocast(inputs.device)
        oracle_dtype = getattr(torch, self.config.dtype)
        fewer = whole.fewer_tokens(model, inputs, lengths, autocast, gradients)
        with tf32(False):
            oracle, upstream = whole.run_oracle(
                model, inputs, lengths, loss_fn, oracle_dtype, gradients, fewer
            )
        if model.v.runner is not None:
            model.v.runner.ran = False
        fast = whole.run_fast(self._call, inputs, lengths, loss_fn, upstream, autocast)
        precision = _precision(model, inputs.device, autocast)
        if count_not_finite(oracle.logits):
            # NaN beside NaN would pass for agreement
            raise EquivalenceError(
                f"the reference's logits are NaN or infinite on {inputs.shape[0]} clips, so there is nothing to "
                f"compare with: {blame(model)}"
            )
        logits, gradient = _errors(fast, oracle)
        allowed = _allowed(precision, gradients, None, None)
        torch_ran = not (allowed[0].admits(logits) and allowed[1].admits(gradient))
        if torch_ran:
            plain = whole.run_plain(model, inputs, lengths, loss_fn, upstream, autocast, fewer)
            plain_logits, plain_gradient = _errors(plain, oracle)
            allowed = _allowed(precision, gradients, plain_logits, plain_gradient)
        loss_error = loss_budget = None
        if loss_fn is not None and fast.loss is not None and oracle.loss is not None:
            loss_error = abs(fast.loss - oracle.loss)
            # the loss's slope is not to be had under inference_mode: the loss is shown, not judged
            if not torch.is_inference_mode_enabled():
                loss_budget = _loss_budget(oracle.logits, loss_fn, oracle.loss, allowed[0])
        row = MonitorRow(
            step=len(self.rows) if step is None else step,
            clips=inputs.shape[0],
            precision=precision,
            logits=(logits.worst, logits.rel_l2),
            logits_budget=(allowed[0].worst, allowed[0].rel_l2),
            loss=oracle.loss,
            loss_error=loss_error,
            loss_budget=loss_budget,
            gradient=(gradient.worst, gradient.rel_l2) if gradients else None,
            gradient_budget=(allowed[1].worst, allowed[1].rel_l2) if gradients else None,
            torch_ran=torch_ran,
            seconds=time.perf_counter() - started,
            ok=False,
        )
        return dataclasses.replace(row, ok=not row.complaint())

    def _judge(self, row: MonitorRow) -> MonitorRow:
        if row.ok:
            gradient = "" if row.gradient is None else f", gradient {_pair(row.gradient)}"
            _log.info(
                "step %d: fast path agrees with the reference on %d clips (%s): logits %s%s, %.2f s",
                *(row.step, row.clips, row.precision, _pair(row.logits), gradient, row.seconds),
            )
            return row
        message = (
            f"step {row.step}: the fast path differs from the reference ({self.config.dtype}) on "
            f"{row.clips} clips in {row.precision}: {row.complaint()}. Run `ast-fast verify` to find the "
            "op; ast_fast.use_backend('reference') trains on without the fast path; "
            "MonitorConfig(stop=False) only logs"
        )
        if self.config.stop:
            raise EquivalenceError(message)
        _log.warning("%s", message)
        return row

    def _current_autocast(self, device: torch.device) -> torch.dtype | None:
        if self._autocast_dtype is not None:
            return self._autocast_dtype
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return None


def _precision(model: Any, device: torch.device, autocast_dtype: torch.dtype | None) -> Precision:
    runner = model.v.runner
    if runner is not None and runner.ran and runner.precision != "exact":
        return BUDGETS[runner.precision]
    if whole.runs_fp8(model):
        return "fp8"
    dtype = next(model.parameters()).dtype
    narrow = autocast_dtype if autocast_dtype is not None and dtype != torch.float64 else dtype
    # a float64 model is held to the float32 budget: the looser of the two that both sides can meet
    narrow = torch.float32 if narrow == torch.float64 else narrow
    loose = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return precision_of(narrow, tf32=loose)


def _allowed(
    precision: Precision, gradients: bool, logits: Errors | None, gradient: Errors | None
) -> tuple[Budget, Budget]:
    # bytes are for inference: there is no budget of a gradient, and none to be judged
    none = Budget(0.0, 0.0)
    return (
        budget("logits", precision, logits),
        budget("whole gradient", precision, gradient) if gradients else none,
    )


def _errors(outcome: whole.Outcome, oracle: whole.Outcome) -> tuple[Errors, Errors]:
    """Errors of logits, and of all gradients with one minus the cosine in place of the worst entry."""
    logits = measure(outcome.logits, oracle.logits)
    if not oracle.grads:
        return logits, Errors(0.0, 0.0, 0.0, 0.0)
    errors, sine = measure_all(
        (outcome.grads[name] for name in oracle.grads), oracle.grads.values()
    )
    return logits, errors._replace(worst=sine)


def _loss_budget(
    logits: Tensor, loss_fn: whole.LossFunction, loss: float, allowed: Budget
) -> float:
    """How far the loss can move while every logit stays within its budget.

    Taken at the two corners of the box that the loss's slope points to, which are the extremes of a
    convex loss such as a softmax or sigmoid cross entropy; half as much again for other losses, and
    for float32 rounding of the loss itself.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(leaf), leaf)
    scale = float(logits.square().mean().sqrt())
    reach = allowed.worst * logits.abs().clamp(min=scale) * slope.sign()
    moved = (abs(float(loss_fn(logits + sign * reach)) - loss) for sign in (1.0, -1.0))
    return 1.5 * max(moved) + 1e-6 * max(abs(loss), 1.0)
