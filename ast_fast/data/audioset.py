"""AudioSet's segment lists (balanced_train_segments.csv and its like) with files that are here.

The lists name pieces of videos, which everybody fetches for himself: some are gone, and files are named
in several ways. A file is taken for a piece if its name, without suffix, is the video's id, with or
without a "Y" before it, alone or followed by the start, or start and end, of the piece in seconds or
milliseconds: `--PJHxphWEs.flac`, `Y--PJHxphWEs.wav`, `--PJHxphWEs_30.wav`,
`--PJHxphWEs_30000_40000.flac`, `Y--PJHxphWEs_30.000-40.000.wav`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .manifest import Manifest, ManifestError, Row, collect, csv_cells
from .tree import Walk

_ID_CHARS = 11
_ID = re.compile(rf"[A-Za-z0-9_-]{{{_ID_CHARS}}}")
_MID = re.compile(r"/[a-z]/[A-Za-z0-9_]{1,32}")
_MAX_SECONDS = 1e6


def is_segments(path: Path) -> bool:
    """Whether a file looks like a list of segments: it begins with a comment."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"#")


def read_segments(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    aliases: Mapping[str, int] | None = None,
) -> Manifest:
    """Pieces of an AudioSet list whose files are here; `missing` has the others.

    Args:
        path: lines of `YTID, start_seconds, end_seconds, "mid,mid"`; those that begin with "#" are
            comments.
        root: folder with the files, at any depth; the list's own folder by default.
        classes: class names in order; by default the mids of the pieces, sorted.
        aliases: further names of classes (the mids), with their indices.

    Raises:
        ManifestError: a line is wrong, or no file is here.
        FileNotFoundError: there is no such list.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if not root.is_dir():
        raise ManifestError(f"root {str(root)!r} is not a folder")
    files: dict[str, str] = {}
    twice: list[str] = []
    bounded: set[str] = set()  # ids of which a file's name says more: of two millions, mostly none
    walk = Walk(root)
    for file in walk.sounds(root):
        stem = file.rpartition("/")[2].rpartition(".")[0]
        if files.setdefault(stem, file) is not file:
            twice.append(file)
        if len(stem) > _ID_CHARS + 1:  # more than an id with a "Y"
            bounded.update((stem[:_ID_CHARS], stem[1 : _ID_CHARS + 1]))
    missing: list[str] = []
    used: dict[str, int] = {}

    def rows() -> Iterator[Row]:
        for line, video, start, end, labels in _segments(path):
            names = file_names(video, start, end) if video in bounded else (video, f"Y{video}")
            stem = next((name for name in names if name in files), None)
            if stem is None:
                missing.append(f"{video}_{start:g}")
                continue
            if stem in used:
                raise ManifestError(
                    f"{path}, line {line}: {files[stem]!r} is the file of line {used[stem]} already: "
                    f"name files with their start, as {video}_{start:g}"
                )
            used[stem] = line
            yield Row(line, files[stem], labels, f"{video}_{start:g}")

    taken = {file.rpartition("/")[2].rpartition(".")[0] for file in twice}
    notes = (
        [f"{len(taken)} names occur twice, the first of each is used: {twice[0]!r} is not"]
        if twice
        else []
    )
    walk.tree.others.clear()  # of a folder that holds lists and other things too
    notes += walk.tree.notes()
    try:
        manifest = collect(rows(), path, root, classes=classes, aliases=aliases, notes=notes)
    except ManifestError as error:
        if missing and not used:
            raise ManifestError(
                f"{path}: none of its {len(missing)} pieces is under {str(root)!r} (looked for "
                f"{missing[0].rpartition('_')[0]}.wav, .flac and the like): give the folder as root"
            ) from error
        raise
    return manifest.with_missing(missing)


def file_names(video: str, start: float, end: float) -> Iterator[str]:
    """Names that the file of a piece goes by, without suffix, likeliest first."""
    bounds = [
        tuple(form(second) for second in (start, end))
        for form in (
            lambda second: f"{second:g}",
            lambda second: f"{second:.3f}",
            lambda second: f"{round(second * 1000)}",
            lambda second: f"{second:.1f}",
            lambda second: f"{int(second)}",
        )
    ]
    for prefix in ("", "Y"):
        name = prefix + video
        # with the start first: a file of the bare id could be another piece of the video
        for first, last in bounds:
            yield f"{name}_{first}_{last}"
            yield f"{name}_{first}-{last}"
            yield f"{name}_{first}"
    yield video
    yield "Y" + video


def _segments(path: Path) -> Iterator[tuple[int, str, float, float, list[str]]]:
    """Line, id, start, end and mids of each piece."""
    for line, cells in csv_cells(path, skip_spaces=True):
        if cells[0].startswith("#"):
            continue
        where = f"{path}, line {line}"
        if len(cells) != 4:
            raise ManifestError(
                f'{where}: {len(cells)} fields: expected YTID, start_seconds, end_seconds, "mid,mid"'
            )
        video, begin, finish, mids = (cell.strip() for cell in cells)
        if not _ID.fullmatch(video):
            raise ManifestError(f"{where}: YTID {video!r:.80}: expected 11 letters, digits, - or _")
        try:
            start, end = float(begin), float(finish)
        except ValueError:
            start, end = 0.0, 0.0
        if not 0 <= start < end < _MAX_SECONDS:
            raise ManifestError(
                f"{where}: from {begin!r:.40} to {finish!r:.40}: expected seconds, start below end"
            )
        labels = [mid.strip() for mid in mids.split(",")]
        wrong = [mid for mid in labels if not _MID.fullmatch(mid)]
        if wrong:
            raise ManifestError(f"{where}: label {wrong[0]!r:.80}: expected mids such as /m/09x0r")
        yield line, video, start, end, labels
