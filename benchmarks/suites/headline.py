"""Whole passes that most people ask about, from the suites of models: what `ast-fast bench` measures.

A few cases rather than all: ten seconds and one second of sound through AST-base, one training step, fewer tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..case import Case, Settings
from . import inference, tokens, training

TITLES = {
    "cpu": (
        *(f"inference/base_features forward B1 S1024 {dtype}" for dtype in ("f32", "bf16", "int8")),
        *(f"inference/base_features forward B1 S128 {dtype}" for dtype in ("f32", "bf16", "int8")),
        "training/small_step step B4 S128 f32",
        "training/small_features_step step B4 S128 bf16-master",
        "tokens/small_patchout step B1 S998 T474 f32",
        "tokens/base_merging_32 forward B1 S1024 T862 f32",
    ),
    "cuda": (
        *(f"inference/base_waveform forward B{clips} N160000 bf16" for clips in (64, 1)),
        *(f"inference/base_waveform_compiled forward B{clips} N160000 bf16" for clips in (64, 1)),
        "training/base_waveform_step step B64 S1024 bf16-master",
        "training/base_waveform_step_transformers-compile step B64 S1024 bf16-master",
        "training/base_waveform_step_original step B12 S1024 bf16-master",
        "training/base_step_modes step B64 S1024 bf16-master",
        "tokens/base_patchout step B64 S998 T474 bf16-amp",
        "tokens/base_merging_32 forward B64 S1024 T862 bf16",
    ),
}


def cases(settings: Settings) -> Iterator[Case]:
    """The chosen cases of all three suites; the first of each in a dry run."""
    wanted = TITLES[settings.device]
    for suite in (inference, training, tokens):
        for case in suite.cases(settings):
            if settings.tiny or settings.quick or case.title in wanted:
                yield dataclasses.replace(case, suite="headline")
                if settings.tiny or settings.quick:
                    break
