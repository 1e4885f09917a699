"""Each recipe from end to end on real speech laid out as its data set is distributed."""

import csv
import json
import math

import pytest
import soundfile as sf
import timm
import torch

from ast_fast import ASTModel, cli
from ast_fast.data.syllables import read_syllables
from ast_fast.training.logs import read_log
from ast_fast.training.recipe import read_config
from ast_fast.training.schedules import run_factor
from ast_fast.training.several import together, variants

pytestmark = pytest.mark.usefixtures("one_thread")

# a recipe's numbers, on a model and batches that a test can wait for
SMALL = (
    "model=ast_mini_p16_s10",
    "weights=random",
    "frontend.num_frames=48",
    "frontend.num_mel_bins=32",
    "train.batch_size=4",
    "train.num_workers=0",
    "train.log_every=1",
    "train.augment.freq_mask_bins=6",
    "train.augment.time_mask_frames=8",
)
TONES = ("high", "rising", "dipping", "falling")


@pytest.fixture(scope="module")
def spoken():
    """Clips of the four tones: (waveform, tone), evenly."""
    found = read_syllables()
    return [
        (found.waves[i].numpy(), found.tones[i] - 1)
        for tone in (1, 2, 3, 4)
        for i in [i for i, t in enumerate(found.tones) if t == tone][:10]
    ]


def write(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave, 16000)


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def esc50(spoken, tmp_path_factory):
    root = tmp_path_factory.mktemp("esc") / "ESC-50-master"
    rows = []
    for index, (wave, tone) in enumerate(spoken):
        fold = index % 5 + 1
        name = f"{fold}-{1000 + index}-A-{tone}.wav"
        write(root / "audio" / name, wave)
        rows.append((name, fold, tone, TONES[tone], False, 1000 + index, "A"))
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    table(root / "meta" / "esc50.csv", header, rows)
    return root


@pytest.fixture(scope="module")
def words(spoken, tmp_path_factory):
    root = tmp_path_factory.mktemp("sc") / "speech_commands_v0.02"
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for index, (wave, tone) in enumerate(spoken):
        name = f"{TONES[tone]}/{index:08x}_nohash_0.wav"
        write(root / name, wave)
        if index % 5 == 3:
            lists["validation_list.txt"].append(name)
        if index % 5 == 4:
            lists["testing_list.txt"].append(name)
    write(root / "_background_noise_" / "white_noise.wav", spoken[0][0])
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def audioset(spoken, tmp_path_factory):
    root = tmp_path_factory.mktemp("as")
    mids = ("/m/09x0r", "/m/05zppz", "/t/dd00004", "/m/02zsn")
    rows = [
        (i, mid, f"Tone, {name}") for i, (mid, name) in enumerate(zip(mids, TONES, strict=True))
    ]
    table(root / "class_labels_indices.csv", ("index", "mid", "display_name"), rows)
    for part in ("balanced_train", "eval"):
        lines = [f"# Segments csv of {part}", "# num_ytids=20", "# YTID, start_seconds, ..."]
        for index, (wave, tone) in enumerate(spoken):
            if (index % 5 == 4) != (part == "eval"):
                continue
            name = f"{part[0]}{index:010d}"
            write(root / "audio" / f"Y{name}.wav", wave)
            labels = mids[tone] if index % 3 else f"{mids[tone]},{mids[0]}"
            lines.append(f'{name}, 30.000, 40.000, "{labels}"')
        lines.append('nothere0000, 0.000, 10.000, "/m/09x0r"')
        (root / f"{part}_segments.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def deam(spoken, tmp_path_factory):
    root = tmp_path_factory.mktemp("deam")
    rows = []
    for index, (wave, tone) in enumerate(spoken):
        write(root / "MEMD_audio" / f"{index + 2}.wav", wave)
        rows.append((index + 2, 3.0 + tone, 0.5, 5.0 - tone / 2, 0.7))
    table(
        root / "annotations/annotations averaged per song/song_level/static_annotations_averaged_songs_1_2000.csv",
        ("song_id", " valence_mean", " valence_std", " arousal_mean", " arousal_std"),
        rows,
    )  # fmt: skip
    return root


def train(*arguments):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return cli.main(["train", *map(str, arguments), *settings])


def steps(run):
    return [row for row in read_log(run / "log.jsonl") if row["kind"] == "step"]


def check_rates(run, recipe, *overrides):
    config = read_config(recipe, [*SMALL, *overrides]).train
    rows, per_epoch = steps(run), len(steps(run)) // config.epochs
    assert rows and len(rows) == config.epochs * per_epoch
    for row in rows:
        step = row["step"] - 1
        assert row["lr"] == pytest.approx(config.lr * run_factor(config, step, per_epoch))


def test_esc50_over_its_folds(esc50, tmp_path, capsys):
    run = tmp_path / "esc"
    more = ("--set", "train.epochs=7")
    assert train("esc50", "--data", esc50, "--run", run, "--folds", "1", "3", *more) == 0
    said = capsys.readouterr().out
    assert "run 1 of 2" in said and "32 clips of 4 classes to train on, 8 to evaluate on" in said
    assert "mean of 2 runs, with its 95 % interval:" in said and "  accuracy 0." in said
    for fold in (1, 3):
        check_rates(run / f"fold-{fold}", "esc50", "train.epochs=7")
        assert ASTModel.from_pretrained(run / f"fold-{fold}" / "model").labels == TONES
    summary = json.loads((run / "summary.json").read_text())
    values = [summary["runs"][f"fold-{k}"]["accuracy"] for k in (1, 3)]
    found = summary["together"]["accuracy"]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    # of two runs: t(0.975, 1) = 12.706 times their standard error, half their distance
    assert found["ci95"] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, rel=1e-4)


def test_speech_commands_with_words_learnt_one_by_one(words, tmp_path, capsys):
    run = tmp_path / "sc"
    assert train("speechcommands", "--data", words, "--run", run, "--set", "train.epochs=2") == 0
    assert "24 clips of 4 classes to train on, 8 to evaluate on" in capsys.readouterr().out
    check_rates(run, "speechcommands", "train.epochs=2")
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert {"accuracy", "auc", "loss"} <= set(figures) and "map" not in figures
    assert figures["loss"] < math.log(4)  # of yes or no, not of one among four


def test_audioset_with_averaged_weights_and_predictions(audioset, tmp_path, capsys):
    run = tmp_path / "as"
    done = train(
        *("audioset", "--data", audioset / "balanced_train_segments.csv", "--run", run),
        *("--eval-data", audioset / "eval_segments.csv", "--root", audioset / "audio"),
        *("--labels", audioset / "class_labels_indices.csv", "--set", "train.lr=1e-3"),
    )
    assert done == 0
    assert "32 clips of 4 classes to train on, 8 to evaluate on" in capsys.readouterr().out
    check_rates(run, "audioset", "train.lr=1e-3")
    rows = read_log(run / "log.jsonl")
    evals = [row for row in rows if row["kind"] == "eval"]
    assert len(evals) == 5 and all("cumulative_map" in row for row in evals)
    assert evals[0]["cumulative_map"] == pytest.approx(evals[0]["map"])
    (averaged,) = [row for row in rows if row["kind"] == "average"]
    assert averaged["epochs"] == 5
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert figures["map"] == averaged["map"] and "dprime" in figures
    model = ASTModel.from_pretrained(run / "model")
    assert model.config.problem_type == "multi_label_classification"
    assert model.labels[0] == "Tone, high"


def test_music_emotion_predicts_numbers(deam, tmp_path, capsys):
    run = tmp_path / "deam"
    more = ("--set", "train.lr=3e-3", "--set", "train.epochs=12", "--holdout", "0.25")
    assert train("music-emotion", "--data", deam, "--run", run, *more) == 0
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert set(figures) == {"loss", "r2", "rmse", "mae"}
    losses = [row["loss"] for row in steps(run)]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    model = ASTModel.from_pretrained(run / "model")
    assert model.config.problem_type == "regression"
    assert model.labels == ("valence", "arousal")


def test_an_image_models_weights_start_a_run_by_name(esc50, tmp_path, monkeypatch, capsys):
    name = "deit_tiny_distilled_patch16_224"
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False).state_dict()
    home = tmp_path / "home"
    home.mkdir()
    torch.save({"model": state}, home / f"{name}-b40b3cf7.pth")
    monkeypatch.setenv("AST_FAST_HOME", str(home))
    run = tmp_path / "run"
    settings = [part for s in SMALL[2:] for part in ("--set", s)]
    chosen = ["--set", "model=ast_tiny_p16_s10", "--set", "weights=imagenet", "--fold", "1"]
    once = [
        "--set",
        "train.epochs=1",
        "--set",
        "train.lr=1e-12",
        "--set",
        "frontend.num_mel_bins=128",
    ]
    command = ["train", "esc50", "--data", str(esc50), "--run", str(run)]
    assert cli.main([*command, *settings, *chosen, *once]) == 0
    found = ASTModel.from_pretrained(run / "model").state_dict()
    wanted = state["blocks.3.mlp.fc1.weight"]
    torch.testing.assert_close(found["v.blocks.3.mlp.fc1.weight"], wanted, rtol=0, atol=1e-6)
    projection = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(found["v.patch_embed.proj.weight"], projection, rtol=0, atol=1e-6)
    capsys.readouterr()
    again = [*command[:-1], str(tmp_path / "other"), *settings]
    assert cli.main([*again, *chosen[:2], "--set", "weights=audioset", "--fold", "1"]) == 2
    assert "weights='audioset': there are none of width 192" in capsys.readouterr().err
    pretrained = ["--set", f"model={run / 'model'}", *chosen[2:]]
    assert cli.main([*again, *pretrained]) == 2
    assert "has weights of its own; leave weights out" in capsys.readouterr().err


def test_seeds_go_on_where_they_were_interrupted(esc50, tmp_path, capsys, monkeypatch):
    from ast_fast import train_command

    run, inner = tmp_path / "seeds", train_command._train_one
    done = []

    def interrupted(plan, folder, *rest):
        if len(done) == 1:
            raise KeyboardInterrupt("between two runs")
        inner(plan, folder, *rest)
        done.append(folder.name)

    monkeypatch.setattr(train_command, "_train_one", interrupted)
    once = ("--set", "train.epochs=1", "--fold", "2")
    assert train("esc50", "--data", esc50, "--run", run, "--seeds", "4", "9", *once) == 130
    assert done == ["seed-4"] and not (run / "summary.json").exists()
    monkeypatch.setattr(train_command, "_train_one", inner)
    kept = (run / "seed-4" / "log.jsonl").read_bytes()
    assert cli.main(["train", "--run", str(run), "--resume"]) == 0
    assert kept == (run / "seed-4" / "log.jsonl").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["runs"]) == ["seed-4", "seed-9"]
    plans = [json.loads((run / name / "run.json").read_text()) for name in ("seed-4", "seed-9")]
    assert [plan["settings"]["train"]["seed"] for plan in plans] == [4, 9]
    assert train("esc50", "--data", esc50, "--run", run, "--seeds", "1", *once) == 2
    assert "holds runs already" in capsys.readouterr().err


def test_every_fold_meets_every_seed_once():
    plan = {"seeds": [1, 2], "folds": [1, 5], "settings": {"train": {"seed": 0}}, "how": {}}
    assert list(variants(plan)) == [
        "fold-1-seed-1", "fold-1-seed-2", "fold-5-seed-1", "fold-5-seed-2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected each once"):
        variants({**plan, "seeds": [1, 1]})
    single = together({"a": {"map": 0.5}})
    assert single["together"] == {"map": {"mean": 0.5}}
    assert together({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}})["together"].keys() == {"x"}
