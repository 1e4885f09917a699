"""Folders walked for sound: links followed where they may be, and everything that is left out counted.

Snapshots of a hub and annexed sets consist of links. A link is followed if what it leads to lies under the
folder itself or under a root that the user named; others are counted, and so are links to nothing, links that
lead back to a folder they lie in, and files that are no sound by their suffix.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .._text import one_line
from ..audio import SUFFIXES

_EXAMPLES = 3


@dataclasses.dataclass(slots=True)
class Tree:
    """What was found below folders.

    Attributes:
        others: files that are no sound, by suffix.
        outside: links that lead out of the roots.
        broken: links to nothing.
        loops: links to a folder that is read already.
    """

    others: Counter[str] = dataclasses.field(default_factory=Counter)
    outside: list[str] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    loops: list[str] = dataclasses.field(default_factory=list)

    def notes(self) -> list[str]:
        """What is left out, a sentence each."""
        found = []
        if self.outside:
            found.append(
                f"{_some(self.outside)} lead out of the folder and are left out: name the folder that "
                "holds what they lead to as root (--root)"
            )
        if self.broken:
            found.append(f"{_some(self.broken)} lead to nothing and are left out")
        if self.loops:
            found.append(
                f"{_some(self.loops)} lead to folders that are read already and are left out"
            )
        if self.others:
            found.append(
                f"files that are no sound by their suffix are left out: {suffixes(self.others)}"
            )
        return found


def suffixes(found: Counter[str]) -> str:
    """Suffixes and how many files have them."""
    most = found.most_common(12)
    text = ", ".join(f"{one_line(name) or 'none'} {count}" for name, count in most)
    return text + (", ..." if len(found) > len(most) else "")


def _some(links: Sequence[str]) -> str:
    names = ", ".join(map(repr, links[:_EXAMPLES])) + ("..." if len(links) > _EXAMPLES else "")
    return f"{len(links)} links ({names})"


class Walk:
    """Walks folders below a root.

    Args:
        root: links may lead to what lies under it.
        further: and under these.
    """

    def __init__(self, root: Path, further: Sequence[str | os.PathLike[str]] = ()) -> None:
        roots = (os.path.realpath(place) for place in (root, *further))
        self._roots = tuple(place if place.endswith(os.sep) else place + os.sep for place in roots)
        self._root = root
        self.tree = Tree()

    def allows(self, path: str) -> bool:
        """Whether a link may be followed; counts it if not."""
        real = os.path.realpath(path)
        if not os.path.exists(real):  # noqa: PTH110 - a million Path objects are slow
            self.tree.broken.append(self._named(path))
            return False
        if not (real + os.sep).startswith(self._roots):
            self.tree.outside.append(self._named(path))
            return False
        return True

    def folders(self, place: Path) -> list[str]:
        """Names of the folders in a folder, linked ones among them, sorted; hidden ones are none."""
        with os.scandir(place) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name[0] != "."
                and (
                    (entry.is_symlink() and os.path.isdir(entry.path) and self.allows(entry.path))  # noqa: PTH112
                    or entry.is_dir(follow_symlinks=False)
                )
            )

    def sounds(self, folder: Path, *, deep: bool = True) -> list[str]:
        """Files of sound below a folder by suffix, relative to it with forward slashes, sorted."""
        found: list[str] = []
        seen: set[tuple[int, int]] = set()
        links: list[tuple[str, str]] = []
        places = [(os.fspath(folder), "")]
        # what is really there comes first, so that a link to it is what is left out
        while places or links:
            linked = not places
            place, prefix = links.pop(0) if linked else places.pop()
            status = os.stat(place)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                self.tree.loops.append(self._named(place))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name[0] == ".":
                        continue
                    link = entry.is_symlink()
                    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                    if link and (deep or suffix in SUFFIXES) and not self.allows(entry.path):
                        continue
                    if entry.is_dir():
                        if deep:
                            to = links if link else places
                            to.append((entry.path, f"{prefix}{entry.name}/"))
                    elif suffix in SUFFIXES:
                        found.append(prefix + entry.name)
                    elif deep:
                        self.tree.others[suffix] += 1
        return sorted(found, key=_by_folders)

    def _named(self, path: str) -> str:
        return os.path.relpath(path, self._root)


def _by_folders(path: str) -> tuple[int, ...] | list[object]:
    """In the order of `os.walk`: the files of a folder before what lies in its folders."""
    *folders, name = path.split("/")
    order: list[object] = []
    for folder in folders:
        order += [1, folder]
    return [*order, 0, name]
