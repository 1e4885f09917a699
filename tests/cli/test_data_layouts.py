"""Data sets as they are distributed, from the shell: trained on, evaluated, prepared."""

import json

import pytest

from ast_fast import ASTModel, cli, sample_sets
from ast_fast.data import read_data

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = (
    *("--set", "frontend.num_mel_bins=32", "--set", "frontend.num_frames=32"),
    *("--set", "train.epochs=1", "--set", "train.batch_size=8"),
)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def plan_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_fold_of_esc50_from_train_to_evaluation(tmp_path, capsys):
    data = sample_sets.make_esc50(tmp_path / "esc50", clips=1)
    out = tmp_path / "run"
    assert run("train", "--data", data, "--fold", "3", "--run", out, *SETTINGS) == 0
    said = capsys.readouterr().out
    assert "16 clips of 4 classes to train on, 4 to evaluate on" in said
    assert "parts to train on: 1, 2, 4, 5" in said and "parts to evaluate on: 3" in said
    assert plan_of(out)["how"]["fold"] == 3
    assert ASTModel.from_pretrained(out / "model").labels == sample_sets.CATEGORIES
    arguments = ("eval", "--data", data, "--model", out / "model", "--json", tmp_path / "e.json")
    for options, clips in (((), 20), (("--fold", "3"), 4), (("--split", "1"), 4)):
        assert run(*arguments, *options) == 0
        assert json.loads((tmp_path / "e.json").read_text())["num_clips"] == clips
    assert run("train", "--run", out, "--resume") == 0
    assert "16 clips of 4 classes" in capsys.readouterr().out
    assert run("train", "--run", out, "--resume", "--fold", "2") == 2
    assert "leave out" in capsys.readouterr().err
    (tmp_path / "plain" / "dog").mkdir(parents=True)
    clip = next((data / "audio").glob("*-0.wav"))
    (tmp_path / "plain" / "dog" / "1.wav").write_bytes(clip.read_bytes())
    options = ("--eval-data", tmp_path / "plain", "--run", tmp_path / "plain run", *SETTINGS)
    assert run("train", "--data", data, "--split", "2", *options) == 0
    assert "4 clips of 4 classes to train on, 1 to evaluate on" in capsys.readouterr().out
    assert run("train", "--data", data, "--fold", "2", "--eval-data", data, "--run", out) == 2
    assert "both say what to evaluate on" in capsys.readouterr().err
    assert run("train", "--data", data, "--run", tmp_path / "other", *SETTINGS) == 2
    assert "choose the fold to evaluate on" in capsys.readouterr().err


def test_speech_commands_are_prepared_trained_on_and_tested_on_their_parts(tmp_path, capsys):
    data = sample_sets.make_speech_commands(tmp_path / "speech")
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert run("prepare", "--data", data, "--out", shards, "--workers", "2") == 0
    said = capsys.readouterr().out
    assert "_background_noise_ is left out, files in it: 1" in said and "20 clips" in said
    assert read_data(shards).splits == read_data(data).splits
    assert run("train", "--data", shards, "--run", out, *SETTINGS) == 0
    assert "12 clips of 4 classes to train on, 4 to evaluate on" in capsys.readouterr().out
    figures = []
    for place in (data, shards):
        options = ("--split", "test", "--json", tmp_path / "e.json", "--model", out / "model")
        assert run("eval", "--data", place, *options) == 0
        figures.append(json.loads((tmp_path / "e.json").read_text()))
    assert figures[0]["num_clips"] == figures[1]["num_clips"] == 4
    assert figures[0]["figures"] == pytest.approx(figures[1]["figures"], rel=1e-5)


def test_an_audioset_list_trains_with_the_files_that_are_here(tmp_path, capsys):
    listing = sample_sets.make_audioset(tmp_path / "audioset", seconds=0.5)
    out = tmp_path / "run"
    options = ("--set", "train.loss=binary_cross_entropy", "--holdout", "0")
    assert run("train", "--data", listing, "--run", out, *options, *SETTINGS) == 0
    said = capsys.readouterr().out
    assert "1 of 8 listed clips are not there: '--Pv000_x-Y_0'" in said
    assert "7 clips of 4 classes to train on" in said
    names = tuple(name for _, name in sample_sets.AUDIOSET_CLASSES)
    assert ASTModel.from_pretrained(out / "model").labels == names


def test_the_originals_json_trains_with_its_table_of_classes(tmp_path, capsys):
    listing = sample_sets.make_original(tmp_path / "original")
    table = tmp_path / "table.csv"
    listing.with_name("class_labels_indices.csv").rename(table)
    out = tmp_path / "run"
    options = ("--labels", table, "--eval-data", listing, "--run", out)
    assert run("train", "--data", listing, *options, *SETTINGS) == 0
    assert "8 clips of 4 classes to train on, 8 to evaluate on" in capsys.readouterr().out
    assert ASTModel.from_pretrained(out / "model").labels == sample_sets.CATEGORIES


def test_a_hugging_face_dataset_trains_on_its_parts(tmp_path, capsys):
    pytest.importorskip("datasets").disable_progress_bars()
    made = sample_sets.make_huggingface(12, seconds=0.3).rename_column("label", "tone")
    made.save_to_disk(str(tmp_path / "data"))
    out = tmp_path / "run"
    options = ("--label-column", "tone", "--run", out, "--set", "train.num_workers=1")
    assert run("train", "--data", tmp_path / "data", *options, *SETTINGS) == 0
    assert "9 clips of 4 classes to train on, 3 to evaluate on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--layout", "esc50"), "esc50.csv' is not there: expected ESC-50 as unpacked"),
        (("--fold", "1"), "in no parts: leave out fold and split"),
        (("--split", "test"), "in no parts"),
        (("--values", "valence"), "does not go with the layout folders"),
        (("--audio-column", "x"), "audio_column='x' does not go with"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, capsys, arguments, says):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "1.wav").write_bytes(b"RIFF")
    for command in (("train", "--run", tmp_path / "run"), ("prepare", "--out", tmp_path / "out")):
        assert run(command[0], "--data", tmp_path / "data", *command[1:], *arguments) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("ast-fast: error:") == 1
