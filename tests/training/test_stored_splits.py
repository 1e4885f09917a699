"""A run keeps what it trained and evaluated on: folders that change later do not change it."""

import json
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file

from ast_fast import cli, run_settings, train_command
from ast_fast.data import ShardSet, read_data
from ast_fast.data.prepare import read_lines
from ast_fast.run_data import drawn

SETTINGS = (
    *("--set", "frontend.num_mel_bins=32", "--set", "frontend.num_frames=32"),
    *("--set", "train.batch_size=8", "--set", "train.monitor.check_every=0"),
)
CLASSES = ("high", "low", "noise")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def make(folder, name, number):
    rng = np.random.default_rng(sum(map(ord, name)) + 1000 * number)
    at = np.arange(3000) / 16000
    wave = 0.1 * rng.standard_normal(3000)
    if name != "noise":
        wave += 0.3 * np.sin(2 * np.pi * {"high": 2500, "low": 250}.get(name, 900) * at)
    (folder / name).mkdir(parents=True, exist_ok=True)
    sf.write(folder / name / f"{number:02}.wav", wave, 16000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve clips of each of three classes, and a run of two epochs."""
    root = tmp_path_factory.mktemp("splits")
    for name in CLASSES:
        for number in range(12):
            make(root / "data", name, number)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = ("--holdout", "0.25", "--set", "statistics=measure", "--set", "train.epochs=2")
    assert run("train", "--data", root / "data", "--run", root / "run", *options, *SETTINGS) == 0
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def place(trained, tmp_path):
    """A copy of both, in which anything may be broken."""
    shutil.copytree(trained, tmp_path / "copy")
    for name in ("run.json", "split.jsonl"):
        file = tmp_path / "copy" / "run" / name
        file.write_text(file.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def split_of(folder):
    head, *rows = map(json.loads, (folder / "split.jsonl").read_text().splitlines())
    parts = {
        part: {row[1]: (row[2], row[3]) for row in rows if row[0] == part}
        for part in ("train", "evaluate")
    }
    assert head["train"] == len(parts["train"]) and head["evaluate"] == len(parts["evaluate"])
    return head, parts


def some(place, part, name="low"):
    """A clip of a class and of a part of the run."""
    return place / "data" / next(n for n in split_of(place / "run")[1][part] if name in n)


def test_the_run_says_which_clips_it_trained_and_evaluated_on(trained):
    head, parts = split_of(trained / "run")
    train, held = drawn(json.loads((trained / "run" / "run.json").read_text()))
    assert set(parts["train"]) == set(train.paths) and set(parts["evaluate"]) == set(held.paths)
    assert head["classes"] == list(CLASSES) and len(held) == 9
    sizes = {name: (trained / "data" / name).stat().st_size for name in parts["train"]}
    assert all(parts["train"][name][0].startswith(f"{size}-") for name, size in sizes.items())
    assert all(
        CLASSES[told[0]] == name.split("/")[0] for name, (_, told) in parts["evaluate"].items()
    )


def evaluated(folder, capsys):
    """The figures of a report and what else it said."""
    capsys.readouterr()
    status = run("report", folder)
    said = capsys.readouterr()
    return status, said.out + said.err


def test_clips_added_or_renamed_later_do_not_change_what_is_evaluated(place, capsys):
    before = evaluated(place / "run", capsys)
    # the class comes first: every class number in the folder is another
    for number in range(40):
        make(place / "data", "aaa", number)
        make(place / "data", "low", 100 + number)
    moved = some(place, "evaluate")
    moved.rename(moved.with_name("renamed.wav"))
    trained_on = some(place, "train", "high")
    trained_on.rename(trained_on.with_name("00_first.wav"))
    status, said = evaluated(place / "run", capsys)
    assert status == before[0] == 0
    figures = [line for line in before[1].splitlines() if "accuracy" in line or "loss" in line]
    assert figures and all(line in said for line in figures)
    assert "1 clip renamed since the run began, used as before" in said and "renamed.wav" in said
    assert "81 clips added since the run began, not used: 'aaa/00.wav'" in said


@pytest.mark.parametrize("what", ["gone", "with other bytes", "with other labels"])
@pytest.mark.parametrize("part", ["evaluate", "train"])
def test_clips_that_are_not_what_they_were_are_refused_by_name(what, part, place, capsys):
    file = some(place, part)
    if what == "gone":
        file.unlink()
    elif what == "with other bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # as large as before
        file.write_bytes(content)
    else:
        file.rename(place / "data" / "high" / f"from_low_{file.name}")
    if part == "evaluate":
        status, said = evaluated(place / "run", capsys)
        assert status == 2 and f"1 clip {what}: 'low/{file.name}'" in said
        assert "put them back, or give --eval-data for other clips" in said
    elif what == "gone":
        # what it was trained on is not asked for
        assert evaluated(place / "run", capsys)[0] == 0
    assert run("train", "--run", place / "run", "--resume") == 2
    error = capsys.readouterr().err
    assert f"1 clip {what}: 'low/{file.name}'" in error and "begin another run" in error


def test_a_resumed_run_is_bitwise_the_same_though_clips_came_and_were_renamed(place, capsys):
    run_dir = place / "run"
    first = sorted((run_dir / "checkpoints").glob("step-*"))[0].name
    wanted = load_file(run_dir / "model" / "model.safetensors")
    (run_dir / "checkpoints" / "latest").write_text(first)
    shutil.rmtree(run_dir / "model")
    (run_dir / "result.json").unlink()
    make(place / "data", "low", 50)
    make(place / "data", "aaa", 0)
    moved = some(place, "train")
    moved.rename(moved.with_name("00_first.wav"))
    plan = (run_dir / "run.json").read_text()
    assert run("train", "--run", run_dir, "--resume") == 0
    assert "2 clips added since the run began, not used" in capsys.readouterr().out
    found = load_file(run_dir / "model" / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (run_dir / "run.json").read_text() == plan


def test_a_run_without_a_stored_split_says_so(place, capsys):
    (place / "run" / "split.jsonl").unlink()
    status, said = evaluated(place / "run", capsys)
    assert status == 0 and "has no split.jsonl" in said and "drawn again" in said
    assert run("train", "--run", place / "run", "--resume") == 0
    assert "drawn again" in capsys.readouterr().out


def test_a_damaged_split_is_refused(place, capsys):
    file = place / "run" / "split.jsonl"
    whole = file.read_text()
    for content, says in (
        (whole[: len(whole) // 2], "is damaged"),
        ("".join(whole.splitlines(keepends=True)[:-1]), "it is cut off"),
        ("{}\n", "is no list of a run's clips"),
        ("", "line 1: is not JSON"),
        (whole.replace('"version": 1', '"version": 9'), "version 9: expected 1"),
    ):
        file.write_text(content)
        status, said = evaluated(place / "run", capsys)
        assert status == 2 and says in said


def test_seeds_share_split_and_statistics_and_can_be_averaged(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_settings, "_SAMPLED", 3)
    options = ("--set", "statistics=measure", "--set", "train.epochs=1", "--seeds", "1", "2")
    both = tmp_path / "both"
    assert run("train", "--data", place / "data", "--run", both, *options, *SETTINGS) == 0
    assert "statistics of 3 of 32 training clips" in capsys.readouterr().out
    one, two = both / "seed-1", both / "seed-2"
    assert split_of(one)[1] == split_of(two)[1]
    plans = [json.loads((folder / "run.json").read_text()) for folder in (one, two)]
    assert plans[0]["measured"] == plans[1]["measured"]
    assert [plan["holdout_seed"] for plan in plans] == [0, 0]
    assert run("average", one, two, "--out", tmp_path / "mean") == 0
    assert "different clips" not in capsys.readouterr().out
    assert run("compare", one, two, "--out", tmp_path / "page.html") == 0
    said = capsys.readouterr().out
    assert "no setting differs but seed and fold" in said and "different sets" not in said
    assert run("ensemble", one, two / "model") == 0  # on what both held out
    assert "mean of the predictions of 2 models" in capsys.readouterr().out


def test_the_seed_of_the_split_can_be_given(place, tmp_path, capsys):
    # statistics of other clips would be another front end, which has no mean
    given = ("--set", "statistics=given")
    options = ("--set", "train.epochs=1", "--set", "train.seed=5", *given, *SETTINGS)
    for name, seed in (("alike", 0), ("other", 7)):
        folder = tmp_path / name
        arguments = ("--data", place / "data", "--run", folder, "--holdout-seed", seed)
        assert run("train", *arguments, "--holdout", "0.25", *options) == 0
    same, other = (split_of(tmp_path / name)[1] for name in ("alike", "other"))
    assert same == split_of(place / "run")[1] != other
    capsys.readouterr()
    runs = (place / "run", tmp_path / "other")
    assert run("compare", *runs, "--out", tmp_path / "page.html") == 0
    assert "evaluated on 2 different sets of clips" in capsys.readouterr().out
    assert "2 different sets of clips" in (tmp_path / "page.html").read_text()
    assert run("ensemble", *runs) == 2
    assert "all held out the same clips" in capsys.readouterr().err
    both = (tmp_path / "alike", tmp_path / "other")
    assert run("average", *both, "--out", tmp_path / "mean") == 0
    assert "held out different clips" in capsys.readouterr().out


def test_evaluating_on_clips_that_were_trained_on_is_said(place, capsys):
    shutil.copytree(place / "data", place / "elsewhere")
    model = place / "run" / "model"
    assert run("eval", "--data", place / "elsewhere", "--model", model) == 0
    assert "27 of 36 clips are ones that" in capsys.readouterr().out
    for name in split_of(place / "run")[1]["train"]:
        (place / "elsewhere" / name).unlink()
    assert run("eval", "--data", place / "elsewhere", "--model", model) == 0
    assert "are ones that" not in capsys.readouterr().out
    assert run("report", place / "run", "--eval-data", place / "data") == 0
    assert "27 of 36 clips are ones that" in capsys.readouterr().out


def test_runs_over_folds_are_of_one_set_of_clips(place, tmp_path, capsys, monkeypatch):
    rows = [
        f"data/{name}/{number:02}.wav,{name},{1 + number % 2}"
        for name in CLASSES
        for number in range(12)
    ]
    table = place / "folds.csv"
    table.write_text("\n".join(["path,labels,fold", *rows]))
    inner = train_command._train_one

    def changed_between(plan, folder, *rest):
        inner(plan, folder, *rest)
        table.write_text("\n".join(["path,labels,fold", *rows[:-1]]))

    monkeypatch.setattr(train_command, "_train_one", changed_between)
    options = ("--set", "train.epochs=1", "--folds", "1", "2", *SETTINGS)
    assert run("train", "--data", table, "--run", tmp_path / "folds", *options) == 2
    error = capsys.readouterr().err
    assert "first of these runs began: 1 differ: 'data/noise/11.wav'" in error


def test_clips_with_the_same_bytes_on_both_sides_and_classes_on_one_are_said(place, capsys):
    for number in range(12):
        shutil.copyfile(place / "data/low/00.wav", place / f"data/low/copy{number}.wav")
    make(place / "data", "single", 0)
    options = ("--holdout", "0.5", "--set", "train.epochs=1", *SETTINGS)
    assert run("train", "--data", place / "data", "--run", place / "new", *options) == 0
    said = capsys.readouterr().out
    assert "clips to evaluate on have the same bytes as a clip to train on: 'low/" in said
    assert "no clip to evaluate on of 1 of 4 classes: 'single'" in said


@pytest.mark.parametrize("form", ["shards", "files", "manifest"])
def test_exact_figures_of_prepare_are_used_for_the_clips_that_are_trained_on(
    form, place, tmp_path, capsys
):
    out = tmp_path / "prepared"
    assert run("prepare", "--data", place / "data", "--out", out, "--to", form) == 0
    root = ("--root", place / "data") if form == "manifest" else ()
    options = ("--set", "statistics=measure", "--set", "train.epochs=1", "--holdout", "0.25")
    wide = ("--set", "frontend.num_mel_bins=128", "--set", "frontend.num_frames=32")
    arguments = ("--data", out, *root, "--run", tmp_path / "run", *options)
    assert run("train", *arguments, *SETTINGS, *wide) == 0
    assert f"statistics of all 27 training clips, from {out}" in capsys.readouterr().out
    plan = json.loads((tmp_path / "run" / "run.json").read_text())
    data = drawn(plan)[0]
    if isinstance(data, ShardSet):
        chosen = [int(place) for place in data.places]
    else:
        everything = read_data(out, *root[1:]).paths
        chosen = [everything.index(path) for path in data.paths]
    lines = list(read_lines(out / "clips.jsonl"))
    figures = np.array([lines[place]["mel"] for place in chosen])
    n, means, squares = figures.T
    mean = (n * means).sum() / n.sum()
    std = ((squares + n * (means - mean) ** 2).sum() / n.sum()) ** 0.5
    assert plan["measured"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert plan["measured"]["std"] == pytest.approx(std, rel=1e-12)
    # a front end that prepare did not measure: sampled, and why is said
    arguments = ("--data", out, *root, "--run", tmp_path / "other", *options)
    assert run("train", *arguments, *SETTINGS) == 0
    said = capsys.readouterr().out
    assert "statistics of 27 of 27 training clips (clips.jsonl of prepare is for another" in said
