"""Sets that folders describe: one per class, and Speech Commands as it is distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .manifest import Manifest, ManifestError, Row, audio_paths, check_path, check_size, collect

# names that folders of parts go by
SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
)
_LISTS = {"validation_list.txt": "validation", "testing_list.txt": "test"}
_NOISE = "_background_noise_"


def read_folder(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
) -> Manifest:
    """A folder per class: `root/<class>/**/<clip>`, or `root/<part>/<class>/**/<clip>`.

    Parts are folders named train, validation, test and the like, if there are no others. Links and
    hidden files are left out.

    Args:
        root: the folder.
        classes: class names in order; by default the folders' names, sorted.
        aliases: further names of classes, with their indices.

    Raises:
        ManifestError: there are no classes or no audio files.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"{str(root)!r} is not a folder")
    names = _folders(root)
    if not names:
        raise ManifestError(f"{str(root)!r} has no subfolders: expected one folder per class")
    places = [(name, name, "") for name in names]
    if SPLIT_NAMES.issuperset(name.lower() for name in names):
        parts = [(part, name) for part in names for name in _folders(root / part)]
        # folders of sound are classes, whatever they are called
        if parts and not any(_has_files(root / part) for part in names):
            places = [(f"{part}/{name}", name, part.lower()) for part, name in parts]
    rows = (
        Row(0, f"{place}/{file}", [name], split=part)
        for place, name, part in places
        for file in audio_paths(root / place)
    )
    return collect(rows, root, root, classes=classes, aliases=aliases)


def _folders(place: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(place)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    )


def _has_files(place: Path) -> bool:
    return any(entry.is_file() and entry.name[0] != "." for entry in os.scandir(place))


def is_speech_commands(root: Path) -> bool:
    """Whether a folder looks like Speech Commands: its two lists lie there."""
    return all((root / name).is_file() for name in _LISTS)


def read_speech_commands(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
) -> Manifest:
    """Speech Commands (v1 or v2) as unpacked: a folder per word, and lists of held-out clips.

    Clips are in the parts train, validation (`validation_list.txt`) and test
    (`testing_list.txt`). `_background_noise_` is left out. Version 2 has 35 words.

    Args:
        root: the unpacked folder.
        classes: words in order; by default sorted.
        aliases: further names of classes, with their indices.

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
    words = [name for name in _folders(root) if name != _NOISE]
    found = [f"{word}/{file}" for word in words for file in audio_paths(root / word)]
    missing = sorted(set(held) - set(found))
    if held and len(missing) == len(held):
        raise ManifestError(f"{str(root)!r}: none of the {len(held)} clips of its lists is there")
    left_out = len(audio_paths(root / _NOISE)) if (root / _NOISE).is_dir() else 0
    rows = (
        Row(0, path, [path.split("/", 1)[0]], split=held[path][0] if path in held else "train")
        for path in found
    )
    notes = [f"{_NOISE} is left out, files in it: {left_out}"] if left_out else []
    manifest = collect(rows, root, root, classes=classes, aliases=aliases, notes=notes)
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
