"""Where the windows of a clip begin: each what the model takes at once, all of the clip in some window."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Self

from torch import Tensor

from ..config import LogMelConfig
from ..data.dataset import max_samples
from ..reference.mel import MelSizes, mel_sizes


@dataclasses.dataclass(frozen=True, slots=True)
class WindowPlan:
    """How clips are cut.

    Attributes:
        most: samples that the model's input can use; None where it has no fixed length.
        full: samples from the first frame of a full window to the one after its last.
        hop: samples from one window to the next; `full` for windows that follow one another.
        rate_hz: of the samples.
        sizes: of the front end's frames.
    """

    most: int | None
    full: int
    hop: int
    rate_hz: int
    sizes: MelSizes

    @classmethod
    def of(cls, front: LogMelConfig, hop_s: float | None = None) -> Self:
        """The plan for a front end, with windows every `hop_s` seconds (None: one after the other).

        Raises:
            ValueError: the hop is shorter than a frame's, or leaves audio between windows out.
        """
        sizes = mel_sizes(**front.framing)
        full = (front.num_frames or 0) * sizes.hop_samples
        rate_hz, hop = front.sample_rate_hz, full
        if hop_s is not None:
            if front.num_frames is None:
                raise ValueError(f"hop={hop_s:g}: the model takes clips of any length whole")
            finite = math.isfinite(hop_s) and hop_s > 0
            # 0.1 s as a float is not quite what was meant
            hop = round(Fraction(hop_s).limit_denominator(10**6) * rate_hz) if finite else 0
            if not sizes.hop_samples <= hop <= full:
                raise ValueError(
                    f"hop={hop_s:g}: expected {sizes.hop_samples / rate_hz:g} s (one frame) to "
                    f"{full / rate_hz:g} s (the model's input: a longer hop would leave audio out)"
                )
        return cls(max_samples(front), full, hop, rate_hz, sizes)

    def starts(self, num_samples: int) -> list[int]:
        """First sample of each window of a clip.

        A last window that would hold less than a tenth of audio (or no frame) is moved back to end
        with the clip, so that none is mostly padding.
        """
        if num_samples <= 0:
            return []
        if self.most is None or num_samples <= self.most:
            return [0]
        count = 1 + -(-(num_samples - self.full) // self.hop)
        starts = [index * self.hop for index in range(count)]
        rest = num_samples - starts[-1]
        if rest < self.full // 10 or not self.sizes.num_frames(rest):
            starts[-1] = max(num_samples - self.most, starts[-2])
            if starts[-1] == starts[-2]:
                starts.pop()
        return starts

    def end(self, start: int, num_samples: int) -> int:
        """First sample after a window that begins at `start`."""
        return num_samples if self.most is None else min(num_samples, start + self.most)


def split_windows(wave: Tensor, front: LogMelConfig) -> list[Tensor]:
    """Consecutive parts of a waveform [N], each what the model takes at once; see `WindowPlan.starts`."""
    plan = WindowPlan.of(front)
    total = wave.shape[0]
    return [wave[start : plan.end(start, total)] for start in plan.starts(total)]
