"""From a path to clips: which of the known layouts lies there, and the reader for it.

Every command that takes data comes through here, so that a set that trains can also be evaluated,
prepared and checked.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..audio import SUFFIXES
from ..config import AudioConfig, DataConfig, Layout
from ..labels import LabelSet, read_labels
from ..names import part_name
from .audioset import is_segments, read_segments
from .dataset import AudioDataset, ClipSet, Skip
from .deam import read_deam, tables_of
from .esc50 import is_esc50, read_esc50
from .file_store import CLASSES, MANIFEST
from .folders import is_speech_commands, read_folder, read_speech_commands
from .huggingface import HuggingFaceSet, is_huggingface
from .manifest import Manifest, ManifestError, unlabelled
from .manifest_files import read_manifest
from .shard_index import is_shards
from .shards import ShardSet
from .stratify import held_count, stratify

_log = logging.getLogger("ast_fast.data")

Data = Manifest | ShardSet | HuggingFaceSet

AS_FOUND = DataConfig()
DRAW = 2  # how `hold_out` draws; runs write it down
_ALL = "all"
_TRAIN = ("train", "training", "development", "dev")
_HELD = ("validation", "valid", "val", "dev", "evaluation", "eval", "test", "testing")
_TABLE = "class_labels_indices.csv"

Place = str | os.PathLike[str]


def detect_layout(path: Place) -> Layout:
    """What lies at a path, by names and first bytes.

    Raises:
        FileNotFoundError: nothing does.
        ManifestError: nothing known.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected a manifest or a folder")
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".csv":
            return "audioset" if is_segments(path) else "manifest"
        kinds: dict[str, Layout] = {
            **{".jsonl": "manifest", ".json": "original", ".tar": "shards"},
            **{".parquet": "huggingface", ".arrow": "huggingface"},
        }
        if suffix in kinds:
            return kinds[suffix]
        hint = " (a single sound has no label)" if suffix in SUFFIXES else ""
        raise ManifestError(
            f"{path}: suffix {suffix!r}{hint}: expected .csv, .jsonl, .json, .tar, .parquet or .arrow"
        )
    if (path / MANIFEST).is_file():
        return "manifest"
    if is_shards(path):
        return "shards"
    if is_huggingface(path):
        return "huggingface"
    if is_esc50(path):
        return "esc50"
    if is_speech_commands(path):
        return "speechcommands"
    return "deam" if tables_of(path) else "folders"


def read_data(
    path: Place,
    root: Place | None = None,
    classes: Sequence[str] | None = None,
    labels: LabelSet | None = None,
    how: DataConfig = AS_FOUND,
    *,
    leave_out_missing: bool = False,
    aliases: Mapping[str, int] | None = None,
) -> Data:
    """Clips and their labels, or numbers to predict, from any known layout.

    Args:
        path: manifest, list, folder, shards or dataset.
        root: folder that the paths of a list start from, by default the list's own; and of a folder,
            one that links in it may lead to.
        classes: class names in order; by default those that the data name.
        labels: a table of classes, instead of `classes`; its mids are names of them too.
        how: layout, columns, and `split`: the part to read. `fold` is for `read_parts`.
        leave_out_missing: leave files out that are listed and not there, and list them, rather than
            refuse. AudioSet's lists and Speech Commands always do.
        aliases: further names of classes, with their indices.

    Raises:
        ManifestError: the data are not as the layout says; names the file and the line.
        FileNotFoundError: there is nothing at the path.
        ValueError: an option does not go with the layout.
    """
    path, root = Path(path), None if root is None else Path(root)
    layout = detect_layout(path) if how.layout == "auto" else how.layout
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected the layout {layout}")
    if layout == "manifest" and path.is_dir() and (path / MANIFEST).is_file():
        path = path / MANIFEST
    _check_options(layout, path, how)
    beside = {"audioset": _TABLE, "original": _TABLE, "manifest": CLASSES}.get(layout)
    if beside is not None and labels is None and classes is None:
        table = path.parent / beside
        labels = read_labels(table) if table.is_file() else None
    if labels is not None:
        classes = labels.names
        aliases = {mid: index for index, mid in enumerate(labels.mids) if mid not in labels.names}
    data = _read(layout, path, root, classes, dict(aliases or {}), how, leave_out_missing)
    if data.values is not None and classes is not None and tuple(classes) != data.classes:
        raise ManifestError(
            f"{path}: holds the numbers {', '.join(data.classes)}: expected "
            f"{', '.join(classes[:5])}{'...' if len(classes) > 5 else ''}, as many and as named"
        )
    return data if how.split in (None, _ALL) else _part(data, path, str(how.split))


def _read(
    layout: Layout,
    path: Path,
    root: Path | None,
    classes: Sequence[str] | None,
    aliases: dict[str, int],
    how: DataConfig,
    leave_out_missing: bool,
) -> Data:
    links = () if root is None else (root,)
    if layout in ("manifest", "original"):
        return read_manifest(
            path,
            root=root,
            classes=None if how.values else classes,
            aliases=aliases,
            values=how.values,
            leave_out_missing=leave_out_missing,
        )
    if layout == "audioset":
        return read_segments(path, root=root, classes=classes, aliases=aliases)
    if layout == "esc50":
        return read_esc50(
            path, classes=classes, aliases=aliases, leave_out_missing=leave_out_missing
        )
    if layout == "speechcommands":
        return read_speech_commands(path, classes=classes, aliases=aliases, link_roots=links)
    if layout == "deam":
        return read_deam(path, values=how.values, leave_out_missing=leave_out_missing)
    if layout == "huggingface":
        return HuggingFaceSet(
            path,
            audio_column=how.audio_column,
            label_column=how.label_column,
            values=how.values,
            classes=None if how.values else classes,
            aliases=aliases,
            root=root,
        )
    if layout == "shards":
        return _with_labels(ShardSet(path, classes=classes, aliases=aliases), path)
    return read_folder(path, classes=classes, aliases=aliases, link_roots=links)


def _with_labels(shards: ShardSet, path: Path) -> ShardSet:
    """The clips whose labels are told; those that are damaged have lost theirs, others must have them."""
    if shards.values is not None:
        return shards
    bare = sorted(shards.untold)
    none = sum(not label for label in shards.labels) - len(bare)
    notes = (unlabelled(none),) if none and none < len(shards) else ()
    if not bare:
        shards.notes = notes
        return shards
    reasons = []
    for number in bare:
        found = shards[number]
        if not isinstance(found, Skip):
            raise ManifestError(
                f"{path}: {shards.name(number)} has no label: expected .json, .cls or .txt beside its "
                "sound"
            )
        reasons += found.report.notes
    if len(bare) == len(shards):
        raise ManifestError(f"{path}: holds no clip that can be read: {reasons[0]}")
    gone = set(bare)
    shards = shards.select([n for n in range(len(shards)) if n not in gone])
    shards.notes = (f"{len(bare)} damaged clips are left out: {reasons[0]}", *notes)
    return shards


_TAKES = {
    "values": ("manifest", "deam", "huggingface"),
    "audio_column": ("huggingface",),
    "label_column": ("huggingface",),
}


def _check_options(layout: Layout, path: Path, how: DataConfig) -> None:
    # a root is taken everywhere: training and evaluation data share it, and one may be a folder
    for name, layouts in _TAKES.items():
        given = getattr(how, name)
        if given and layout not in layouts:
            raise ValueError(
                f"{name}={given!r} does not go with the layout {layout} of {str(path)!r}: "
                f"expected it with {', '.join(layouts)}"
            )
    wants_folder = layout in ("esc50", "speechcommands", "deam", "folders")
    wants_file = layout in ("manifest", "original", "audioset")
    if (wants_folder and not path.is_dir()) or (wants_file and not path.is_file()):
        kind = "a folder" if wants_folder else "a file"
        raise ValueError(f"layout={layout!r}: {str(path)!r}: expected {kind}")


def read_parts(
    path: Place,
    root: Place | None = None,
    labels: LabelSet | None = None,
    how: DataConfig = AS_FOUND,
    *,
    holdout: float = 0.0,
    seed: int = 0,
    draw: int = DRAW,
) -> tuple[Data, Data | None]:
    """What to train on and what to evaluate on.

    With `how.fold`, that fold is for evaluation and the rest for training. Data in parts are trained on
    their part `train` and evaluated on their validation part, or the test part if there is no other.
    With `how.split`, and for data without parts, a share is held out.

    Args:
        path: see `read_data`.
        root: see `read_data`.
        labels: see `read_data`.
        how: see `read_data`.
        holdout: share of the clips to evaluate on where the data do not say which; 0 for none.
        seed: of the draw.
        draw: see `hold_out`.

    Raises:
        ManifestError: see `read_data`; or the data have folds, and none was chosen.
        ValueError: the share is impossible.
    """
    if how.split is not None and how.fold is not None:
        raise ValueError(f"fold={how.fold} and split={how.split!r}: expected one of them")
    path = Path(path)
    data = read_data(path, root, None, labels, how)
    if how.fold is not None:
        held = _part(data, path, str(how.fold))
        rest = [place for place, name in enumerate(data.splits or ()) if name != str(how.fold)]
        if not rest:
            raise ManifestError(f"{path}: all clips are in fold {how.fold}: nothing to train on")
        return data.select(rest), held
    if how.split is None and data.splits is not None:
        names = sorted(set(data.splits))
        train = next((name for name in _TRAIN if name in names), None)
        if train is None:
            raise ManifestError(
                f"{path}: its clips are in the parts {', '.join(names[:12])}: choose the fold to "
                "evaluate on (fold), a part to train on (split), or split 'all' for every clip"
            )
        chosen = next((name for name in _HELD if name in names and name != train), None)
        kept = _part(data, path, train)
        others = [name for name in names if name not in (*_TRAIN, *_HELD)]
        if others:
            count = sum(name in others for name in data.splits)
            _log.warning(
                "%s: %d clips are in parts that are not used: %s",
                path,
                count,
                ", ".join(others[:12]),
            )
        if chosen is not None:
            return kept, _part(data, path, chosen)
        data = kept
    return hold_out(data, holdout, seed, draw)


def _part(data: Data, path: Path, name: str) -> Data:
    name = part_name(name)
    if data.splits is None:
        raise ManifestError(
            f"{path}: its clips are in no parts: leave out fold and split, or add a column 'split'"
        )
    places = [place for place, part in enumerate(data.splits) if part == name]
    if not places:
        names = ", ".join(sorted(set(data.splits))[:12])
        raise ManifestError(f"{path}: no clip is in the part {name!r}: it has {names}")
    return data.select(places)


def hold_out(data: Data, share: float, seed: int, draw: int = DRAW) -> tuple[Data, Data | None]:
    """Training and evaluation part: the share is of all clips, and every class has its share of them.

    See `stratify`. The draw follows the seed, the clips' paths and the names of their classes: neither
    their order nor the order of the classes changes it. A file that is listed twice stays on one side.

    Args:
        data: the clips.
        share: 0 for none to evaluate on.
        seed: of the draw.
        draw: 1 draws as runs did before they kept their split, within each set of labels by itself.

    Raises:
        ValueError: the share is impossible, or leaves nothing on one side.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"holdout={share}: expected 0 (no evaluation) to below 1")
    if share == 0.0:
        return data, None
    if draw == 1:
        held = _drawn_within_label_sets(data.labels, share, seed)
        held_count(len(data), share)
    else:
        order = sorted(range(len(data.classes)), key=data.classes.__getitem__)
        rank = {number: place for place, number in enumerate(order)}
        sets = {labels: tuple(rank[label] for label in labels) for labels in set(data.labels)}
        # clips of shards and tables are known by their places
        paths = data.paths if isinstance(data, Manifest) else None
        twice = paths is not None and len(set(paths)) < len(paths)
        labels = [sets[labels] for labels in data.labels]
        held = stratify(labels, share, seed, paths, paths if twice else None)
    if not held or len(held) == len(data):
        raise ValueError(
            f"holdout={share} of {len(data)} clips leaves none on one side: give --eval-data, another "
            "share, or --holdout 0"
        )
    out = set(held)
    kept = [index for index in range(len(data)) if index not in out]
    return data.select(kept), data.select(held)


def _drawn_within_label_sets(
    labels: Sequence[tuple[int, ...]], share: float, seed: int
) -> list[int]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, clip in enumerate(labels):
        groups.setdefault(clip, []).append(index)
    rng = random.Random(seed)
    held: list[int] = []
    for indices in groups.values():
        held += rng.sample(indices, round(share * len(indices)))
    return sorted(held)


def missing_classes(data: Data, held: Data | None) -> list[str]:
    """Which classes are on one side only, a line for each side.

    Args:
        data: trained on.
        held: evaluated on.
    """
    if held is None or data.values is not None:
        return []
    names = data.classes
    learnt, tried = (
        {names[label] for labels in set(part.labels) for label in labels} for part in (data, held)
    )
    notes = []
    for purpose, lack in (("evaluate", sorted(learnt - tried)), ("train", sorted(tried - learnt))):
        if lack:
            some = ", ".join(map(repr, lack[:5])) + ("..." if len(lack) > 5 else "")
            notes.append(f"no clip to {purpose} on of {len(lack)} of {len(names)} classes: {some}")
    return notes


def dataset_of(data: Data, audio: AudioConfig) -> ClipSet:
    """The clips as a dataset.

    Args:
        data: from `read_data`.
        audio: how to read them; in float32 only where a file holds more than 16 bits, which takes half
            the memory and gives the same features to the bit.
    """
    if audio.dtype == "float32":
        audio = audio.replace(dtype="auto")
    return AudioDataset(data, audio) if isinstance(data, Manifest) else data.read_as(audio)


def reading_notes(data: Data) -> list[str]:
    """What reading a list chose, left out or did not find, a line each."""
    notes = list(getattr(data, "notes", ()))
    missing = getattr(data, "missing", ())
    if missing:
        count = len(missing) + len(data)
        some = ", ".join(map(repr, missing[:3])) + ("..." if len(missing) > 3 else "")
        notes.insert(0, f"{len(missing)} of {count} listed clips are not there: {some}")
    return notes
