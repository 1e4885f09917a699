"""Decode, resample and check audio files: a named error or a counted change, never a silent one.

libsndfile (through soundfile) reads wav, flac, ogg, opus, mp3, aiff and more by content, whatever
the suffix; torchcodec, where it is installed, reads what libsndfile cannot (m4a, video). What data
sets mostly hold, intact FLAC of one channel and 16 bits, is decoded by our own C++ where it is built:
the same samples in half the time. Files are opened once, only if they are regular files, and decoded
block by block, so that a lying header costs no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ._containers import Pieces, ReadAt, Survey, survey
from ._optional import optional_import, require_package
from ._streams import Streams
from .audio_report import (
    AudioDecodeError,
    AudioEmptyError,
    AudioError,
    AudioFormatError,
    AudioNonFiniteError,
    AudioNotFoundError,
    AudioReport,
    AudioTooLargeError,
    AudioTruncatedError,
)
from .config import MAX_RATE_HZ, MIN_RATE_HZ, AudioConfig
from .cpp import available, flac

__all__ = [
    "SUFFIXES",
    "AudioClip",
    "AudioDecodeError",
    "AudioEmptyError",
    "AudioError",
    "AudioFormatError",
    "AudioNonFiniteError",
    "AudioNotFoundError",
    "AudioReport",
    "AudioTooLargeError",
    "AudioTruncatedError",
    "Source",
    "from_samples",
    "load",
    "resample",
    "source_name",
]

Source = str | os.PathLike[str] | bytes | BinaryIO

# fmt: off
SUFFIXES = frozenset((
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf",
    ".w64", ".rf64", ".m4a", ".aac", ".mp4", ".webm", ".wave", ".bwf", ".snd", ".sph", ".mp1", ".mp2",
    ".mpga", ".wma",
))
# fmt: on
_BLOCK_VALUES = 1 << 19  # values decoded at a time, all channels together
_MAX_CHANNELS = 256
_FULL_SCALE = 1.0 - 1.5 / 32768.0
_CLIPPED_SHARE = 0.01
LARGEST_SAMPLE = 1e12


@dataclasses.dataclass(frozen=True, slots=True)
class AudioClip:
    """Mono audio in memory.

    Attributes:
        wave: [N] float32 in [-1, 1], or int16 (scaled by 1/32768 wherever it is used).
        sample_rate_hz: its rate.
        report: what was changed on the way.
    """

    wave: Tensor
    sample_rate_hz: int
    report: AudioReport


def load(
    source: Source, config: AudioConfig | None = None, name: str | None = None, **overrides: Any
) -> AudioClip:
    """Read one file (or bytes, or a binary file object) as mono audio at one rate.

    Args:
        source: path, bytes of a file, or a seekable binary file object.
        config: rate, limits and what to do with files that are not as expected.
        name: how messages name it; its path or kind by default.
        **overrides: settings of `AudioConfig`, by name.

    Raises:
        AudioError: one of its subclasses; `AudioNotFoundError` is a FileNotFoundError too.
        ValueError: a setting is out of range.
        MissingPackageError: soundfile (or soxr, to resample) is not installed.

    >>> import io, wave
    >>> file = io.BytesIO()
    >>> with wave.open(file, "wb") as writer:
    ...     writer.setparams((1, 2, 16000, 0, "NONE", ""))
    ...     writer.writeframes(bytes(32000))
    >>> load(file.getvalue()).wave.shape
    torch.Size([16000])
    """
    config = config or AudioConfig()
    if overrides:
        config = config.replace(**overrides)
    name = source_name(source) if name is None else name
    report = AudioReport(clips=1)
    samples, rate_hz, subtype = _decode(source, name, config, report)  # [N, channels]
    return _finished(samples, rate_hz, subtype, name, config, report)


def from_samples(samples: np.ndarray, rate_hz: int, name: str, config: AudioConfig) -> AudioClip:
    """What `load` makes of samples [N] that lie in memory already.

    Args:
        samples: [N] int16, or float32 in [-1, 1].
        rate_hz: their rate.
        name: for messages.
        config: rate, limits and what to do with clips that are not as expected.

    Raises:
        AudioError: one of its subclasses.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioDecodeError(
            name, f"claims {rate_hz} Hz: expected {MIN_RATE_HZ} to {MAX_RATE_HZ}"
        )
    if not samples.shape[0]:
        raise AudioEmptyError(name, "holds no samples; record it again or drop it")
    _check_limits(name, samples.shape[0], 1, rate_hz, config)
    report = AudioReport(clips=1)
    if samples.dtype != np.int16:
        return _finished(samples[:, None], rate_hz, "FLOAT", name, config, report)
    return _finished(_as_asked(samples, rate_hz, config), rate_hz, "PCM_16", name, config, report)


def _as_asked(samples: np.ndarray, rate_hz: int, config: AudioConfig) -> np.ndarray:
    """int16 samples [N] as [N, 1]; in float32 if that is asked for, or if they will be resampled."""
    if config.dtype == "float32" or config.sample_rate_hz not in (None, rate_hz):
        samples = samples.astype(np.float32) * np.float32(1.0 / 32768.0)
    return samples[:, None]


def _finished(
    samples: np.ndarray,  # [N, channels]
    rate_hz: int,
    subtype: str,
    name: str,
    config: AudioConfig,
    report: AudioReport,
) -> AudioClip:
    samples = _check_samples(samples, name, subtype, config, report)
    wave = _to_mono(samples, name, config, report)
    wave, rate_hz = _to_rate(wave, rate_hz, name, config, report)
    least = int(rate_hz * config.min_ms * 0.001)
    if wave.shape[0] < least:
        report.padded = 1
        report.note(f"{name}: {wave.shape[0]} samples, padded with zeros to {least}")
        wave = np.pad(wave, (0, least - wave.shape[0]))
    if config.dtype == "int16" and wave.dtype != np.int16:
        # the same scale as float files: 1/32768 a step, rounded, and clipped at the ends
        wave = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    return AudioClip(torch.from_numpy(np.ascontiguousarray(wave)), rate_hz, report)


def resample(wave: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample a float waveform [N] (or [N, channels]) with soxr's high-quality setting."""
    if from_hz == to_hz:
        return wave
    soxr = require_package("soxr", "resampling", "audio")
    return torch.from_numpy(soxr.resample(wave.numpy(), from_hz, to_hz, quality="HQ"))


def source_name(source: Source) -> str:
    """How messages name a source: file names through repr, so that no control character escapes."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    return repr(getattr(source, "name", "<file object>"))


@contextlib.contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[Any, ReadAt, int]]:
    """What soundfile opens, a reader of raw bytes and the size; only regular files pass."""
    if isinstance(source, (str, os.PathLike)):
        try:
            # O_NONBLOCK: opening a pipe must not wait for a writer
            handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AudioNotFoundError(name, "no such file; check the path") from error
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise AudioDecodeError(name, f"cannot be opened: {error}") from error
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise AudioDecodeError(name, f"is {kind}: expected an audio file")
            yield handle, lambda offset, count: os.pread(handle, count, offset), status.st_size
        except OSError as error:
            # a disk that fails, a mount that went away: this file's fault as far as a job can tell
            if isinstance(error, AudioError):
                raise
            raise AudioDecodeError(name, f"cannot be read: {error.strerror or error}") from error
        finally:
            os.close(handle)
        return
    if isinstance(source, bytes) and hasattr(os, "memfd_create"):
        # libsndfile reads a file by itself; from a Python object it calls back every few kilobytes
        handle = os.memfd_create("ast_fast-clip", os.MFD_CLOEXEC)
        try:
            place = 0
            while place < len(source):
                place += os.pwrite(handle, memoryview(source)[place:], place)
            yield handle, lambda offset, count: source[offset : offset + count], len(source)
        finally:
            os.close(handle)
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    begin = file.tell()
    size = file.seek(0, os.SEEK_END) - begin

    def read_at(offset: int, count: int) -> bytes:
        file.seek(begin + offset)
        return file.read(count)

    def rewound() -> BinaryIO:
        file.seek(begin)
        return file

    yield rewound, read_at, size


def _decode(
    source: Source, name: str, config: AudioConfig, report: AudioReport
) -> tuple[np.ndarray, int, str]:
    """Samples [N, channels], rate and libsndfile's subtype."""
    soundfile = require_package("soundfile", "reading audio files", "audio")
    with _opened(source, name) as (handle, read_at, size):
        if size == 0:
            raise AudioEmptyError(name, "the file is empty (0 bytes)")
        own = _decode_flac(read_at, size, config)
        if own is not None:
            return own
        found = _surveyed(read_at, size, name, config, report)
        try:
            try:
                return _decode_as(found, handle, read_at, name, config, report, found is None)
            except (soundfile.LibsndfileError, _FewerSamples) as error:
                # a FLAC file that is cut short, as opposed to one that is damaged; an MP3 that was believed
                deep = survey(read_at, size, deep=True) if found is None else None
                known = deep is not None and deep.missing is not None
                if not known and not isinstance(error, _FewerSamples):
                    raise
                if deep is not None:
                    tell_survey(deep, name, config, report)
                if isinstance(handle, int):
                    os.lseek(handle, 0, os.SEEK_SET)
                return _decode_as(deep, handle, read_at, name, config, report)
        except soundfile.LibsndfileError as error:
            reason = str(error.error_string).strip().rstrip(".")
            with_codec = _decode_with_torchcodec(source, read_at, size)
            if with_codec is not None:
                frames, channels = with_codec[0].shape
                _check_limits(name, frames, channels, with_codec[1], config)
                return with_codec
            head = read_at(0, 64).lstrip().lower()
            if head.startswith((b"<!doctype", b"<html")):
                reason = "this is a web page, not audio; download the file again"
            raise AudioDecodeError(name, f"cannot be decoded: {reason}") from error
        except (RuntimeError, TypeError, ValueError, MemoryError, OverflowError) as error:
            if isinstance(error, AudioError):
                raise
            raise AudioDecodeError(name, f"cannot be decoded: {error}") from error


def _surveyed(
    read_at: ReadAt, size: int, name: str, config: AudioConfig, report: AudioReport
) -> Survey | None:
    """What walking a file finds; what is to be said of it is said.

    Raises:
        AudioError: it is cut short, or cannot be read as one sound.
    """
    found = survey(read_at, size)
    if found is not None:
        tell_survey(found, name, config, report)
    return found


def tell_survey(found: Survey, name: str, config: AudioConfig, report: AudioReport) -> None:
    """Refuse, or count and note, what walking a file found.

    Raises:
        AudioError: it is cut short, or cannot be read as one sound.
    """
    if found.refused is not None:
        raise AudioDecodeError(name, found.refused)
    if found.missing is not None:
        _truncated(name, found.missing, config, report)
    for note in found.notes:
        report.restated = 1
        report.note(f"{name}: {note}")


def _decode_as(
    found: Survey | None,
    handle: Any,
    read_at: ReadAt,
    name: str,
    config: AudioConfig,
    report: AudioReport,
    again: bool = False,
) -> tuple[np.ndarray, int, str]:
    """Decode a file as it stands, or the streams found in it.

    Raises:
        AudioError: one of its subclasses.
        _FewerSamples: it is shorter than it states, and there is to be another look at it.
    """
    soundfile = require_package("soundfile", "reading audio files", "audio")
    samples = None if found is None else found.samples
    with open_streams(soundfile, found, handle, read_at, name) as file:
        if samples is not None and file.frames < samples:
            raise AudioDecodeError(
                name,
                f"holds {samples} samples, and the decoder finds {file.frames}; convert it to WAV",
            )
        return _read(file, name, config, report, samples, again)


def open_streams(
    soundfile: Any,
    found: Survey | None,
    handle: Any,
    read_at: ReadAt,
    name: str,
    frames: tuple[int, ...] | None = None,
    seeking: bool = False,
) -> Any:
    """Libsndfile's view of a file, or of the streams that were found in it.

    Args:
        soundfile: the library.
        found: by walking the file.
        handle: of the file, or what opens it.
        read_at: reads its bytes.
        name: for messages.
        frames: of each stream, if they are known.
        seeking: samples will be read from anywhere.

    Raises:
        AudioDecodeError: these are not of one rate and as many channels.
    """
    if found is None or found.streams is None:
        target = handle() if callable(handle) else handle
        if not seeking or found is None or found.tails is None:
            return soundfile.SoundFile(target, closefd=False)
        return Streams([target], name, frames, found.tails)
    targets = [Pieces(read_at, pieces) for pieces in found.streams]
    return Streams(targets, name, frames, found.tails)


def _decode_flac(
    read_at: ReadAt, size: int, config: AudioConfig
) -> tuple[np.ndarray, int, str] | None:
    """A mono FLAC file of 16 bits; None if it is anything else, damaged, or beyond the limits."""
    if not available():
        return None
    info = flac.stream_info(read_at(0, flac.HEAD_BYTES))
    if info is None or size > config.max_decoded_bytes:
        return None
    rate_hz, samples, _ = info
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        return None
    if samples > min(config.max_seconds * rate_hz, config.max_decoded_bytes / 4):
        return None
    decoded = flac.decode(read_at(0, size))
    if (
        decoded is None
    ):  # damaged; or more follows than the header promises, which is to be looked at
        return None
    return _as_asked(decoded, rate_hz, config), rate_hz, "PCM_16"


class _FewerSamples(Exception):
    """Of a file that was taken as it stands: fewer samples decode than it states."""


def _read(
    file: Any,
    name: str,
    config: AudioConfig,
    report: AudioReport,
    samples: int | None,
    again: bool,
) -> tuple[np.ndarray, int, str]:
    (rate_hz, channels), promised = _check_header(file, name), int(file.frames)
    promised = promised if samples is None else samples
    whole = config.dtype != "float32" and file.subtype == "PCM_16" and channels == 1
    dtype = "int16" if whole and config.sample_rate_hz in (None, rate_hz) else "float32"
    blocks, total = [], 0
    while True:
        block = file.read(_BLOCK_VALUES // channels, dtype=dtype, always_2d=True)
        if not len(block):
            break
        blocks.append(block)
        total += len(block)
        _check_limits(name, total, channels, rate_hz, config)
        if total == promised:
            break
    if not total:
        raise AudioEmptyError(name, "holds no samples (header only); record it again or drop it")
    if total < promised < 1 << 40:  # beyond: unknown length
        if again:
            raise _FewerSamples
        _truncated(name, f"the header promises {promised} samples, {total} decode", config, report)
    return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks)), rate_hz, str(file.subtype)


def _check_header(file: Any, name: str) -> tuple[int, int]:
    """Rate and channels, if they can be true."""
    rate_hz, channels = int(file.samplerate), int(file.channels)
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioDecodeError(
            name, f"the header claims {rate_hz} Hz: expected {MIN_RATE_HZ} to {MAX_RATE_HZ}"
        )
    if not 1 <= channels <= _MAX_CHANNELS:
        raise AudioDecodeError(name, f"has {channels} channels: expected 1 to {_MAX_CHANNELS}")
    return rate_hz, channels


def _check_limits(name: str, frames: int, channels: int, rate_hz: int, config: AudioConfig) -> None:
    if frames > config.max_seconds * rate_hz:
        raise AudioTooLargeError(
            name, f"is longer than max_seconds={config.max_seconds:g}; cut it or raise the limit"
        )
    if frames * channels * 4 > config.max_decoded_bytes:
        raise AudioTooLargeError(
            name,
            f"decodes to more than max_decoded_bytes={config.max_decoded_bytes}; cut it or raise "
            "the limit",
        )


def _truncated(name: str, reason: str, config: AudioConfig, report: AudioReport) -> None:
    if config.truncated == "error":
        raise AudioTruncatedError(
            name, f"is truncated: {reason}; copy it again, or keep what there is (truncated='keep')"
        )
    if not report.truncated:
        report.truncated = 1
        report.note(f"{name}: truncated and kept: {reason}")


def _decode_with_torchcodec(
    source: Source, read_at: ReadAt, size: int
) -> tuple[np.ndarray, int, str] | None:
    """Decode with torchcodec if it is there and can; None otherwise."""
    decoders = optional_import("torchcodec.decoders")
    if decoders is None:
        return None
    if isinstance(source, (str, os.PathLike)):
        content: str | bytes = str(Path(source))
    else:
        content = read_at(0, size)
    try:
        samples = decoders.AudioDecoder(content).get_all_samples()
    except (RuntimeError, ValueError, OSError):
        return None
    return samples.data.T.contiguous().numpy(), int(samples.sample_rate), "torchcodec"


def _check_samples(
    samples: np.ndarray, name: str, subtype: str, config: AudioConfig, report: AudioReport
) -> np.ndarray:
    """Refuse or zero NaN and Inf; note clipping."""
    if samples.dtype == np.int16:
        at_full_scale = 0
        if samples.max() == 32767 or samples.min() == -32768:  # rare: two quick passes, not four
            at_full_scale = int(np.count_nonzero((samples == 32767) | (samples == -32768)))
    else:
        size = np.abs(samples)
        # NaN is not below anything; squares of larger values overflow float32 in the front end
        finite = size < LARGEST_SAMPLE
        bad = samples.size - int(np.count_nonzero(finite))
        if bad and config.non_finite == "error":
            raise AudioNonFiniteError(
                name,
                f"{bad} of {samples.size} samples are NaN, infinite or beyond "
                f"{LARGEST_SAMPLE:g}; repair the file, or set "
                "non_finite='zero'",
            )
        if bad:
            samples = np.where(finite, samples, np.float32(0.0))
            report.zeroed_clips, report.zeroed_samples = 1, bad
            report.note(f"{name}: {bad} samples that were NaN or infinite are now 0")
            size = np.abs(samples)
        peak = float(size.max())
        if subtype in ("FLOAT", "DOUBLE") and peak > 1.0:
            report.over_scale = 1
            report.note(f"{name}: a float file with a peak of {peak:.3g}: expected at most 1")
        at_full_scale = int(np.count_nonzero(size >= _FULL_SCALE))
    if at_full_scale > _CLIPPED_SHARE * samples.size:
        share = 100.0 * at_full_scale / samples.size
        report.clipped = 1
        report.note(f"{name}: {share:.1f} % of the samples are at full scale: probably clipped")
    return samples


def _to_mono(
    samples: np.ndarray, name: str, config: AudioConfig, report: AudioReport
) -> np.ndarray:
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0]
    if config.channels == "error":
        raise AudioFormatError(name, f"has {channels} channels: expected mono; mix it down")
    report.downmixed = 1
    return samples[:, 0] if config.channels == "first" else samples.mean(axis=1)


def _to_rate(
    wave: np.ndarray, rate_hz: int, name: str, config: AudioConfig, report: AudioReport
) -> tuple[np.ndarray, int]:
    wanted = config.sample_rate_hz
    if wanted is None or wanted == rate_hz:
        return wave, rate_hz
    if config.other_rate == "error":
        raise AudioFormatError(name, f"has {rate_hz} Hz: expected {wanted}; resample it")
    if wave.shape[0] * (wanted / rate_hz) * 4 > config.max_decoded_bytes:
        raise AudioTooLargeError(name, f"resamples from {rate_hz} to {wanted} Hz beyond the limit")
    report.resampled = 1
    return resample(torch.from_numpy(np.ascontiguousarray(wave)), rate_hz, wanted).numpy(), wanted
