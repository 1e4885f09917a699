"""The demo set: one voice reading Mandarin syllables, for telling the four tones apart.

The recordings ship with the package (see NOTICE beside them). The split is by base syllable: what
the model is tested on it has never heard in any tone.
"""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..audio import load
from .dataset import WaveformDataset

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "mandarin_syllables"
SAMPLE_RATE_HZ = 16000
CLASSES = ("tone 1 (high level)", "tone 2 (rising)", "tone 3 (dipping)", "tone 4 (falling)")


class Syllables(NamedTuple):
    """The recordings: waveforms [N] int16, syllables (bopomofo) and tones (1 to 4)."""

    waves: list[Tensor]
    syllables: list[str]
    tones: list[int]


def read_syllables() -> Syllables:
    """Decode and cut the shipped recordings.

    Raises:
        AudioError: the package data is missing or broken: install the package again.
    """
    whole = load(FOLDER / "syllables.ogg", sample_rate_hz=SAMPLE_RATE_HZ, dtype="int16").wave
    text = (FOLDER / "syllables.csv").read_text(encoding="utf-8")
    waves, syllables, tones = [], [], []
    for row in csv.DictReader(io.StringIO(text)):
        start, length = int(row["start"]), int(row["frames"])
        waves.append(whole[start : start + length])
        syllables.append(row["syllable"])
        tones.append(int(row["tone"]))
    return Syllables(waves, syllables, tones)


def split_by_syllable(
    syllables: list[str], seed: int = 0, unseen: float = 0.25
) -> tuple[list[int], list[int]]:
    """Indices to train on and to test on, with no base syllable on both sides.

    Args:
        syllables: the base syllable of each clip.
        seed: of the draw.
        unseen: share of the base syllables kept for the test.

    Raises:
        ValueError: that is none of them, or all.
    """
    names = sorted(set(syllables))
    random.Random(seed).shuffle(names)
    count = round(unseen * len(names))
    if not 0 < count < len(names):
        raise ValueError(
            f"unseen={unseen} of {len(names)} syllables is {count} to test on: expected one or more, and "
            "some left to train on"
        )
    held_out = set(names[:count])
    train = [index for index, name in enumerate(syllables) if name not in held_out]
    test = [index for index, name in enumerate(syllables) if name in held_out]
    return train, test


def tone_datasets(seed: int = 0) -> tuple[WaveformDataset, WaveformDataset, Syllables]:
    """Training and test set of the four-tone task, and everything they come from."""
    everything = read_syllables()

    def subset(indices: list[int]) -> WaveformDataset:
        return WaveformDataset(
            [everything.waves[i] for i in indices],
            [(everything.tones[i] - 1,) for i in indices],
            CLASSES,
            SAMPLE_RATE_HZ,
        )

    train, test = split_by_syllable(everything.syllables, seed)
    return subset(train), subset(test), everything
