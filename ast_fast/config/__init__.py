"""Every setting and its default: frozen dataclasses that check themselves and know no globals."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal, Self

from .._text import shown
from ..names import check_names
from .base import Config, check
from .data import DataConfig, Layout
from .facts import ModelFacts
from .training import (
    AugmentConfig,
    AverageConfig,
    DistillConfig,
    MonitorConfig,
    Task,
    TrainConfig,
    TuneConfig,
)

__all__ = [
    "ACTIVATION_OF",
    "MAX_RATE_HZ",
    "MIN_RATE_HZ",
    "NORMALISATION",
    "AudioConfig",
    "AugmentConfig",
    "AverageConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "Layout",
    "LogMelConfig",
    "MelNorm",
    "MelScale",
    "MfccConfig",
    "ModelConfig",
    "ModelFacts",
    "MonitorConfig",
    "Output",
    "Padding",
    "PositionRule",
    "ProblemType",
    "Task",
    "TrainConfig",
    "TuneConfig",
    "Window",
    "check",
]

PositionRule = Literal["bilinear", "nearest", "reinitialise"]
# transformers' terms
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
# what makes answers of logits
ACTIVATION_OF: dict[ProblemType, Literal["softmax", "sigmoid", "none"]] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}

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

# Sizes beyond these are a mistake or an attack, and would be allocated before anybody could tell.
_MAX_WINDOW_SAMPLES = 1 << 20  # of a window, a hop or an FFT, as in reference.mel
_MAX_MEL_BINS = 1 << 14
_MAX_FRAMES = 1 << 24  # 46 hours at 10 ms
_MAX_DEPTH = 1024  # the deepest transformers that were trained
_MAX_WIDTH = 1 << 16  # of tokens; four times as much in an MLP
_MAX_HIDDEN = 1 << 20
_MAX_CLASSES = 1 << 24
_MAX_TOKENS = 1 << 22  # 4 M: float32 positions of width 768 are 12 GiB
_MAX_PATCH_VALUES = 1 << 20


def _check_range(config: Config, lowest: int, highest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(
            value is None or lowest <= value <= highest,
            f"{name}={shown(value)}: expected {lowest} to {highest}",
        )


def _check_finite(config: Config, *names: str) -> None:
    for name in names:
        check(
            math.isfinite(getattr(config, name)),
            f"{name}={getattr(config, name)}: expected a finite number",
        )


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
        _check_finite(self, "mean", "std", "preemphasis", "log_offset", "log_floor")
        _check_finite(self, "low_freq_hz", "high_freq_hz", "window_ms", "hop_ms")
        for name in ("num_frames", "n_fft", "window_samples", "hop_samples"):
            value = getattr(self, name)
            check(
                value is None or value > 0, f"{name}={value}: expected a positive number, or None"
            )
        _check_range(self, 1, MAX_RATE_HZ, "sample_rate_hz")
        _check_range(self, 1, _MAX_FRAMES, "num_frames")
        _check_range(self, 1, _MAX_MEL_BINS, "num_mel_bins")
        _check_range(self, 1, _MAX_WINDOW_SAMPLES, "n_fft", "window_samples", "hop_samples")
        for name, samples in (("window_ms", self.window_samples), ("hop_ms", self.hop_samples)):
            longest = 1000 * _MAX_WINDOW_SAMPLES / self.sample_rate_hz
            value = getattr(self, name)
            check(
                samples is not None or value <= longest,
                f"{name}={value:g} at {self.sample_rate_hz} Hz: expected at most {longest:.0f}, "
                f"{_MAX_WINDOW_SAMPLES} samples",
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
            check(value >= 1, f"{name}={shown(value)}: expected at least 1")
        _check_range(self, 1, _MAX_DEPTH, "depth")
        _check_range(self, 1, _MAX_WIDTH, "embed_dim", "num_heads")
        _check_range(self, 1, _MAX_CLASSES, "label_dim")
        _check_range(self, 1, _MAX_MEL_BINS, "input_fdim", "patch_fdim", "fstride")
        _check_range(self, 1, _MAX_FRAMES, "input_tdim", "patch_tdim", "tstride")
        hidden = self.embed_dim * self.mlp_ratio
        check(
            1 <= hidden <= _MAX_HIDDEN,
            f"mlp_ratio={self.mlp_ratio:g} at width {self.embed_dim}: expected 1 to {_MAX_HIDDEN} hidden "
            "units in an MLP",
        )
        check(
            self.patch_fdim * self.patch_tdim <= _MAX_PATCH_VALUES,
            f"patches of {self.patch_fdim} x {self.patch_tdim}: expected at most {_MAX_PATCH_VALUES} values",
        )
        for name in ("eps", "head_eps"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name}={value:g}: expected 0 to 1")
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
        check(
            self.num_tokens <= _MAX_TOKENS,
            f"{self.grid[0]} x {self.grid[1]} patches: expected at most {_MAX_TOKENS} tokens; give larger "
            "strides or a shorter input",
        )
        types = (None, *typing.get_args(ProblemType))
        check(
            self.problem_type in types,
            f"problem_type={self.problem_type!r}: expected {', '.join(map(str, types))}",
        )
        check(
            self.labels is None or len(self.labels) == self.label_dim,
            f"labels has {len(self.labels or ())} names: expected label_dim={self.label_dim}",
        )
        check_names(self.labels or (), "labels")

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
