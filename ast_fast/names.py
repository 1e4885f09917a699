"""Names of classes, parts and files: when two are one, in which order they stand, and how they are written.

A name comes from somewhere else: a folder on a Mac (decomposed, NFD), a table typed on Windows (composed, NFC), a
list with terminal codes in it. One idea of each question is here, for every layout and every output.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# names that parts go by, folders and columns alike
SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
)
_FORMULA = re.compile(r"'*[=+\-@\t\r]").match
_LISTED = 12  # names in a message
_MAX_DIGITS = 4000  # Python refuses longer numbers


def same_name(text: str) -> str:
    """What two names have in common that are written alike: composed characters (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def in_order(names: Iterable[str]) -> list[str]:
    """Classes sorted: as numbers if all of them are whole numbers (2 before 10), else as text."""
    names = list(names)
    numbers = all(name.isascii() and name.isdigit() and len(name) < _MAX_DIGITS for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def part_name(text: str) -> str:
    """The name of a part: of those that everybody uses, in small letters (Train is train)."""
    small = text.lower()
    return small if small in SPLIT_NAMES else text


def is_name(text: str) -> bool:
    """Whether a text can name a class: it is not blank and holds no NUL."""
    return bool(text.strip()) and "\0" not in text


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first twelve of many.

    >>> listed(["dog", "cat"])
    "'dog', 'cat'"
    """
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse names of classes that cannot tell classes apart.

    Raises:
        ValueError: one is empty, holds NUL, or stands twice.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if not isinstance(name, str) or not is_name(name):
            raise ValueError(
                f"{what}: name {place} is {name!r:.80}: expected text that is not empty, without NUL"
            )
        first = places.setdefault(same_name(name), place)
        if first != place:
            raise ValueError(
                f"{what}: {name!r:.80} is the name of class {first} and of class {place}: expected "
                "each once"
            )


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, for CSV files; `plain_cell` gives it back.

    >>> safe_cell("=SUM(A1)"), safe_cell("dog"), safe_cell("'-dog")
    ("'=SUM(A1)", 'dog', "''-dog")
    """
    return f"'{text}" if _FORMULA(text) else text


def plain_cell(cell: str) -> str:
    """The text that `safe_cell` wrote.

    >>> plain_cell("'=SUM(A1)"), plain_cell("'til dawn")
    ('=SUM(A1)', "'til dawn")
    """
    return cell[1:] if cell[:1] == "'" and _FORMULA(cell) else cell


def safe_path(path: str) -> str:
    """A file's name for CSV files: `./--PJ.wav` for `--PJ.wav`, the same file and no formula."""
    return f"./{path}" if _FORMULA(path) else path
