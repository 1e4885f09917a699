"""Settings of a training run; every number of a recipe is one of these."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from .base import Config, check

Task = Literal["single_label", "multi_label", "regression"]
Fault = Literal["sigmoid_validation_loss", "truncated_labels"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Config):
    """SpecAugment, mixup, noise and roll, as the original recipes order them; waveforms first.

    Draws belong to a clip: seed, step and clip decide them, not the batch around it.
    """

    freq_mask_bins: int = 0  # widest frequency mask
    time_mask_frames: int = 0  # widest time mask
    mixup: float = 0.0  # probability that a clip is mixed with another, lambda ~ Beta(10, 10)
    # set: anyone, as the original, read beside the batch; batch: its other clips, which costs no reading
    mixup_partners: Literal["batch", "set"] = "batch"
    noise: bool = False  # U[0, 1) * U[0, 1) / 10 added after normalisation
    roll_frames: int = 0  # largest circular shift in time
    roll_waveforms: bool = False  # clips start anywhere and continue at their beginning
    place: bool = False  # clips shorter than the model's length begin anywhere in it
    gain_db: float = 0.0  # louder or softer by up to so many decibels
    snr_db: tuple[float, float] | None = None  # white noise, so many decibels below the clip
    patchout_time: int = 0  # columns of the patch grid left out of each step (PaSST: 40 of 99)
    patchout_frequency: int = 0  # rows left out (PaSST: 4 of 12)
    patchout_patches: int = 0  # single patches left out of the rest

    def __post_init__(self) -> None:
        check(0.0 <= self.mixup <= 1.0, f"mixup={self.mixup:g}: expected a probability, 0 to 1")
        check(
            self.mixup_partners in ("batch", "set"),
            f"mixup_partners={self.mixup_partners!r}: expected batch or set",
        )
        check(self.gain_db >= 0, f"gain_db={self.gain_db:g}: expected 0 (off) or more")
        for name in ("patchout_time", "patchout_frequency", "patchout_patches"):
            check(
                getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected 0 (off) or more"
            )
        check(
            self.snr_db is None or (len(self.snr_db) == 2 and self.snr_db[0] <= self.snr_db[1]),
            f"snr_db={self.snr_db}: expected the lowest and the highest ratio in decibels, or None",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig(Config):
    """The equivalence monitor: how often the reference runs beside the fast path, and on what."""

    check_every: int = 0  # steps; 0 switches it off
    max_clips: int = 4  # the check runs on this many clips of the batch
    dtype: Literal["float32", "float64"] = "float64"
    stop: bool = True  # over budget: stop the run with EquivalenceError rather than log

    def __post_init__(self) -> None:
        check(self.check_every >= 0, f"check_every={self.check_every}: expected 0 or more")
        check(self.max_clips >= 1, f"max_clips={self.max_clips}: expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AverageConfig(Config):
    """Averages over a run: of weights, which become the run's model, and of predictions."""

    first_epoch: int = 0  # plain mean of the weights after these epochs, counted from 1; 0: none
    last_epoch: int = 0  # 0: the last of the run
    ema: float = 0.0  # decay of an exponential mean of the weights after each step; 0: none
    cumulative: bool = False  # evaluate the mean of the predictions of all epochs so far

    def __post_init__(self) -> None:
        first, last = self.first_epoch, self.last_epoch
        check(
            (first == 0 and last == 0) or (first >= 1 and (last == 0 or last >= first)),
            f"first_epoch={first}, last_epoch={last}: expected epochs from 1, in order, or 0 for none",
        )
        check(0.0 <= self.ema < 1.0, f"ema={self.ema}: expected 0 (off) to below 1")
        check(
            not (first and self.ema),
            "first_epoch and ema are both set: expected one kind of averaged weights",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(Config):
    """What of a model is trained, and how fast each part of it."""

    freeze: tuple[
        str, ...
    ] = ()  # patterns of names that stay as they are; ("v.*",): a linear probe
    layer_decay: float = 1.0  # rate of a block is that of the next one times this
    head_rate: float = 1.0  # rate of the head, in units of the rate

    def __post_init__(self) -> None:
        check(
            isinstance(self.freeze, tuple) and all(isinstance(each, str) for each in self.freeze),
            f'freeze={self.freeze!r}: expected patterns of names, as ["v.*"]',
        )
        check(
            0.0 < self.layer_decay <= 1.0, f"layer_decay={self.layer_decay}: expected above 0 to 1"
        )
        check(self.head_rate > 0, f"head_rate={self.head_rate}: expected above 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(Config):
    """Learning from what another model says of the same features (its logits)."""

    teacher: str = ""  # pretrained directory, file or hub id; "": none
    weight: float = 0.5  # share of the teacher in the loss
    temperature: float = 1.0  # logits of both are divided by it

    def __post_init__(self) -> None:
        check(0.0 <= self.weight <= 1.0, f"weight={self.weight}: expected 0 to 1")
        check(self.temperature > 0, f"temperature={self.temperature}: expected above 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """A training run."""

    epochs: int = 15
    batch_size: int = 48
    accumulate: int = 1  # parts of a batch, computed one after the other: less memory
    # auto: of the loss; cross_entropy one label a clip, binary_cross_entropy several
    task: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    loss: Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0  # share of a label spread over all classes (cross-entropy alone)
    # adam: decay is added to the gradient of every weight (L2); adamw: to matrices alone, apart
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 50
    # staircase: 20 even stairs from 0, as the original's 1000 steps; overrides the schedule
    warmup: Literal["linear", "staircase"] = "linear"
    # stairs: times decay_factor after decay_start epochs, and every decay_epochs after that
    schedule: Literal["constant", "cosine", "stairs"] = "cosine"
    decay_start: int = 2
    decay_epochs: int = 1
    decay_factor: float = 0.5
    grad_clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    # stop where the mean loss of 100 steps is so many times that of the first 100; 0: never
    divergence: float = 4.0
    # bfloat16, float16: autocast over float32 weights; bfloat16-master: bfloat16 weights with float32
    # masters; fp8: the blocks' matrix products in FP8, everything else as in bfloat16
    precision: Literal["float32", "bfloat16", "float16", "bfloat16-master", "fp8"] = "float32"
    # how a step runs; graph: one CUDA graph of it; regional: torch.compile of each block
    compile: Literal["off", "regional", "graph", "auto"] = "auto"
    # less: LayerNorms computed again in backward; least: whole blocks
    activation_memory: Literal["fast", "less", "least"] = "fast"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1  # processes, one a device
    # ddp: each process has all weights; fsdp2: weights, gradients and optimiser state are sharded
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    seed: int = 0
    num_workers: int = 0
    class_balanced: bool = False  # draw clips so that every class comes up as often
    log_every: int = 10  # steps between lines of the log
    tensorboard: bool = False  # write events for TensorBoard beside the log
    checkpoint_every: int = 0  # steps between checkpoints; 0: at the end of each epoch only
    keep_checkpoints: int = 2  # newest ones kept, beside the best
    # faults of the original that a faithful rerun may want
    reproduce: tuple[Fault, ...] = ()
    augment: AugmentConfig = AugmentConfig()
    average: AverageConfig = AverageConfig()
    tune: TuneConfig = TuneConfig()
    distill: DistillConfig = DistillConfig()
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self) -> None:
        check(self.lr > 0, f"lr={self.lr}: expected a positive rate")
        check(self.grad_clip >= 0, f"grad_clip={self.grad_clip}: expected 0 (off) or more")
        check(
            self.divergence == 0 or self.divergence > 1,
            f"divergence={self.divergence}: expected 0 (off) or above 1",
        )
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas={self.betas}: expected two numbers in [0, 1)",
        )
        for name in ("epochs", "batch_size", "accumulate", "devices", "log_every"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("keep_checkpoints", "decay_start", "decay_epochs"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        check(
            0 < self.decay_factor <= 1, f"decay_factor={self.decay_factor}: expected above 0 to 1"
        )
        # step and process are packed beside it into one 64-bit seed
        check(self.seed < 2**29, f"seed={self.seed}: expected below 2**29")
        for name in ("warmup_steps", "weight_decay", "num_workers", "checkpoint_every", "seed"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected 0 or more")
        for field in ("task", "loss", "optimizer", "warmup", "schedule", "precision", "compile"):
            self._check_choice(field)
        self._check_choice("activation_memory")
        self._check_choice("accelerator")
        self._check_choice("strategy")
        check(
            self.strategy == "ddp" or self.compile != "graph",
            "compile='graph' with strategy='fsdp2': a CUDA graph holds all weights of one device; "
            "expected auto, regional or off",
        )
        faults = typing.get_args(Fault)
        check(
            all(fault in faults for fault in self.reproduce),
            f"reproduce={self.reproduce!r}: expected some of {', '.join(faults)}",
        )
        self._check_task()

    def _check_choice(self, name: str) -> None:
        value = getattr(self, name)
        allowed = typing.get_args(typing.get_type_hints(type(self))[name])
        check(value in allowed, f"{name}={value!r}: expected one of {', '.join(allowed)}")

    def _check_task(self) -> None:
        check(
            0.0 <= self.label_smoothing < 1.0,
            f"label_smoothing={self.label_smoothing}: expected 0 (off) to below 1",
        )
        check(
            self.label_smoothing == 0.0
            or (self.loss == "cross_entropy" and "truncated_labels" not in self.reproduce),
            f"label_smoothing={self.label_smoothing} smooths loss='cross_entropy' alone: leave it at 0",
        )
        fitting = {
            "cross_entropy": ("single_label",),
            "binary_cross_entropy": ("multi_label", "single_label"),
            "mean_squared_error": ("regression",),
        }[self.loss]
        check(
            self.task in ("auto", *fitting),
            f"task={self.task!r} with loss={self.loss!r}: expected {' or '.join(fitting)}",
        )
        check(
            self.task_of_run != "regression" or not self.class_balanced,
            "class_balanced=True with task='regression': expected false, there are no classes",
        )
        first, last = self.average.first_epoch, self.average.last_epoch
        check(
            max(first, last) <= self.epochs,
            f"average.first_epoch={first}, average.last_epoch={last}: expected at most "
            f"epochs={self.epochs}; set them too (last_epoch=0 is the last, both 0 average nothing)",
        )
        check(
            "truncated_labels" not in self.reproduce or self.loss == "cross_entropy",
            "reproduce='truncated_labels' is a fault of loss='cross_entropy'",
        )

    @property
    def task_of_run(self) -> Task:
        """What is learnt: `task`, or what the loss stands for."""
        if self.task != "auto":
            return self.task
        tasks: dict[str, Task] = {
            "cross_entropy": "single_label",
            "binary_cross_entropy": "multi_label",
            "mean_squared_error": "regression",
        }
        return tasks[self.loss]
