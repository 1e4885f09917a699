"""Hugging Face datasets with sound, saved and opened by the datasets library, decoded by ours."""

import io

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import sample_sets
from ast_fast.config import AudioConfig, DataConfig
from ast_fast.data import (
    BatchSampler,
    Clip,
    Feeder,
    HuggingFaceSet,
    ManifestError,
    Skip,
    dataset_of,
    detect_layout,
    read_data,
    read_parts,
)

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Parquet is unpacked into the library's cache: not into the user's."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def made():
    return sample_sets.make_huggingface(12, seconds=0.3)


def expected(made, part):
    """Samples and labels as soundfile and the library itself give them."""
    rows = made[part]
    waves = [sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")[0] for row in rows]
    return waves, [(row["label"],) for row in rows]


def saved(made, folder, form):
    if form == "disk":
        made.save_to_disk(str(folder))
    else:
        folder.mkdir()
        for part, rows in made.items():
            half = len(rows) // 2
            for number, some in enumerate((range(half), range(half, len(rows)))):
                rows.select(some).to_parquet(str(folder / f"{part}-{number:05d}-of-00002.parquet"))
    return folder


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_saved_datasets_give_their_sound_and_labels(made, tmp_path, form):
    folder = saved(made, tmp_path / "d", form)
    assert detect_layout(folder) == "huggingface"
    train, held = read_parts(folder)
    assert train.classes == sample_sets.CATEGORIES == held.classes
    for part, data in (("train", train), ("test", held)):
        waves, labels = expected(made, part)
        dataset = dataset_of(data, AudioConfig())
        assert data.labels == labels and len(data) == len(waves) and set(data.splits) == {part}
        for index, wave in enumerate(waves):
            clip = dataset[index]
            assert clip.wave.dtype == torch.int16 and np.array_equal(clip.wave.numpy(), wave)
    whole = read_data(folder)
    assert len(whole) == 12 and len(read_data(folder, how=DataConfig(split="test"))) == 3


def test_one_part_and_one_file_are_datasets_too(made, tmp_path):
    made["train"].save_to_disk(str(tmp_path / "one"))
    made["train"].to_parquet(str(tmp_path / "some.parquet"))
    arrow = next((tmp_path / "one").glob("*.arrow"))
    for path in (tmp_path / "one", tmp_path / "some.parquet", arrow):
        data = read_data(path)
        assert len(data) == 9 and data.splits is None and isinstance(data[0], Clip)


def test_workers_read_the_same_from_arrow(made, tmp_path):
    data = read_data(saved(made, tmp_path / "d", "disk"))
    batches = []
    for workers in (0, 2):
        with Feeder(data, BatchSampler(12, 5, seed=2), num_workers=workers) as feeder:
            batches.append([fed.batch for fed in feeder])
    for one, two in zip(*batches, strict=True):
        assert torch.equal(one.wave, two.wave) and torch.equal(one.targets, two.targets)
        assert torch.equal(one.indices, two.indices)


def table(features=None, **columns):
    made = datasets.Dataset.from_dict(columns, features)
    return made.cast_column("audio", datasets.Audio(decode=False))


def sounds(count, path=None):
    file = io.BytesIO()
    sf.write(file, np.zeros(800), 16000, format="WAV")
    return [{"bytes": file.getvalue(), "path": path or f"{i}.wav"} for i in range(count)]


def test_labels_may_be_texts_lists_and_numbers():
    text = HuggingFaceSet(table(audio=sounds(3), category=["b", "a", "b"]))
    assert text.classes == ("a", "b") and text.labels == [(1,), (0,), (1,)]
    several = HuggingFaceSet(table(audio=sounds(2), labels=[["x", "y"], ["y"]]))
    assert several.labels == [(0, 1), (1,)]
    features = datasets.Features(
        audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        tags=datasets.List(datasets.ClassLabel(names=["p", "q", "r"])),
    )
    listed = HuggingFaceSet(table(features, audio=sounds(2), tags=[[2], [0, 1]]))
    assert listed.classes == ("p", "q", "r") and listed.labels == [(2,), (0, 1)]
    numbers = HuggingFaceSet(table(audio=sounds(3), label=[10, 9, 10]))
    assert numbers.classes == ("9", "10") and numbers.labels == [(1,), (0,), (1,)]
    ours = HuggingFaceSet(
        table(audio=sounds(2), mid=["/m/x", "Dog"]),
        label_column="mid",
        classes=("Cat", "Dog"),
        aliases={"/m/x": 0},
    )
    assert ours.labels == [(0,), (1,)]


def test_numbers_are_targets_and_folds_are_parts():
    data = HuggingFaceSet(
        table(audio=sounds(3), valence=[1, 2, 3], arousal=[0.5, 0.25, 4], fold=[1, 2, 1]),
        values=("arousal", "valence"),
    )
    assert data.values.tolist() == [[0.5, 1.0], [0.25, 2.0], [4.0, 3.0]]
    assert data.splits == ["1", "2", "1"] and data.classes == ("arousal", "valence")
    some = data.select([2, 0]).read_as(AudioConfig(sample_rate_hz=8000))
    assert some.values.tolist() == [[4.0, 3.0], [0.5, 1.0]] and some.splits == ["1", "1"]
    assert some[0].length == 400 and some.name(0).endswith("row 2")


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"label": ["a", None]}, {}, "row 1: label is None: expected labels"),
        ({"label": [["a"], None]}, {}, "row 1: label is None: expected labels"),
        ({"label": [[], []]}, {}, "no row has a label in label"),
        ({"label": ["a", "b"]}, {"classes": ("a",)}, "row 1: label 'b' is not among the 1 classes"),
        ({"text": ["a", "b"]}, {}, "no column of labels is evident among audio, text"),
        ({"label": ["a", "b"]}, {"label_column": "x"}, "has no column 'x'; it has audio, label"),
        ({"label": ["a", "b"]}, {"audio_column": "label"}, "'label' is no column of audio"),
        ({"x": [1.0, float("nan")]}, {"values": ("x",)}, "row 1: x is nan: expected a finite"),
        ({"x": [1.0, 2.0]}, {"values": ("y",)}, "has no column 'y'"),
    ],
)
def test_wrong_columns_are_named(columns, options, says):
    with pytest.raises(ManifestError, match=says):
        HuggingFaceSet(table(audio=sounds(2), **columns), **options)


def test_wrong_sources_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ManifestError, match=r"x\.parquet: cannot be opened as a dataset"):
        read_data(tmp_path / "x.parquet")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "state.json").write_text("{}")
    with pytest.raises(ManifestError, match="cannot be opened as a dataset"):
        read_data(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        HuggingFaceSet(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="is a list: expected a Dataset"):
        HuggingFaceSet([1, 2])
    with pytest.raises(ManifestError, match="has 0 columns of audio"):
        HuggingFaceSet(datasets.Dataset.from_dict({"label": ["a"]}))


def test_bad_sound_is_skipped_with_its_row_and_paths_stay_in_the_root(tmp_path):
    (tmp_path / "in").mkdir()
    for place in ("in", "."):
        sf.write(tmp_path / place / "a.wav", np.zeros(800), 16000)
    audio = [
        {"bytes": b"no sound", "path": "0.wav"},
        {"bytes": None, "path": "a.wav"},
        {"bytes": None, "path": "../a.wav"},
        {"bytes": None, "path": str(tmp_path / "in" / "a.wav")},
        {"bytes": None, "path": None},
    ]
    made = table(audio=audio, label=["x"] * 5)
    within = HuggingFaceSet(made, root=tmp_path / "in")
    kinds = [
        "skip" if isinstance(item, Skip) else item.length
        for item in map(within.__getitem__, range(5))
    ]
    assert kinds == ["skip", 800, "skip", 800, "skip"]
    assert "dataset: row 0: cannot be decoded" in within[0].report.notes[0]
    assert "not inside the root" in within[2].report.notes[0]
    assert "give the folder that holds it as root" in HuggingFaceSet(made)[1].report.notes[0]
