"""Sets that folders describe: one per class, and Speech Commands as it is distributed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..names import SPLIT_NAMES, listed
from .manifest import Manifest, ManifestError, Row, check_path, check_size, collect
from .tree import Walk

_LISTS = {"validation_list.txt": "validation", "testing_list.txt": "test"}
_NOISE = "_background_noise_"
_FOLD = re.compile(r"folds?[-_ ]?\d+", re.IGNORECASE)


def read_folder(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    link_roots: Sequence[str | os.PathLike[str]] = (),
) -> Manifest:
    """A folder per class: `root/<class>/**/<clip>`, or `root/<part>/<class>/**/<clip>`.

    Parts are folders named train, validation, test and the like, if no others hold sound; sound in one
    that is in no folder of a class is left out. Links are followed to what lies under the root or under
    `link_roots`. The notes say what is left out, hidden files and folders apart.

    Args:
        root: the folder.
        classes: class names in order; by default the folders' names, sorted.
        aliases: further names of classes, with their indices.
        link_roots: folders outside the root that links in it may lead to.

    Raises:
        ManifestError: there are no classes or no audio files; or folders that look like parts lie beside
            others with sound, or hold no folders of classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"{str(root)!r} is not a folder")
    walk = Walk(root, link_roots)
    names = walk.folders(root)
    if not names:
        raise ManifestError(f"{str(root)!r} has no subfolders: expected one folder per class")
    notes: list[str] = []
    loose = walk.sounds(root, deep=False)
    if loose:
        notes.append(f"{len(loose)} files of sound beside the folders are of no class and left out")
    found = {name: walk.sounds(root / name) for name in names}
    full = [name for name in names if found[name]]
    places = [(name, name, "") for name in names]
    if full and _are_parts(root, full, found):
        beside = [name for name in names if name not in full]
        if beside:
            notes.append(f"folders without sound beside the parts are left out: {listed(beside)}")
        for part in full:
            bare = [file for file in found[part] if "/" not in file]
            if bare:
                notes.append(
                    f"{len(bare)} files of sound in {part!r}, in no folder of a class, are left out"
                )
            found[part] = [file for file in found[part] if "/" in file]
        inner = {part: _folders_of(walk, root / part, found[part]) for part in full}
        places = [(f"{part}/{name}", name, part.lower()) for part in full for name in inner[part]]
        found = {f"{part}/{name}": inner[part][name] for part in full for name in inner[part]}
    else:
        words = [name for name in full if name.lower() in SPLIT_NAMES]
        if words:
            notes.append(f"{listed(words)} are taken for classes, as others beside them hold sound")
    empty = [place for place, _, _ in places if not found[place]]
    if empty:
        notes.append(f"folders without sound are no classes: {listed(empty)}")
    rows = (
        Row(0, f"{place}/{file}", [name], split=part)
        for place, name, part in places
        for file in found[place]
    )
    notes += walk.tree.notes()
    if not full:
        raise ManifestError(f"{root}: holds no clips: {'; '.join(notes)}")
    further = [os.fspath(place) for place in link_roots]
    return collect(
        rows, root, root, classes=classes, aliases=aliases, notes=notes, link_roots=further
    )


def _are_parts(root: Path, full: Sequence[str], found: Mapping[str, Sequence[str]]) -> bool:
    """Whether the folders that hold sound are parts of a set, with folders of classes in one at least.

    Raises:
        ManifestError: they may be parts or classes.
    """
    parts = [name for name in full if name.lower() in SPLIT_NAMES]
    if not parts:
        _check_no_folds(root, full)
        return False
    inner = {name: {file.partition("/")[0] for file in found[name] if "/" in file} for name in full}
    others = [name for name in full if name not in parts]
    if not others:
        if not any(inner.values()):
            raise ManifestError(
                f"{str(root)!r}: {listed(parts)} look like parts of a set, but hold no folders of classes: expected "
                "train/<class>/<clip>; list the clips in a CSV with columns path, label and split, or rename "
                "what are classes"
            )
        return True
    # folders of sound are classes, whatever they are called
    if any("/" not in file for name in parts for file in found[name]):
        return False
    shared = any(inner[part] & inner[name] for part in parts for name in full if name != part)
    # of classes with folders in them the others have some too
    alone = any(len(inner[name]) > 1 for name in parts) and not any(inner[name] for name in others)
    if shared or alone:
        why = "the same folders" if shared else "folders"
        raise ManifestError(
            f"{str(root)!r}: {listed(parts)} look like parts of a set, as they hold {why}, but "
            f"{listed(others)} beside them hold sound too: move those away, or rename what are classes"
        )
    return False


def _check_no_folds(root: Path, full: Sequence[str]) -> None:
    """Refuse folders all of which are called as folds or parts are: fold1, fold2; train-clean, test-clean.

    Raises:
        ManifestError: they are.
    """
    folds = [name for name in full if _FOLD.fullmatch(name)]
    words = {re.split(r"[-_ .]", name.lower())[0] for name in full}
    if len(full) > 1 and (folds == list(full) or (len(words) > 1 and words <= SPLIT_NAMES)):
        raise ManifestError(
            f"{str(root)!r}: {listed(full)} look like folds or parts of a set, not like classes: list the clips in a "
            "CSV with columns path, label and split, or rename what are classes"
        )


def _folders_of(walk: Walk, part: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each class of a part; folders without any too."""
    inner: dict[str, list[str]] = {name: [] for name in walk.folders(part)}
    for file in files:
        name, _, rest = file.partition("/")
        inner.setdefault(name, []).append(rest)
    return inner


def is_speech_commands(root: Path) -> bool:
    """Whether a folder looks like Speech Commands: its two lists lie there."""
    return all((root / name).is_file() for name in _LISTS)


def read_speech_commands(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
    link_roots: Sequence[str | os.PathLike[str]] = (),
) -> Manifest:
    """Speech Commands (v1 or v2) as unpacked: a folder per word, and lists of held-out clips.

    Clips are in the parts train, validation (`validation_list.txt`) and test
    (`testing_list.txt`). `_background_noise_` is left out. Version 2 has 35 words.

    Args:
        root: the unpacked folder.
        classes: words in order; by default sorted.
        aliases: further names of classes, with their indices.
        link_roots: see `read_folder`.

    Raises:
        ManifestError: a list is missing or wrong (named by its line), or there is no clip.
    """
    root = Path(root)
    held: dict[str, tuple[str, str, int]] = {}
    for name, part in _LISTS.items():
        file = root / name
        if not file.is_file():
            raise ManifestError(
                f"{str(file)!r} is not there: expected Speech Commands as unpacked, with its lists"
            )
        for line, path in _listed(file):
            if path in held:
                _, other, first = held[path]
                raise ManifestError(
                    f"{file}, line {line}: {path!r} is on line {first} of {other} already"
                )
            held[path] = part, name, line
    walk = Walk(root, link_roots)
    words = [name for name in walk.folders(root) if name != _NOISE]
    found = [f"{word}/{file}" for word in words for file in walk.sounds(root / word)]
    missing = sorted(set(held) - set(found))
    if held and len(missing) == len(held):
        raise ManifestError(f"{str(root)!r}: none of the {len(held)} clips of its lists is there")
    notes = walk.tree.notes()
    noise = root / _NOISE
    left_out = len(Walk(root, link_roots).sounds(noise)) if noise.is_dir() else 0
    rows = (
        Row(0, path, [path.split("/", 1)[0]], split=held[path][0] if path in held else "train")
        for path in found
    )
    if left_out:
        notes.insert(0, f"{_NOISE} is left out, files in it: {left_out}")
    further = [os.fspath(place) for place in link_roots]
    manifest = collect(
        rows, root, root, classes=classes, aliases=aliases, notes=notes, link_roots=further
    )
    return manifest.with_missing(missing)


def _listed(file: Path) -> Iterator[tuple[int, str]]:
    check_size(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file}: is not UTF-8 text: {error}") from error
    for line, text in enumerate(lines, start=1):
        path = text.strip()
        if not path:
            continue
        check_path(path, f"{file}, line {line}")
        if path.count("/") != 1:
            raise ManifestError(f"{file}, line {line}: {path!r:.200}: expected word/clip.wav")
        yield line, path
