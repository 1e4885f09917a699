"""The training loop: waveforms in, augmented on the device, checked against the reference on the way.

Short on purpose. Lightning Fabric places the model and handles precision and processes; everything
else is here. All randomness of a step follows from the seed and the number of the step, so that a
resumed run repeats an uninterrupted one bit by bit.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._optional import require_package
from ..audio import AudioReport
from ..config import ModelConfig, TrainConfig
from ..data.dataset import Batch, ClipSet, max_samples
from ..data.feeder import Feeder, FeedStats
from ..data.sampler import balanced_weights
from ..data.shard_sampler import sampler_for
from ..data.transfer import Fed
from ..frontend import log_mel_features
from ..hub import CheckpointError, read_weights
from .augment import (
    augment_features,
    augment_waveforms,
    clip_seeds,
    mixup,
    seek_patchout,
    set_patchout,
)
from .checkpoints import CheckpointStore
from .evaluate import Evaluation, evaluate
from .logs import Progress, RunLog
from .schedules import rate_factor

_log = logging.getLogger("ast_fast.training")


class TrainingError(RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """Loss or gradient is NaN or infinite. The weights are those before the step."""


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the state is saved in {run_dir}")
        self.run_dir = run_dir
        self.step = step


def _with_problem_type(model: Any, multi_label: bool) -> Any:
    """The same model, which notes what it is trained for: tagging needs to know it when it is saved."""
    if isinstance(getattr(model, "config", None), ModelConfig):
        kind = "multi" if multi_label else "single"
        model.config = model.config.replace(problem_type=f"{kind}_label_classification")
    return model


class Trainer:
    """Trains a model with `forward_waveform` on clips.

    Args:
        model: as `ast_fast.create_model` makes it, on the CPU.
        train_set: clips to learn from.
        config: see `TrainConfig`.
        run_dir: gets `checkpoints/`, `log.jsonl` and, if a loss is not finite, `bad-batch/`.
        eval_set: evaluated after each epoch; decides which checkpoint is best.
        resume: go on from the newest checkpoint of the run folder, if there is one.
        progress: a bar on a terminal, lines elsewhere.

    Attributes:
        model: the model, on its device.
        step: optimiser steps done.
        total_steps: steps of the whole run.
        audio_report: what reading files changed and skipped since the start of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: ClipSet,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        eval_set: ClipSet | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        fabric_module = require_package("lightning_fabric", "training", "train")
        if config.accelerator == "cuda" and not torch.cuda.is_available():
            raise TrainingError("accelerator='cuda': PyTorch sees no GPU here; use auto or cpu")
        self.config = config
        self.run_dir = Path(run_dir)
        self.train_set, self.eval_set = train_set, eval_set
        self.multi_label = config.loss == "binary_cross_entropy"
        self.fabric = fabric_module.Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        )
        if config.devices > 1:
            self.fabric.launch()
        # an nn.Module with frontend_config, forward_waveform, save_pretrained
        self.model: Any = _with_problem_type(model, self.multi_label)
        set_patchout(model, config.augment, config.seed)
        self._sampler = sampler_for(
            train_set,
            config.batch_size,
            seed=config.seed,
            weights=balanced_weights(train_set.labels, len(train_set.classes))
            if config.class_balanced
            else None,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=config.lr, betas=config.betas, fused=True
        )
        # wrapped for precision and processes; the plain model is self.model, with the same weights
        self._wrapped, self._optimizer = self.fabric.setup(model, optimizer)
        self._monitor = None
        if config.monitor.check_every and self.fabric.is_global_zero:
            from ..equivalence import EquivalenceMonitor

            autocast = torch.bfloat16 if config.precision == "bfloat16" else None
            self._monitor = EquivalenceMonitor(model, config.monitor, autocast)
        self.total_steps = config.epochs * len(self._sampler)
        self.step = 0
        self.best: float | None = None
        self.audio_report = AudioReport()
        self._said = ""
        self._epoch_clips = 0
        self._stop = False
        self._feature_step = 0
        self._progress_wanted = progress and self.fabric.is_global_zero
        self._store = CheckpointStore(
            self.run_dir / "checkpoints", config.keep_checkpoints, self.fabric.is_global_zero
        )
        if resume:
            self._resume()
        elif self._store.pointer("latest") is not None:
            self._store.close()
            raise TrainingError(
                f"{self.run_dir} holds a run already: resume it, delete it or choose another folder"
            )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay acts on matrices only, not on biases, norms and tokens."""
        decayed = [p for p in self._parameters.values() if p.dim() == 2 or p.dim() == 4]
        plain = [p for p in self._parameters.values() if p.dim() != 2 and p.dim() != 4]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def fit(self) -> Evaluation | None:
        """Train to the end, from wherever the run stands.

        Returns:
            The evaluation after the last epoch, if there is an evaluation set.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
            NonFiniteLossError: the batch is saved, the weights are unchanged.
            EquivalenceError: the fast path left its error budget.
            CheckpointWriteError: the disk is full.
        """
        log = RunLog(self.run_dir / "log.jsonl", self.step) if self.fabric.is_global_zero else None
        bar = Progress(self.total_steps, self.step, "training", self._progress_wanted)
        self._evaluation: Evaluation | None = None
        feeder = self._feeder()
        try:
            with _stop_signals(self._request_stop):
                while self._sampler.epoch < self.config.epochs:
                    self._run_epoch(feeder, log, bar)
        finally:
            feeder.close()
            bar.close()
            if log is not None:
                log.close()
            self._store.close()
        if self._evaluation is None and self.eval_set is not None:
            self._evaluation = self._evaluate()
        return self._evaluation

    def _feeder(self) -> Feeder:
        return Feeder(
            self.train_set,
            self._sampler,
            multi_label=self.multi_label,
            device=self.fabric.device,
            transform=self._features,
            most_samples=max_samples(self.model.frontend_config),
            num_workers=self.config.num_workers,
        )

    def _run_epoch(self, feeder: Feeder, log: RunLog | None, bar: Progress) -> None:
        config, epoch = self.config, self._sampler.epoch
        self._wrapped.train()
        started, clips = time.perf_counter(), 0
        self._feature_step = self.step
        feeder.stats = FeedStats()
        for fed in feeder:
            batch = fed.batch
            self.audio_report.merge(batch.report)
            values = {} if fed.features is None else self._train_step(fed, log)
            clips += len(batch)
            self._epoch_clips += len(batch)
            self.step += 1
            self._sampler.step()
            shown = {"epoch": str(epoch + 1), **{k: f"{v:.4g}" for k, v in values.items()}}
            bar.step(**shown)
            if log is not None and values and self.step % config.log_every == 0:
                rate = clips / (time.perf_counter() - started)
                log.write(
                    "step",
                    self.step,
                    epoch=epoch,
                    clips_per_second=rate,
                    wait_share=feeder.stats.wait_share,
                    **values,
                )
            last = self._sampler.epoch > epoch
            if not last and self._should_stop():
                self._save()
                raise TrainingInterrupted(self.run_dir, self.step)
            if config.checkpoint_every and self.step % config.checkpoint_every == 0 and not last:
                self._save()
        said = f"{time.perf_counter() - started:.1f} s, {feeder.stats.summary()}"
        self._end_epoch(epoch, said, log, bar)

    def _end_epoch(self, epoch: int, said: str, log: RunLog | None, bar: Progress) -> None:
        if not self._epoch_clips:
            raise TrainingError(
                f"no clip of the training set could be read: {self.audio_report.summary()}"
            )
        self._epoch_clips = 0
        best = False
        text = f"epoch {epoch + 1} of {self.config.epochs}: {said}"
        if self.eval_set is not None:
            self._evaluation = self._evaluate()
            figures = self._evaluation.figures
            skipped = self._evaluation.report.num_skipped
            score = figures.get("map", figures.get("accuracy", -figures["loss"]))
            best = self.best is None or score > self.best
            self.best = score if best else self.best
            text += "".join(f", {name} {value:.4f}" for name, value in figures.items())
            text += f" ({skipped} clips of the evaluation set unreadable)" if skipped else ""
            if log is not None:
                log.write("eval", self.step, epoch=epoch, skipped=skipped, **figures)
        bar.say(text)
        said = self.audio_report.changes()
        if said and said != self._said:
            bar.say(f"  clips so far: {said}")
            self._said = said
        self._save(best)
        if self._sampler.epoch < self.config.epochs and self._should_stop():
            raise TrainingInterrupted(self.run_dir, self.step)

    def _evaluate(self) -> Evaluation:
        assert self.eval_set is not None
        return evaluate(
            self.model,
            self.eval_set,
            batch_size=2 * self.config.batch_size,
            multi_label=self.multi_label,
            num_workers=self.config.num_workers,
            bfloat16=self.config.precision == "bfloat16",
        )

    def _train_step(self, fed: Fed, log: RunLog | None) -> dict[str, float]:
        config, batch = self.config, fed.batch
        features, targets = fed.features
        seek_patchout(self.model, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * rate_factor(
                self.step, self.total_steps, config.warmup_steps, config.schedule
            )
        loss_fn = self._loss_function(targets)
        if self._monitor is not None and self._monitor.due(self.step) and len(batch):
            row = self._monitor.step(features, loss_fn, step=self.step)
            if log is not None:
                log.write("check", **row.to_dict())
        self._optimizer.zero_grad()
        logits = self._wrapped(features)
        loss = loss_fn(logits.float())
        self.fabric.backward(loss)
        limit = config.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), limit)
        # one wait for the device a step, before the weights change
        values = torch.stack([loss.detach(), norm.detach()])
        if self.fabric.world_size > 1:
            # the mean is NaN everywhere if it is NaN anywhere
            values = self.fabric.all_reduce(values)
        loss_value, norm_value = values.tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._bad_batch(batch, features, targets, loss_value, norm_value)
        self._optimizer.step()
        rate = self._optimizer.param_groups[0]["lr"]
        return {"loss": loss_value, "grad_norm": norm_value, "lr": rate}

    @torch.no_grad()
    def _features(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Augmented log-mel [B, S, F] and targets of a batch on the device; None: nothing to do.

        May run ahead of the steps, but always in their order.
        """
        step, self._feature_step = self._feature_step, self._feature_step + 1
        if not len(batch) and self.config.devices == 1:
            return None
        # by clip rather than by process: the same on every device and over any number of them
        seeds = clip_seeds(self.config.seed, step, batch.indices, len(self.train_set))
        placed, settings = seeds.to(self.fabric.device), self.config.augment
        wave = augment_waveforms(batch.wave, batch.lengths, settings, placed)
        targets = batch.targets
        if settings.mixup:
            classes = len(self.train_set.classes)
            wave, targets = mixup(wave, batch.lengths, targets, settings.mixup, classes, seeds)
        front = self.model.frontend_config
        features = log_mel_features(wave, front, batch.lengths)
        return augment_features(features, settings, front, placed), targets

    def _loss_function(self, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """Loss of logits [B, C] for these targets."""
        function: Callable[[Tensor, Tensor], Tensor] = (
            nn.functional.binary_cross_entropy_with_logits
            if self.multi_label
            else nn.functional.cross_entropy
        )

        def loss(logits: Tensor) -> Tensor:
            rows = targets[: len(logits)]
            if not len(rows):  # another process has clips in this step: take part with nothing
                return logits.sum() * 0.0
            return function(logits, rows.to(logits.dtype) if rows.is_floating_point() else rows)

        return loss

    def _bad_batch(
        self, batch: Batch, features: Tensor, targets: Tensor, loss: float, norm: float
    ) -> NonFiniteLossError:
        folder = self.run_dir / "bad-batch"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "wave": batch.wave,
            "lengths": batch.lengths,
            "indices": batch.indices,
            "features": features,
            "targets": targets,
        }
        file = folder / f"step-{self.step:08d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
        self._optimizer.zero_grad()
        return NonFiniteLossError(
            f"step {self.step}: the loss is {loss:g} and the gradient norm {norm:g}; the weights are "
            f"unchanged and the batch is in {file}; look at its clips, lower lr={self.config.lr:g}, "
            "or resume from the last checkpoint"
        )

    def _request_stop(self) -> None:
        self._stop = True

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        if self.fabric.world_size == 1:
            return self._stop
        flag = torch.tensor(float(self._stop), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum"))

    # ---- state on disk

    def _save(self, best: bool = False) -> None:
        if self.fabric.is_global_zero:
            tensors = {"rng.cpu": torch.get_rng_state()}
            if self.fabric.device.type == "cuda":
                tensors["rng.cuda"] = torch.cuda.get_rng_state(self.fabric.device)
            for name, parameter in self._parameters.items():
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value
            state = {
                "step": self.step,
                "best": self.best,
                "epoch_clips": self._epoch_clips,
                "sampler": self._sampler.state_dict(),
                "train": self.config.to_dict(),
            }
            self._store.save(self.step, self.model.save_pretrained, tensors, state, best)
        if self.fabric.world_size > 1:
            self.fabric.barrier()

    def _resume(self) -> None:
        checkpoint = self._store.load()
        if checkpoint is None:
            return
        saved, mine = checkpoint.state["train"], _as_json(self.config.to_dict())
        changed = sorted(name for name in mine if saved.get(name) != mine[name])
        free = {"log_every", "checkpoint_every", "keep_checkpoints", "num_workers", "monitor"}
        if set(changed) - free:
            raise CheckpointError(
                f"{checkpoint.folder}: was trained with other settings: "
                + ", ".join(f"{name}={saved.get(name)!r}" for name in changed if name not in free)
                + "; resume with the same, or choose another run folder"
            )
        weights, _ = read_weights(checkpoint.folder / "model")
        self.model.load_state_dict(weights, strict=True)
        for name, parameter in self._parameters.items():
            found = {
                key.split(".", 2)[1]: value
                for key, value in checkpoint.tensors.items()
                if key.startswith("optimizer.") and key.split(".", 2)[2] == name
            }
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in found.items()
            }
        torch.set_rng_state(checkpoint.tensors["rng.cpu"])
        if "rng.cuda" in checkpoint.tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"], self.fabric.device)
        self._sampler.load_state_dict(checkpoint.state["sampler"])
        self.step = int(checkpoint.state["step"])
        self.best = checkpoint.state["best"]
        self._epoch_clips = int(checkpoint.state["epoch_clips"])


def _as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


class _stop_signals:
    """SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once."""

    def __init__(self, request: Callable[[], None]) -> None:
        self._request = request
        self._previous: dict[int, Any] = {}
        self._asked = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        _log.warning("stopping after this step and saving the state; Ctrl-C again stops at once")
        self._request()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
