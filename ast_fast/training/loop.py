"""The training loop: waveforms in, augmented on the device, checked against the reference on the way.

Short on purpose. Lightning Fabric places the model and handles precision and processes; everything
else is here. All randomness of a step follows from the seed and the number of the step, so that a
resumed run repeats an uninterrupted one bit by bit.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
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
from .errors import NonFiniteLossError, TrainingError, TrainingInterrupted
from .evaluation import Evaluation, evaluate
from .logs import Progress, RunLog
from .master import MasterWeights
from .modes import chosen_mode, prepared_step
from .schedules import rate_factor
from .step import TrainingStep, run_step
from .stopping import stop_signals

# settings that a resumed run may change: they say how it runs
_FREE = frozenset(
    {
        *("log_every", "checkpoint_every", "keep_checkpoints", "num_workers", "monitor"),
        *("compile", "activation_memory"),
    }
)


def _with_problem_type(model: Any, multi_label: bool) -> Any:
    """The same model, which notes what it is trained for: tagging needs to know it when it is saved."""
    if isinstance(getattr(model, "config", None), ModelConfig):
        kind = "multi" if multi_label else "single"
        model.config = model.config.replace(problem_type=f"{kind}_label_classification")
    return model


def _loss(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of logits [B, C], for as many targets as there are."""
    rows = targets[: len(logits)]
    if not len(rows):  # another process has clips in this step: take part with nothing
        return logits.sum() * 0.0
    return function(logits, rows.to(logits.dtype) if rows.is_floating_point() else rows)


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
            precision="32-true" if config.precision == "float32" else "bf16-mixed",
        )
        if config.devices > 1:
            self.fabric.launch()
        # an nn.Module with frontend_config, forward_waveform, save_pretrained
        self.model: Any = _with_problem_type(model, self.multi_label)
        if config.precision == "fp8":
            self.model.set_precision("fp8")
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
        # bound to its function rather than to the trainer, which would then be part of a cycle
        self._loss = functools.partial(
            _loss,
            nn.functional.binary_cross_entropy_with_logits
            if self.multi_label
            else nn.functional.cross_entropy,
        )
        self._mode = chosen_mode(config, self.fabric.device)
        if config.activation_memory != "fast":
            self.model.set_activation_memory(config.activation_memory)
        self._step_function = self._make_step(model)
        self._monitor = None
        if config.monitor.check_every and self.fabric.is_global_zero:
            from ..equivalence import EquivalenceMonitor

            autocast = None if config.precision == "float32" else torch.bfloat16
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

    def _make_step(self, model: nn.Module) -> Any:
        """Optimiser, masters if they are asked for, the wrapped model, and the step of them all."""
        config, fabric = self.config, self.fabric
        # before the optimiser: masters lie where the weights do
        model.to(fabric.device)
        self._masters: MasterWeights | None = None
        if config.precision == "bfloat16-master":
            self._masters = MasterWeights(model, self._make_optimizer)
            self._parameters, self._optimizer = self._masters.trainable, self._masters.optimizer
        else:
            self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            self._optimizer = self._make_optimizer(self._parameters)
        # wrapped for precision and processes; the plain model is self.model, with the same weights
        self._wrapped = fabric.setup_module(model)
        if self._masters is not None and fabric.world_size > 1:
            self._masters.broadcast()
        step = TrainingStep(
            self._wrapped,
            self._loss,
            self._optimizer,
            masters=self._masters,
            max_norm=config.grad_clip,
            backward=fabric.backward,
            reduce=fabric.all_reduce if fabric.world_size > 1 else None,
        )
        return prepared_step(step, self._mode, model)

    def _make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW. Weight decay acts on matrices only, not on biases, norms and tokens."""
        config = self.config
        decayed = [p for p in parameters.values() if p.dim() == 2 or p.dim() == 4]
        plain = [p for p in parameters.values() if p.dim() != 2 and p.dim() != 4]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            fused=True,
            capturable=self._mode == "graph",
        )

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
            with stop_signals(self._request_stop):
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
            bfloat16=self.config.precision != "float32",
        )

    def _train_step(self, fed: Fed, log: RunLog | None) -> dict[str, float]:
        config, batch = self.config, fed.batch
        features, targets = fed.features
        seek_patchout(self.model, self.step)
        rate = config.lr * rate_factor(
            self.step, self.total_steps, config.warmup_steps, config.schedule
        )
        if self._monitor is not None and self._monitor.due(self.step) and len(batch):
            row = self._monitor.step(
                features, lambda logits: self._loss(logits, targets), step=self.step
            )
            if log is not None:
                log.write("check", **row.to_dict())
        self._step_function.set_lr(rate)
        # the one wait for the device in a step; a step that is not finite has changed no weight
        loss, norm = run_step(self._step_function, features, targets, config.batch_size).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._bad_batch(batch, features, targets, loss, norm)
        return {"loss": loss, "grad_norm": norm, "lr": rate}

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
        features = augment_features(features, settings, front, placed)
        return features.to(next(self.model.parameters()).dtype), targets

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
        self._step_function.zero_grad()
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
            self._store.save(self.step, self.save_model, tensors, state, best)
        if self.fabric.world_size > 1:
            self.fabric.barrier()

    def save_model(self, folder: Path) -> None:
        """Write the model in the precision it learns in: with masters, their float32 weights."""
        if self._masters is None:
            self.model.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=self._masters.model_state_dict())

    def _resume(self) -> None:
        checkpoint = self._store.load()
        if checkpoint is None:
            return
        saved, mine = checkpoint.state["train"], _as_json(self.config.to_dict())
        changed = sorted(name for name in mine if saved.get(name) != mine[name])
        if set(changed) - _FREE:
            raise CheckpointError(
                f"{checkpoint.folder}: was trained with other settings: "
                + ", ".join(f"{name}={saved.get(name)!r}" for name in changed if name not in _FREE)
                + "; resume with the same, or choose another run folder"
            )
        weights, _ = read_weights(checkpoint.folder / "model")
        if self._masters is None:
            self.model.load_state_dict(weights, strict=True)
        else:
            self._masters.load_model_state_dict(weights)
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
