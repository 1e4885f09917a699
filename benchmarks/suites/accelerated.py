"""A model of transformers before and after `ast_fast.accelerate`: inference and a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from ..case import DTYPES, Case, Settings, Skipped
from ..models import State, forward_flops, ours, plain, with_transformers
from ..peers import need
from . import inference, training


def _accelerated(size: str, frames: int, depth: int, state: State) -> nn.Module:
    model = with_transformers("sdpa")(size, frames, depth, state)
    return need("ast_fast.integrations.transformers").accelerate(model)


def _shapes(settings: Settings) -> list[tuple[str, int, int]]:
    """Size, frames, clips."""
    if settings.tiny:
        return [("tiny", 36, 1)]
    if settings.cuda:
        return [("base", 1024, 32)] if settings.quick else [("base", 1024, 32), ("base", 1024, 1)]
    if settings.quick:
        return [("tiny", 128, 1)]
    return [("base", 1024, 1), ("base", 128, 1), ("small", 128, 4)]


def cases(settings: Settings) -> Iterator[Case]:
    """Features to logits, then whole steps: ours is transformers' own model on our ops.

    Beside it transformers as it comes, and our model of the same weights, which has one product for
    queries, keys and values.
    """
    try:
        need("transformers")
    except Skipped:  # a bare GPU machine
        return
    dtypes = [dtype for dtype in settings.dtypes if dtype in DTYPES]
    for dtype in dtypes:
        for size, frames, clips in _shapes(settings):
            yield _features(settings, size, frames, clips, dtype)
    for dtype in dtypes:
        for size, frames, clips in _shapes(settings):
            if settings.cuda or settings.tiny or (size, frames) != ("base", 1024):
                yield _step(settings, size, frames, clips, dtype)


def _features(settings: Settings, size: str, frames: int, clips: int, dtype: str) -> Case:
    def make(name: str, build: inference.Build, timed: bool = True):  # type: ignore[no-untyped-def]
        return inference._candidate(name, build, settings, size, frames, dtype, timed=timed)

    return Case(
        suite="accelerated",
        name=f"{size}_transformers",
        mode="forward",
        shape={"B": clips, "S": frames},
        dtype=dtype,
        outputs=("logits",),
        make_inputs=inference.spectrograms(settings, frames, clips, dtype),
        oracle=inference.oracle_of(size, frames, settings, dtype),
        candidates=(
            make(settings.ours, _accelerated),
            make("torch", plain, timed=False),
            make("transformers", with_transformers("sdpa")),
            make("native", ours),
        ),
        kinds=("logits",),
        clips=clips,
        flops=clips * forward_flops(size, frames, inference.depth_of(settings)),
    )


def _step(settings: Settings, size: str, frames: int, clips: int, dtype: str) -> Case:
    def make(name: str, build: inference.Build):  # type: ignore[no-untyped-def]
        return training._candidate(name, build, settings, size, frames, dtype, False)

    return Case(
        suite="accelerated",
        name=f"{size}_transformers_step",
        mode="step",
        shape={"B": clips, "S": frames},
        dtype=dtype,
        outputs=("loss", "gradient"),
        make_inputs=inference.spectrograms(settings, frames, clips, dtype, True),
        make_gate_inputs=inference.spectrograms(settings, frames, 1, dtype, True),
        oracle=training._oracle(settings, size, frames, dtype),
        candidates=(
            make(settings.ours, _accelerated),
            dataclasses.replace(make("torch", plain), timed=settings.tiny),
            make("transformers", with_transformers("sdpa")),
            make("native", ours),
        ),
        kinds=("logits", "whole gradient"),
        clips=clips,
        flops=3.0 * clips * forward_flops(size, frames, inference.depth_of(settings)),
    )
