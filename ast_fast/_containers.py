"""What an audio file holds, told by walking it, beside what its header states.

libsndfile believes lengths: a WAV cut in half reads as a shorter WAV, an MP3 without a table of contents by a
guess, of two files joined only the first. So chunks, pages and frames are walked here, and where the stated
length is not what the file holds, the decoder gets the same bytes under a header that tells the truth.
"""

from __future__ import annotations

from . import _flac_frames, _mpeg, _ogg
from ._chunks import HEAD_BYTES, is_chunked, survey_chunks
from ._pieces import Pieces, ReadAt, Survey, Windowed

__all__ = ["Pieces", "ReadAt", "Survey", "survey"]


def survey(read_at: ReadAt, size: int, *, deep: bool = False) -> Survey | None:
    """What is to be decoded of a file, and what is to be said of it; None: as it stands.

    Args:
        read_at: reads bytes at an offset.
        size: bytes in the file.
        deep: it did not decode, or to fewer samples than it states: walk all of a FLAC file, and not only to
            its end, and of an MP3 file, though it states as many bytes as it holds.
    """
    magic = read_at(0, HEAD_BYTES)
    if _is_plain_wav(magic, size):
        return None
    if is_chunked(magic):
        return survey_chunks(read_at, size, magic)
    data = Windowed(read_at, size)
    if magic[:4] == b"OggS":
        return _ogg.survey(data)
    begin = _mpeg.after_id3(data, 0)
    if data.get(begin, 4) == b"fLaC":
        return _flac_frames.survey(data, begin, deep)
    if magic[:3] == b"ID3" or _mpeg.is_header(magic[:4]):
        return _mpeg.survey(data, begin, deep)
    return None


def _is_plain_wav(magic: bytes, size: int) -> bool:
    """Whether a file is a WAV of two chunks that holds what it states: nearly all are, and are soon read."""
    return (
        magic[36:40] == b"data"
        and magic[:4] == b"RIFF"
        and magic[8:20] == b"WAVEfmt \x10\0\0\0"
        and 0 < int.from_bytes(magic[40:44], "little") == size - 44
        and not (size - 44) % max(1, int.from_bytes(magic[32:34], "little"))
    )
