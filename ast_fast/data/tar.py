"""Plain tar archives as a list of members: nothing is extracted and no name is used as a path.

Shards come from elsewhere. Every header is held to its checksum, sizes and names are capped, links
and devices are passed over, and what is cut off or damaged is a named error.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..audio import AudioError

BLOCK = 512
MAX_MEMBER_BYTES = 2 << 30
MAX_NAME_CHARS = 4096
MAX_MEMBERS = 10_000_000
_MAX_EXTENSION_BYTES = 1 << 20  # of a pax or GNU header; sane ones hold a path
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\0\x37"  # "7" is a contiguous file, read like any other

ReadAt = Callable[[int, int], bytes]  # (offset, count) -> at most count bytes


class ShardError(AudioError):
    """A shard, or a clip in it, is damaged or not what was expected."""


class Member(NamedTuple):
    """One file in an archive."""

    name: str
    begin: int  # first byte of its headers
    start: int  # first byte of its content
    size: int

    @property
    def end(self) -> int:
        """First byte after its padding."""
        return self.start + -(-self.size // BLOCK) * BLOCK

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part: members of one clip share it."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def kind(self) -> str:
        """What follows that dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def members(read_at: ReadAt, begin: int, end: int, shard: str) -> Iterator[Member]:
    """Regular files whose headers lie in a part of an archive, in order.

    A member may reach beyond `end` where an archive is cut off: compare `start + size`.

    Args:
        read_at: reads bytes at an offset of the archive.
        begin: where the first header starts.
        end: where to stop.
        shard: the archive's name, for messages.

    Raises:
        ShardError: a header is damaged, or asks for more than the limits allow.
    """
    offset, first = begin, begin
    renamed: str | None = None
    resized: int | None = None
    for _ in range(MAX_MEMBERS):
        if offset >= end:
            return
        header = read_at(offset, BLOCK)
        if len(header) < BLOCK:
            raise ShardError(shard, f"is cut off in a header at byte {offset}: copy it again")
        if header == _ZEROS:
            return
        kind, size, name = _header(header, shard, offset)
        start = offset + BLOCK
        if kind in b"xgLKX":
            if size > _MAX_EXTENSION_BYTES:
                raise ShardError(
                    shard,
                    f"has a name of {size} bytes at byte {offset}: expected at most "
                    f"{_MAX_EXTENSION_BYTES}",
                )
            content = read_at(start, size)
            if kind == b"L":
                renamed = _text(content.rstrip(b"\0"), shard, offset)
            elif kind in b"xX":
                path, length = _pax(content, shard, offset)
                renamed, resized = path or renamed, length if length is not None else resized
            offset = start + -(-size // BLOCK) * BLOCK
            continue
        size = size if resized is None else resized
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise ShardError(
                shard,
                f"has a member of {size} bytes at byte {offset}: expected at most "
                f"{MAX_MEMBER_BYTES}",
            )
        member = Member(renamed if renamed is not None else name, first, start, size)
        if kind in _REGULAR:
            yield member
        elif kind in b"12":  # links have no content, whatever their size field says
            member = member._replace(size=0)
        renamed = resized = None
        offset = first = member.end
    raise ShardError(shard, f"has more than {MAX_MEMBERS} members")


def _header(header: bytes, shard: str, offset: int) -> tuple[bytes, int, str]:
    """Type, size and name of a header block."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        claimed = int(header[148:156].strip(b" \0") or b"0", 8)
        size = _number(header[124:136])
    except ValueError:
        claimed, size = -1, 0
    if total != claimed:
        raise ShardError(
            shard,
            f"has a damaged header at byte {offset} (or is compressed, or no tar): expected a plain "
            "tar; copy or write it again",
        )
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:  # the old GNU form uses these bytes otherwise
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return header[156:157], size, _text(name, shard, offset)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for what octal digits cannot hold
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.strip(b" \0") or b"0", 8)


def _text(raw: bytes, shard: str, offset: int) -> str:
    if len(raw) > MAX_NAME_CHARS:
        raise ShardError(
            shard,
            f"has a name of {len(raw)} bytes at byte {offset}: expected at most {MAX_NAME_CHARS}",
        )
    return raw.decode("utf-8", "backslashreplace")


def _pax(content: bytes, shard: str, offset: int) -> tuple[str | None, int | None]:
    """Path and size of a pax header: records of length, space, key, "=", value and line end."""
    path, size = None, None
    position = 0
    while position < len(content) and content[position]:
        digits, space, _ = content[position : position + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[position + len(digits) + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or position + length > len(content):
            raise ShardError(shard, f"has a damaged pax header at byte {offset}")
        if key == b"path":
            path = _text(value[:-1], shard, offset)
        elif key == b"size":
            size = int(value) if value[:-1].isdigit() and len(value) < 20 else -1
        position += length
    return path, size


def packed(name: str, content: bytes) -> bytes:
    """A member as it stands in an archive: header, content, padding; the same for the same input."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % BLOCK)


END = _ZEROS * 2  # of an archive
