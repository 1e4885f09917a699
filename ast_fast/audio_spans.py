"""Parts of audio files that are too long to be held whole.

A span is read by itself: the file is opened, the decoder is set to the place, and what is resampled
has enough on both sides that the samples are those of the whole file. So any process can read any
part, and reading it twice gives the same.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._containers import ReadAt, Survey, survey
from ._optional import require_package
from .audio import (
    AudioDecodeError,
    AudioError,
    AudioFormatError,
    AudioReport,
    _check_header,
    _check_samples,
    _opened,
    _to_mono,
    _truncated,
    load,
    open_streams,
    resample,
    source_name,
    tell_survey,
)
from .config import AudioConfig
from .cpp import available, flac

# soxr's filters are shorter at any ratio: in samples of the lower rate
_MARGIN = 1024
_MPEG_EARLY = 100 * 1152  # samples; at the lowest bit rates bits come from some 90 frames before
_UNKNOWN_FRAMES = 1 << 40  # and above: a stream that does not tell its length


class Span(NamedTuple):
    """A part of a file.

    Attributes:
        wave: [N] float32 or int16.
        total: samples of the whole file, at the rate asked for.
        report: what reading the part changed; the clip is counted with the first part.
    """

    wave: Tensor
    total: int
    report: AudioReport


def read_span(path: str | os.PathLike[str], start: int, count: int, config: AudioConfig) -> Span:
    """Some samples of a file, at the rate that is asked for; from 0 and of a short file, all of it.

    A file of at most `count` samples, and one that does not tell its length, is what `load` gives.
    Of a longer one `max_seconds` is not asked: no more than a span is ever held.

    Args:
        path: the file.
        start: first sample; 0 where it is not known yet how many there are.
        count: samples; fewer come at the end.
        config: as for `load`; one sample rate.

    Raises:
        AudioError: one of its subclasses.
    """
    rate_hz = config.sample_rate_hz
    if rate_hz is None:
        raise ValueError("config.sample_rate_hz is None: expected the rate of the samples counted")
    name = source_name(path)
    with _opened(path, name) as (handle, read_at, size), contextlib.ExitStack() as stack:
        # a FLAC file tells its length in its first bytes: opening a decoder takes a while
        info = flac.stream_info(read_at(0, flac.HEAD_BYTES)) if available() and not start else None
        short = info is not None and 0 < _at_rate(info[1], info[0], rate_hz) <= count
        found, each = (None, None) if short else _surveyed(handle, read_at, size)
        file = None
        if not short and size and (found is None or found.refused is None):
            file = stack.enter_context(_decoder(handle, read_at, name, found, each))
        if start or _total(file, rate_hz) > count:
            report = AudioReport(clips=0 if start else 1)
            if found is not None:
                # what is found is told of with the first part; what is refused is refused at any
                tell_survey(found, name, config, AudioReport() if start else report)
            return _read(file, name, start, count, config, report)
    clip = load(path, config, name)
    return Span(clip.wave, clip.wave.shape[0], clip.report)


# of files read in spans, a few at a time
_SURVEYS: dict[tuple[int, ...], tuple[Survey | None, list[int]]] = {}
_MAX_SURVEYS = 16


def _surveyed(handle: int, read_at: ReadAt, size: int) -> tuple[Survey | None, list[int]]:
    """What walking a file finds, and room for the samples of its streams; kept for its next spans."""
    status = os.fstat(handle)
    key = (status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns)
    found = _SURVEYS.get(key)
    if found is None:
        while len(_SURVEYS) >= _MAX_SURVEYS:
            _SURVEYS.pop(next(iter(_SURVEYS)), None)
        # an MP3 is walked whatever it states: once for all of its spans, and each is to be in its place
        deep = read_at(0, 4) != b"fLaC"
        found = _SURVEYS[key] = (survey(read_at, size, deep=deep), [])
    return found


@contextlib.contextmanager
def _decoder(
    handle: Any, read_at: ReadAt, name: str, found: Survey | None, each: list[int] | None
) -> Iterator[Any]:
    """Libsndfile's view of a file; None if it cannot open it: `load` then says why, or can."""
    soundfile = require_package("soundfile", "reading audio files", "audio")
    file = None
    with contextlib.suppress(
        soundfile.LibsndfileError, RuntimeError, TypeError, ValueError, OverflowError
    ):
        known = tuple(each or ()) or None
        file = open_streams(soundfile, found, handle, read_at, name, known, seeking=True)
        if each is not None and not each and hasattr(file, "each"):
            each.extend(file.each)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _total(file: Any, rate_hz: int) -> int:
    """Samples of the whole file at a rate; 0 if that cannot be told."""
    if file is None or not 0 < file.frames < _UNKNOWN_FRAMES or not file.samplerate:
        return 0
    return _at_rate(int(file.frames), int(file.samplerate), rate_hz)


def _at_rate(frames: int, own_hz: int, rate_hz: int) -> int:
    """As many samples as soxr makes of so many."""
    return frames if own_hz == rate_hz else (2 * frames * rate_hz + own_hz) // (2 * own_hz)


def _read(
    file: Any, name: str, start: int, count: int, config: AudioConfig, report: AudioReport
) -> Span:
    if file is None:
        raise AudioDecodeError(name, "could be opened before and not now; was it replaced?")
    own_hz, channels = _check_header(file, name)
    wanted_hz = config.sample_rate_hz or own_hz
    total = _total(file, wanted_hz)
    count = max(0, min(count, total - start))
    common = math.gcd(own_hz, wanted_hz)
    up, down = wanted_hz // common, own_hz // common
    begin, end, skip = start, start + count, 0
    if own_hz != wanted_hz:
        if config.other_rate == "error":
            raise AudioFormatError(name, f"has {own_hz} Hz: expected {wanted_hz}; resample it")
        margin = _MARGIN * max(1, -(-own_hz // wanted_hz))
        # both rates have a sample at every multiple of (down, up)
        first = max(0, start // up - -(-margin // down))
        begin, skip = first * down, start - first * up
        end = min(int(file.frames), -(-(start + count) * down // up) + margin)
    whole = config.dtype != "float32" and file.subtype == "PCM_16" and channels == 1
    dtype = "int16" if whole and own_hz == wanted_hz else "float32"
    # a frame of MP3 takes bits from those before it, which after a leap the decoder does not have
    early = min(begin, _MPEG_EARLY) if str(file.subtype).startswith("MPEG") else 0
    try:
        file.seek(begin - early)
        samples = file.read(end - begin + early, dtype=dtype, always_2d=True)[early:]
    except (RuntimeError, TypeError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioDecodeError(name, f"cannot be decoded at sample {begin}: {error}") from error
    if len(samples) < end - begin:
        held = begin + len(samples)
        _truncated(
            name, f"the header promises {file.frames} samples, {held} decode", config, report
        )
        total = min(total, held * up // down)
        count = max(0, min(count, total - start))
    if len(samples):
        samples = _check_samples(samples, name, str(file.subtype), config, report)
    wave = _to_mono(samples, name, config, report)
    if own_hz != wanted_hz and len(wave):
        report.resampled = 1
        wave = resample(torch.from_numpy(np.ascontiguousarray(wave)), own_hz, wanted_hz).numpy()
    wave = wave[skip : skip + count]
    if config.dtype == "int16" and wave.dtype != np.int16:
        wave = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    return Span(torch.from_numpy(np.ascontiguousarray(wave)), total, report)
