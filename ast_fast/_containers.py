"""Does an audio file hold all the audio that its header promises?

libsndfile corrects lengths silently: a WAV cut in half reads as a shorter WAV. The containers that
state their size are checked here, from a few bytes at either end.
"""

from __future__ import annotations

from collections.abc import Callable

ReadAt = Callable[[int, int], bytes]  # (offset, count) -> at most count bytes

# writers that cannot seek back leave the size at one of these or above, or at 0
_UNKNOWN_SIZE = 0x7FFFF000
_MAX_CHUNKS = 4096
_OGG_TAIL_BYTES = 1 << 17  # an Ogg page is at most 65,307 bytes


def missing_audio(read_at: ReadAt, size: int) -> str | None:
    """Why the file is known to be cut short, or None.

    Args:
        read_at: reads bytes at an offset.
        size: bytes in the file.
    """
    magic = read_at(0, 12)
    if magic[:4] in (b"RIFF", b"RIFX") and magic[8:12] == b"WAVE":
        return _missing_chunk(read_at, size, b"data", "big" if magic[3:4] == b"X" else "little")
    if magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC"):
        return _missing_chunk(read_at, size, b"SSND", "big")
    if magic[:4] == b"OggS":
        return _missing_ogg_end(read_at, size)
    return None


def _missing_chunk(read_at: ReadAt, size: int, name: bytes, order: str) -> str | None:
    offset = 12
    for _ in range(_MAX_CHUNKS):
        header = read_at(offset, 8)
        if len(header) < 8:
            return None
        length = int.from_bytes(header[4:], "big" if order == "big" else "little")
        if header[:4] == name:
            held = size - offset - 8
            if length <= held or length >= _UNKNOWN_SIZE:
                return None
            return f"the header promises {length} bytes of audio, the file holds {held}"
        offset += 8 + length + (length & 1)
    return None


def _missing_ogg_end(read_at: ReadAt, size: int) -> str | None:
    start = max(0, size - _OGG_TAIL_BYTES)
    tail = read_at(start, size - start)
    page = tail.rfind(b"OggS")
    header = tail[page : page + 27]
    if page < 0 or len(header) < 27:
        return "the last Ogg page is incomplete"
    segments = tail[page + 27 : page + 27 + header[26]]
    if len(segments) < header[26] or page + 27 + len(segments) + sum(segments) > len(tail):
        return "the last Ogg page is incomplete"
    if not header[5] & 4:
        return "the Ogg stream has no last page"
    return None
