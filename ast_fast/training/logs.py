"""What a run says: lines of JSON in its folder, and progress for the person watching."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from .._optional import optional_import, require_package
from .._text import without_nan


class RunLog:
    """`log.jsonl`: one JSON object a line, with the step it belongs to.

    Args:
        path: the file; lines of an earlier part of the run are kept.
        resume_step: drop lines of later steps, which will be done again.
        events: folder for the same figures as events of TensorBoard, if they are wanted.
    """

    def __init__(self, path: Path, resume_step: int = 0, events: Path | None = None) -> None:
        # what is said at the end of a run is said again
        rows = [
            row
            for row in read_log(path)
            if row.get("step", 0) <= resume_step and row.get("kind") != "average"
        ]
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        text = "".join(
            json.dumps(without_nan(row), allow_nan=False) + "\n" for row in rows if resume_step
        )
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if events is not None:
            require_package("tensorboard", "events for TensorBoard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            # events of steps that will be done again are hidden
            self._events = SummaryWriter(str(events), purge_step=resume_step or None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line, at once visible to readers."""
        self._file.write(
            json.dumps(without_nan({"kind": kind, "step": step, **values}), allow_nan=False) + "\n"
        )
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def figures_text(figures: Mapping[str, float]) -> str:
    """Figures by name on one line.

    >>> figures_text({"map": 0.5, "loss": 0.25})
    'map 0.5000, loss 0.2500'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def say(text: str) -> None:
    """Print a line at once, into pipes and files too."""
    print(text, flush=True)


def say_figures(figures: Mapping[str, float]) -> None:
    """Print figures by name on one line."""
    say(figures_text(figures))


def check_writable(option: str, path: Path | None) -> None:
    """Raise ValueError if a file of results could not be written: before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(
            f"{option} {str(path)!r}: {str(path.parent)!r} is not a folder: make it first"
        )
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {str(path)!r} cannot be written: choose another file")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725.4), _clock(65)
    ('1:02:05', '1:05')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing if not wanted.

    Args:
        total: steps.
        done: steps done before.
        title: what is counted.
        enabled: False is silent.
        stream: where it goes; standard error by default.
    """

    PLAIN_SECONDS = 10.0

    def __init__(
        self,
        total: int,
        done: int = 0,
        title: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.total, self.done, self.title = total, done, title
        self._began = self._said_at = time.monotonic()
        self._here = 0  # steps of this process
        self._bar = None
        tqdm = optional_import("tqdm") if enabled and self.stream.isatty() else None
        if tqdm is not None:
            self._bar = tqdm.tqdm(
                total=total, initial=done, desc=title, unit="step", file=self.stream, leave=True
            )

    def step(self, **values: str) -> None:
        """One step is done; `values` are shown beside it."""
        self.done += 1
        self._here += 1
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()
        elif self.enabled and time.monotonic() - self._said_at > self.PLAIN_SECONDS:
            self._said_at = time.monotonic()
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            left = (self.total - self.done) * (self._said_at - self._began) / self._here
            self.say(
                f"{self.title}: step {self.done} of {self.total}  {shown}  {_clock(left)} left"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.enabled:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
