"""Ogg: pages walked, and streams that follow one another in a file (chained) told apart."""

from __future__ import annotations

from ._pieces import Survey, Windowed

_HEADER = 27
_FIRST, _LAST = 2, 4  # flags of a page


def survey(data: Windowed) -> Survey:
    """See `containers.survey`."""
    links: list[int] = [0]
    tails: list[int] = []
    before = last = 0  # samples at the end of the last pages
    missing: str | None = None
    place = left_out = 0
    begun = False  # whether pages of sound have come since the link's first pages
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
        place = end
    tails.append(last - before)
    if missing is None and not flags & _LAST:
        missing = "the Ogg stream has no last page"
    notes = [f"{left_out} bytes that are no Ogg page are left out"] if left_out else []
    if len(links) == 1:
        return Survey(missing, notes=tuple(notes), tails=tuple(tails))
    notes.append(f"holds {len(links)} Ogg streams one after the other: all are read")
    ends = [*links[1:], data.size]
    streams = tuple(((begin, end),) for begin, end in zip(links, ends, strict=True))
    return Survey(missing, streams=streams, notes=tuple(notes), tails=tuple(tails))


def _is_tag(data: Windowed, begin: int, end: int) -> bool:
    """An ID3 tag behind the sound, or nothing but zeros."""
    if end - begin == 128 and data.get(begin, 3) == b"TAG":
        return True
    return data.is_zero(begin, end)
