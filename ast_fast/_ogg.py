"""Ogg: pages walked, and streams that follow one another in a file (chained) told apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from ._pieces import Survey, Windowed

_HEADER = 27
_CHECKSUM = 22, 26  # where it lies in a page
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FIRST, _LAST = 2, 4  # flags of a page


def survey(data: Windowed) -> Survey:
    """See `containers.survey`."""
    links: list[int] = [0]
    tails: list[int] = []
    before = last = 0  # samples at the end of the last pages
    missing: str | None = None
    place = left_out = damaged = lost = 0
    begun = False  # whether pages of sound have come since the link's first pages
    notes: list[str] = []
    following: dict[bytes, int] = {}  # number of each stream's next page; not after a damaged one
    heard: set[bytes] = set()  # streams of which pages of sound have come
    repeated: list[tuple[int, int]] = []  # where pages lie that are there once more
    page = b""
    flags = _LAST
    while place < data.size:
        head = data.get(place, _HEADER)
        if head[:4] != b"OggS":
            after = data.find(b"OggS", place + 1)
            end = data.size if after < 0 else after
            left_out += 0 if _is_tag(data, place, end) else end - place
            if after < 0:
                break
            place = after
            continue
        lengths = data.get(place + _HEADER, head[26]) if len(head) == _HEADER else b""
        end = place + _HEADER + len(lengths) + sum(lengths)
        if len(head) < _HEADER or len(lengths) < head[26] or end > data.size:
            missing = "the last Ogg page is incomplete"
            break
        known, page = page, data.get(place, end - place)
        if checksum(page) != int.from_bytes(head[slice(*_CHECKSUM)], "little"):
            # decoders leave it out, and go on behind it or fill the hole with what they guess
            damaged += 1
            following.clear()
            place = end
            continue
        if page == known:  # decoders would play it twice
            repeated.append((place, end))
            place = end
            continue
        stream, number = head[14:18], int.from_bytes(head[18:22], "little")
        gap = 0 if head[5] & _FIRST else number - following.get(stream, number)
        if gap and stream not in heard:
            notes.append(f"begins with page {number} of its Ogg stream: what came before is not in the file")  # fmt: skip
        elif gap:
            lost += max(1, gap)  # or out of order
        following[stream] = number + 1
        if head[5] & _FIRST:
            heard.discard(stream)
        if head[5] & _FIRST and begun:
            if not flags & _LAST:
                missing = f"the Ogg stream before byte {place} has no last page"
            links.append(place)
            tails.append(last - before)
            before = last = 0
            begun = False
        begun |= not head[5] & _FIRST
        flags = head[5]
        at = int.from_bytes(head[6:14], "little")
        if at >> 63 == 0:  # otherwise no packet ends in it
            before, last = last, max(last, at)
        if at:  # of pages with headers alone it is 0
            heard.add(stream)
        place = end
    tails.append(last - before)
    if missing is None and not flags & _LAST:
        missing = "the Ogg stream has no last page"
    if damaged:
        missing = f"damaged Ogg pages (their checksums are wrong): {damaged}"
    elif lost:
        missing = f"Ogg pages that are missing between others: {lost}"
    if left_out:
        notes.append(f"{left_out} bytes that are no Ogg page are left out")
    if repeated:
        notes.append(f"Ogg pages that are there twice and are read once: {len(repeated)}")
    if len(links) == 1 and not repeated:
        return Survey(missing, notes=tuple(notes), tails=tuple(tails))
    if len(links) > 1:
        notes.append(f"holds {len(links)} Ogg streams one after the other: all are read")
    ends = [*links[1:], data.size]
    streams = tuple(_without(begin, end, repeated) for begin, end in zip(links, ends, strict=True))
    return Survey(missing, streams=streams, notes=tuple(notes), tails=tuple(tails))


def _without(
    begin: int, end: int, left_out: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """What of a stretch of the file is left when others are taken out of it."""
    pieces = []
    for first, last in left_out:
        if begin <= first < end:
            pieces.append((begin, first))
            begin = last
    return (*pieces, (begin, end))


def checksum(page: bytes) -> int:
    """CRC-32 of a page as Ogg has it: the polynomial of zlib's, but not mirrored and without its complements."""
    begin, end = _CHECKSUM
    mirrored = (page[:begin] + bytes(end - begin) + page[end:]).translate(_MIRRORED)
    value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def _is_tag(data: Windowed, begin: int, end: int) -> bool:
    """An ID3 tag behind the sound, or nothing but zeros."""
    if end - begin == 128 and data.get(begin, 3) == b"TAG":
        return True
    return data.is_zero(begin, end)
