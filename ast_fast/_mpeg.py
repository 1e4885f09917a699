"""MPEG audio (MP3): frames walked and counted, and files joined to one told apart.

An MP3 file states its length only in a Xing or Info frame, if it has one; libsndfile guesses it otherwise,
and is wrong by any factor where the bit rate varies. So frames are counted, and an Info frame that says how
many there are stands before them when they are decoded.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from ._pieces import Piece, Survey, Windowed

_KBITS = {
    # by (MPEG-1, layer): of the index 1 to 14
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = (44100, 48000, 32000)
# of a header: sync, version, layer, rate; and, apart, whether there is one channel
_KIND, _MONO = 0xFFFE0C00, 0xC0
_FORM = _KIND | 0xF200 | _MONO  # and bit rate and padding: all that a frame's length hangs on
_MARKS = b"XI"  # of the Xing and the Info frame, their first letters
_header_at = struct.Struct(">I").unpack_from
_LAME_BYTES = 24  # of an Info frame, behind its own: up to delay and padding
_DECODER_DELAY = 529  # samples that a decoder of layer III is late
_SEARCH = 1 << 16  # bytes of something else that may stand before and between frames


class _Kind(NamedTuple):
    """What the frames of a stream have in common."""

    key: int
    mono: bool
    rate_hz: int
    samples: int  # of a frame
    layer: int
    side: int  # bytes between header and a Xing mark
    lengths: dict[int, int]  # in bytes, of each form that frames of this kind have
    shortest: int
    longest: int

    def length(self, header: int) -> int:
        """Bytes of a frame; 0 if the header is of another kind."""
        return self.lengths.get(header & _FORM, 0)


def _kind(header: int) -> _Kind | None:
    """The kind of frame that a header begins; None if it begins none."""
    return _kind_of(header & (_KIND | _MONO))


@functools.lru_cache(256)
def _kind_of(header: int) -> _Kind | None:
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    rate = header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or rate == 3:
        return None
    first = version == 3
    rate_hz = _RATES_HZ[rate] >> (0 if first else 1 if version == 2 else 2)
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    mono = header & _MONO == _MONO
    modes = (_MONO,) if mono else (0, 0x40, 0x80)
    lengths: dict[int, int] = {}
    for index, kbits in enumerate(_KBITS[first, layer], start=1):
        for pad in (0, 1):
            if layer == 1:
                length = (12000 * kbits // rate_hz + pad) * 4
            else:
                length = samples // 8 * 1000 * kbits // rate_hz + pad
            form = header & _KIND | index << 12 | pad << 9
            lengths.update((form | mode, length) for mode in modes)
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Kind(header & _KIND, mono, rate_hz, samples, layer, side, lengths, *_ends(lengths))


def _ends(lengths: dict[int, int]) -> tuple[int, int]:
    return min(lengths.values()), max(lengths.values())


def is_header(head: bytes) -> bool:
    """Whether four bytes begin a frame of MPEG audio."""
    kind = _kind(int.from_bytes(head, "big")) if len(head) == 4 else None
    return kind is not None and kind.length(int.from_bytes(head, "big")) > 0


def after_id3(data: Windowed, begin: int) -> int:
    """Where the ID3v2 tags that begin at a place end."""
    while True:
        head = data.get(begin, 10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
            return begin
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        begin += 10 + size + (10 if head[5] & 16 else 0)


class _Stream:
    """Frames that belong together: what one encoder wrote."""

    def __init__(self, header: bytes) -> None:
        self.header = header  # four bytes, of the first frame
        self.info: bytes | None = None  # the frame that states how many there are
        self.promised = 0
        self.frames = 0
        self.runs: list[tuple[int, int]] = []  # bytes of whole frames


def survey(data: Windowed, begin: int, deep: bool) -> Survey | None:
    """See `containers.survey`; None for a file that is as it says, or of another kind."""
    end = _without_tags(data)
    place = begin
    first = _next_frame(data, place, None)
    if first is None:
        return None
    junk = first[0] - place
    place, kind = first
    if not deep and not junk and _is_as_stated(data, place, end, kind):
        return None
    streams: list[_Stream] = []
    cut = ""
    while place < end:
        place = _run(data, place, end, kind, streams)
        if place >= end:
            break
        tag = after_id3(data, place)
        if tag > place:
            place = tag
            continue
        # a frame that the file ends in the middle of, or something else
        header = data.get(place, 4)
        length = kind.length(int.from_bytes(header, "big")) if len(header) == 4 else 0
        if length and place + length > end:
            cut = f"the last frame has {end - place} of {length} bytes"
            break
        after = _next_frame(data, place + 1, kind, end)
        if after is None:
            after_any = _next_frame(data, place, None, min(end, place + _SEARCH))
            if after_any is not None:
                frames = sum(stream.frames for stream in streams)
                return Survey(refused=_differs(kind, after_any[1], frames, after_any[0]))
            junk += 0 if data.is_zero(place, end) else end - place
            break
        junk += after[0] - place
        place = after[0]
    streams = [stream for stream in streams if stream.frames]
    if not streams:
        return None
    return _judged(streams, kind, cut, junk)


def _is_as_stated(data: Windowed, place: int, end: int, kind: _Kind) -> bool:
    """Whether an Info frame states the bytes that are there, and as many frames as these can be.

    Files that were joined, cut or edited hold other bytes than it states. What is damaged within them decodes
    to fewer samples, which is noticed then.
    """
    length, at = kind.length(int.from_bytes(data.get(place, 4), "big")), 4 + kind.side
    frame = data.get(place, length)
    if len(frame) < at + 16 or not _is_info(frame, 0, kind):
        return False
    frames, num_bytes = _stated(frame, kind), _stated_bytes(frame, kind)
    sound = end - place - length
    possible = kind.shortest * frames <= sound <= kind.longest * frames
    return frames > 0 and num_bytes == end - place and possible


def _differs(kind: _Kind, other: _Kind, frames: int, place: int) -> str:
    def words(of: _Kind) -> str:
        return f"{of.rate_hz} Hz {'mono' if of.mono else 'stereo'} layer {of.layer}"

    return (
        f"after {frames * kind.samples} samples of {words(kind)} come others, of {words(other)} "
        f"(byte {place}): split the file there"
    )


def _run(data: Windowed, place: int, end: int, kind: _Kind, streams: list[_Stream]) -> int:
    """Take the frames that follow one another; gives where the first thing lies that is none."""
    begin, frames = place, 0
    mark, length_of, header_at = 4 + kind.side, kind.lengths.get, _header_at
    while place + 4 <= end:
        content, at = data.from_(place, mark + 4), 0
        if place + len(content) >= data.size or len(content) < mark + 4:
            content += bytes(mark + 4)  # room to look for a mark in the last frame
        last = min(len(content) - (mark + 4), end - place - 4)
        length = 0
        info = False
        # a fraction of a microsecond a frame: files have thousands
        while at <= last:
            length = length_of(header_at(content, at)[0] & _FORM, 0)
            if not length or not streams:
                break
            if content[at + mark] in _MARKS and _is_info(content, at, kind):
                info = True
                break
            frames += 1
            at += length
        else:
            if place + at > end:  # the last one is cut
                frames -= 1
                place += at - length
                break
            place += at
            continue
        place += at
        if not length or place + length > end:
            break
        if frames:
            streams[-1].runs.append((begin, place))
            streams[-1].frames += frames
        begin, frames = place, 0
        streams.append(_Stream(content[at : at + 4]))
        if info or _is_info(content, at, kind):
            frame = data.get(place, length)
            streams[-1].info, streams[-1].promised = frame, _stated(frame, kind)
            begin = place = place + length
    if frames:
        streams[-1].runs.append((begin, place))
        streams[-1].frames += frames
    return place


def _is_info(content: bytes, at: int, kind: _Kind) -> bool:
    """Whether a frame is one that states how many follow, and not sound."""
    mark = at + 4 + kind.side
    found = kind.layer == 3 and content[mark : mark + 4] in (b"Xing", b"Info")
    return found and not content[at + 4 : mark].strip(b"\0")


def _stated(frame: bytes, kind: _Kind) -> int:
    """Frames that an Info frame promises; 0 if it does not say."""
    at = 4 + kind.side
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    return int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0


def _stated_bytes(frame: bytes, kind: _Kind) -> int:
    """Bytes that an Info frame promises, itself among them; 0 if it does not say."""
    at = 4 + kind.side
    if frame[at + 7] & 3 != 3:
        return 0
    return int.from_bytes(frame[at + 12 : at + 16], "big")


def _next_frame(
    data: Windowed, place: int, kind: _Kind | None, end: int | None = None
) -> tuple[int, _Kind] | None:
    """The next frame that another, or the end, follows; of one kind, if that is known."""
    limit = min(place + _SEARCH, data.size if end is None else end)
    while 0 <= place < limit:
        header = data.get(place, 4)
        found = _kind(int.from_bytes(header, "big")) if len(header) == 4 else None
        if found is not None and (kind is None or kind.length(int.from_bytes(header, "big"))):
            length = found.length(int.from_bytes(header, "big"))
            after = data.get(place + length, 4)
            follows = len(after) == 4 and found.length(int.from_bytes(after, "big")) > 0
            if length and (follows or place + length == (end or data.size)):
                return place, found
        place = data.find(b"\xff", place + 1)
    return None


def _without_tags(data: Windowed) -> int:
    """Where the sound ends: ID3v1, APE and Lyrics3 tags stand behind it."""
    end = data.size
    for _ in range(8):
        if end >= 128 and data.get(end - 128, 3) == b"TAG":
            end -= 128
            continue
        foot = data.get(end - 32, 32) if end >= 32 else b""
        if foot[:8] == b"APETAGEX":
            size = int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 128 else 0)
            if size <= end:
                end -= size
                continue
        if foot[-9:] == b"LYRICS200" and foot[-15:-9].isdigit():
            size = int(foot[-15:-9]) + 15
            if size <= end:
                end -= size
                continue
        break
    return end


def _judged(streams: list[_Stream], kind: _Kind, cut: str, junk: int) -> Survey:
    missing, notes = cut or None, []
    whole = len(streams) == 1 and not junk
    for stream in streams:
        if _counts_itself(stream, kind):
            stream.promised = stream.frames
            stream.info = _with_count(stream, kind)
            whole = False
        if stream.promised > stream.frames:
            missing = (
                f"the header promises {stream.promised} MPEG frames, {stream.frames} are there"
            )
    if len(streams) > 1:
        notes.append(f"holds {len(streams)} MPEG streams one after the other: all are read")
    if junk:
        notes.append(f"{junk} bytes that are no MPEG frame are left out")
    for stream in streams:
        if stream.info is not None and 0 < stream.promised < stream.frames:
            notes.append(
                f"the header promises {stream.promised} MPEG frames, {stream.frames} are there: all "
                "are read"
            )
    stated = [s.info is not None and s.promised in (s.frames, 0) for s in streams]
    if kind.layer != 3:  # no frame tells lengths there
        samples = kind.samples * sum(stream.frames for stream in streams)
        return Survey(missing, notes=tuple(notes), samples=samples)
    if whole and stated[0] and streams[0].promised:
        return Survey(missing, notes=tuple(notes))
    pieces = tuple(_pieces(stream, kind) for stream in streams)
    return Survey(missing, streams=pieces, notes=tuple(notes))


def _counts_itself(stream: _Stream, kind: _Kind) -> bool:
    """Whether nothing is missing but one frame, and not a byte: some writers count the Info frame too."""
    if stream.info is None or stream.promised != stream.frames + 1:
        return False
    return _stated_bytes(stream.info, kind) == len(stream.info) + _num_bytes(stream)


def _num_bytes(stream: _Stream) -> int:
    return sum(end - begin for begin, end in stream.runs)


def _with_count(stream: _Stream, kind: _Kind) -> bytes:
    """The Info frame with the number of frames that are there."""
    at = 4 + kind.side + 8
    frame = stream.info or b""
    return frame[:at] + stream.frames.to_bytes(4, "big") + frame[at + 4 :]


def _pieces(stream: _Stream, kind: _Kind) -> tuple[Piece, ...]:
    """The frames of a stream under an Info frame that tells the truth."""
    num_bytes = _num_bytes(stream)
    if stream.info is None or not stream.promised:
        silent = _silent(stream.header, kind)
        info = _blank(stream.header, kind, stream.frames + 1, num_bytes + len(silent))
        return (info, silent, *stream.runs)
    if stream.promised == stream.frames:
        frame = bytearray(stream.info)
    else:
        frame = bytearray(_with_count(stream, kind))
        at = 4 + kind.side
        flags = int.from_bytes(frame[at + 4 : at + 8], "big")
        _untrim(frame, at, flags)
        if flags & 2:
            frame[at + 12 : at + 16] = (num_bytes + len(frame)).to_bytes(4, "big")
    return (bytes(frame), *stream.runs)


def _untrim(frame: bytearray, at: int, flags: int) -> None:
    """Take back what the encoder said is to be cut off at the end: it is another end now."""
    lame = at + 12 + (4 if flags & 2 else 0) + (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    if len(frame) >= lame + _LAME_BYTES:  # delay and padding, 12 bits each
        frame[lame + 22] &= 0xF0
        frame[lame + 23] = 0


def _sized(header: bytes, kind: _Kind, room: int) -> bytearray:
    """A frame of zeros of the smallest bit rate that leaves room, without checksum and padding."""
    packed = int.from_bytes(header, "big") | 1 << 16
    packed &= ~(15 << 12 | 1 << 9)
    index = next(n for n in range(1, 15) if kind.length(packed | n << 12) >= room)
    frame = bytearray(kind.length(packed | index << 12))
    frame[:4] = (packed | index << 12).to_bytes(4, "big")
    return frame


def _silent(header: bytes, kind: _Kind) -> bytes:
    """A frame of silence: no bits of sound, and the decoder as it was before."""
    return bytes(_sized(header, kind, 4 + kind.side))


def _blank(header: bytes, kind: _Kind, frames: int, num_bytes: int) -> bytes:
    """An Info frame that states frames and bytes, the first of them a silent one to be cut off.

    Where an Info frame stands, the decoder cuts off its own delay at the beginning; with a silent frame
    in front, and the rest of its length as the encoder's delay, it cuts off that frame and nothing else.
    """
    at = 4 + kind.side
    frame = _sized(header, kind, at + 16 + _LAME_BYTES + 12)
    frame[at : at + 8] = b"Info" + (3).to_bytes(4, "big")
    frame[at + 8 : at + 12] = frames.to_bytes(4, "big")
    frame[at + 12 : at + 16] = (num_bytes + len(frame)).to_bytes(4, "big")
    frame[at + 16 : at + 25] = b"ast_fast\0"
    frame[at + 37 : at + 40] = (kind.samples - _DECODER_DELAY << 12).to_bytes(3, "big")
    return bytes(frame)
