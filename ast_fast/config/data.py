"""What a data set is, and how to read it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal, Self

from .base import Config, check

Layout = Literal[
    "auto",
    "manifest",
    "original",
    "audioset",
    "esc50",
    "speechcommands",
    "folders",
    "deam",
    "shards",
    "huggingface",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """What a data set is, where that does not follow from what lies at its path.

    Attributes:
        layout: auto looks; manifest is CSV or JSON lines, original the original AST's JSON.
        fold: evaluate on this fold and train on the rest (ESC-50, or a column fold or split).
        split: take only the clips of this part; all takes every clip of data in parts.
        values: columns of numbers to predict instead of labels, such as valence arousal.
        audio_column: of a Hugging Face dataset, if it has several of sound.
        label_column: of a Hugging Face dataset, if it is not called labels, label or the like.
    """

    layout: Layout = "auto"
    fold: int | None = None
    split: str | None = None
    values: tuple[str, ...] = ()
    audio_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        layouts = typing.get_args(Layout)
        check(
            self.layout in layouts, f"layout={self.layout!r}: expected one of {', '.join(layouts)}"
        )
        check(self.fold is None or self.fold >= 0, f"fold={self.fold}: expected 0 or more")
        check(
            len(set(self.values)) == len(self.values) and all(self.values),
            f"values={self.values}: expected names of columns, each once",
        )

    def one_part(self) -> Self:
        """The same where nothing is trained: a fold is then the part of that name, and alone."""
        return self if self.fold is None else self.replace(fold=None, split=str(self.fold))
