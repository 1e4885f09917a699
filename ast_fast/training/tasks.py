"""Tasks, and what models say of the one that they were trained for."""

from __future__ import annotations

from typing import Any

from ..config import ProblemType, Task

PROBLEM_TYPES: dict[Task, ProblemType] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_TASKS = {problem: task for task, problem in PROBLEM_TYPES.items()}


def task_of(model: Any, multi_label: bool = False) -> Task:
    """The task that a model's `config.problem_type` names; one label a clip if it names none.

    Args:
        model: with a `config`.
        multi_label: the clips to be evaluated have several labels, whatever the model says.
    """
    if multi_label:
        return "multi_label"
    return _TASKS.get(model.config.problem_type, "single_label")


def check_fits(task: Task, dataset: Any) -> None:
    """Whether a data set has what a task learns from.

    Raises:
        ValueError: numbers are to be learnt and there are none, or the other way round.
    """
    numbers = getattr(dataset, "values", None) is not None
    if task == "regression" and not numbers:
        raise ValueError(
            "loss='mean_squared_error' learns numbers, and the data hold labels: leave it out, or name "
            "the columns of numbers (--values)"
        )
    if task != "regression" and numbers:
        raise ValueError(
            f"the data hold numbers to predict and the task is {task}: expected "
            "--set train.loss=mean_squared_error"
        )
