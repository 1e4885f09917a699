"""Every setting and its default: frozen dataclasses that check themselves and know no globals."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

PositionRule = Literal["bilinear", "nearest", "reinitialise"]
# transformers' terms
ProblemType = Literal["single_label_classification", "multi_label_classification"]

Window = Literal["hann", "hann_periodic", "povey", "hamming", "blackman", "rectangular"]
MelScale = Literal["kaldi", "htk", "slaney"]
MelNorm = Literal["none", "slaney"]
Padding = Literal["none", "reflect", "zeros"]
Output = Literal["log", "db"]

# (mean, std) of log-mel energies; features are (x - mean) / (2 std). From the original recipes.
NORMALISATION = {
    "audioset": (-4.2677393, 4.5689974),
    "esc50": (-6.6268077, 5.358466),
    "speechcommands": (-6.845978, 5.5654526),
}


# rates outside this are a broken header, not audio
MIN_RATE_HZ, MAX_RATE_HZ = 2000, 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Base of all settings: conversion to and from plain dicts, unknown keys refused."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON or TOML; nested settings become nested dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dict.

        Raises:
            ValueError: a key is unknown, or a value does not pass the checks.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}: expected some of "
                f"{', '.join(fields)}"
            )
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            default = fields[name].default
            if isinstance(default, Config) and isinstance(value, Mapping):
                value = type(default).from_dict(value)
            elif isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            arguments[name] = value
        return cls(**arguments)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig(Config):
    """How audio files are read, and what happens to those that are not as expected."""

    sample_rate_hz: int | None = 16000  # None: each file's own rate
    other_rate: Literal["resample", "error"] = "resample"
    channels: Literal["mean", "first", "error"] = "mean"  # of a file with several
    non_finite: Literal["error", "zero"] = "error"  # NaN and Inf in a float file
    truncated: Literal["error", "keep"] = "error"  # less audio than the header promises
    min_ms: float = 25.0  # shorter clips are padded with zeros to this: one window
    # auto: int16 where the file holds nothing finer (the same values to the bit), else float32
    dtype: Literal["float32", "int16", "auto"] = "float32"
    max_seconds: float = 3600.0
    max_decoded_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        rate = self.sample_rate_hz
        check(
            rate is None or MIN_RATE_HZ <= rate <= MAX_RATE_HZ,
            f"sample_rate_hz={rate}: expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, or None",
        )
        check(self.min_ms >= 0, f"min_ms={self.min_ms}: expected 0 or more")
        check(self.max_seconds > 0, f"max_seconds={self.max_seconds}: expected a positive length")
        for name, allowed in (
            ("other_rate", ("resample", "error")),
            ("channels", ("mean", "first", "error")),
            ("non_finite", ("error", "zero")),
            ("truncated", ("error", "keep")),
            ("dtype", ("float32", "int16", "auto")),
        ):
            value = getattr(self, name)
            check(value in allowed, f"{name}={value!r}: expected one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogMelConfig(Config):
    """The front end: waveform to normalised log-mel (torchaudio's Kaldi fbank as AST calls it).

    `mel_spectrogram` gives the other common front end. `ops.log_mel` explains every setting.
    """

    sample_rate_hz: int = 16000
    num_mel_bins: int = 128
    num_frames: int | None = 1024  # None: as many whole frames as there are
    window_ms: float = 25.0
    hop_ms: float = 10.0
    low_freq_hz: float = 20.0
    high_freq_hz: float = 0.0  # 0: Nyquist
    preemphasis: float = 0.97
    remove_dc: bool = True
    mean: float = NORMALISATION["audioset"][0]
    std: float = NORMALISATION["audioset"][1]
    n_fft: int | None = None  # None: the power of two at or above the window
    window_samples: int | None = None  # instead of window_ms
    hop_samples: int | None = None  # instead of hop_ms
    window: Window = "hann"
    mel_scale: MelScale = "kaldi"
    mel_norm: MelNorm = "none"
    power: int = 2  # of the spectrum's magnitude
    padding: Padding = "none"  # others: frames centred on hops
    output: Output = "log"
    log_floor: float = 1.1920928955078125e-07  # float32 epsilon, as Kaldi
    log_offset: float = 0.0  # added to energies before the floor
    top_db: float | None = None  # decibels below a clip's loudest value

    def __post_init__(self) -> None:
        check(self.std > 0, f"std={self.std}: expected a positive value")
        for name in ("num_frames", "n_fft", "window_samples", "hop_samples"):
            value = getattr(self, name)
            check(
                value is None or value > 0, f"{name}={value}: expected a positive number, or None"
            )
        for name, allowed in (
            ("window", typing.get_args(Window)),
            ("mel_scale", typing.get_args(MelScale)),
            ("mel_norm", typing.get_args(MelNorm)),
            ("power", (1, 2)),
            ("padding", typing.get_args(Padding)),
            ("output", typing.get_args(Output)),
        ):
            value = getattr(self, name)
            check(
                value in allowed,
                f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}",
            )
        check(self.log_floor > 0, f"log_floor={self.log_floor:g}: expected a positive energy")
        check(self.log_offset >= 0, f"log_offset={self.log_offset:g}: expected 0 or more")
        check(
            self.mel_norm == "none" or self.mel_scale != "kaldi",
            "mel_norm='slaney' needs mel_scale='htk' or 'slaney': Kaldi's filters have no norm",
        )
        check(
            self.top_db is None or (self.output == "db" and self.top_db >= 0),
            f"top_db={self.top_db} with output={self.output!r}: expected 0 or more, and output='db'",
        )

    @property
    def framing(self) -> dict[str, Any]:
        """The settings that decide how many frames a clip has: the arguments of `mel_sizes`."""
        sizes = ("window_ms", "hop_ms", "n_fft", "window_samples", "hop_samples")
        names = ("sample_rate_hz", "num_mel_bins", *sizes, "padding")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def mel_spectrogram(
        cls,
        sample_rate_hz: int = 16000,
        n_fft: int = 400,
        win_length: int | None = None,
        hop_length: int | None = None,
        n_mels: int = 128,
        f_min: float = 0.0,
        f_max: float = 0.0,
        top_db: float | None = None,
        **changes: Any,
    ) -> Self:
        """`torchaudio.transforms.MelSpectrogram` and `AmplitudeToDB`, not normalised.

        Lengths are in samples, as there; `changes` are settings of this class (`power`, `mel_scale`,
        `mel_norm`, `padding`, `output="log"`, `mean`, `std`, `num_frames`...). `top_db` counts from
        each clip's loudest value (torchaudio's from a batch's, if the batch has three dimensions).
        """
        window = win_length or n_fft
        settings: dict[str, Any] = {
            "sample_rate_hz": sample_rate_hz,
            "num_mel_bins": n_mels,
            "num_frames": None,
            "n_fft": n_fft,
            "window_samples": window,
            "hop_samples": hop_length or window // 2,
            "low_freq_hz": f_min,
            "high_freq_hz": f_max,
            "preemphasis": 0.0,
            "remove_dc": False,
            "mean": 0.0,
            "std": 0.5,
            "window": "hann_periodic",
            "mel_scale": "htk",
            "padding": "reflect",
            "output": "db",
            "log_floor": 1e-10,
            "top_db": top_db,
        }
        return cls(**(settings | changes))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MfccConfig(Config):
    """Cepstra: the cosine transform of log-mel energies. Defaults are Kaldi's, as torchaudio's are."""

    log_mel: LogMelConfig = LogMelConfig(
        num_mel_bins=23, num_frames=None, window="povey", mean=0.0, std=0.5
    )
    num_ceps: int = 13
    lifter: float = 22.0  # 0 switches it off
    mean: float = 0.0
    std: float = 0.5  # cepstra are (x - mean) / (2 std)

    def __post_init__(self) -> None:
        bins = self.log_mel.num_mel_bins
        check(
            1 <= self.num_ceps <= bins,
            f"num_ceps={self.num_ceps}: expected 1 to {bins}, the mel bins",
        )
        check(self.lifter >= 0, f"lifter={self.lifter:g}: expected 0 (off) or more")
        check(self.std > 0, f"std={self.std}: expected a positive value")
        check(
            self.log_mel.mean == 0.0 and self.log_mel.std == 0.5,
            f"log_mel.mean={self.log_mel.mean:g} and log_mel.std={self.log_mel.std:g}: expected 0 and "
            "0.5, since cepstra are normalised and not what they are made of",
        )

    @classmethod
    def torchaudio(
        cls, num_ceps: int = 40, mean: float = 0.0, std: float = 0.5, **mel: Any
    ) -> Self:
        """`torchaudio.transforms.MFCC`; `mel` are arguments of `LogMelConfig.mel_spectrogram`.

        `log_mels=True` there is `output="log", log_floor=1e-30, log_offset=1e-6, top_db=None` here.
        """
        settings: dict[str, Any] = {"top_db": 80.0, **mel}
        front = LogMelConfig.mel_spectrogram(**settings)
        return cls(log_mel=front, num_ceps=num_ceps, lifter=0.0, mean=mean, std=std)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """An AST: sizes, patches and head. Defaults are AST-base of the paper."""

    label_dim: int = 527
    input_fdim: int = 128  # F, mel bins
    input_tdim: int = 1024  # S, frames
    patch_fdim: int = 16
    patch_tdim: int = 16
    fstride: int = 10
    tstride: int = 10
    embed_dim: int = 768  # C
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_prefix_tokens: int = 2  # class and distillation
    eps: float = 1e-6  # LayerNorm of blocks and of the final norm
    head_eps: float = 1e-5  # LayerNorm of the head
    dead_heads: bool = True  # v.head and v.head_dist, unused but in every original checkpoint
    labels: tuple[str, ...] | None = None  # display names, one a class
    problem_type: ProblemType | None = None  # one label a clip or several, if known

    def __post_init__(self) -> None:
        for name in ("label_dim", "patch_fdim", "patch_tdim", "fstride", "tstride", "depth"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value}: expected at least 1")
        check(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim={self.embed_dim} does not split into num_heads={self.num_heads} heads",
        )
        check(
            self.num_prefix_tokens in (1, 2),
            f"num_prefix_tokens={self.num_prefix_tokens}: expected 1 (class) or 2 (and distillation)",
        )
        for side, size, patch in (
            ("input_fdim", self.input_fdim, self.patch_fdim),
            ("input_tdim", self.input_tdim, self.patch_tdim),
        ):
            check(size >= patch, f"{side}={size} is smaller than a patch of {patch}")
        types = (None, *typing.get_args(ProblemType))
        check(
            self.problem_type in types,
            f"problem_type={self.problem_type!r}: expected {', '.join(map(str, types))}",
        )
        check(
            self.labels is None or len(self.labels) == self.label_dim,
            f"labels has {len(self.labels or ())} names: expected label_dim={self.label_dim}",
        )

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and time."""
        return (
            (self.input_fdim - self.patch_fdim) // self.fstride + 1,
            (self.input_tdim - self.patch_tdim) // self.tstride + 1,
        )

    @property
    def num_tokens(self) -> int:
        """T: prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Config):
    """SpecAugment, mixup, noise and roll, as the original recipes order them; waveforms first.

    Draws belong to a clip: seed, step and clip decide them, not the batch around it.
    """

    freq_mask_bins: int = 0  # widest frequency mask
    time_mask_frames: int = 0  # widest time mask
    mixup: float = 0.0  # probability that a clip is mixed with another, lambda ~ Beta(10, 10)
    noise: bool = False  # U[0, 1) * U[0, 1) / 10 added after normalisation
    roll_frames: int = 0  # largest circular shift in time
    roll_waveforms: bool = False  # clips start anywhere and continue at their beginning
    gain_db: float = 0.0  # louder or softer by up to so many decibels
    snr_db: tuple[float, float] | None = None  # white noise, so many decibels below the clip
    patchout_time: int = 0  # columns of the patch grid left out of each step (PaSST: 40 of 99)
    patchout_frequency: int = 0  # rows left out (PaSST: 4 of 12)
    patchout_patches: int = 0  # single patches left out of the rest

    def __post_init__(self) -> None:
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


Layout = Literal[
    "auto",
    "manifest",
    "original",
    "audioset",
    "esc50",
    "speechcommands",
    "folders",
    "deam",
    "shards",
    "huggingface",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """What a data set is, where that does not follow from what lies at its path.

    Attributes:
        layout: auto looks; manifest is CSV or JSON lines, original the original AST's JSON.
        fold: evaluate on this fold and train on the rest (ESC-50, or a column fold or split).
        split: take only the clips of this part; all takes every clip of data in parts.
        values: columns of numbers to predict instead of labels, such as valence arousal.
        audio_column: of a Hugging Face dataset, if it has several of sound.
        label_column: of a Hugging Face dataset, if it is not called labels, label or the like.
    """

    layout: Layout = "auto"
    fold: int | None = None
    split: str | None = None
    values: tuple[str, ...] = ()
    audio_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        layouts = typing.get_args(Layout)
        check(
            self.layout in layouts, f"layout={self.layout!r}: expected one of {', '.join(layouts)}"
        )
        check(self.fold is None or self.fold >= 0, f"fold={self.fold}: expected 0 or more")
        check(
            len(set(self.values)) == len(self.values) and all(self.values),
            f"values={self.values}: expected names of columns, each once",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """A training run."""

    epochs: int = 15
    batch_size: int = 48
    lr: float = 5e-4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    grad_clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    # bfloat16: autocast over float32 weights; bfloat16-master: bfloat16 weights with float32 masters
    # fp8: the blocks' matrix products in FP8, everything else as in bfloat16
    precision: Literal["float32", "bfloat16", "bfloat16-master", "fp8"] = "float32"
    # how a step runs; graph: one CUDA graph of it; regional: torch.compile of each block
    compile: Literal["off", "regional", "graph", "auto"] = "auto"
    # less: LayerNorms computed again in backward; least: whole blocks
    activation_memory: Literal["fast", "less", "least"] = "fast"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1  # processes, one a device
    seed: int = 0
    num_workers: int = 0
    class_balanced: bool = False  # draw clips so that every class comes up as often
    log_every: int = 10  # steps between lines of the log
    checkpoint_every: int = 0  # steps between checkpoints; 0: at the end of each epoch only
    keep_checkpoints: int = 2  # newest ones kept, beside the best
    augment: AugmentConfig = AugmentConfig()
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"epochs={self.epochs}: expected at least 1")
        check(self.batch_size >= 1, f"batch_size={self.batch_size}: expected at least 1")
        check(self.lr > 0, f"lr={self.lr}: expected a positive rate")
        check(self.grad_clip >= 0, f"grad_clip={self.grad_clip}: expected 0 (off) or more")
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas={self.betas}: expected two numbers in [0, 1)",
        )
        for name in ("devices", "log_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1")
        # step and process are packed beside it into one 64-bit seed
        check(self.seed < 2**29, f"seed={self.seed}: expected below 2**29")
        for name in ("warmup_steps", "weight_decay", "num_workers", "checkpoint_every", "seed"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected 0 or more")
        for name, allowed in (
            ("schedule", ("constant", "cosine")),
            ("loss", ("cross_entropy", "binary_cross_entropy")),
            ("precision", ("float32", "bfloat16", "bfloat16-master", "fp8")),
            ("compile", ("off", "regional", "graph", "auto")),
            ("activation_memory", ("fast", "less", "least")),
            ("accelerator", ("auto", "cpu", "cuda")),
        ):
            value = getattr(self, name)
            check(value in allowed, f"{name}={value!r}: expected one of {', '.join(allowed)}")
