"""One error for every checkpoint that cannot be used, and the report of keys that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._text import named, printable

_SHOWN = 8  # keys named in a report; the rest are counted


class CheckpointError(ValueError):
    """A checkpoint is missing, broken or does not fit; the message names the file and the fix.

    What a file brought into the message is printed, never obeyed: control codes are spelled out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def _listing(title: str, lines: list[str]) -> str:
    shown = "".join(f"\n    {line}" for line in lines[:_SHOWN])
    rest = f"\n    ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"\n  {title} ({len(lines)}):{shown}{rest}" if lines else ""


def require_match(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], file: str | Path
) -> None:
    """Raise unless names and shapes of two state dicts are equal.

    Raises:
        CheckpointError: lists missing, unexpected and mis-shaped keys.
    """
    missing = [f"{named(key)} {tuple(expected[key].shape)}" for key in expected if key not in got]
    unexpected = [f"{named(key)} {tuple(got[key].shape)}" for key in got if key not in expected]
    shapes = [
        f"{key}: got {tuple(got[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in got and got[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{str(file)!r} does not fit the model"
            + _listing("missing", missing)
            + _listing("unexpected", unexpected)
            + _listing("wrong shape", shapes)
            + "\n  load it into a model of its own sizes, or pass the sizes that changed "
            "(label_dim=, input_tdim=, ...) to from_pretrained"
        )
