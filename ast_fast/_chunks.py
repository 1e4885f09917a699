"""WAV, RF64, Wave64, AIFF, 8SVX, AU, CAF and NIST: the stated size of the sound beside what is there.

Four cases: the size is right; it is more than there is (cut short); it is one of those that writers leave that
cannot seek back (all of the rest is sound); or it is too small, and behind the sound come no chunks but more sound.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ._pieces import Piece, ReadAt, Survey

HEAD_BYTES = 128  # of a file, read at once; most headers are shorter
_MAX_CHUNKS = 4096
_UNKNOWN_64 = 1 << 62
_WAVE_PCM = (1, 3, 6, 7, 0xFFFE)  # integers, floats, A-law, mu-law; named by a GUID
_AIFC_PCM = (
    b"NONE",
    b"sowt",
    b"fl32",
    b"FL32",
    b"fl64",
    b"FL64",
    b"in24",
    b"in32",
    b"raw ",
    b"twos",
)
_AU_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}
_NAME = re.compile(rb"[ -~]{4}")
_W64_TAIL = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0O\x8e\xdb\x8a"
_W64_FORMAT, _W64_WAVE, _W64_DATA = (name + _W64_TAIL for name in (b"fmt ", b"wave", b"data"))


class _Sound(NamedTuple):
    """Where the sound lies in a file, by its header.

    Attributes:
        begin: its first byte.
        stated: bytes; None if the header says that it does not know.
        fields: where the size stands: place, bytes, and what is added to it there.
        order: of their bytes.
        chunk: bytes of the header of each chunk behind it; 0 if none can follow.
        align: where chunks begin.
        frame: bytes of one sample of all channels; 0 if it is not PCM.
    """

    begin: int
    stated: int | None
    fields: tuple[tuple[int, int, int], ...]
    order: str
    chunk: int = 8
    align: int = 2
    frame: int = 0


def is_chunked(magic: bytes) -> bool:
    """Whether a file that begins so is one of those."""
    return _kind_of(magic) is not None or magic[:7] == b"NIST_1A"


def survey_chunks(read_at: ReadAt, size: int, magic: bytes) -> Survey | None:
    """See `containers.survey`; of a file that begins with `magic`, `HEAD_BYTES` if it has so many."""

    def near(offset: int, count: int) -> bytes:
        end = offset + count
        return magic[offset:end] if end <= len(magic) else read_at(offset, count)

    if magic[:7] == b"NIST_1A":
        return _nist(read_at, size)
    kind = _kind_of(magic)
    sound = None if kind is None else kind(near, magic)
    return None if sound is None else _judged(read_at, size, sound, magic)


def _kind_of(magic: bytes):  # type: ignore[no-untyped-def]
    if magic[8:12] == b"WAVE" and magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        return _wave
    if magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        return _form
    return {b"riff": _wave64, b".snd": _au, b"dns.": _au, b"caff": _caf}.get(magic[:4])


def _chunks(read_at: ReadAt, begin: int, order: str, wide: bool = False):  # type: ignore[no-untyped-def]
    """Name, place of its content, and size of each chunk."""
    head = 12 if wide else 8
    for _ in range(_MAX_CHUNKS):
        header = read_at(begin, head)
        if len(header) < head:
            return
        length = int.from_bytes(header[4:], order, signed=wide)  # type: ignore[arg-type]
        yield header[:4], begin + head, length
        if length < 0:
            return
        begin += head + length + (0 if wide else length & 1)


def _wave(read_at: ReadAt, magic: bytes) -> _Sound | None:
    order = "big" if magic[:4] == b"RIFX" else "little"
    large: tuple[int, int] | None = None  # place and value of ds64's size
    frame = 0
    for name, place, length in _chunks(read_at, 12, order):
        if name == b"ds64":
            large = place + 8, int.from_bytes(read_at(place + 8, 8), "little")
        if name == b"fmt ":
            frame = _frame_of_wave(read_at(place, 16), order)
        if name != b"data":
            continue
        if large is not None and length == 0xFFFFFFFF:
            unknown = large[1] >= _UNKNOWN_64 or not large[1]
            return _Sound(
                place, None if unknown else large[1], ((large[0], 8, 0),), order, frame=frame
            )
        # what writers leave that cannot seek back: near 2^32 or 2^31
        unknown = length >= 0xFFFF0000 or 0x7FFFF000 <= length <= 0x80000000
        stated = None if unknown or (large is not None and not length) else length
        return _Sound(place, stated, ((place - 4, 4, 0),), order, frame=frame)
    return None


def _frame_of_wave(content: bytes, order: str) -> int:
    tag, frame = (int.from_bytes(content[at : at + 2], order) for at in (0, 12))  # type: ignore[arg-type]
    return frame if tag in _WAVE_PCM else 0


def _form(read_at: ReadAt, magic: bytes) -> _Sound | None:
    frame = 1 if magic[8:12] == b"8SVX" else 2 if magic[8:12] == b"16SV" else 0
    for name, place, length in _chunks(read_at, 12, "big"):
        if name == b"COMM" and (magic[8:12] == b"AIFF" or read_at(place + 18, 4) in _AIFC_PCM):
            content = read_at(place, 8)
            frame = int.from_bytes(content[:2], "big") * -(-int.from_bytes(content[6:], "big") // 8)
        if name in (b"SSND", b"BODY"):
            skip = 8 if name == b"SSND" else 0
            unknown = length >= 0xFFFF0000 or 0x7FFFF000 <= length <= 0x80000000
            stated = None if unknown else max(0, length - skip)
            return _Sound(place + skip, stated, ((place - 4, 4, skip),), "big", frame=frame)
    return None


def _wave64(read_at: ReadAt, magic: bytes) -> _Sound | None:
    if read_at(24, 16) != _W64_WAVE:
        return None
    place, frame = 40, 0
    for _ in range(_MAX_CHUNKS):
        header = read_at(place, 24)
        if len(header) < 24:
            return None
        length = int.from_bytes(header[16:], "little")
        if header[:16] == _W64_FORMAT:
            frame = _frame_of_wave(read_at(place + 24, 16), "little")
        if header[:16] == _W64_DATA:
            unknown = length >= _UNKNOWN_64
            stated = None if unknown else max(0, length - 24)
            fields = ((place + 16, 8, 24), (16, 8, place + 24))
            return _Sound(place + 24, stated, fields, "little", 24, 8, frame)
        if length < 24 or length >= _UNKNOWN_64:
            return None
        place += length + -length % 8
    return None


def _au(read_at: ReadAt, magic: bytes) -> _Sound | None:
    head = read_at(0, 24)
    order = "big" if head[:4] == b".snd" else "little"
    begin, length, encoding, _, channels = (
        int.from_bytes(head[at : at + 4], order)  # type: ignore[arg-type]
        for at in range(4, 24, 4)
    )
    if len(head) < 24 or begin < 24:
        return None
    stated = None if length >= 0xFFFF0000 else length
    frame = channels * _AU_WIDTHS.get(encoding, 0)
    return _Sound(begin, stated, ((8, 4, 0),), order, 0, frame=frame)


def _caf(read_at: ReadAt, magic: bytes) -> _Sound | None:
    frame = 0
    for name, place, length in _chunks(read_at, 8, "big", wide=True):
        if name == b"desc" and read_at(place + 8, 4) in (b"lpcm", b"ulaw", b"alaw"):
            frame = int.from_bytes(read_at(place + 16, 4), "big")
        if name == b"data":
            stated = None if length < 0 else max(0, length - 4)
            return _Sound(place + 4, stated, ((place - 8, 8, 4),), "big", 12, 1, frame)
    return None


def _nist(read_at: ReadAt, size: int) -> Survey | None:
    """A header of text; libsndfile takes the number of samples from the size of the file."""
    head = read_at(0, 1024)

    def number(name: bytes, default: int) -> int:
        found = re.search(rb"^" + name + rb" -i (\d{1,15})\s*$", head, re.MULTILINE)
        return int(found[1]) if found else default

    first = re.match(rb"NIST_1A\s+(\d{1,6})\s", head)
    begin = int(first[1]) if first else 1024
    samples, width = number(b"sample_count", 0), number(b"sample_n_bytes", 2)
    stated, held = samples * width * number(b"channel_count", 1), size - begin
    if stated > held and b"shorten" not in head:
        return Survey(f"the header promises {samples} samples, the file holds {held} bytes of them")
    return None


def _judged(read_at: ReadAt, size: int, sound: _Sound, magic: bytes) -> Survey | None:
    """What is to be decoded, and what is to be said; also of a sound that ends within a sample."""
    found, count = _measured(read_at, size, sound, magic)
    over = count % sound.frame if sound.frame else 0
    if not over or (found is not None and found.missing):
        return found
    told = f"holds {count} bytes of audio, {over} more than whole samples of {sound.frame}: they are left out"
    # of Wave64 libsndfile would read the padding as a sample
    found = found or Survey(streams=(_with_size(sound.begin + count - over, sound, count - over),))
    return found._replace(notes=(*found.notes, told))


def _measured(read_at: ReadAt, size: int, sound: _Sound, magic: bytes) -> tuple[Survey | None, int]:
    """The same but for such an end; and how many bytes are sound."""
    held = max(0, size - sound.begin)
    if sound.stated is None:
        # libsndfile knows this of WAV, and of AU and CAF as they are
        plain = magic[:4] in (b"RIFF", b"RIFX", b".snd", b"dns.")
        return None if plain else Survey(streams=(_with_size(size, sound, held),)), held
    if sound.stated > held:
        missing = f"the header promises {sound.stated} bytes of audio, the file holds {held}"
        return Survey(missing, streams=(_with_size(size, sound, held),)), held
    rest = held - sound.stated
    if not rest or _is_known(read_at, size, sound):
        return None, sound.stated
    told = f"the header promises {sound.stated} bytes of audio, and {rest} more follow that are no chunk"
    if not sound.stated:
        told = f"the header does not tell its length, and {rest} bytes follow that are no chunk"
    notes = (f"{told}: read as audio",)
    return Survey(streams=(_with_size(size, sound, held),), notes=notes), held


def _is_known(read_at: ReadAt, size: int, sound: _Sound) -> bool:
    """Whether what lies behind the sound is chunks, a tag, or nothing."""
    end = sound.begin + (sound.stated or 0)
    # some writers leave the padding out
    for place in dict.fromkeys((end + -end % sound.align, end)):
        if _is_chunks(read_at, size, place, sound):
            return True
    # zeros fill a block; but of a size of 0 it is silence that was recorded
    return bool(sound.stated) and _is_zero(read_at, end, size)


def _is_chunks(read_at: ReadAt, size: int, place: int, sound: _Sound) -> bool:
    for _ in range(_MAX_CHUNKS):
        if place >= size or (size - place < 8 and not read_at(place, size - place).strip(b"\0")):
            return True
        head = read_at(place, max(sound.chunk, 10))
        if head[:3] == b"ID3" and max(head[6:10], default=255) < 128:
            place += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
            continue
        if head[:3] == b"TAG" and size - place == 128:
            return True
        if not sound.chunk or len(head) < sound.chunk or not _NAME.match(head):
            return False
        length = int.from_bytes(head[16 if sound.chunk == 24 else 4 : sound.chunk], sound.order)  # type: ignore[arg-type]
        length += 0 if sound.chunk == 24 else sound.chunk
        if length < sound.chunk or place + length > size + 1:
            # text behind the sound that is itself cut short is no loss of sound
            return head[:4] in (
                b"LIST",
                b"id3 ",
                b"ID3 ",
                b"bext",
                b"iXML",
                b"_PMX",
                b"afsp",
                b"APPL",
            )
        place += length + -length % sound.align
    return True


def _is_zero(read_at: ReadAt, begin: int, end: int) -> bool:
    while begin < end:
        content = read_at(begin, min(1 << 18, end - begin))
        if not content or content.strip(b"\0"):
            return False
        begin += len(content)
    return True


def _with_size(size: int, sound: _Sound, held: int) -> tuple[Piece, ...]:
    """The file with the true size of its sound in its header."""
    pieces: list[Piece] = []
    at = 0
    for place, width, more in sorted(sound.fields):
        value = min(held + more, (1 << 8 * width) - 1)
        pieces += [(at, place), value.to_bytes(width, sound.order)]  # type: ignore[arg-type]
        at = place + width
    return (*pieces, (at, max(at, size)))
