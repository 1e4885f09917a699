"""Data sets laid out as they are distributed: what is read from them, and what is refused and where."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile as sf
import torch
import webdataset

from ast_fast import sample_sets
from ast_fast.config import AudioConfig, DataConfig
from ast_fast.data import (
    BatchSampler,
    Clip,
    Feeder,
    ManifestError,
    ShardSet,
    balanced_weights,
    class_counts,
    dataset_of,
    detect_layout,
    read_data,
    read_folder,
    read_manifest,
    read_parts,
    read_segments,
    reading_notes,
    write_shards,
)
from ast_fast.data.audioset import file_names
from ast_fast.labels import read_labels


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    sample_sets.make_esc50(root / "esc50", clips=1)
    sample_sets.make_speech_commands(root / "speech")
    sample_sets.make_audioset(root / "audioset", seconds=1.0)
    sample_sets.make_original(root / "original")
    sample_sets.make_deam(root / "deam")
    return root


def readable(data, rate_hz=16000):
    """Every clip, read."""
    dataset = dataset_of(data, AudioConfig(sample_rate_hz=rate_hz))
    items = [dataset[index] for index in range(len(dataset))]
    assert all(isinstance(item, Clip) for item in items)
    return items


def by_path(manifest):
    return {
        path: tuple(manifest.classes[label] for label in labels)
        for path, labels in zip(manifest.paths, manifest.labels, strict=True)
    }


# ---- ESC-50


def test_esc50_has_its_categories_in_the_order_of_their_numbers(place):
    assert detect_layout(place / "esc50") == "esc50"
    data = read_data(place / "esc50")
    assert data.classes == sample_sets.CATEGORIES and len(data) == 20
    assert [item.length for item in readable(data)] == [5 * 16000] * 20
    for path, labels, split in zip(data.paths, data.labels, data.splits, strict=True):
        fold, _, _, target = path.removeprefix("audio/").removesuffix(".wav").split("-")
        assert labels == (int(target),) and split == fold


@pytest.mark.parametrize("fold", [1, 5])
def test_a_fold_is_evaluated_and_the_rest_trains(place, fold):
    train, held = read_parts(place / "esc50", how=DataConfig(fold=fold), holdout=0.1)
    assert len(train) == 16 and len(held) == 4
    assert set(held.splits) == {str(fold)} and not set(train.paths) & set(held.paths)
    assert sorted(train.paths + held.paths) == sorted(read_data(place / "esc50").paths)


def test_folds_want_a_choice(place):
    with pytest.raises(ManifestError, match=r"parts 1, 2, 3, 4, 5: choose the fold"):
        read_parts(place / "esc50", holdout=0.1)
    with pytest.raises(ManifestError, match=r"no clip is in the part '6': it has 1, 2, 3, 4, 5"):
        read_parts(place / "esc50", how=DataConfig(fold=6))
    train, held = read_parts(place / "esc50", how=DataConfig(split="all"), holdout=0.2)
    assert len(train) + len(held) == 20 and len(held) == 4
    with pytest.raises(ValueError, match="expected one of them"):
        read_parts(place / "esc50", how=DataConfig(fold=1, split="2"))
    with pytest.raises(ManifestError, match="in no parts"):
        read_parts(place / "original" / "train.json", how=DataConfig(fold=1))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1-1-A-0.wav,1,0", "line 3: 3 fields: expected 7"),
        ("1-1-A-0.wav,one,0,dog,False,1,A", "line 3: fold is 'one': expected a small number"),
        ("1-1-A-0.wav,1,-1,dog,False,1,A", "line 3: target is '-1'"),
        ("1-1-A-0.wav,1,3,dog,False,1,A", "line 3: target 3 is 'dog'"),
        ("1-1-A-0.wav,1,0,wolf,False,1,A", "line 3: target 0 is 'wolf': another line has it as"),
        ("../x.wav,1,0,dog,False,1,A", "line 3: filename '../x.wav': expected a name in audio/"),
        ("gone.wav,1,0,dog,False,1,A", r"line 3: there is no file 'audio/gone\.wav'"),
        ("1-100010-A-0.wav,1,0,dog,False,1,A", "line 3: id .* was already on line 2"),
    ],
)
def test_wrong_lines_of_esc50_are_named(place, tmp_path, line, says):
    meta = (place / "esc50" / "meta" / "esc50.csv").read_text().splitlines()
    good = next(row for row in meta if row.startswith("1-") and row.split(",")[2] == "0")
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    name = good.split(",")[0]
    (tmp_path / "audio" / name).write_bytes((place / "esc50" / "audio" / name).read_bytes())
    (tmp_path / "meta" / "esc50.csv").write_text(f"{meta[0]}\n{good}\n{line}\n")
    with pytest.raises(ManifestError, match=says):
        read_data(tmp_path)


def test_esc50_without_its_parts_is_refused(place, tmp_path):
    with pytest.raises(ManifestError, match=r"meta/esc50\.csv"):
        read_data(tmp_path, how=DataConfig(layout="esc50"))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("filename,fold,target\n")
    with pytest.raises(ManifestError, match="audio' is not there"):
        read_data(tmp_path)
    (tmp_path / "audio").mkdir()
    with pytest.raises(ManifestError, match="holds no clips"):
        read_data(tmp_path)


# ---- Speech Commands


def test_speech_commands_is_split_by_its_lists_and_noise_is_left_out(place):
    root = place / "speech"
    assert detect_layout(root) == "speechcommands"
    data = read_data(root)
    assert data.classes == sample_sets.WORDS and len(data) == 20
    assert not any("_background_noise_" in path for path in data.paths)
    listed = {
        part: set((root / f"{name}_list.txt").read_text().split())
        for part, name in (("validation", "validation"), ("test", "testing"))
    }
    for path, split in zip(data.paths, data.splits, strict=True):
        assert split == next((part for part, held in listed.items() if path in held), "train")
    train, held = read_parts(root)
    assert set(held.splits) == {"validation"} and set(held.paths) == listed["validation"]
    assert set(train.splits) == {"train"} and len(train) == 12
    test = read_data(root, how=DataConfig(split="test"))
    assert set(test.paths) == listed["test"] and test.classes == data.classes
    assert any("_background_noise_" in note for note in reading_notes(data))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bed/../../x.wav\n", r"testing_list.txt, line 1: path 'bed/\.\./\.\./x\.wav' leaves"),
        ("\n/etc/passwd\n", "testing_list.txt, line 2: path '/etc/passwd' is not relative"),
        ("a.wav\n", "line 1: 'a.wav': expected word/clip.wav"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_wrong_lists_of_speech_commands_are_named(tmp_path, text, says):
    sample_sets.make_speech_commands(tmp_path, clips=1, words=("bed",))
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "testing_list.txt").write_bytes(content)
    with pytest.raises(ManifestError, match=says):
        read_data(tmp_path)


def test_clips_listed_twice_or_gone_are_said(tmp_path):
    sample_sets.make_speech_commands(tmp_path, clips=5, words=("bed",))
    held = (tmp_path / "validation_list.txt").read_text().strip()
    (tmp_path / "testing_list.txt").write_text(f"bed/gone_nohash_0.wav\n{held}\n")
    with pytest.raises(ManifestError, match=r"line 2: .* is on line 1 of validation_list\.txt"):
        read_data(tmp_path)
    (tmp_path / "testing_list.txt").write_text("bed/gone_nohash_0.wav\n")
    data = read_data(tmp_path)
    assert data.missing == ("bed/gone_nohash_0.wav",)
    assert "1 of 6 listed clips are not there" in reading_notes(data)[0]
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(ManifestError, match=r"testing_list.txt' is not there"):
        read_data(tmp_path, how=DataConfig(layout="speechcommands"))


# ---- AudioSet

NAMINGS = (
    lambda video, start, end: f"{video}.wav",
    lambda video, start, end: f"sub/Y{video}.flac",
    lambda video, start, end: f"{video}_{start:g}.flac",
    lambda video, start, end: f"{video}_{round(1000 * start)}_{round(1000 * end)}.flac",
    lambda video, start, end: f"Y{video}_{start:.3f}_{end:.3f}.wav",
    lambda video, start, end: f"{video}_{start:.1f}-{end:.1f}.wav",
    lambda video, start, end: f"{video}_{start:g}-{end:g}.wav",
)


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: n("ID", 30.0, 40.0))
def test_segments_find_their_files_however_they_are_named(tmp_path, naming):
    path = sample_sets.make_audioset(tmp_path, clips=5, naming=naming, absent=2, seconds=0.1)
    assert detect_layout(path) == "audioset"
    data = read_data(path)
    assert len(data) == 3 and data.missing == ("--Pv000_x-Y_0", "--Pv001_x-Y_30")
    names = tuple(name for _, name in sample_sets.AUDIOSET_CLASSES)
    assert data.classes == names  # of the table beside the list
    assert set(by_path(data).values()) == {names[:1], (names[0], names[2]), (names[0], names[3])}
    assert data.lines == [6, 7, 8] and len(readable(data)) == 3
    (tmp_path / "class_labels_indices.csv").unlink()
    assert set(read_data(path).classes) == {mid for mid, _ in sample_sets.AUDIOSET_CLASSES[::1]} - {
        "/m/05zppz"
    }


def test_a_file_with_its_start_wins_over_a_bare_name():
    names = list(file_names("abcdefghijk", 30.0, 40.0))
    assert names.index("Yabcdefghijk_30") < names.index("abcdefghijk") and len(names) == 32
    assert len(set(file_names("abcdefghijk", 0.5, 10.25))) >= 20


def test_files_can_lie_elsewhere_and_copies_are_said(place, tmp_path):
    listing = tmp_path / "eval_segments.csv"
    listing.write_text((place / "audioset" / "balanced_train_segments.csv").read_text())
    data = read_data(listing, root=place / "audioset")
    assert len(data) == 7 and "/m/09x0r" in data.classes
    again = place / "audioset" / "audio" / "--Pv004_x-Y.wav"
    sf.write(again, np.zeros(100), 16000)
    notes = reading_notes(read_data(listing, root=place / "audioset"))
    again.unlink()
    assert any("1 names occur twice" in note and "--Pv004_x-Y.wav" in note for note in notes)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("abcdefghijk, 0.0, 10.0", "line 2: 3 fields: expected YTID"),
        ('short, 0.0, 10.0, "/m/09x0r"', "line 2: YTID 'short'"),
        ('../../../x/, 0.0, 10.0, "/m/09x0r"', "line 2: YTID '../../../x/'"),
        ('abcdefghijk, ten, 20, "/m/09x0r"', "line 2: from 'ten' to '20'"),
        ('abcdefghijk, 10, 0, "/m/09x0r"', "start below end"),
        ('abcdefghijk, nan, 10, "/m/09x0r"', "start below end"),
        ('abcdefghijk, 0, 10, "Speech"', "line 2: label 'Speech': expected mids"),
        ('abcdefghijk, 0, 10, "/m/09x0r', "unexpected end"),
        ('abcdefghijk, 0, 10, "/m/0dgw9r"', "line 2: label '/m/0dgw9r' is not among the 4 classes"),
        ('abcdefghijk, 5, 10, "/m/09x0r"\nabcdefghijk, 7, 12, "/m/09x0r"', "is the file of line 2"),
    ],
)
def test_wrong_lines_of_segments_are_named(place, tmp_path, line, says):
    sf.write(tmp_path / "abcdefghijk.wav", np.zeros(100), 16000)
    path = tmp_path / "list.csv"
    path.write_text(f"# YTID, start_seconds, end_seconds, positive_labels\n{line}\n")
    table = read_labels(place / "audioset" / "class_labels_indices.csv")
    with pytest.raises(ManifestError, match=says):
        read_data(path, labels=table)


def test_a_list_without_any_of_its_files_says_what_it_looked_for(place, tmp_path):
    (tmp_path / "empty").mkdir()
    listing = place / "audioset" / "balanced_train_segments.csv"
    with pytest.raises(ManifestError, match=r"none of its 8 pieces .*--Pv000_x-Y\.wav"):
        read_segments(listing, root=tmp_path / "empty")
    with pytest.raises(ManifestError, match="not a folder"):
        read_segments(listing, root=tmp_path / "nowhere")


# ---- the original's JSON


def test_the_originals_json_takes_absolute_paths_inside_the_root(place, tmp_path):
    path = place / "original" / "train.json"
    data = read_data(path)
    assert detect_layout(path) == "original" and len(readable(data)) == 8
    assert data.classes == sample_sets.CATEGORIES and data.labels[:2] == [(0,), (1,)]
    moved = tmp_path / "train.json"
    moved.write_text(path.read_text())
    with pytest.raises(ManifestError, match=r"line 1: .* is not relative to the root"):
        read_data(moved)
    assert read_data(moved, root=place / "original").paths == data.paths
    rows = json.loads(path.read_text())["data"]
    rows[1]["wav"] = str(place / "original" / ".." / "esc50" / "meta" / "esc50.csv")
    moved.write_text(json.dumps({"data": rows}))
    with pytest.raises(ManifestError, match=r"line 2: .* leaves its folder"):
        read_data(moved, root=place / "original")


# ---- folders


def test_folders_of_parts_are_told_from_folders_of_classes(place, tmp_path):
    clip = next((place / "speech" / "bed").glob("*.wav")).read_bytes()
    for name in ("train/cat/1.wav", "train/dog/2.wav", "val/dog/3.wav", "test/cat/4.wav"):
        (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(clip)
    data = read_data(tmp_path / "parts")
    assert data.classes == ("cat", "dog") and data.splits == ["test", "train", "train", "val"]
    train, held = read_parts(tmp_path / "parts")
    assert train.paths == ["train/cat/1.wav", "train/dog/2.wav"] and held.paths == ["val/dog/3.wav"]
    # beside others sound in them makes them classes
    for name in ("test/1.wav", "train/2.wav", "plane/3.wav"):
        (tmp_path / "vehicles" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vehicles" / name).write_bytes(clip)
    assert read_folder(tmp_path / "vehicles").classes == ("plane", "test", "train")
    # and so do folders of recordings in all of them
    for name in ("train/a/1.wav", "train/b/2.wav", "plane/c/3.wav"):
        (tmp_path / "sessions" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sessions" / name).write_bytes(clip)
    data = read_folder(tmp_path / "sessions")
    assert data.classes == ("plane", "train")
    assert data.notes == ("'train' are taken for classes, as others beside them hold sound",)


def laid_out(root, clip, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip)
    return root


def test_a_part_without_classes_is_no_class(place, tmp_path):
    clip = next((place / "speech" / "bed").glob("*.wav")).read_bytes()
    # as competitions hand sets out: what is to be told lies in one folder
    names = ["train/cat/1.wav", "train/dog/2.wav", "test/3.wav", "test/4.wav"]
    data = read_folder(laid_out(tmp_path / "told", clip, names))
    assert data.classes == ("cat", "dog") and data.paths == names[:2]
    assert "2 files of sound in 'test', in no folder of a class, are left out" in data.notes
    # a stray file makes no part a class
    names = [
        "test/cat/1.wav",
        "test/dog/2.wav",
        "train/cat/3.wav",
        "train/dog/4.wav",
        "train/5.wav",
    ]
    data = read_folder(laid_out(tmp_path / "stray", clip, names))
    assert data.classes == ("cat", "dog") and data.paths == names[:4]
    assert "1 files of sound in 'train', in no folder of a class, are left out" in data.notes
    for bare in (["train/1.wav", "test/2.wav"], ["Train/1.wav"]):
        with pytest.raises(ManifestError, match="hold no folders of classes"):
            read_folder(
                laid_out(tmp_path / bare[0].lower().replace("/", len(bare) * "-"), clip, bare)
            )
    for folds in (["fold1/1.wav", "Fold_2/2.wav"], ["fold1/cat/1.wav", "fold2/cat/2.wav"], ["train-a/1.wav", "test-a/2.wav"]):  # fmt: skip
        with pytest.raises(ManifestError, match="look like folds or parts of a set"):
            read_folder(laid_out(tmp_path / folds[0].replace("/", "-"), clip, folds))
    names = ["train/cat/1.wav", "extra/cat/2.wav"]
    with pytest.raises(ManifestError, match="as they hold the same folders, but 'extra'"):
        read_folder(laid_out(tmp_path / "extra", clip, names))
    beside = ["train/cat/1.wav", "train/dog/2.wav", "noise/3.wav"]
    with pytest.raises(
        ManifestError, match=r"'train' look like parts of a set, as they hold folders, but 'noise'"
    ):
        read_folder(laid_out(tmp_path / "beside", clip, beside))


# ---- numbers to predict


INFO_HEADER = "song_id,file_name,Artist,Song title,Genre,Mediaeval 2013 set\n"


def mediaeval(root, info):
    """The set of 2013: one table, `songs_info.csv` beside it, clips of 45 s (here shorter)."""
    (root / "annotations").mkdir(parents=True)
    (root / "clips_45seconds").mkdir()
    table = ["song_id,mean_arousal,std_arousal,mean_valence,std_valence"]
    for number in (2, 3, 4, 5):
        wave = np.sin(np.arange(8000) * 0.02 * number) * 0.3
        sf.write(root / "clips_45seconds" / f"{number}.wav", wave, 16000)
        table.append(f"{number},{3 + number / 10},1.0,{5 - number / 10},0.9")
    (root / "annotations" / "static_annotations.csv").write_text("\n".join(table))
    (root / "annotations" / "songs_info.csv").write_text(INFO_HEADER + info, encoding="utf-8")
    return root


def test_mediaevals_own_parts_are_read(tmp_path):
    info = (
        '2,2.mp3,"Some, One",Caf\u00e9\t,Rock,development\n003,3.mp3,A,B,Pop,evaluation\n'
        "4,4.mp3,A,B,Pop, development \n5,5.mp3,A,B,Pop,Evaluation\n9,9.mp3,A,B,Pop,evaluation\n"
    )
    root = mediaeval(tmp_path / "2013", info)
    data = read_data(root)
    assert data.splits == ["train", "test", "train", "test"]
    assert np.allclose(data.values, [[4.8, 3.2], [4.7, 3.3], [4.6, 3.4], [4.5, 3.5]])
    train, held = read_parts(root)
    assert train.paths == ["clips_45seconds/2.wav", "clips_45seconds/4.wav"]
    assert held.paths == ["clips_45seconds/3.wav", "clips_45seconds/5.wav"]
    assert len(read_data(root, how=DataConfig(split="test"))) == 2


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ("2,f,A,B,Pop,development\n3,f,A,B,Pop,test\n", "line 3: mediaeval 2013 set is 'test'"),
        ("2,f,A,B,Pop,development\n2,f,A,B,Pop,evaluation\n", "line 3: song 2 is listed twice"),
        ("two,f,A,B,Pop,development\n", "line 2: song_id is 'two': expected a number"),
        (
            "2,f,A,B,Pop,development\n",
            "static_annotations.csv, line 3: songs_info.csv has no song 3",
        ),
        ("2,f,A,B,Pop\n", "line 2: 5 fields: expected 6"),
    ],
)
def test_wrong_lines_of_mediaevals_parts_are_named(tmp_path, info, says):
    with pytest.raises(ManifestError, match=says.replace(".", r"\.")):
        read_data(mediaeval(tmp_path / "2013", info))


def test_songs_without_a_column_of_parts_are_refused(tmp_path):
    root = mediaeval(tmp_path / "2013", "2,f,A,B,Pop,development\n")
    (root / "annotations" / "songs_info.csv").write_text("song_id,Artist\n2,A\n")
    with pytest.raises(
        ManifestError, match="line 2: has song_id, artist: expected 'mediaeval 2013 set'"
    ):
        read_data(root)


def test_deam_gives_the_means_of_its_songs(place):
    assert detect_layout(place / "deam") == "deam"
    data = read_data(place / "deam")
    assert data.classes == ("valence", "arousal") and data.labels == [()] * 8
    assert data.values.dtype == np.float32 and data.values.shape == (8, 2)
    assert data.values[:4, 0].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert data.paths[0].endswith("MEMD_audio/2.mp3") and data.paths[-1].endswith("/2001.mp3")
    items = readable(data)
    # louder songs were given more arousal
    loudness = [item.wave.float().std().item() for item in items[::4]]
    assert (loudness[0] < loudness[1]) == (data.values[0, 1] < data.values[4, 1])
    assert read_data(place / "deam", how=DataConfig(values=("arousal_std",))).values.shape == (8, 1)
    train, held = read_parts(place / "deam", holdout=0.25)
    assert len(train) == 6 and len(held) == 2 and train.values.shape == (6, 2)


def test_values_become_the_targets_of_batches(place):
    data = read_data(place / "deam")
    dataset = dataset_of(data, AudioConfig())
    with Feeder(dataset, BatchSampler(8, 3, seed=1), regression=True, num_workers=2) as feeder:
        batches = [fed.batch for fed in feeder]
    assert sum(len(batch) for batch in batches) == 8
    for batch in batches:
        assert batch.targets.dtype == torch.float32
        assert torch.equal(batch.targets, torch.from_numpy(data.values)[batch.indices])
    labelled = dataset_of(read_data(place / "speech"), AudioConfig())
    with pytest.raises(ValueError, match="no values to predict"):
        Feeder(labelled, BatchSampler(20, 4), regression=True)


def test_manifests_hold_values_in_columns_or_by_name(tmp_path):
    path = tmp_path / "songs.csv"
    path.write_text("path,valence,arousal\na.wav,5.1,-2\nb.wav,3,4e-1\n")
    data = read_manifest(path, values=("arousal", "valence"), check_files=False)
    assert data.classes == ("arousal", "valence") and data.values.tolist() == [
        [-2.0, pytest.approx(5.1)],
        [pytest.approx(0.4), 3.0],
    ]
    lines = ('{"path": "a.wav", "values": {"v": 1, "a": 2.5}, "split": "train"}',) * 2
    named = tmp_path / "songs.jsonl"
    named.write_text("\n".join(lines))
    data = read_manifest(named, check_files=False)
    assert data.classes == ("v", "a") and data.values.tolist() == [[1.0, 2.5]] * 2
    assert data.splits == ["train"] * 2 and data.select([1]).values.shape == (1, 2)
    with pytest.raises(ManifestError, match=r"expected 'labels' .or number columns"):
        read_manifest(path, check_files=False)
    for text, says in (
        ("a.wav,nan,1", "line 2: valence is 'nan': expected a finite number"),
        ("a.wav,5.1,", "line 2: arousal is ''"),
        ("a.wav,5.1,high", "line 2: arousal is 'high'"),
        ("a.wav,1e39,0", "line 2: valence is '1e39'"),
    ):
        path.write_text(f"path,valence,arousal\n{text}\n")
        with pytest.raises(ManifestError, match=says):
            read_manifest(path, values=("valence", "arousal"), check_files=False)
    with pytest.raises(ManifestError, match="line 2: has path, valence, arousal: expected 'tempo'"):
        read_manifest(path, values=("tempo",), check_files=False)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("x, 1, 1, 1, 1", "line 2: song_id is 'x'"),
        ("2, 1, 1, nan, 1", "line 2: arousal_mean is 'nan'"),
        ("2, 1, 1, 1", "line 2: 4 fields: expected 5"),
        ("77, 1, 1, 1, 1", "line 2: there is no song 77"),
        ("2, 1, 1, 1, 1\n2, 1, 1, 1, 1", "song 2 is listed twice"),
    ],
)
def test_wrong_lines_of_deam_are_named(tmp_path, row, says):
    sample_sets.make_deam(tmp_path, songs=2, seconds=0.2)
    for table in tmp_path.rglob("*2058.csv"):
        table.unlink()
    table = next(tmp_path.rglob("static_annotations*.csv"))
    table.write_text(f"song_id, valence_mean, valence_std, arousal_mean, arousal_std\n{row}\n")
    with pytest.raises(ManifestError, match=says):
        read_data(tmp_path)
    with pytest.raises(ManifestError, match="holds no static_annotations"):
        read_data(tmp_path / "DEAM_audio", how=DataConfig(layout="deam"))


# ---- shards of others


def test_shards_written_by_webdataset_are_read(place, tmp_path):
    source = read_data(place / "speech", how=DataConfig(split="test"))
    clips = readable(source)
    forms = {
        "cls": lambda label: {"cls": label},
        "json": lambda label: {"json": {"label": source.classes[label], "other": [1, 2]}},
        "txt": lambda label: {"txt": source.classes[label]},
        "tags": lambda label: {"json": {"tags": [source.classes[label], "speech"]}, "txt": "hm"},
    }
    for form, told in forms.items():
        folder = tmp_path / form
        folder.mkdir()
        with webdataset.ShardWriter(f"{folder}/s-%04d.tar", maxcount=3, verbose=0) as writer:
            for number, (path, clip) in enumerate(zip(source.paths, clips, strict=True)):
                suffix = "wav" if number % 2 else "flac"
                file = io.BytesIO()
                sf.write(file, clip.wave.numpy(), 16000, format=suffix.upper())
                key = path.removesuffix(".wav").replace("_nohash_", "/clip ")
                writer.write({"__key__": key, suffix: file.getvalue(), **told(clip.labels[0])})
        shards = read_data(folder)
        assert len(list(folder.glob("*.tar"))) == 2 and len(shards) == 4
        for number, clip in enumerate(clips):
            found = {shards.classes[label] for label in shards.labels[number]}
            wanted = str(clip.labels[0]) if form == "cls" else source.classes[clip.labels[0]]
            assert found == {wanted, *(("speech",) if form == "tags" else ())}
            assert torch.equal(shards[number].wave, clip.wave)
    named = read_data(tmp_path / "json", classes=source.classes)
    assert named.labels == source.labels
    numbered = read_data(tmp_path / "cls", classes=source.classes)
    assert numbered.labels == source.labels
    with pytest.raises(ManifestError, match="label 'bed' is none of the 1 classes"):
        read_data(tmp_path / "json", classes=("backward",))


def test_webdataset_reads_what_is_written_here(place, tmp_path):
    source = read_data(place / "speech", how=DataConfig(split="train"))
    write_shards(dataset_of(source, AudioConfig()), tmp_path, encoding="flac", shard_bytes=90_000)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(source)
    for sample, clip in zip(samples, readable(source), strict=True):
        told = json.loads(sample["json"])
        assert told["labels"] == [source.classes[label] for label in clip.labels]
        assert told["split"] == "train"
        wave, rate = sf.read(io.BytesIO(sample["flac"]), dtype="int16")
        assert rate == 16000 and np.array_equal(wave, clip.wave.numpy())


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_keep_values_and_parts(place, tmp_path, indexed):
    for name in ("deam", "esc50"):
        source = read_data(place / name)
        write_shards(dataset_of(source, AudioConfig()), tmp_path / name)
        if not indexed:
            (tmp_path / name / "index.json").unlink()
        shards = read_data(tmp_path / name)
        assert set(shards.classes) == set(source.classes) and shards.splits == source.splits
        if name == "deam":
            assert np.array_equal(shards.values, source.values)
            with Feeder(shards, BatchSampler(8, 8, shuffle=False), regression=True) as feeder:
                (fed,) = feeder
            assert torch.equal(fed.batch.targets, torch.from_numpy(source.values))
        else:
            train, held = read_parts(tmp_path / name, how=DataConfig(fold=2))
            assert len(train) == 16 and set(held.splits) == {"2"}
            assert isinstance(held[3], Clip)


def test_classes_given_in_another_order_renumber_indexed_shards(place, tmp_path):
    source = read_data(place / "speech")
    write_shards(dataset_of(source, AudioConfig()), tmp_path)
    turned = read_data(tmp_path, classes=source.classes[::-1])
    assert turned.labels == [(3 - label,) for (label,) in source.labels]
    with pytest.raises(ManifestError, match="class 'backward' is not among the 2 classes given"):
        ShardSet(tmp_path, classes=("bed", "cat"))


def test_clips_without_labels_are_refused_where_labels_are_wanted(tmp_path):
    file = io.BytesIO()
    sf.write(file, np.zeros(800), 16000, format="FLAC")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.flac", "b.flac", "b.txt"):
            content = b"dog\n" if name == "b.txt" else file.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert len(ShardSet(tmp_path)) == 2  # to be tagged
    with pytest.raises(ManifestError, match=r"x\.tar/a\.flac has no label"):
        read_data(tmp_path)


# ---- what does not fit


def test_what_does_not_fit_is_said(place, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    for path, how, says in (
        (tmp_path / "x.txt", {}, "suffix '.txt'"),
        (next((place / "speech" / "bed").glob("*.wav")), {}, "a single sound has no label"),
        (place / "speech", {"values": ("a",)}, "does not go with the layout speechcommands"),
        (place / "speech", {"label_column": "x"}, "label_column='x' does not go with"),
        (place / "speech", {"layout": "manifest"}, "expected a file"),
        (place / "original" / "train.json", {"layout": "folders"}, "expected a folder"),
        (place / "speech", {"split": "dev"}, "no clip is in the part 'dev'"),
    ):
        with pytest.raises(ValueError, match=says):
            read_data(path, how=DataConfig(**how))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_data(tmp_path / "nowhere", how=DataConfig(layout="esc50"))
    with pytest.raises(ValueError, match="layout='esc': expected one of auto"):
        DataConfig(layout="esc")
    with pytest.raises(ManifestError, match="holds the numbers valence, arousal: expected dog"):
        read_data(place / "deam", classes=("dog", "cat"))


def test_weights_are_those_of_the_originals_script(place):
    """w[c] = 1000 / (count[c] + 0.01), summed over a clip's labels."""
    data = read_data(place / "audioset" / "balanced_train_segments.csv")
    counts = class_counts(data.labels, 4)
    vectors = np.zeros((len(data), 4))
    for row, labels in zip(vectors, data.labels, strict=True):
        row[list(labels)] = 1
    assert counts == vectors.sum(0).tolist() == [7, 2, 2, 2]
    expected = vectors @ (1000.0 / (vectors.sum(0) + 0.01))
    assert balanced_weights(data.labels, 4) == pytest.approx(expected.tolist(), rel=1e-15)
