"""Groups of options that several commands share: each a dataclass whose fields are options of their own."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from .config import DataConfig, ModelFacts

# --layout, --fold, --split, ... rather than --how.layout
How = Annotated[DataConfig, tyro.conf.arg(name="")]
AS_FOUND = DataConfig()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Facts(ModelFacts):
    # one spelling that every command has
    frames: Annotated[int | None, tyro.conf.arg(aliases=("--input-frames",))] = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _TagFacts(ModelFacts):
    # --frames asks for scores over time there
    frames: Annotated[int | None, tyro.conf.arg(name="input-frames")] = None


# --strides, --frames, --mean, ... rather than --facts.strides
Facts = Annotated[_Facts, tyro.conf.arg(name="")]
TagFacts = Annotated[_TagFacts, tyro.conf.arg(name="")]
NO_FACTS, NO_TAG_FACTS = _Facts(), _TagFacts()
