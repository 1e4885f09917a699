"""A training run as it lies in its folder: settings, log, and the models that it left."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from .training.logs import read_log

# figures by which a run is judged, the first that it has; the last is better when lower
JUDGES = ("map", "accuracy", "r2", "loss")
NAMES = {
    "map": "mean average precision",
    "accuracy": "accuracy",
    "macro_accuracy": "accuracy, mean over classes",
    "top5_accuracy": "top-5 accuracy",
    "auc": "area under the ROC curve",
    "dprime": "d'",
    "r2": "R2",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "loss": "loss",
}
_NO_FIGURE = {"kind", "step", "epoch", "epochs", "skipped", "time"}


@dataclasses.dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run says of itself.

    Attributes:
        folder: of the run.
        name: what it is called among others.
        plan: run.json: data and settings; empty for a run begun from Python.
        settings: flat, by dotted name.
        rows: of log.jsonl.
    """

    folder: Path
    name: str
    plan: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no log in it.
            ValueError: run.json is no JSON object.
        """
        if not (folder / "log.jsonl").is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no log.jsonl: expected the folder of a training run"
            )
        plan: dict[str, Any] = {}
        file = folder / "run.json"
        if file.is_file():
            try:
                plan = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: is not JSON: {error}") from error
            if not isinstance(plan, dict):
                raise ValueError(f"{file}: expected a JSON object")
        settings = flat(plan) if plan else flat({"train": _saved_settings(folder)}, "settings")
        return cls(folder, folder.resolve().name, plan, settings, read_log(folder / "log.jsonl"))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one kind: step, eval, check."""
        return [row for row in self.rows if row.get("kind") == kind]

    @property
    def judge(self) -> str | None:
        """The figure that the run is judged by; None if it was never evaluated."""
        evals = self.of_kind("eval")
        return next((name for name in JUDGES if evals and name in evals[-1]), None)

    @property
    def final(self) -> dict[str, float]:
        """Figures of the run's model; of one that is not finished, of the last evaluation."""
        kept = self.result.get("figures")
        if kept:
            return _figures(kept)
        evals = [row for row in self.rows if row.get("kind") in ("eval", "average")]
        return _figures(evals[-1]) if evals else {}

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best evaluation."""
        name, evals = self.judge, self.of_kind("eval")
        if name is None:
            return None
        sign = -1.0 if name == "loss" else 1.0
        return max(evals, key=lambda row: sign * row.get(name, -sign * math.inf))

    @property
    def result(self) -> dict[str, Any]:
        """result.json: which epoch became the model, and its figures; empty until the run is finished."""
        try:
            found = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def model_folder(self, which: Literal["final", "best"] = "final") -> Path:
        """The run's model (until there is one the newest checkpoint), or that of the best evaluation.

        Raises:
            FileNotFoundError: there is none.
        """
        kept = which == "final" or self.result.get("kept") == "best"
        if kept and (self.folder / "model").is_dir():
            return self.folder / "model"
        pointer = self.folder / "checkpoints" / ("latest" if which == "final" else "best")
        if pointer.is_file():
            found = pointer.parent / pointer.read_text(encoding="ascii").strip() / "model"
            if found.is_dir():
                return found
        raise FileNotFoundError(
            f"{str(self.folder)!r} holds no {which} model: expected model/ or checkpoints/"
        )

    def typical(self, name: str) -> float | None:
        """Median over the logged steps, the first tenth left out."""
        values = [row[name] for row in self.of_kind("step") if isinstance(row.get(name), float)]
        values = sorted(values[len(values) // 10 :])
        return values[len(values) // 2] if values else None


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if name not in _NO_FIGURE and isinstance(value, (int, float))
    }


def _saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in the newest checkpoint, for a run without run.json."""
    pointer = folder / "checkpoints" / "latest"
    try:
        state = pointer.parent / pointer.read_text(encoding="ascii").strip() / "state.json"
        saved = json.loads(state.read_text(encoding="utf-8"))["state"]["train"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return saved if isinstance(saved, dict) else {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            found |= flat(value, path)
        else:
            found[path] = value
    return found
