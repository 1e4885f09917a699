"""Which task a model was trained for."""

from __future__ import annotations

from typing import Any

from ..config import Task

_TASKS: dict[str, Task] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def task_of(model: Any, multi_label: bool = False) -> Task:
    """The task that a model's `config.problem_type` names; one label a clip if it names none.

    Args:
        model: with a `config`.
        multi_label: the clips to be evaluated have several labels, whatever the model says.
    """
    if multi_label:
        return "multi_label"
    return _TASKS.get(model.config.problem_type or "", "single_label")
