"""Exact statistics of a training set that `ast-fast prepare` has read once already.

`clips.jsonl` has count, mean and squares of the energies of every clip; those of the clips to train on are
put together, so clips that are held out do not count.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..config import LogMelConfig
from .examine import Moments
from .file_store import MANIFEST
from .layouts import Data
from .manifest import Manifest
from .prepare import CLIPS, stored
from .shards import ShardSet

REPORT = "report.json"


def prepared_front(sample_rate_hz: int) -> LogMelConfig:
    """What `prepare` measures: the energies of recipes by themselves, no padding, no normalisation."""
    return LogMelConfig(sample_rate_hz=sample_rate_hz, num_frames=None, mean=0.0, std=0.5)


def prepared_moments(path: Path, data: Data, front: LogMelConfig) -> Moments | str:
    """Moments of the energies of all clips of a prepared set that are trained on.

    Args:
        path: of the set, as it was given.
        data: some of its clips.
        front: whose energies are wanted.

    Returns:
        The moments; or why they cannot be had, empty where the set was not prepared.
    """
    folder = path.parent if path.name == MANIFEST else path
    if not (folder / CLIPS).is_file() or not (folder / REPORT).is_file():
        return ""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        rate, statistics = int(report["sample_rate_hz"]), report["statistics"] or {}
        # reports of older versions do not say, and were made so
        made = statistics.get("frontend", prepared_front(rate).to_dict())
        lines = [Moments(*line["mel"]) for line in stored(folder / CLIPS)]
        count = int(report["stored"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{REPORT} and {CLIPS} of prepare are not as it writes them: {error!r}"
    if front.replace(num_frames=None, mean=0.0, std=0.5).to_dict() != made:
        return (
            f"{CLIPS} of prepare is for another front end: {made['num_mel_bins']} bins, {rate} Hz"
        )
    places = _places(data, folder)
    if places is None or len(lines) != count or int(places.max(initial=-1)) >= count:
        return f"{CLIPS} of prepare does not fit the clips that are there now"
    total = Moments()
    for place in places.tolist():
        total = total.merged(lines[place])
    return total if total.n else f"{CLIPS} of prepare holds no energies"


def _places(data: Data, folder: Path) -> np.ndarray | None:
    """The number of each clip among all that were stored."""
    if isinstance(data, Manifest):
        # a line a clip, in order
        fits = Path(data.source) == folder / MANIFEST
        return np.asarray(data.lines, np.int64) - 1 if fits else None
    if isinstance(data, ShardSet) and data.folder == folder:
        return data.places
    return None
