"""What is kept of a clip, and how it reads: labels, windows, curves and vectors as records and as rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..names import safe_path
from .outputs import ClipOutput
from .records import Record

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TagRows:
    """Labels of clips.

    Attributes:
        names: of the classes.
        top_k: labels kept of a clip and of a window; None for all of them.
    """

    names: Sequence[str]
    top_k: int | None = 5

    def encode(self, output: ClipOutput) -> Record:
        """Scores of the labels that are kept; curves are of those of the clip."""
        assert output.scores is not None
        arrays: dict[str, np.ndarray] = {}
        count = len(self.names) if self.top_k is None else min(self.top_k, len(self.names))
        best = output.scores.topk(count)
        arrays["classes"] = best.indices.numpy().astype(np.int32)
        arrays["scores"] = best.values.numpy()
        if output.window_scores is not None:
            each = output.window_scores.topk(count)
            arrays["spans_s"] = np.asarray(output.spans_s, np.float64)
            arrays["window_classes"] = each.indices.numpy().astype(np.int32)
            arrays["window_scores"] = each.values.numpy()
        if output.frame_times_s is not None and output.frame_scores is not None:
            arrays["times_s"] = output.frame_times_s.numpy()
            arrays["frame_scores"] = output.frame_scores[:, best.indices].numpy()
        return Record(output.number, _meta(output), arrays)

    def row(self, record: Record) -> Row:
        """A record for people and programs: file, seconds, labels, and what else was asked for."""
        arrays, row = record.arrays, dict(record.meta)
        row["labels"] = self._labels(arrays["classes"], arrays["scores"])
        if "spans_s" in arrays:
            row["parts"] = [
                {"start_s": begin, "end_s": end, "labels": self._labels(classes, scores)}
                for (begin, end), classes, scores in zip(
                    arrays["spans_s"].tolist(),
                    arrays["window_classes"],
                    arrays["window_scores"],
                    strict=True,
                )
            ]
        if "times_s" in arrays:
            row["frames"] = {
                "times_s": [round(at, 6) for at in arrays["times_s"].tolist()],
                "labels": [self.names[index] for index in arrays["classes"].tolist()],
                "scores": [short(curve) for curve in arrays["frame_scores"].T],
            }
        return row

    def _labels(self, classes: np.ndarray, scores: np.ndarray) -> list[Row]:
        return [
            {"label": self.names[index], "score": score}
            for index, score in zip(classes.tolist(), short(scores), strict=True)
        ]

    def lines(self, record: Record) -> Iterator[tuple[Any, ...]]:
        """A record as lines of a table: file, kind, start_s, end_s, label, score."""
        row = self.row(record)
        file, whole = safe_path(row["file"]), row["seconds"]
        for found in row["labels"]:
            yield file, "clip", 0.0, whole, found["label"], found["score"]
        for part in row.get("parts", ()):
            for found in part["labels"]:
                yield (
                    *(file, "window", part["start_s"], part["end_s"]),
                    *(found["label"], found["score"]),
                )
        frames = row.get("frames")
        if frames is not None:
            for label, curve in zip(frames["labels"], frames["scores"], strict=True):
                for at, score in zip(frames["times_s"], curve, strict=True):
                    yield file, "frame", at, at, label, score


def encode_embedding(output: ClipOutput) -> Record:
    """The vector of a clip, or those of its windows where they are wanted."""
    if output.window_embeddings is not None:
        name, vectors, spans = "window_vectors", output.window_embeddings, output.spans_s
    else:
        assert output.embedding is not None
        name, vectors, spans = "vectors", output.embedding[None], [(0.0, output.seconds)]
    arrays = {name: vectors.float().numpy(), "spans_s": np.asarray(spans, np.float64)}
    return Record(output.number, _meta(output), arrays)


def vectors_of(record: Record) -> Iterator[tuple[float, float, np.ndarray]]:
    """Begin, end and vector [C] of the clip, or of each of its windows."""
    name = "vectors" if "vectors" in record.arrays else "window_vectors"
    for (begin, end), vector in zip(
        record.arrays["spans_s"].tolist(), record.arrays[name], strict=True
    ):
        yield begin, end, vector


def embedding_row(record: Record) -> Row:
    """A record for people and programs: file, seconds, and the vector or those of the windows."""
    found = [
        {"start_s": begin, "end_s": end, "embedding": short(vector)}
        for begin, end, vector in vectors_of(record)
    ]
    if "vectors" in record.arrays:
        return {**record.meta, "embedding": found[0]["embedding"]}
    return {**record.meta, "parts": found}


def _meta(output: ClipOutput) -> Row:
    return {
        "file": output.path if output.path is not None else output.source,
        "seconds": round(output.seconds, 6),
        "windows": len(output.spans_s),
        "notes": output.report.notes,
    }


def short(values: np.ndarray | Tensor) -> list[float]:
    """Numbers as text should show them: six digits, not the tail of a float32."""
    return [float(f"{value:.6g}") for value in values.tolist()]
