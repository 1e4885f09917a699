"""A Hugging Face dataset with an audio column, read by our own decoder.

The `datasets` library opens it (`save_to_disk`, parquet or arrow) and hands out each file's bytes; what
it would decode with is not needed. Clips keep their order, and the parts of a DatasetDict their names.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .._optional import require_package
from ..audio import AudioDecodeError, AudioError, AudioReport, Source, load
from ..config import AudioConfig
from ..names import in_order, part_name, same_name
from .dataset import Clip, Skip
from .manifest import ManifestError, finite, unlabelled

_LABEL_COLUMNS = ("labels", "label", "human_labels", "category", "class", "target")
_SPLIT_COLUMNS = ("split", "fold")
_FILES = (".parquet", ".arrow")
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


def is_huggingface(path: Path) -> bool:
    """Whether a path holds a dataset of the `datasets` library, or tables in its forms."""
    if path.is_file():
        return path.suffix.lower() in _FILES
    return any((path / name).is_file() for name in _SAVED) or any(
        entry.name.lower().endswith(".parquet") for entry in os.scandir(path)
    )


class HuggingFaceSet(Dataset[Any]):
    """The clips of a dataset of the `datasets` library.

    Args:
        source: folder of `save_to_disk`, a .parquet or .arrow file, a folder of .parquet files (those of
            one part begin with its name, as train-00000-of-00002.parquet), or an opened Dataset or
            DatasetDict.
        audio: how to read clips; by default int16 where a clip holds nothing finer.
        audio_column: by default the only column of audio.
        label_column: by default `labels`, `label` or the like, or else the only column of class labels.
        values: columns of numbers to predict, instead of labels.
        classes: class names in order; by default the column's own, or the texts found, sorted.
        aliases: further names of classes, with their indices.
        root: folder in which files lie that the dataset only names; it must hold them.
        strict: raise the AudioError of a bad clip rather than skip and count it.

    Raises:
        ManifestError: there is no such column, or a label in it is unknown (named by its row).
        MissingPackageError: `datasets` is not installed.
    """

    def __init__(
        self,
        source: Any,
        audio: AudioConfig | None = None,
        *,
        audio_column: str | None = None,
        label_column: str | None = None,
        values: Sequence[str] = (),
        classes: Sequence[str] | None = None,
        aliases: dict[str, int] | None = None,
        root: str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> None:
        library = require_package("datasets", "reading a Hugging Face dataset", "datasets")
        self.source = str(source) if isinstance(source, (str, os.PathLike)) else "dataset"
        rows, parts = _opened(library, source, self.source)
        self.strict = strict
        self._root = None if root is None else os.path.realpath(root)
        column = _audio_column(library, rows, audio_column, self.source)
        self._audio_column = column
        # undecoded: the bytes of the file, or its path
        self._rows = rows.cast_column(column, library.Audio(decode=False)).select_columns([column])
        self.splits: list[str] | None = parts
        if parts is None:
            named = next((name for name in _SPLIT_COLUMNS if name in rows.column_names), None)
            self.splits = None if named is None else [str(value) for value in rows[named]]
        if self.splits is not None:
            self.splits = list(map(part_name, self.splits))
        self.values: np.ndarray | None = None
        self.notes: tuple[str, ...] = ()  # what the reader has to say
        self.classes: tuple[str, ...]
        self.labels: list[tuple[int, ...]]
        if values:
            self.classes, self.labels = tuple(values), [()] * len(rows)
            self.values = _numbers(rows, values, self.source)
        else:
            name = _label_column(library, rows, label_column, self.source)
            self.classes, self.labels = _labels(library, rows, name, classes, aliases, self.source)
            bare = sum(not labels for labels in self.labels)
            self.notes = (unlabelled(bare),) if bare else ()
        self._indices = np.arange(len(rows))
        self._read_as(audio or AudioConfig(dtype="auto"))

    def _read_as(self, audio: AudioConfig) -> None:
        if audio.sample_rate_hz is None:
            raise ValueError("audio.sample_rate_hz is None: expected one rate for the whole set")
        self.audio, self.sample_rate_hz = audio, audio.sample_rate_hz

    def read_as(self, audio: AudioConfig) -> HuggingFaceSet:
        """The same clips, read as `audio` says."""
        same = copy.copy(self)
        same._read_as(audio)
        return same

    def select(self, indices: Sequence[int]) -> HuggingFaceSet:
        """Some of the clips, in the order given, with the same classes."""
        some = copy.copy(self)
        places = np.asarray(indices, np.int64)
        some._indices = self._indices[places]
        some.labels = [self.labels[i] for i in indices]
        some.splits = None if self.splits is None else [self.splits[i] for i in indices]
        some.values = None if self.values is None else self.values[places]
        return some

    def labelled(self, classes: Sequence[str], labels: Sequence[tuple[int, ...]]) -> HuggingFaceSet:
        """The same clips, their classes named and numbered otherwise."""
        same = copy.copy(self)
        same.classes, same.labels = tuple(classes), list(labels)
        return same

    def row_name(self, index: int) -> str:
        """What a clip is called in its set, wherever that lies."""
        return f"row {int(self._indices[index])}"

    def stored(self, index: int) -> memoryview | str:
        """The bytes of a clip's file, not copied where that can be done, or its path.

        Raises:
            AudioError: there is neither.
        """
        row = int(self._indices[index])
        table = self._rows.with_format("arrow")[row]
        content = table[self._audio_column].chunk(0)[0]
        held = content.get("bytes")
        if held is not None and held.is_valid:
            return memoryview(held.as_buffer())
        found = self._content(content.as_py(), self.name(index))
        return found if isinstance(found, str) else memoryview(bytes(found))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """How messages name a clip."""
        return f"{self.source}: row {int(self._indices[index])}"

    def __getitem__(self, index: int) -> Clip | Skip:
        index = range(len(self))[index]
        name = self.name(index)
        try:
            content = self._rows[int(self._indices[index])][self._audio_column]
            clip = load(self._content(content, name), self.audio, name)
        except AudioError as error:
            if self.strict:
                raise
            report = AudioReport()
            report.skip(error)
            return Skip(index, report)
        return Clip(clip.wave, self.labels[index], index, clip.report)

    def _content(self, content: Any, name: str) -> Source:
        if not content or (content.get("bytes") is None and not content.get("path")):
            raise AudioDecodeError(name, "holds neither bytes nor a path")
        if content.get("bytes") is not None:
            return bytes(content["bytes"])
        path = str(content["path"])
        if self._root is None:
            raise AudioDecodeError(
                name, f"only names a file, {path!r:.200}: give the folder that holds it as root"
            )
        real = os.path.realpath(os.path.join(self._root, path))  # noqa: PTH118
        if not real.startswith(self._root.rstrip(os.sep) + os.sep):
            raise AudioDecodeError(
                name, f"names {path!r:.200}, which is not inside the root {self._root!r}"
            )
        return real


def _opened(library: Any, source: Any, name: str) -> tuple[Any, list[str] | None]:
    """All rows as one Dataset, and the part of each."""
    if isinstance(source, (str, os.PathLike)):
        source = _from_path(library, Path(source), name)
    if isinstance(source, library.Dataset):
        if not len(source):
            raise ManifestError(f"{name}: holds no rows")
        return source, None
    if isinstance(source, library.DatasetDict):
        filled = {str(part): rows for part, rows in source.items() if len(rows)}
        if not filled:
            raise ManifestError(f"{name}: holds no rows")
        parts = [part for part, rows in filled.items() for _ in range(len(rows))]
        try:
            rows = library.concatenate_datasets(list(filled.values()))
        except ValueError as error:
            raise ManifestError(
                f"{name}: its parts {', '.join(filled)} have other columns: {error}"
            ) from error
        return rows, parts
    raise ManifestError(f"{name} is a {type(source).__name__}: expected a Dataset or a DatasetDict")


def _from_path(library: Any, path: Path, name: str) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{name!r} does not exist: expected a saved dataset or .parquet")
    try:
        if path.is_file():
            if path.suffix.lower() == ".arrow":
                return library.Dataset.from_file(str(path))
            return _parquet(library, [path])
        if any((path / saved).is_file() for saved in _SAVED):
            return library.load_from_disk(str(path))
        files: dict[str, list[Path]] = {}
        for file in sorted(path.glob("*.parquet")):
            files.setdefault(file.name.partition("-")[0] if "-" in file.name else "", []).append(
                file
            )
        if not files:
            raise ManifestError(f"{name}: holds neither a saved dataset nor .parquet files")
        tables = {part: _parquet(library, group) for part, group in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        # pyarrow's errors are among these
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{name}: cannot be opened as a dataset: {error}") from error
    return tables[""] if set(tables) == {""} else library.DatasetDict(tables)


def _parquet(library: Any, files: Sequence[Path]) -> Any:
    # the library keeps an uncompressed copy in its cache, which is mapped into memory
    return library.Dataset.from_parquet([str(file) for file in files])


def _audio_column(library: Any, rows: Any, wanted: str | None, name: str) -> str:
    kinds = {column: _is_audio(library, kind) for column, kind in rows.features.items()}
    if wanted is not None:
        if not kinds.get(wanted):
            held = ", ".join(f"{column!r}" for column in kinds)
            raise ManifestError(f"{name}: {wanted!r} is no column of audio; it has {held}")
        return wanted
    found = [column for column, fits in kinds.items() if fits]
    if len(found) != 1:
        held = ", ".join(found or kinds)
        raise ManifestError(
            f"{name}: has {len(found)} columns of audio (of {held}): name one as audio_column"
        )
    return found[0]


def _is_audio(library: Any, kind: Any) -> bool:
    """An Audio feature, or what one is stored as."""
    if isinstance(kind, library.Audio):
        return True
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _label_column(library: Any, rows: Any, wanted: str | None, name: str) -> str:
    names = list(rows.column_names)
    if wanted is not None:
        if wanted not in names:
            raise ManifestError(f"{name}: has no column {wanted!r}; it has {', '.join(names)}")
        return wanted
    for usual in _LABEL_COLUMNS:
        if usual in names:
            return usual
    kinds = [
        column
        for column, kind in rows.features.items()
        if isinstance(_element(kind), library.ClassLabel)
    ]
    if len(kinds) != 1:
        raise ManifestError(
            f"{name}: no column of labels is evident among {', '.join(names)}: name it as "
            "label_column, or number columns as values"
        )
    return kinds[0]


def _element(kind: Any) -> Any:
    """The feature of a list's elements; that of a plain column itself."""
    if isinstance(kind, list):
        return kind[0]
    return getattr(kind, "feature", kind)


def _labels(
    library: Any,
    rows: Any,
    column: str,
    classes: Sequence[str] | None,
    aliases: dict[str, int] | None,
    name: str,
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Class names, and the classes of each row."""
    kind = _element(rows.features[column])
    own = list(kind.names) if isinstance(kind, library.ClassLabel) else None
    texts: list[tuple[str, ...]] = []
    for row, value in enumerate(rows[column]):
        found = value if isinstance(value, (list, tuple)) else [value]
        if found == [""]:
            found = []
        # a list without any: a clip of no class; nothing at all is not known
        if any(type(label) not in (int, str) for label in found):
            raise ManifestError(f"{name}: row {row}: {column} is {value!r:.80}: expected labels")
        if own is not None:
            wrong = [n for n in found if not isinstance(n, int) or not 0 <= n < len(own)]
            if wrong:
                raise ManifestError(f"{name}: row {row}: {column} is {value!r:.80}: has no label")
            found = [own[number] for number in found]
        texts.append(tuple(dict.fromkeys(same_name(str(label)) for label in found)))
    if classes is None:
        every = {label for text in texts for label in text}
        classes = own or in_order(every)
        if not classes:
            raise ManifestError(f"{name}: no row has a label in {column}")
    known = {same_name(label): index for index, label in enumerate(classes)}
    known |= {same_name(label): index for label, index in (aliases or {}).items()}
    for row, text in enumerate(texts):
        unknown = [label for label in text if label not in known]
        if unknown:
            raise ManifestError(
                f"{name}: row {row}: label {unknown[0]!r} is not among the {len(classes)} classes"
            )
    return tuple(classes), [tuple(known[label] for label in text) for text in texts]


def _numbers(rows: Any, columns: Sequence[str], name: str) -> np.ndarray:
    absent = [column for column in columns if column not in rows.column_names]
    if absent:
        held = ", ".join(rows.column_names)
        raise ManifestError(f"{name}: has no column {absent[0]!r}; it has {held}")
    numbers = [
        [finite(value, column, f"{name}: row {row}") for row, value in enumerate(rows[column])]
        for column in columns
    ]
    return np.asarray(numbers, np.float32).T.copy()
