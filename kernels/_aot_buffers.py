"""Which copies of a compiled kernel fill buffers that no matrix product reads, told from its TTGIR.

A buffer in shared memory that threads load from themselves is guarded by Triton's own analysis of loads and
stores; the check of _aot_barriers.py is about what wgmma reads behind their backs. Copies are named by
their line in the source, which the PTX repeats. A line counts only if every copy it stands for fills
such a buffer.
"""

from __future__ import annotations

import re

Place = tuple[str, int, int]  # file, line, column

_COPIES = r"ttn?g\.async_(?:tma_)?copy_global_to_local"
_VIEW = re.compile(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)")
_BUFFER = re.compile(r"(%[\w#]+) = ttg\.local_alloc\b")
# what may be done to a buffer of threads alone
_PLAIN = re.compile(rf"ttg\.(?:local_load|local_dealloc|local_alloc|memdesc_\w+)\b|{_COPIES}\b")


def places_of_plain_copies(ttgir: str) -> frozenset[Place]:
    """Lines of the source whose copies fill buffers that only threads read."""
    origin: dict[str, str] = {}  # a buffer or a view of one to the buffer
    read: set[str] = set()  # buffers with any other use: products, and whatever is not known
    copies: list[tuple[str, str]] = []  # buffer and location
    lines = ttgir.splitlines()
    for line in lines:
        if made := _BUFFER.search(line):
            origin[made.group(1)] = made.group(1)
        elif view := _VIEW.search(line):
            origin[view.group(1)] = origin.get(view.group(2), view.group(2))
        used = {origin[name] for name in re.findall(r"%[\w#]+", line) if name in origin}
        if used and not _PLAIN.search(line):
            read |= used
        if re.search(rf"{_COPIES}\b", line) and (where := re.search(r"loc\((#loc\d*)\)$", line)):
            # of a TMA copy the mbarrier is one of them, so that none counts
            copies += ((buffer, where.group(1)) for buffer in used)
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    plain = {_innermost(where, locations) for buffer, where in copies if buffer not in read}
    others = {_innermost(where, locations) for buffer, where in copies if buffer in read}
    return frozenset(place for place in plain - others if place is not None)


def _innermost(name: str, locations: dict[str, str]) -> Place | None:
    """File, line and column of a location; of an inlined call those of the callee."""
    text = locations.get(name, "")
    if place := re.match(r'"([^"]*)":(\d+):(\d+)', text):
        return place.group(1), int(place.group(2)), int(place.group(3))
    inner = re.search(r"#loc\d*", text)
    return _innermost(inner.group(), locations) if inner else None
