"""`predict`, `tag` and `embed`: what a program calls, from one clip to millions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from torch import Tensor

from ..audio import AudioReport
from ..audio_memory import AnyClip, described, is_clip
from ..config import AudioConfig
from .engine import Engine
from .loading import Activation, best_labels, class_names, load_model, resolve_activation
from .outputs import ClipOutput, Failure, Pooling, Wanted
from .sources import AnySource, OneFile, units_of

Labels = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class WindowLabels:
    """One window of a clip.

    Attributes:
        start_s: where it begins.
        end_s: where it ends, or the clip does.
        labels: (name, probability) of the most probable classes, best first.
        probabilities: [classes].
    """

    start_s: float
    end_s: float
    labels: Labels
    probabilities: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Curves:
    """Probabilities over time.

    Attributes:
        times_s: [T] float64, middle of each point's patches.
        probabilities: [T, classes].
    """

    times_s: Tensor
    probabilities: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What a clip sounds like.

    Attributes:
        source: the clip, as messages name it.
        path: its path, if it is a file or lies in a shard.
        labels: (name, probability) of the most probable classes, best first.
        probabilities: [classes], pooled over the windows.
        windows: parts the clip was cut into (1 unless it is longer than the model's input).
        report: what reading the clip changed.
        seconds: length of the clip.
        parts: each window, if asked for.
        frames: probabilities over time, if asked for.
    """

    source: str
    path: str | None
    labels: Labels
    probabilities: Tensor
    windows: int
    report: AudioReport
    seconds: float = 0.0
    parts: tuple[WindowLabels, ...] | None = None
    frames: Curves | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """A clip as a vector: the mean of the prefix tokens after the final norm, and over the windows.

    Attributes:
        source: the clip, as messages name it.
        path: its path, if it is a file or lies in a shard.
        vector: [C] float32.
        windows: parts the clip was cut into.
        report: what reading the clip changed.
        seconds: length of the clip.
        spans_s: begin and end of each window.
        window_vectors: [W, C], if asked for.
    """

    source: str
    path: str | None
    vector: Tensor
    windows: int
    report: AudioReport
    seconds: float
    spans_s: tuple[tuple[float, float], ...]
    window_vectors: Tensor | None = None


class TagSettings(TypedDict, total=False):
    """Settings of `tag`, by name."""

    top_k: int
    labels: Sequence[str] | None
    activation: Activation
    audio: AudioConfig | None
    pooling: Pooling
    hop_s: float | None
    windows: bool
    frames: bool
    batch_size: int
    num_workers: int
    root: str | os.PathLike[str] | None


@overload
def predict(
    source: AnyClip,
    model: Any,
    **settings: Unpack[TagSettings],
) -> Prediction: ...


@overload
def predict(
    source: Iterable[AnySource], model: Any, **settings: Unpack[TagSettings]
) -> list[Prediction | Failure]: ...


def predict(
    source: Any, model: Any, **settings: Unpack[TagSettings]
) -> Prediction | list[Prediction | Failure]:
    """The most probable labels of one clip, or of each of several.

    One clip is a path, the bytes of a file, an open file, a waveform [N] at the model's rate (a tensor or array,
    floats in [-1, 1] or int16), or a dict {"array" or "raw": waveform, "sampling_rate": Hz}, which is resampled.
    All are held to what files are: NaN is refused, a clip under a window is padded with a note. It
    gives one `Prediction`, or raises why there is none. A list (or any other iterable) of clips,
    folders, manifests and shards gives a list, in which a clip that cannot be read is a `Failure`
    at its place. For more clips than should lie in memory use `tag`, which gives them one by one.

    Args:
        source: a clip, or several.
        model: an `ASTModel`, or what `ASTModel.from_pretrained` takes.
        **settings: those of `tag`: top_k, labels, activation, audio, pooling, hop_s, windows, frames,
            batch_size, num_workers, root.

    Raises:
        AudioError: the one clip cannot be read.
        NotFiniteError: the model's weights are NaN or infinite.
        TypeError: there is no such setting; or a source is no clip.
        ValueError: an argument does not fit the model; a folder was given for a clip.
    """
    unknown = sorted(set(settings) - set(TagSettings.__annotations__))
    if unknown:
        raise TypeError(
            f"predict has no setting {', '.join(unknown)}: expected some of "
            f"{', '.join(TagSettings.__annotations__)}"
        )
    if not is_clip(source):
        if not isinstance(source, Iterable):
            raise TypeError(f"source is {described(source)}: expected a clip, or several as a list")
        return list(tag(source, model, **settings))
    if isinstance(source, (str, os.PathLike)):
        if Path(source).is_dir():
            raise ValueError(
                f"source {os.fspath(source)!r} is a folder: expected one clip; predict([folder], ...) "
                "gives a list of all its clips, tag([folder], ...) one after the other"
            )
        source = OneFile(source)
    for result in tag([source], model, **settings):
        if isinstance(result, Failure):
            raise result.error
        return result
    raise AssertionError("one source gives one result")


def tag(
    paths: Iterable[AnySource],
    model: Any,
    *,
    top_k: int = 5,
    labels: Sequence[str] | None = None,
    activation: Activation = "auto",
    audio: AudioConfig | None = None,
    pooling: Pooling = "mean",
    hop_s: float | None = None,
    windows: bool = False,
    frames: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> Iterator[Prediction | Failure]:
    """Label files, and all clips of folders, manifests and shards; a bad file is a result, not the end.

    A clip longer than the model's input is cut into windows, every `hop_s` seconds, such that nothing
    is left out. Results come one by one in the order of the paths, which may be a generator of millions:
    memory holds what is being read, whatever the length of a file.

    Args:
        paths: files, folders, manifests (.csv, .jsonl, .json), lists of paths (.txt), shards; and clips in
            memory, as `predict` takes them.
        model: an `ASTModel`, or what `ASTModel.from_pretrained` takes.
        top_k: how many labels.
        labels: class names, if the model has none or others are wanted.
        activation: "softmax" for one label a clip, "sigmoid" for several; "auto" takes what the model
            was trained for (`config.problem_type`), else sigmoid for AudioSet's 527 classes.
        audio: how to read files; the sample rate is always the model's.
        pooling: "mean" or "max" of the probabilities over the windows of a clip.
        hop_s: seconds from one window to the next; by default they follow one another.
        windows: give the labels of each window, too.
        frames: give probabilities over time, too.
        batch_size: windows that run at a time, of one clip or of several.
        num_workers: processes that read files; 0 reads between batches.
        root: folder that the paths of manifests start from; the manifest's own by default.

    Raises:
        TypeError: paths is one path rather than several.
        ValueError: an argument does not fit; a manifest cannot be read.
    """
    _check_sources(paths)
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1")
    network = load_model(model)
    names = class_names(network, labels)
    engine = Engine(
        network,
        resolve_activation(activation, network),
        Wanted(scores=True, windows=windows, frames=frames),
        hop_s=hop_s,
        pooling=pooling,
        audio=audio,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    return (
        output if isinstance(output, Failure) else prediction_of(output, names, top_k)
        for output in engine.run(units_of(paths, root))
    )


def prediction_of(output: ClipOutput, names: Sequence[str], top_k: int) -> Prediction:
    """The labels of what came of a clip."""
    assert output.scores is not None
    parts = frames = None
    if output.window_scores is not None:
        parts = tuple(
            WindowLabels(*span, best_labels(scores, names, top_k), scores)
            for span, scores in zip(output.spans_s, output.window_scores, strict=True)
        )
    if output.frame_times_s is not None and output.frame_scores is not None:
        frames = Curves(output.frame_times_s, output.frame_scores)
    return Prediction(
        output.source,
        output.path,
        best_labels(output.scores, names, top_k),
        output.scores,
        len(output.spans_s),
        output.report,
        output.seconds,
        parts,
        frames,
    )


def embed(
    paths: Iterable[AnySource],
    model: Any,
    *,
    audio: AudioConfig | None = None,
    hop_s: float | None = None,
    windows: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> Iterator[Embedding | Failure]:
    """Vectors of clips: the mean of the model's prefix tokens after its final norm.

    Args:
        paths: as for `tag`.
        model: an `ASTModel`, or what `ASTModel.from_pretrained` takes.
        audio: how to read files; the sample rate is always the model's.
        hop_s: seconds from one window to the next; by default they follow one another.
        windows: give the vector of each window, too.
        batch_size: windows that run at a time.
        num_workers: processes that read files; 0 reads between batches.
        root: folder that the paths of manifests start from.

    Raises:
        ValueError: an argument does not fit; a manifest cannot be read.
    """
    _check_sources(paths)
    engine = Engine(
        load_model(model),
        "sigmoid",
        Wanted(embedding=True, windows=windows),
        hop_s=hop_s,
        audio=audio,
        batch_size=batch_size,
        num_workers=num_workers,
    )

    return (
        output if isinstance(output, Failure) else embedding_of(output)
        for output in engine.run(units_of(paths, root))
    )


def embedding_of(output: ClipOutput) -> Embedding:
    """The vector of what came of a clip."""
    assert output.embedding is not None
    return Embedding(
        output.source,
        output.path,
        output.embedding,
        len(output.spans_s),
        output.report,
        output.seconds,
        tuple(output.spans_s),
        output.window_embeddings,
    )


def _check_sources(sources: Any) -> None:
    if is_clip(sources):
        many = getattr(sources, "ndim", 0) > 1
        raise TypeError(
            f"paths is {described(sources)}: expected several clips, as a list; write "
            + ("list(batch) for the rows of a batch" if many else "[path] or [waveform] for one")
        )
    if not isinstance(sources, Iterable):
        raise TypeError(
            f"paths is {described(sources)}: expected clips, as a list or other iterable"
        )
