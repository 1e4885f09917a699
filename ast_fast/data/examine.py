"""What is to be known of a clip before it is trained on, and its bytes as they will be stored.

Runs in workers: everything that costs time happens here, and what comes back is a few numbers and the
bytes to be written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._optional import require_package
from ..audio import AudioReport
from .dataset import Clip, ClipSet, Skip
from .reading import Reader

Energies = Callable[[Tensor], Tensor]  # int16 [1, N] -> log-mel energies [1, S, F]
Pack = Callable[[Clip, np.ndarray], bytes]  # a clip and its samples as they are stored

SILENT_PEAK = 1e-3  # -60 dB: nothing to be heard


class Moments(NamedTuple):
    """How many numbers, their mean, and the sum of squared differences from it; float64."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of all values of an array."""
        if not values.size:
            return cls()
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        return cls(wide.size, mean, float(np.square(wide - mean).sum()))

    def merged(self, other: Moments) -> Moments:
        """Of both sets of numbers, without the loss of sums of squares (Chan, Golub and LeVeque)."""
        count = self.n + other.n
        if not count:
            return self
        difference, share = other.mean - self.mean, other.n / count
        squares = self.squares + other.squares + difference**2 * self.n * share
        return Moments(count, self.mean + difference * share, squares)

    def std(self, less: int = 0) -> float:
        """Standard deviation; `less` 1 divides by one less than the count, as `torch.std` does."""
        return (self.squares / max(self.n - less, 1)) ** 0.5


def as_stored(wave: Tensor) -> tuple[np.ndarray, int]:
    """Samples [N] as 16-bit integers, and how many lay beyond full scale and were clipped."""
    if wave.dtype == torch.int16:
        return wave.numpy(), 0
    whole = (wave * 32768.0).round()
    # 32768 is full scale of a float file, not beyond it
    beyond = int(((whole > 32768.0) | (whole < -32768.0)).sum())
    return whole.clamp(-32768, 32767).to(torch.int16).numpy(), beyond


def flac_bytes(samples: np.ndarray, rate_hz: int) -> bytes:
    """A FLAC file of 16-bit samples."""
    soundfile = require_package("soundfile", "writing FLAC", "audio")
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="FLAC", subtype="PCM_16")
    return file.getvalue()


class Examiner:
    """Reads the clips of a task and examines each.

    Clips come back with `facts`, a dict ready for JSON, and the packed bytes (uint8) in place of samples.

    Args:
        dataset: clips at the rate to be stored.
        pack: makes the bytes of a clip; None for none.
        energies: log-mel energies without padding, for statistics; None for none.
        frames: length that the statistics with padding are of.
    """

    def __init__(
        self, dataset: ClipSet, pack: Pack | None, energies: Energies | None, frames: int
    ) -> None:
        self._read = Reader(dataset)
        self._pack, self._energies, self._frames = pack, energies, frames

    def __call__(self, task: tuple[Any, frozenset[int]]) -> Iterator[Clip | Skip]:
        """What is found of each clip of a task."""
        for item in self._read(task):
            yield item if isinstance(item, Skip) else self._examined(item)

    def _examined(self, clip: Clip) -> Clip:
        samples, beyond = as_stored(clip.wave)
        digest = hashlib.blake2b(samples.astype("<i2", copy=False).tobytes(), digest_size=16)
        facts: dict[str, Any] = {
            "samples": samples.size,
            "hash": digest.hexdigest(),
            "peak": round(float(np.abs(samples.astype(np.int32)).max(initial=0)) / 32768.0, 6),
        }
        if beyond:
            facts["limited"] = beyond
        if self._energies is not None:
            # the stored samples: what will be trained on
            values = self._energies(torch.from_numpy(samples)[None])[0].numpy()
            facts["mel"] = Moments.of(values)
            if len(values) > self._frames:
                facts["cut"] = Moments.of(values[: self._frames])
        content = b"" if self._pack is None else self._pack(clip, samples)
        packed = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _NOTHING
        return dataclasses.replace(clip, wave=packed, facts=facts)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def changes_of(report: AudioReport) -> dict[str, int]:
    """The counts of a clip's report that are not 0, without what it was skipped for."""
    return {
        field.name: value
        for field in dataclasses.fields(report)
        if field.name not in ("clips", "skipped", "notes")
        and (value := getattr(report, field.name))
    }
