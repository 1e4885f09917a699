"""Names, links, empty folders and clips of no class: the same in every layout, and said where the user looks."""

import csv
import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import soundfile as sf

from ast_fast import ASTModel, cli, create_model
from ast_fast._text import one_line
from ast_fast.config import AudioConfig, DataConfig
from ast_fast.data import (
    BatchSampler,
    Feeder,
    HuggingFaceSet,
    ManifestError,
    ShardSet,
    balanced_weights,
    dataset_of,
    read_data,
    read_folder,
    read_manifest,
    read_parts,
    write_shards,
)
from ast_fast.data.layouts import reading_notes
from ast_fast.hub.errors import CheckpointError
from ast_fast.inference.sources import units_of
from ast_fast.labels import read_labels
from ast_fast.names import (
    check_names,
    in_order,
    part_name,
    plain_cell,
    safe_cell,
    safe_path,
    same_name,
)

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def sound(path, seed=0, samples=800):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.random.default_rng(seed).normal(0, 0.1, samples), 16000, format="WAV")
    return path


def content_of(path):
    return sound(path).read_bytes()


# ---- folders


def test_parts_stay_parts_beside_a_folder_without_sound(tmp_path):
    for name in ("train/cat/1.wav", "train/dog/2.wav", "Test/cat/3.wav", "Test/dog/4.wav"):
        sound(tmp_path / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").write_text("x")
    manifest = read_folder(tmp_path)
    assert manifest.classes == ("cat", "dog") and set(manifest.splits) == {"train", "test"}
    assert any("beside the parts" in note and "'docs'" in note for note in manifest.notes)


def test_parts_beside_a_folder_with_sound_are_refused_and_classes_of_such_names_are_not(tmp_path):
    for name in ("train/cat/1.wav", "test/cat/3.wav", "extra/5.wav"):
        sound(tmp_path / "a" / name)
    with pytest.raises(ManifestError, match=r"'test', 'train' look like parts.*'extra'"):
        read_folder(tmp_path / "a")
    for name in ("train/1.wav", "plane/2.wav"):
        sound(tmp_path / "b" / name)
    assert read_folder(tmp_path / "b").classes == ("plane", "train")


def test_what_a_folder_holds_beside_sound_is_said(tmp_path):
    sound(tmp_path / "dog" / "1.wave")
    sound(tmp_path / "loose.wav")
    for name in ("cat/a.xyz", "cat/b.xyz", "bird/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    data = read_data(tmp_path)
    assert data.paths == ["dog/1.wave"] and data.classes == ("dog",)
    told = "\n".join(reading_notes(data))
    assert "1 files of sound beside the folders" in told
    assert "no classes: 'bird', 'cat', 'empty'" in told
    assert ".xyz 2" in told and ".txt 1" in told
    for path in tmp_path.glob("dog/*"):
        path.unlink()
    with pytest.raises(ManifestError, match=r"holds no clips.*\.xyz 2"):
        read_folder(tmp_path)


def test_links_within_the_root_or_a_declared_one_are_followed_and_others_counted(tmp_path):
    store, data = tmp_path / "blobs", tmp_path / "snapshot"
    blob = sound(store / "0a1b")  # a hub's: no suffix but in the link
    (data / "cat").mkdir(parents=True)
    sound(data / "dog" / "1.wav")
    (data / "cat" / "1.wav").symlink_to(blob)
    (data / "cat" / "gone.wav").symlink_to(tmp_path / "nothing")
    (data / "pup").symlink_to(data / "dog", target_is_directory=True)
    (data / "out").symlink_to(store, target_is_directory=True)
    manifest = read_data(data)
    assert manifest.classes == ("dog", "pup")
    told = "\n".join(reading_notes(manifest))
    assert "2 links" in told and "lead out" in told and "--root" in told
    assert "1 links ('cat/gone.wav') lead to nothing" in told and "no classes: 'cat'" in told
    declared = read_data(data, root=store)
    assert declared.classes == ("cat", "dog", "pup")
    dataset = dataset_of(declared, AudioConfig())
    assert [dataset[index].length for index in range(3)] == [800] * 3
    # a link that appeared since leads nowhere else
    (data / "dog" / "1.wav").unlink()
    (data / "dog" / "1.wav").symlink_to(sound(tmp_path / "elsewhere.wav"))
    assert "leaves" in dataset[1].report.notes[0]


def test_annexed_folders_are_read(tmp_path):
    key = sound(tmp_path / ".git" / "annex" / "objects" / "K" / "key")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.wav").symlink_to(os.path.relpath(key, tmp_path / "dog"))
    assert read_folder(tmp_path).paths == ["dog/1.wav"]


def test_loops_of_links_end_and_are_counted(tmp_path):
    for name in "abcdefgh":
        sound(tmp_path / "x" / name / "1.wav")
        for other in "abcdefgh":
            (tmp_path / "x" / name / f"to_{other}").symlink_to(tmp_path / "x" / other)
        (tmp_path / "x" / name / "up").symlink_to(tmp_path)
    manifest = read_folder(tmp_path)
    real = [f"x/{name}/1.wav" for name in "abcdefgh"]
    assert set(real) <= set(manifest.paths)
    assert any("read already" in note for note in manifest.notes)


def test_folders_to_be_tagged_follow_links_and_say_what_is_left_out(tmp_path, caplog):
    store, data = tmp_path / "blobs", tmp_path / "data"
    sound(data / "1.wav")
    (data / "2.wav").symlink_to(data / "1.wav")
    (data / "3.wav").symlink_to(sound(store / "b"))
    (data / "4.xyz").write_bytes(b"x")
    files = [path for unit in units_of([data]) for path, _ in unit.files]
    assert [Path(file).name for file in files] == ["1.wav", "2.wav"]
    assert "lead out of the folder" in caplog.text and ".xyz 1" in caplog.text
    assert sum(len(unit.files) for unit in units_of([data], root=store)) == 3


# ---- parts


def test_parts_are_the_same_in_any_case_in_folders_lists_and_datasets(tmp_path):
    for number in range(4):
        sound(tmp_path / f"{number}.wav")
    rows = [
        ("0.wav", "a", "Train"),
        ("1.wav", "b", "Train"),
        ("2.wav", "a", "TEST"),
        ("3.wav", "b", "Test"),
    ]
    lines = ["path,label,split", *(",".join(row) for row in rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    told = [json.dumps(dict(zip(("path", "label", "split"), row, strict=True))) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(told))
    for name in ("list.csv", "list.jsonl"):
        train, held = read_parts(tmp_path / name)
        assert len(train) == len(held) == 2
        assert len(read_data(tmp_path / name, how=DataConfig(split="Test"))) == 2
    assert part_name("Fold A") == "Fold A" and part_name("VAL") == "val"


# ---- names


def tar_of(path, clips):
    with tarfile.open(path, "w") as archive:
        for number, (content, told) in enumerate(clips):
            parts = [("wav", content)] + (
                [] if told is None else [("json", json.dumps(told).encode())]
            )
            for kind, raw in parts:
                info = tarfile.TarInfo(f"{number:03}.{kind}")
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))


def hugging_face(labels, content):
    datasets = pytest.importorskip("datasets")
    audio = [{"bytes": content, "path": f"{n}.wav"} for n in range(len(labels))]
    rows = datasets.Dataset.from_dict({"audio": audio, "label": labels})
    return rows.cast_column("audio", datasets.Audio(decode=False))


def in_each_layout(tmp_path, labels):
    """The classes and labels of clips with these labels, by every layout that takes names from its data."""
    content = content_of(tmp_path / "one.wav")
    for number, label in enumerate(labels):
        place = tmp_path / "folders" / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03}.wav").write_bytes(content)
        (tmp_path / f"{number:03}.wav").write_bytes(content)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"{n:03}.wav", x) for n, x in enumerate(labels))]
        )
    lines = [json.dumps({"path": f"{n:03}.wav", "labels": [x]}) for n, x in enumerate(labels)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "tar").mkdir()
    tar_of(tmp_path / "tar" / "x.tar", [(content, {"label": label}) for label in labels])
    yield "folders", read_data(tmp_path / "folders")
    for name in ("list.csv", "list.jsonl", "tar"):
        yield name, read_data(tmp_path / name)
    yield "huggingface", HuggingFaceSet(hugging_face(list(labels), content))


def test_composed_and_decomposed_names_are_one_class_in_every_layout(tmp_path):
    assert NFC != NFD
    for layout, data in in_each_layout(tmp_path, (NFC, NFD, "dog")):
        assert data.classes == (NFC, "dog"), layout
        assert sorted(data.labels) == [(0,), (0,), (1,)], layout
    # and beside classes that are given, as a model has them
    assert read_data(tmp_path / "list.csv", classes=(NFD, "dog")).labels == [(0,), (0,), (1,)]
    assert read_data(tmp_path / "tar", classes=(NFD, "dog")).labels == [(0,), (0,), (1,)]


def test_classes_that_are_numbers_stand_in_one_order_in_every_layout(tmp_path):
    for layout, data in in_each_layout(tmp_path, ("10", "9", "1", "2")):
        assert data.classes == ("1", "2", "9", "10"), layout
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
    content = content_of(tmp_path / "one.wav")
    tar_of(
        tmp_path / "n.tar", [(content, {"cls": 10}), (content, {"cls": "9"}), (content, {"cls": 9})]
    )
    shards = ShardSet(tmp_path / "n.tar")  # a number and the same as text
    assert shards.classes == ("9", "10") and shards.labels == [(1,), (0,), (0,)]


def test_names_are_printed_without_control_characters(tmp_path, capsys):
    assert one_line("a\x1b[31mb\n\u202ec") == "a\\x1b[31mb\\n\\u202ec"
    assert one_line(NFC) == NFC and one_line("\u4e2d") == "\u4e2d"
    evil = "do\x1b]0;x\x07g"
    model = create_model("ast_tiny_p16_s10", 2, labels=(evil, "cat"), input_tdim=64)
    model.save_pretrained(tmp_path / "model")
    sound(tmp_path / "1.wav", samples=16000)
    assert cli.main(["tag", str(tmp_path / "1.wav"), "--model", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "do\\x1b]0;x\\x07g" in out


@pytest.mark.parametrize("names", [("a", "a"), (NFC, NFD), ("a", ""), ("a", " "), ("a", "b\0")])
def test_names_that_cannot_tell_classes_apart_are_refused(names, tmp_path):
    with pytest.raises(ValueError, match=r"labels: .*expected"):
        create_model("ast_tiny_p16_s10", 2, labels=names, input_tdim=64)
    with pytest.raises(ValueError, match="expected"):
        check_names(names, "names")
    # in a checkpoint too
    create_model("ast_tiny_p16_s10", 2, labels=("x", "y"), input_tdim=64).save_pretrained(
        tmp_path / "m"
    )
    file = tmp_path / "m" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as old:
        told = json.loads(old.metadata()["ast_fast"])
    assert told["model"]["labels"] == ["x", "y"]
    told["model"]["labels"] = list(names)
    safetensors.torch.save_file(state, file, {"format": "pt", "ast_fast": json.dumps(told)})
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected"):
        ASTModel.from_pretrained(tmp_path / "m")


def test_tables_of_labels_refuse_a_name_twice(tmp_path):
    (tmp_path / "x.csv").write_text("index,mid,display_name\n0,/m/1,Dog\n1,/m/2,Dog\n")
    with pytest.raises(ValueError, match=r"line 3: display_name 'Dog' is on line 2 already"):
        read_labels(tmp_path / "x.csv")
    (tmp_path / "x.txt").write_text(f"{NFC}\n{NFD}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: .*is on line 1 already"):
        read_labels(tmp_path / "x.txt")
    assert same_name(NFD) == NFC


# ---- clips of no class


def test_clips_without_a_label_are_negatives_in_every_layout(tmp_path):
    content = content_of(tmp_path / "one.wav")
    for number in range(3):
        (tmp_path / f"{number}.wav").write_bytes(content)
    (tmp_path / "a.csv").write_text("path,label\n0.wav,dog\n1.wav,\n2.wav,dog;cat\n")
    (tmp_path / "b.jsonl").write_text(
        '{"path": "0.wav", "labels": ["dog"]}\n{"path": "1.wav", "labels": []}\n'
        '{"path": "2.wav", "labels": ["dog", "cat"]}\n'
    )
    (tmp_path / "c.jsonl").write_text(
        '{"path": "0.wav", "label": "dog"}\n{"path": "1.wav", "label": ""}\n'
        '{"path": "2.wav", "label": "dog;cat"}\n'
    )
    (tmp_path / "tar").mkdir()
    clips = [["dog"], [], ["dog", "cat"]]
    tar_of(tmp_path / "tar" / "x.tar", [(content, {"labels": labels}) for labels in clips])
    rows = hugging_face([["dog"], [], ["dog", "cat"]], content)
    rows.to_parquet(str(tmp_path / "d.parquet"))
    sets = [
        read_data(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.jsonl", "tar", "d.parquet")
    ]
    write_shards(dataset_of(sets[0], AudioConfig()), tmp_path / "own")
    for data in (*sets, read_data(tmp_path / "own")):
        assert data.classes == ("cat", "dog") and len(data) == 3
        assert data.labels[1] == () and sorted(data.labels[2]) == [0, 1]
        assert any("1 clips have no label" in note for note in reading_notes(data))
        dataset = dataset_of(data, AudioConfig())
        with Feeder(dataset, BatchSampler(3, 3, shuffle=False), multi_label=True) as feeder:
            (batch,) = [fed.batch for fed in feeder]
        assert batch.targets.tolist() == [[0, 1], [0, 0], [1, 1]]


def test_presence_and_absence_is_one_class_and_clips_without_it(tmp_path):
    for number in range(4):
        sound(tmp_path / f"{number}.wav")
    (tmp_path / "a.csv").write_text("path,label\n0.wav,bat\n1.wav,\n2.wav,bat\n3.wav,\n")
    data = read_data(tmp_path / "a.csv")
    assert data.classes == ("bat",) and data.labels == [(0,), (), (0,), ()]
    # drawn by class, those of none are drawn too
    weights = balanced_weights(data.labels, 1)
    assert min(weights) > 0 and weights[0] == pytest.approx(weights[1])


def test_one_label_problems_refuse_clips_without_one_by_name(tmp_path, capsys):
    for number in range(3):
        sound(tmp_path / f"{number}.wav")
    (tmp_path / "a.csv").write_text("path,label\n0.wav,dog\n1.wav,\n2.wav,cat\n")
    dataset = dataset_of(read_data(tmp_path / "a.csv"), AudioConfig())
    with pytest.raises(ValueError, match=r"a\.csv, line 3: '1\.wav' has no label"):
        Feeder(dataset, BatchSampler(3, 1))
    arguments = ["train", "--data", str(tmp_path / "a.csv"), "--run", str(tmp_path / "run")]
    tiny = ["--set", "model=ast_tiny_p16_s10", "--holdout", "0"]
    assert cli.main([*arguments, *tiny]) == 2
    assert "line 3: '1.wav' has no label" in capsys.readouterr().err


def test_a_set_without_any_label_and_clips_that_nothing_is_said_of_are_refused(tmp_path):
    content = content_of(tmp_path / "0.wav")
    (tmp_path / "a.csv").write_text("path,label\n0.wav,\n")
    with pytest.raises(ManifestError, match="none of its 1 clips has a label"):
        read_manifest(tmp_path / "a.csv")
    (tmp_path / "tar").mkdir()
    tar_of(tmp_path / "tar" / "x.tar", [(content, {"labels": ["dog"]}), (content, None)])
    with pytest.raises(ManifestError, match=r"001\.wav has no label"):
        read_data(tmp_path / "tar")


# ---- CSV


@pytest.mark.parametrize(
    "text", ["dog", "=SUM(A1)", "-x", "+1", "@a", "\tb", "'til", "'-x", "''=y", "a-b", "", "'"]
)
def test_cells_come_back_as_they_were_and_are_no_formulas(text):
    cell = safe_cell(text)
    assert plain_cell(cell) == text and cell[:1] not in ("=", "+", "-", "@", "\t", "\r")


def test_file_names_in_csv_are_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = create_model("ast_tiny_p16_s10", 2, labels=("=x", "cat"), input_tdim=64)
    model.save_pretrained("model")
    names = ["--PJHxphWEs.wav", "=1.wav", "b.wav"]
    for number, name in enumerate(names):
        sound(tmp_path / name, number, 16000)
    (tmp_path / "list.txt").write_text("\n".join(names))
    for command, out in (("tag", "t.csv"), ("embed", "e.csv"), ("embed", "e.npy")):
        arguments = [command, "--model", "model", "--out", out]
        assert cli.main([*arguments, *(f"./{name}" for name in names)]) == 0
        table = Path(out if out.endswith("csv") else f"{out}.index.csv")
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = list(dict.fromkeys(row["file"] for row in rows))
        assert [os.path.normpath(name) for name in found] == names
        assert all(Path(name).exists() and name[0] not in "=-" for name in found)
        if command == "tag":
            assert {plain_cell(row["label"]) for row in rows} == {"=x", "cat"}
    assert safe_path("--PJ.wav") == "./--PJ.wav" and safe_path("a/-b.wav") == "a/-b.wav"
