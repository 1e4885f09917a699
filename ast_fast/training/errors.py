"""How training ends when it does not end well."""

from __future__ import annotations

from pathlib import Path


class TrainingError(RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """Loss or gradient is NaN or infinite. The weights are those before the step."""


class DivergedError(TrainingError):
    """The loss grew far above where it began. The weights are those after the step."""


class StepOutOfMemoryError(TrainingError):
    """A step did not fit into memory. The weights are those before it and the process is usable."""


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the state is saved in {run_dir}")
        self.run_dir = run_dir
        self.step = step
