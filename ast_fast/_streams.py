"""The streams of an audio file as one sound, with the names of soundfile's `SoundFile`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._optional import require_package
from .audio_report import AudioDecodeError

_PASSED = 1 << 16  # samples read at a time on the way to a place


class Streams:
    """Several streams, decoded one after the other.

    Args:
        targets: what soundfile opens.
        name: for messages.
        frames: of each, if they are known.
        tails: samples at the end of each that the decoder cannot go to at once.

    Raises:
        AudioDecodeError: they are not of one rate and as many channels.
    """

    def __init__(
        self,
        targets: Sequence[Any],
        name: str,
        frames: Sequence[int] | None = None,
        tails: Sequence[int] | None = None,
    ) -> None:
        self._tails = tails or (0,) * len(targets)
        self._targets, self._place, self._file = targets, -1, None
        self._soundfile = require_package("soundfile", "reading audio files", "audio")
        self._open(0)
        file: Any = self._file
        self.samplerate, self.channels = int(file.samplerate), int(file.channels)
        self.subtype = str(file.subtype)
        self.each = tuple(self._measured(name) if frames is None else frames)
        self.frames = sum(self.each)
        self._open(0)

    def _measured(self, name: str) -> list[int]:
        found = []
        for place in range(len(self._targets)):
            self._open(place)
            file: Any = self._file
            if (file.samplerate, file.channels) != (self.samplerate, self.channels):
                raise AudioDecodeError(
                    name,
                    f"holds {len(self._targets)} streams: number {place + 1} has {file.samplerate} Hz "
                    f"and {file.channels} channels, the first {self.samplerate} Hz and "
                    f"{self.channels}; split the file",
                )
            found.append(int(file.frames))
        return found

    def _open(self, place: int) -> None:
        if place == self._place:
            assert self._file is not None
            self._file.seek(0)
            return
        self.close()
        target = self._targets[place]
        if isinstance(target, int):
            os.lseek(target, 0, os.SEEK_SET)
        else:
            target.seek(0)
        self._file = self._soundfile.SoundFile(target, closefd=False)
        self._place = place

    def seek(self, frame: int) -> None:
        """Go to a sample of the whole."""
        place = 0
        while place < len(self.each) - 1 and frame >= self.each[place]:
            frame -= self.each[place]
            place += 1
        self._open(place)
        assert self._file is not None
        # from the last page of Vorbis libsndfile gives what lies later, by as much as is cut off at its end
        known = max(0, self.each[place] - self._tails[place] - 1)
        self._file.seek(min(frame, known) if self._tails[place] else frame)
        left = frame - known if self._tails[place] else 0
        while left > 0:
            passed = len(self._file.read(min(left, _PASSED), dtype="float32", always_2d=True))
            if not passed:
                break
            left -= passed

    def read(self, count: int, dtype: str, always_2d: bool = True) -> np.ndarray:
        """The next samples [n, channels]; fewer where a stream ends early, none at the end."""
        parts: list[np.ndarray] = []
        while count > 0:
            assert self._file is not None
            part = self._file.read(count, dtype=dtype, always_2d=always_2d)
            if len(part):
                parts.append(part)
                count -= len(part)
                continue
            whole = self._file.tell() >= self.each[self._place]
            if self._place + 1 == len(self._targets) or (parts and not whole):
                break
            self._open(self._place + 1)
        if not parts:
            return np.empty((0, self.channels), dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Let go of the decoder."""
        if self._file is not None:
            self._file.close()
        self._file, self._place = None, -1

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
