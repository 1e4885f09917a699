"""What a file of bare weights does not tell about its model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .base import Config, check


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts(Config):
    """How a model was trained, for files that do not tell; what a file tells itself must agree.

    Attributes:
        strides: of a file of bare weights: mel bins and frames from one patch to the next.
        frames: of a file of bare weights: length of the model's input.
        mel_bins: of a file of bare weights.
        heads: of a file of bare weights: attention heads.
        mean: of the log-mel energies; counts above what the file says.
        std: of the log-mel energies, likewise.
    """

    strides: tuple[int, int] | None = None
    frames: int | None = None
    mel_bins: int | None = None
    heads: int | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        strides = self.strides
        check(
            strides is None or (len(strides) == 2 and all(stride >= 1 for stride in strides)),
            f"strides={strides}: expected two of at least 1: mel bins, frames",
        )
        for name in ("frames", "mel_bins", "heads"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name}={value}: expected at least 1")
        check(
            self.mean is None or math.isfinite(self.mean),
            f"mean={self.mean}: expected a finite number",
        )
        check(
            self.std is None or 0 < self.std < math.inf,
            f"std={self.std}: expected a positive value",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What is said, by the names of `ModelConfig` and `LogMelConfig`."""
        fstride, tstride = self.strides or (None, None)
        named = {
            **{"fstride": fstride, "tstride": tstride, "input_tdim": self.frames},
            **{"input_fdim": self.mel_bins, "num_heads": self.heads},
            **{"mean": self.mean, "std": self.std},
        }
        return {name: value for name, value in named.items() if value is not None}
