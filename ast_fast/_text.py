"""Text from files and strangers, made safe to print: no control codes, of bounded length."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

# controls, what turns text around or joins it unseen, halves of pairs, other ends of lines
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_LONGEST = 200  # characters of a value in a message


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with everything spelled out that a terminal would obey rather than show.

    >>> printable(chr(27) + "[2J").isprintable()
    True
    """
    if text.isprintable():
        return text
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in _OBEYED and char not in keep else char
        for char in text
    )


def one_line(text: str) -> str:
    """A name as it may go to a terminal: `printable`, and on one line."""
    return printable(text, keep="")


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
