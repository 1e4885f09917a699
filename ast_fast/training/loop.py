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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..audio import AudioReport
from ..config import ModelConfig, Task, TrainConfig
from ..data.dataset import Batch, ClipSet, check_one_label, max_samples
from ..data.feeder import Feeder, FeedStats
from ..data.mixing import WholeSetMixup
from ..data.sampler import balanced_weights
from ..data.shard_sampler import sampler_for
from ..data.transfer import Fed
from .augment import seek_patchout, set_patchout
from .averaging import PredictionMean, WeightAverage, swapped
from .bad_batch import save_batch
from .checkpoints import CheckpointStore
from .checks import Checks
from .distillation import DistillationLoss, Teacher, with_teacher
from .divergence import Divergence
from .errors import DivergedError, NonFiniteLossError, TrainingError, TrainingInterrupted
from .evaluation import Evaluation, evaluate
from .inputs import BatchFeatures
from .logs import Progress, RunLog, figures_text
from .losses import of_rows, task_loss
from .metrics import MAIN_FIGURE
from .modes import chosen_mode, prepared_step
from .optimizers import depth_for_rates, freeze, make_optimizer
from .processes import from_all, hold, make_fabric
from .result_csv import original_figures, write_result
from .scaling import LossScaler
from .schedules import run_factor
from .snapshot import restore, state_of, tensors_of
from .step import TrainingStep, run_step
from .stopping import stop_signals
from .tasks import PROBLEM_TYPES, check_fits
from .weights import Weights

_AUTOCAST = {
    "bfloat16": torch.bfloat16,
    "bfloat16-master": torch.bfloat16,
    "fp8": torch.bfloat16,
    "float16": torch.float16,
}


def _with_problem_type(model: Any, task: Task) -> Any:
    """The same model, which notes what it is trained for: tagging needs to know it when it is saved."""
    if isinstance(getattr(model, "config", None), ModelConfig):
        model.config = model.config.replace(problem_type=PROBLEM_TYPES[task])
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
        teacher: model to distil from; by default the one that `config.distill` names.

    Attributes:
        model: the model, on its device; sharded, if the strategy is fsdp2.
        weights: who holds its weights: masters, if it is narrow; a part in each process, if it is sharded.
        parameters: what the optimiser updates, by name: masters or parts where there are some.
        optimizer: of those.
        scaler: scale of a float16 loss, if there is one.
        sampler: which clips come next.
        average: mean of the weights, see `AverageConfig`.
        cumulative: mean of the predictions of all epochs.
        divergence: watches the loss.
        step: optimiser steps done.
        best: the best main figure so far.
        best_loss: the loss of the same evaluation.
        store: the run's checkpoints.
        epoch_clips: clips learnt from in this epoch.
        epoch_loss: the sum of their losses.
        total_steps: steps of the whole run.
        audio_report: what reading files changed and skipped since the start of this process; of several
            processes together, as of the end of the last epoch.
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
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = config
        self.run_dir = Path(run_dir)
        self.train_set, self.eval_set = train_set, eval_set
        self.task = config.task_of_run
        check_fits(self.task, train_set)
        self._autocast = _AUTOCAST.get(config.precision)
        self.fabric = make_fabric(config, self._autocast)
        # an nn.Module with frontend_config, forward_waveform, save_pretrained
        self.model: Any = _with_problem_type(model, self.task)
        if config.precision == "fp8":
            self.model.set_precision("fp8")
        if self.task == "single_label":
            check_one_label(train_set)
        set_patchout(model, config.augment, config.seed)
        freeze(model, config.tune.freeze)
        self.sampler = sampler_for(
            train_set,
            config.batch_size,
            seed=config.seed,
            weights=balanced_weights(train_set.labels, len(train_set.classes))
            if config.class_balanced
            else None,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        self._teacher = self._make_teacher(teacher)
        loss = task_loss(config)
        if self._teacher is not None:
            loss = DistillationLoss(loss, self.task, config.distill)
        self._loss = of_rows(loss)
        everywhere = config.replace(devices=self.fabric.world_size)
        self._mode = chosen_mode(everywhere, self.fabric.device)
        if config.activation_memory != "fast":
            self.model.set_activation_memory(config.activation_memory)
        self._checks = Checks(model, config, self._autocast, self.fabric.is_global_zero)
        self._step_function = self._make_step(model)
        self._features = BatchFeatures(
            self.model,
            config,
            len(train_set),
            len(train_set.classes),
            self.fabric.device,
            alone=self.fabric.world_size == 1,
        )
        self.average, self.cumulative = WeightAverage(config.average), PredictionMean()
        self.divergence = Divergence(config.divergence)
        self.total_steps = config.epochs * len(self.sampler)
        self.step = 0
        self.best: float | None = None
        self.best_loss: float | None = None
        self.audio_report = self._report = AudioReport()
        self._said = ""
        self.epoch_clips, self.epoch_loss = 0, 0.0
        self._stop = False
        self._overflows = 0
        self._progress_wanted = progress and self.fabric.is_global_zero
        self.store = CheckpointStore(
            self.run_dir / "checkpoints", config.keep_checkpoints, self.fabric.is_global_zero
        )
        if resume:
            try:
                checkpoint = self.store.load()
                if checkpoint is not None:
                    restore(self, checkpoint)
            except BaseException:
                self.store.close()
                raise
        elif self.store.pointer("latest") is not None:
            self.store.close()
            raise TrainingError(
                f"{self.run_dir} holds a run already: resume it, delete it or choose another folder"
            )

    def _make_step(self, model: nn.Module) -> Any:
        """Who holds the weights, their optimiser, the wrapped model, and the step of them all."""
        config, fabric = self.config, self.fabric
        narrow = config.precision == "bfloat16-master"
        self.weights: Weights
        # wrapped for precision and processes; the plain model is self.model, with the same weights
        if config.strategy == "fsdp2":
            from .sharding import ShardedWeights

            self._wrapped = fabric.setup_module(model)
            self.weights = ShardedWeights(model, self._make_optimizer, fabric.is_global_zero)
        else:
            # before the optimiser: masters lie where the weights do
            model.to(fabric.device)
            self.weights = Weights(model, self._make_optimizer, narrow)
            self._wrapped = fabric.setup_module(model)
            if fabric.world_size > 1:
                self.weights.share()
        self.parameters, self.optimizer = self.weights.trainable, self.weights.optimizer
        float16 = config.precision == "float16"
        self.scaler = LossScaler(fabric.device) if float16 else None
        # nothing of the step is bound to the trainer, which would then be part of a cycle
        wrapped = self._wrapped
        step = TrainingStep(
            functools.partial(_in_float16, wrapped) if float16 else wrapped,
            self._loss,
            self.optimizer,
            max_norm=config.grad_clip,
            backward=fabric.backward,
            reduce=fabric.all_reduce if fabric.world_size > 1 else None,
            parts=config.accumulate,
            hold=functools.partial(hold, fabric, wrapped),
            scaler=self.scaler,
            **self.weights.for_step(),
        )
        return prepared_step(step, self._mode, model)

    def _make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        known = getattr(getattr(self.model, "config", None), "depth", None)
        names = (name for name, _ in self.model.named_parameters())
        depth = depth_for_rates(names, known, self.config.tune)
        return make_optimizer(parameters, self.config, depth, self._mode == "graph")

    def _make_teacher(self, given: Any) -> Teacher | None:
        name = self.config.distill.teacher
        if given is None and not name:
            return None
        if given is None:
            from ..models.ast import ASTModel

            given = ASTModel.from_pretrained(name)
        classes = len(self.train_set.classes)
        return Teacher(given, self.model.frontend_config, classes).to(self.fabric.device)

    def fit(self) -> Evaluation | None:
        """Train to the end, from wherever the run stands.

        Returns:
            The evaluation after the last epoch, if there is an evaluation set.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
            NonFiniteLossError: the batch is saved, the weights are unchanged.
            DivergedError: the loss grew and grew; the batch is saved.
            EquivalenceError: the fast path left its error budget.
            CheckpointWriteError: the disk is full.
        """
        log = None
        if self.fabric.is_global_zero:
            events = self.run_dir / "tensorboard" if self.config.tensorboard else None
            log = RunLog(self.run_dir / "log.jsonl", self.step, events)
        bar = Progress(self.total_steps, self.step, "training", self._progress_wanted)
        self._evaluation: Evaluation | None = None
        feeder = self._feeder()
        try:
            with stop_signals(self._request_stop):
                while self.sampler.epoch < self.config.epochs:
                    self._run_epoch(feeder, log, bar)
                self._finish(log, bar)
        finally:
            feeder.close()
            bar.close()
            if log is not None:
                log.close()
            self.store.close()
        return self._evaluation

    def _finish(self, log: RunLog | None, bar: Progress) -> None:
        """Evaluate what the run leaves behind, unless the last epoch did."""
        if self.eval_set is None:
            return
        plain_mean = bool(self.config.average.first_epoch) and self.average.ready
        if plain_mean:
            self._evaluation = self._evaluate(self.average.weights())
            figures = self._evaluation.figures
            bar.say(f"mean of the weights of {self.average.count} epochs: {figures_text(figures)}")
            if log is not None:
                told = self._original_figures(self._evaluation)
                log.write("average", self.step, epochs=self.average.count, **figures, **told)
                write_result(self.run_dir, self.config.epochs)
        elif self._evaluation is None:
            self._evaluation = self._evaluate(self.average.weights())

    def _feeder(self) -> Feeder:
        return Feeder(
            self.train_set,
            self.sampler,
            multi_label=self.config.loss == "binary_cross_entropy",
            regression=self.task == "regression",
            mixup=self._partners(),
            device=self.fabric.device,
            transform=self._features,
            most_samples=max_samples(self.model.frontend_config),
            num_workers=self.config.num_workers,
        )

    def _partners(self) -> WholeSetMixup | None:
        settings = self.config.augment
        if not settings.mixup or settings.mixup_partners == "batch":
            return None
        return WholeSetMixup(self.config.seed, settings.mixup, len(self.train_set))

    def _run_epoch(self, feeder: Feeder, log: RunLog | None, bar: Progress) -> None:
        config, epoch = self.config, self.sampler.epoch
        self._wrapped.train()
        started, clips, main = time.perf_counter(), 0, MAIN_FIGURE[self.task]
        self._features.step = self.step
        feeder.stats = FeedStats()
        for fed in feeder:
            batch = fed.batch
            self._report.merge(batch.report)
            values = {} if fed.features is None else self._train_step(fed, log)
            clips += len(batch)
            self.epoch_clips += len(batch)
            self.epoch_loss += _finite(values.get("loss", 0.0)) * len(batch)
            self.step += 1
            self.sampler.step()
            # of all processes: the others have as many, but for files that cannot be read
            rate = clips * self.fabric.world_size / (time.perf_counter() - started)
            shown = {"epoch": str(epoch + 1), **{k: f"{v:.4g}" for k, v in values.items()}}
            if self._evaluation is not None and main in self._evaluation.figures:
                shown[main] = f"{self._evaluation.figures[main]:.4f}"
            bar.step(**shown, clips=f"{rate:.4g}/s")
            if log is not None and values and self.step % config.log_every == 0:
                log.write(
                    "step",
                    self.step,
                    epoch=epoch,
                    clips_per_second=rate,
                    wait_share=feeder.stats.wait_share,
                    **values,
                )
            last = self.sampler.epoch > epoch
            if not last and self._should_stop():
                self._save()
                raise TrainingInterrupted(self.run_dir, self.step)
            if config.checkpoint_every and self.step % config.checkpoint_every == 0 and not last:
                self._save()
        said = f"{time.perf_counter() - started:.1f} s, {feeder.stats.summary()}"
        self._end_epoch(epoch, said, log, bar)

    def _end_epoch(self, epoch: int, said: str, log: RunLog | None, bar: Progress) -> None:
        mean_loss = self._mean_loss()
        self.epoch_clips, self.epoch_loss = 0, 0.0
        best = False
        text = f"epoch {epoch + 1} of {self.config.epochs}: {said}"
        self.average.after_epoch(epoch + 1, self.weights.floats())
        if self.eval_set is not None:
            exponential = self.config.average.ema > 0.0
            self._evaluation = self._evaluate(self.average.weights() if exponential else {})
            figures = self._evaluation.figures
            skipped = self._evaluation.report.num_skipped
            score = figures.get(MAIN_FIGURE[self.task], -figures["loss"])
            best = self._is_best(score, figures["loss"])
            if self.config.average.cumulative:
                metrics = self._evaluation.metrics
                together = metrics.figures(self.cumulative.add(metrics.scores()))
                figures |= {f"cumulative_{name}": value for name, value in together.items()}
            text += f"; evaluation: {figures_text(figures)}"
            text += f" ({skipped} clips of the evaluation set unreadable)" if skipped else ""
            if log is not None:
                told = self._original_figures(
                    self._evaluation, train_loss=mean_loss, lr=self._rate()
                )
                log.write("eval", self.step, epoch=epoch, skipped=skipped, **figures, **told)
                write_result(self.run_dir, self.config.epochs)
        bar.say(text)
        said = self.audio_report.changes()
        if said and said != self._said:
            bar.say(f"  clips so far: {said}")
            self._said = said
        self._save(best)
        if self.sampler.epoch < self.config.epochs and self._should_stop():
            raise TrainingInterrupted(self.run_dir, self.step)

    def _is_best(self, score: float, loss: float) -> bool:
        """Whether an evaluation is the best so far, which is noted; of equal scores the lower loss is."""
        if self.best is not None:
            equal = score == self.best and self.best_loss is not None and loss < self.best_loss
            if not (score > self.best or equal):
                return False
        self.best, self.best_loss = score, loss
        return True

    def _mean_loss(self) -> float:
        """Of the clips of the epoch, in all processes; brings their reports together on the way."""
        mine = (self.epoch_clips, self.epoch_loss, self._report)
        counts, losses, reports = zip(*from_all(mine, self.fabric.world_size), strict=True)
        if len(reports) > 1:
            self.audio_report = AudioReport()
            for report in reports:
                self.audio_report.merge(report)
        if not sum(counts):
            raise TrainingError(
                f"no clip of the training set could be read: {self.audio_report.summary()}"
            )
        return float(sum(losses) / sum(counts))

    def _original_figures(self, found: Evaluation, **more: float) -> dict[str, Any]:
        """What `result.csv` says beyond the figures of an evaluation; nothing for numbers."""
        if self.task == "regression":
            return {}
        return {"original": {**original_figures(found.metrics, found.figures), **more}}

    def _rate(self) -> float:
        """The learning rate of the last step."""
        return self.config.lr * run_factor(self.config, self.step - 1, len(self.sampler))

    def _evaluate(self, weights: dict[str, Tensor]) -> Evaluation:
        """Evaluate the model, or averaged weights in its place if there are any."""
        assert self.eval_set is not None
        config = self.config
        with swapped(self.model, weights):
            return evaluate(
                self.model,
                self.eval_set,
                batch_size=2 * config.batch_size,
                task=self.task,
                binary=config.loss == "binary_cross_entropy",
                on_sigmoids="sigmoid_validation_loss" in config.reproduce,
                num_workers=config.num_workers,
                autocast=self._autocast,
                rank=self.fabric.global_rank,
                world_size=self.fabric.world_size,
            )

    def evaluate_weights(self, weights: dict[str, Tensor]) -> Evaluation:
        """Evaluate whole weights, by the model's names, in place of its own; all processes call it."""
        return self._evaluate({n: self.weights.part(n, value) for n, value in weights.items()})

    def _train_step(self, fed: Fed, log: RunLog | None) -> dict[str, float]:
        config, batch = self.config, fed.batch
        features, targets = fed.features
        seek_patchout(self.model, self.step)
        if self._teacher is not None:
            device = self.fabric.device.type
            with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
                targets = with_teacher(targets, self._teacher(features))
        row = self._checks.step(
            self.step, self.weights, features, lambda logits: self._loss(logits, targets)
        )
        if log is not None and row is not None:
            log.write("check", **row)
        rate = config.lr * run_factor(config, self.step, len(self.sampler))
        self._step_function.set_lr(rate)
        # the one wait for the device in a step; a step that is not finite has changed no weight
        loss, norm = run_step(self._step_function, features, targets, config.batch_size).tolist()
        values = {"loss": loss, "grad_norm": norm, "lr": rate}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if not self._may_overflow(loss):
                raise self._bad_batch(batch, features, targets, values)
            values.pop("grad_norm")
            return values
        self._overflows = 0
        diverged = self.divergence.add(loss)
        if diverged is not None:
            raise self._bad_batch(batch, features, targets, values, diverged)
        if config.average.ema:
            self.average.after_step(self.weights.floats())
        return values

    def _may_overflow(self, loss: float) -> bool:
        """Whether a float16 gradient overflowed, which a smaller scale of the loss will mend."""
        self._overflows += 1
        return self.scaler is not None and math.isfinite(loss) and self._overflows <= 20

    def _bad_batch(
        self,
        batch: Batch,
        features: Tensor,
        targets: Tensor,
        values: dict[str, float],
        diverged: str | None = None,
    ) -> TrainingError:
        file = save_batch(self.run_dir / "bad-batch", self.step, batch, features, targets)
        self._step_function.zero_grad()
        advice = f"lower lr={self.config.lr:g}, or resume from the last checkpoint"
        if diverged is not None:
            return DivergedError(f"step {self.step}: {diverged}; the batch is in {file}; {advice}")
        return NonFiniteLossError(
            f"step {self.step}: the loss is {values['loss']:g} and the gradient norm "
            f"{values['grad_norm']:g}; the weights are unchanged and the batch is in {file}; look at "
            f"its clips, {advice}"
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
        # the weights that are being trained, in the precision they learn in, from all who hold them
        weights, tensors = self.weights.whole_of(self.weights.here()), tensors_of(self)
        if self.fabric.is_global_zero:
            write = functools.partial(self.model.save_pretrained, state_dict=weights)
            self.store.save(self.step, write, tensors, state_of(self), best)
        if self.fabric.world_size > 1:
            self.fabric.barrier()

    def save_model(self, folder: Path) -> None:
        """Write what the run has made: averaged weights if it averages, else those it trains.

        All processes call it; the first one writes.
        """
        made = self.weights.here() | self.average.weights()
        whole = self.weights.whole_of(made)
        if self.fabric.is_global_zero:
            self.model.save_pretrained(folder, state_dict=whole)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _in_float16(model: Any, features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, torch.float16):
        logits: Tensor = model(features)
    return logits
