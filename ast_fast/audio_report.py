"""What reading audio says: errors that name file, reason and remedy, and counts of what was changed."""

from __future__ import annotations

import dataclasses
from typing import Any

_MAX_NOTES = 20


class AudioError(ValueError):
    """An audio file cannot be used. The message names the file, the reason and what to do."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.reason)

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class AudioNotFoundError(AudioError, FileNotFoundError):
    """There is no such file."""


class AudioDecodeError(AudioError):
    """The file is not audio, or is broken."""


class AudioEmptyError(AudioError):
    """The file is well formed and holds no samples."""


class AudioTruncatedError(AudioError):
    """The file holds less audio than its header promises."""


class AudioNonFiniteError(AudioError):
    """Samples are NaN or infinite."""


class AudioFormatError(AudioError):
    """Rate or channels are not what was asked for, and converting was switched off."""


class AudioTooLargeError(AudioError):
    """The file is longer, or decodes to more bytes, than the limits allow."""


@dataclasses.dataclass(slots=True)
class AudioReport:
    """Counts of what was read, changed and refused; reports of many clips add up.

    Attributes:
        clips: read and returned.
        resampled: clips whose rate was changed.
        downmixed: clips of several channels made mono.
        padded: clips shorter than the minimum, filled with zeros.
        truncated: clips kept although audio is missing from the file.
        restated: clips whose file states another length than it holds, or holds more than sound, read by
            what is there.
        zeroed_clips: clips in which NaN or Inf became 0.
        zeroed_samples: how many samples that were.
        clipped: clips with more than 1 % of their samples at full scale (left as they are).
        over_scale: float files with a peak above 1 (left as they are).
        cut: clips longer than the model's input, of which only the start was used.
        skipped: files refused, by class of error.
        notes: the first messages, one a finding.
    """

    clips: int = 0
    resampled: int = 0
    downmixed: int = 0
    padded: int = 0
    truncated: int = 0
    restated: int = 0
    zeroed_clips: int = 0
    zeroed_samples: int = 0
    clipped: int = 0
    over_scale: int = 0
    cut: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        """Files refused."""
        return sum(self.skipped.values())

    def note(self, text: str) -> None:
        """Keep a message, up to a small number of them."""
        if len(self.notes) < _MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def skip(self, error: AudioError) -> None:
        """Count a refused file."""
        kind = type(error).__name__
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        self.note(str(error))

    def merge(self, other: AudioReport) -> None:
        """Add another report to this one."""
        for field in dataclasses.fields(self):
            if field.name not in ("skipped", "notes"):
                total = getattr(self, field.name) + getattr(other, field.name)
                setattr(self, field.name, total)
        for kind, count in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
        for text in other.notes:
            self.note(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One line: what was read and everything that was changed or refused."""
        return ", ".join(filter(None, (f"{self.clips} clips read", self.changes())))

    def changes(self) -> str:
        """What was changed or refused; empty if nothing was."""
        parts = []
        for count, text in (
            (self.resampled, "resampled"),
            (self.downmixed, "mixed down to mono"),
            (self.padded, "padded to one window"),
            (self.truncated, "kept although truncated"),
            (self.restated, "read by what they hold, not by the length they state"),
            (self.zeroed_clips, f"with NaN or Inf zeroed ({self.zeroed_samples} samples)"),
            (self.clipped, "clipped"),
            (self.over_scale, "with a peak above 1"),
            (self.cut, "cut to the model's input length"),
        ):
            if count:
                parts.append(f"{count} {text}")
        if self.skipped:
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.skipped.items()))
            parts.append(f"{self.num_skipped} skipped ({kinds})")
        return ", ".join(parts)
