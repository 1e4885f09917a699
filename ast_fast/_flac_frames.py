"""FLAC: frames walked by their headers, where STREAMINFO does not say how many samples there are, or wrongly.

A writer that cannot seek back leaves the number of samples at 0. Each frame's header says where in the stream
it stands, under a checksum, so the last one tells the length; a second file joined behind the first is found too.
"""

from __future__ import annotations

from typing import NamedTuple

from ._pieces import Piece, Survey, Windowed

_INFO_BYTES = 42  # magic, and the block STREAMINFO
_TAIL_BYTES = 1 << 17
_MAX_FRAME = 1 << 20  # bytes; larger ones, of many channels and bits, are taken for damaged
_MISSED = 64  # frames
_BLOCKS = (
    {1: 192} | {n: 576 << (n - 2) for n in range(2, 6)} | {n: 256 << (n - 8) for n in range(8, 16)}
)


def _crc_table(polynomial: int, bits: int) -> tuple[int, ...]:
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value & top else 0)
        table.append(value & mask)
    return tuple(table)


_CRC8, _CRC16 = _crc_table(0x07, 8), _crc_table(0x8005, 16)


def _crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc16(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc = ((crc << 8) & 0xFFFF) ^ _CRC16[(crc >> 8) ^ byte]
    return crc


class _Frame(NamedTuple):
    """What a frame's header says."""

    place: int
    number: int  # of the frame, or of its first sample where blocks vary
    block: int  # samples


class _Stream(NamedTuple):
    """One FLAC stream in a file."""

    begin: int
    first: int  # byte of the first frame
    info: bytes  # magic and STREAMINFO
    last: _Frame | None
    total: int  # samples in whole frames
    end: int  # byte behind the last whole frame
    cut: bool  # what follows it begins a frame and is not one
    broken: bool  # frames are missing in between


def _block_size(info: bytes) -> int:
    """Samples of each frame but the last; 0 where they vary."""
    least, most = int.from_bytes(info[8:10], "big"), int.from_bytes(info[10:12], "big")
    return least if least == most else 0


def _stated(info: bytes) -> int:
    return int.from_bytes(info[18:26], "big") & ((1 << 36) - 1)


def survey(data: Windowed, begin: int, deep: bool) -> Survey | None:
    """See `containers.survey`; None for a file that is as it says, or damaged in some other way."""
    head = data.get(begin, _INFO_BYTES)
    first = _after_metadata(data, begin)
    if len(head) < _INFO_BYTES or first is None:
        return None
    joined = _joined(data, first, data.size)
    if not deep and joined is None and _ends_as_stated(data, head, first):
        return None
    streams: list[_Stream] = []
    place = begin
    while True:
        stream = _walk(data, place)
        if stream is None or stream.broken or stream.last is None:
            break
        streams.append(stream)
        if data.get(stream.end, 4) != b"fLaC":
            break
        place = stream.end
    if not streams:
        return None
    return _judged(data, streams)


def _judged(data: Windowed, streams: list[_Stream]) -> Survey | None:
    last, notes, missing = streams[-1], [], None
    if len(streams) > 1:
        notes.append(f"holds {len(streams)} FLAC streams one after the other: all are read")
    for stream in streams:
        stated = _stated(stream.info)
        if stated > stream.total or stream.cut:
            held = f"{stream.total} are whole"
            missing = (
                f"the header promises {stated} samples, {held}"
                if stated
                else f"its last frame is not whole, {stream.total} samples are"
            )
        elif 0 < stated < stream.total:
            notes.append(
                f"the header promises {stated} samples, {stream.total} are there: all are read"
            )
    if not last.cut and last.end < data.size and not _is_tag(data, last.end):
        notes.append(f"{data.size - last.end} bytes behind the last FLAC frame are left out")
    return Survey(missing, streams=tuple(map(_pieces, streams)), notes=tuple(notes))


def _pieces(stream: _Stream) -> tuple[Piece, ...]:
    """The stream with the number of its samples written in."""
    packed = int.from_bytes(stream.info[18:26], "big") >> 36 << 36 | stream.total
    head = stream.info[:18] + packed.to_bytes(8, "big") + stream.info[26:]
    return head, (stream.begin + _INFO_BYTES, stream.end)


def _is_tag(data: Windowed, place: int) -> bool:
    return (data.size - place == 128 and data.get(place, 3) == b"TAG") or data.is_zero(
        place, data.size
    )


def _after_metadata(data: Windowed, begin: int) -> int | None:
    """Where the first frame begins."""
    head = data.get(begin + 4, 4)
    if head[1:] != b"\0\0\x22" or head[0] & 0x7F:
        return None
    place = begin + 4
    for _ in range(4096):
        head = data.get(place, 4)
        if len(head) < 4:
            return None
        place += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            return place
    return None


def _ends_as_stated(data: Windowed, info: bytes, first: int) -> bool:
    """Whether the last frame's header, alone, bears out the number of samples; the usual case."""
    total, block = _stated(info), _block_size(info)
    if not total:
        return False
    mark = data.get(first, 2)
    if mark not in (b"\xff\xf8", b"\xff\xf9"):
        return False
    begin = max(first, data.size - max(_TAIL_BYTES, 2 * int.from_bytes(info[15:18], "big")))
    tail = data.get(begin, data.size - begin)
    place = tail.rfind(mark)
    while place >= 0:
        frame = _header(tail[place : place + 16], begin + place)
        if frame is not None:
            start = frame.number if mark[1] & 1 else frame.number * block
            # only a last frame may be shorter, and only it ends where the stream does
            if start + frame.block == total:
                return True
            if start + frame.block > total:
                return False
        place = tail.rfind(mark, 0, place)
    return False


def _header(head: bytes, place: int) -> _Frame | None:
    """A frame's header, if its checksum fits."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    size, rate = head[2] >> 4, head[2] & 15
    if not size or rate == 15:
        return None
    lead, at = head[4], 5
    if lead < 0x80:
        number = lead
    else:
        more = _following(lead)
        if not 1 <= more <= 6 or len(head) < 5 + more:
            return None
        number = lead & ((1 << (6 - more)) - 1)
        for byte in head[5 : 5 + more]:
            if byte >> 6 != 2:
                return None
            number = number << 6 | byte & 63
        at += more
    if size in (6, 7):
        width = size - 5
        block = int.from_bytes(head[at : at + width], "big") + 1
        at += width
    else:
        block = _BLOCKS[size]
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    return _Frame(place, number, block)


def _following(lead: int) -> int:
    """Bytes that follow the first of a number in UTF-8's form."""
    ones = 0
    while lead & (0x80 >> ones) and ones < 8:
        ones += 1
    return ones - 1


def _walk(data: Windowed, begin: int) -> _Stream | None:
    """The frames of a stream, up to the last that is whole."""
    info, first = data.get(begin, _INFO_BYTES), _after_metadata(data, begin)
    if info[:4] != b"fLaC" or first is None:
        return None
    mark, block = data.get(first, 2), _block_size(info)
    by_sample = mark == b"\xff\xf9"
    if mark not in (b"\xff\xf8", b"\xff\xf9") or not (by_sample or block):
        return None
    frame = _header(data.get(first, 16), first)
    if frame is None:
        return None
    before, total = None, 0
    broken = False
    while True:
        total += frame.block
        expected = frame.number + (frame.block if by_sample else 1)
        following, stop, broken = _following_frame(data, frame, mark, expected)
        if following is None:
            break
        before, frame = frame, following
    # the last frame is whole if its checksum is
    end = _end_of(data, frame, stop)
    if end is not None:
        rest = data.get(end, 2)
        return _Stream(begin, first, info, frame, total, end, rest == mark, broken)
    return _Stream(begin, first, info, before, total - frame.block, frame.place, True, broken)


def _following_frame(
    data: Windowed, frame: _Frame, mark: bytes, expected: int
) -> tuple[_Frame | None, int, bool]:
    """The frame with the number expected; where the stream must end without it; whether one is missing."""
    place = frame.place + 6
    stop = data.size
    while True:
        found = data.find(mark, place)
        joined = _joined(data, place, data.size if found < 0 else found)
        if joined is not None:
            return None, joined, False
        if found < 0:
            return None, stop, False
        header = _header(data.get(found, 16), found)
        if header is not None:
            if header.number == expected:
                return header, 0, False
            if expected < header.number <= expected + _MISSED * (frame.block if mark[1] & 1 else 1):
                return None, found, True  # not by chance
        place = found + 1


def _joined(data: Windowed, begin: int, end: int) -> int | None:
    """Where another FLAC file begins between two places."""
    place = begin
    while True:
        found = data.find(b"fLaC", place, end)
        if found < 0:
            return None
        if data.get(found + 4, 4) in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            return found
        place = found + 1


def _end_of(data: Windowed, frame: _Frame, stop: int) -> int | None:
    """Where a frame ends that nothing of its stream follows; None if its checksum does not fit."""
    if stop - frame.place > _MAX_FRAME:
        return None
    content = data.get(frame.place, stop - frame.place)
    ends = [len(content)]
    if content[-128:-125] == b"TAG":
        ends.append(len(content) - 128)
    bare = len(content.rstrip(b"\0"))
    ends += [end for end in range(bare, min(bare + 3, len(content) + 1)) if end not in ends]
    for end in ends:
        if end > 8 and _crc16(content[: end - 2]) == int.from_bytes(content[end - 2 : end], "big"):
            return frame.place + end
    return None
