"""Label audio: `predict` for one or a few clips in a program, `tag` for files and folders.

A clip longer than the model's input is cut into consecutive windows, and the probabilities are the
mean over them: nothing of it is left out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .audio import AudioError, AudioReport, Source, load, source_name
from .config import AudioConfig, LogMelConfig
from .data.dataset import max_samples
from .data.manifest import audio_files
from .optimized import Precision, optimize_for_inference, why_not
from .reference.mel import mel_sizes

Activation = Literal["auto", "softmax", "sigmoid"]
AUDIOSET_CLASSES = 527


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What a clip sounds like.

    Attributes:
        source: the clip, as messages name it.
        path: its path, if it is a file.
        labels: (name, probability) of the most probable classes, best first.
        probabilities: [classes].
        windows: parts the clip was cut into (1 unless it is longer than the model's input).
        report: what reading the clip changed.
    """

    source: str
    path: str | None
    labels: tuple[tuple[str, float], ...]
    probabilities: Tensor
    windows: int
    report: AudioReport


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A file that could not be read, and why."""

    source: str
    path: str | None
    error: AudioError


def predict(
    source: Source | Tensor,
    model: Any,
    *,
    top_k: int = 5,
    labels: Sequence[str] | None = None,
    activation: Activation = "auto",
    audio: AudioConfig | None = None,
) -> Prediction:
    """The most probable labels of one clip.

    Args:
        source: a path, the bytes of a file, a file object, or a waveform [N] at the model's rate.
        model: an `ASTModel`, or what `ASTModel.from_pretrained` takes.
        top_k: how many labels.
        labels: class names, if the model has none or others are wanted.
        activation: "softmax" for one label a clip, "sigmoid" for several; "auto" takes what the model
            was trained for (`config.problem_type`), else sigmoid for AudioSet's 527 classes.
        audio: how to read the file; the sample rate is always the model's.

    Raises:
        AudioError: the clip cannot be read.
        ValueError: labels do not fit the model.
    """
    for result in _run([source], model, top_k, labels, activation, audio, batch_size=16):
        if isinstance(result, Failure):
            raise result.error
        return result
    raise AssertionError("one source gives one result")


def tag(
    paths: Iterable[str | os.PathLike[str]],
    model: Any,
    *,
    top_k: int = 5,
    labels: Sequence[str] | None = None,
    activation: Activation = "auto",
    audio: AudioConfig | None = None,
    batch_size: int = 16,
) -> Iterator[Prediction | Failure]:
    """Label files, and every audio file in folders; a bad file is a result, not the end.

    Takes the arguments of `predict`; `batch_size` windows run at a time.
    """
    return _run(_expand(paths), model, top_k, labels, activation, audio, batch_size)


def _expand(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from audio_files(path)
        else:
            yield path


def load_model(model: Any) -> Any:
    """The model itself, or the one that a path or hub id names, in evaluation mode."""
    if isinstance(model, (str, os.PathLike)):
        from .models.ast import ASTModel

        model = ASTModel.from_pretrained(model)
    return model.eval()


def load_for_inference(model: Any, precision: Precision = "exact") -> Any:
    """What `load_model` gives, on the GPU if there is one, else with packed weights where they can be had.

    Raises:
        ValueError: another precision than "exact" is not to be had here; says why.
    """
    network = load_model(model)
    if torch.cuda.is_available():
        if precision != "exact":
            raise ValueError(
                f"precision={precision!r} is for CPUs: on a GPU only exact is to be had"
            )
        return network.to("cuda")
    if precision == "exact" and why_not(precision) is not None:
        return network
    return optimize_for_inference(network, precision)


def class_names(model: Any, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Names for the classes of a model: those given, its own, or "class 0" and so on.

    Raises:
        ValueError: the number of names is wrong.
    """
    count = int(model.config.label_dim)
    names = labels if labels is not None else model.labels
    if names is None:
        return tuple(f"class {index}" for index in range(count))
    if len(names) != count:
        raise ValueError(f"labels: got {len(names)} names: expected {count}, the model's classes")
    return tuple(names)


def resolve_activation(activation: Activation, model: Any) -> Activation:
    """Softmax or sigmoid; "auto" goes by `config.problem_type`, else by the number of classes.

    Raises:
        ValueError: it is none of the three.
    """
    if activation not in ("auto", "softmax", "sigmoid"):
        raise ValueError(f"activation={activation!r}: expected auto, softmax or sigmoid")
    if activation != "auto":
        return activation
    several = {"multi_label_classification": True, "single_label_classification": False}
    known = several.get(model.config.problem_type, model.config.label_dim == AUDIOSET_CLASSES)
    return "sigmoid" if known else "softmax"


def class_probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """Probabilities [B, classes] on the CPU in float32; `activation` as `resolve_activation` gives it."""
    logits = logits.float().cpu()
    return logits.softmax(1) if activation == "softmax" else logits.sigmoid()


def best_labels(
    probabilities: Tensor,  # [classes]
    names: Sequence[str],
    top_k: int,
) -> tuple[tuple[str, float], ...]:
    """Name and probability of the most probable classes, best first."""
    best = probabilities.topk(min(top_k, len(names)))
    return tuple(
        (names[index], value)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def _run(
    sources: Iterable[Source | Tensor],
    model: Any,
    top_k: int,
    labels: Sequence[str] | None,
    activation: Activation,
    audio: AudioConfig | None,
    batch_size: int,
) -> Iterator[Prediction | Failure]:
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k}, batch_size={batch_size}: expected at least 1 of each")
    model = load_model(model)
    activation = resolve_activation(activation, model)
    names = class_names(model, labels)
    front: LogMelConfig = model.frontend_config
    settings = (audio or AudioConfig()).replace(sample_rate_hz=front.sample_rate_hz)
    waiting: list[_Pending] = []
    for source in sources:
        clip = _read(source, settings)
        clip.windows = split_windows(clip.wave, front)
        waiting.append(clip)
        if sum(len(item.windows) for item in waiting) >= batch_size:
            yield from _finish(waiting, model, names, top_k, activation, batch_size)
            waiting = []
    yield from _finish(waiting, model, names, top_k, activation, batch_size)


@dataclasses.dataclass(slots=True)
class _Pending:
    source: str
    path: str | None
    wave: Tensor
    report: AudioReport
    error: AudioError | None = None
    windows: list[Tensor] = dataclasses.field(default_factory=list)


def _read(source: Source | Tensor, settings: AudioConfig) -> _Pending:
    if isinstance(source, Tensor):
        if source.dim() != 1 or not source.numel():
            raise ValueError(f"source has shape {tuple(source.shape)}: expected a waveform [N]")
        return _Pending("<waveform>", None, source.detach().cpu(), AudioReport(clips=1))
    name = source_name(source)
    path = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
    try:
        clip = load(source, settings)
    except AudioError as error:
        report = AudioReport()
        report.skip(error)
        return _Pending(name, path, torch.empty(0), report, error)
    return _Pending(name, path, clip.wave, clip.report)


def split_windows(wave: Tensor, front: LogMelConfig) -> list[Tensor]:
    """Consecutive parts of a waveform [N], each what the model takes at once.

    A rest shorter than a tenth of a window (or than one frame) is joined to the window before it by
    starting that one later, so that no part is mostly padding.
    """
    most = max_samples(front)
    if not wave.numel():
        return []
    if most is None or wave.shape[0] <= most:
        return [wave]
    sizes = mel_sizes(**front.framing)
    step = (front.num_frames or 0) * sizes.hop_samples
    starts = list(range(0, wave.shape[0], step))
    rest = wave.shape[0] - starts[-1]
    if rest < step // 10 or not sizes.num_frames(rest):
        starts[-1] = wave.shape[0] - most
    return [wave[start : start + most] for start in starts]


@torch.no_grad()
def _finish(
    waiting: list[_Pending],
    model: Any,
    names: tuple[str, ...],
    top_k: int,
    activation: Activation,
    batch_size: int,
) -> Iterator[Prediction | Failure]:
    device = next(model.parameters()).device
    windows = [window for item in waiting for window in item.windows]
    rows: list[Tensor] = []
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        lengths = torch.tensor([len(window) for window in part])
        wave = torch.zeros(len(part), int(lengths.max()), dtype=torch.float32)
        for row, window in zip(wave, part, strict=True):
            row[: len(window)] = window if window.dtype != torch.int16 else window / 32768.0
        logits = model.forward_waveform(wave.to(device), lengths.to(device))
        rows += class_probabilities(logits, activation).unbind()
    position = 0
    for item in waiting:
        if item.error is not None:
            yield Failure(item.source, item.path, item.error)
            continue
        mine = torch.stack(rows[position : position + len(item.windows)])
        position += len(item.windows)
        probabilities = mine.mean(0)
        found = best_labels(probabilities, names, top_k)
        yield Prediction(
            item.source, item.path, found, probabilities, len(item.windows), item.report
        )
