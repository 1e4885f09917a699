"""Text from files and strangers, made safe to print: no control codes, of bounded length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LONGEST = 200  # characters of a value in a message


def printable(text: str) -> str:
    """The text with everything spelled out that a terminal would obey rather than show.

    Line ends and tabs stay.

    >>> printable(chr(27) + "[2J").isprintable()
    True
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A value in a message: one line of bounded length, whatever a file put there."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested beyond sense; an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def named(name: Any) -> str:
    """A name in a message, such as a tensor's: bare where it is plain, else as `shown` gives it."""
    if isinstance(name, str) and name.isprintable() and name and len(name) <= _LONGEST:
        return name
    return shown(name)


def without_nan(value: Any) -> Any:
    """Plain values with None for every number that JSON lacks: NaN and the infinities.

    >>> without_nan({"loss": float("nan"), "each": (1.0, float("inf"))})
    {'loss': None, 'each': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
