"""Pages on runs: what they hold is what the run, its log and its model say."""

import json
import re
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import cli, run_plots
from ast_fast.calibration import of_classes, reliability
from ast_fast.config import AudioConfig
from ast_fast.data import AudioDataset, read_folder, read_manifest
from ast_fast.inference import load_model
from ast_fast.run_compare import compare_runs, figure_table, interval, seed_table, setting_table
from ast_fast.run_folder import RunFolder
from ast_fast.run_report import measure

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = (
    *("--set", "train.epochs=2", "--set", "train.batch_size=8", "--set", "train.log_every=1"),
    *("--set", "frontend.num_mel_bins=32", "--set", "frontend.num_frames=32"),
    *("--set", "train.monitor.check_every=4", "--set", "model=ast_mini_p16_s10"),
)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classes of tones, two runs that differ in their seed, one in its rate, one of several labels."""
    root = tmp_path_factory.mktemp("reports")
    rng = np.random.default_rng(0)
    lines = ["path,labels"]
    for name, hz in (("low", 250), ("high", 2500)):
        (root / "data" / name).mkdir(parents=True)
        for index in range(12):
            at = np.arange(4000) / 16000
            sound = 0.3 * np.sin(2 * np.pi * hz * (1 + 0.1 * rng.random()) * at)
            sf.write(root / "data" / name / f"{index:02}.wav", sound, 16000)
            lines.append(f"data/{name}/{index:02}.wav,{name}" + (";even" if index % 2 == 0 else ""))
    (root / "several.csv").write_text("\n".join(lines))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, extra in (
        ("one", ("--set", "train.seed=1")),
        ("two", ("--set", "train.seed=2")),
        ("slow", ("--set", "train.lr=1e-5", "--set", "train.seed=1")),
    ):
        arguments = ("--data", root / "data", "--run", root / name, "--holdout", "0.5")
        assert run("train", *arguments, *SETTINGS, *extra) == 0
    arguments = ("--data", root / "several.csv", "--run", root / "several", "--holdout", "0.5")
    assert run("train", *arguments, *SETTINGS, "--set", "train.loss=binary_cross_entropy") == 0
    torch.set_num_threads(threads)
    return root


def picture(folder, name, plots="plots"):
    image = Image.open(folder / plots / f"{name}.png").convert("L")
    assert image.width > 400 and image.height > 200
    low, high = image.getextrema()
    assert high == 255 and low < 100, name
    return image


def test_the_page_holds_the_runs_own_figures_and_every_picture(place, capsys):
    assert run("report", place / "one") == 0
    said = capsys.readouterr().out
    page = (place / "one" / "report.html").read_text()
    rows = [json.loads(line) for line in (place / "one" / "log.jsonl").read_text().splitlines()]
    kept = json.loads((place / "one" / "result.json").read_text())["epoch"]
    (last,) = (row for row in rows if row["kind"] == "eval" and row["epoch"] == kept - 1)
    assert f"accuracy {last['accuracy']:.4f}" in said  # the set that the run kept aside
    assert f"<b>{last['accuracy']:.4f}</b>" in page
    for name in ("history", "checks", "classes", "confusion", "calibration", "losses", "worst"):
        picture(place / "one", name)
    assert page.count("data:image/png;base64,") == 7
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert "<td>settings.train.seed</td><td>1</td>" in page
    assert f"checked {sum(row['kind'] == 'check' for row in rows)} steps; 0 were over" in page


def test_several_labels_have_average_precision_and_no_confusion(place):
    out = place / "pages" / "several.html"
    assert run("report", place / "several", "--out", out, "--checkpoint", "best") == 0
    page = out.read_text()
    assert "Average precision of each class" in page and "What it confuses" not in page
    picture(out.parent, "classes", "several_plots")
    assert "all classes of all clips" not in page  # it is in the picture
    assert "mean average precision" in page


def test_the_worst_clips_are_those_of_the_highest_loss(place):
    model = load_model(place / "one" / "model")
    dataset = AudioDataset(read_folder(place / "data"), AudioConfig())
    measured = measure(model, dataset, task="single_label", batch_size=5)
    with torch.no_grad():
        waves = torch.stack([dataset[index].wave for index in range(len(dataset))])
        logits = model.forward_waveform(waves)
    targets = torch.tensor([labels[0] for labels in dataset.labels])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(measured.losses, losses, rtol=1e-4, atol=1e-5)
    assert measured.indices.tolist() == list(range(24))
    out = place / "pages" / "given.html"
    assert run("report", place / "one", "--eval-data", place / "data", "--out", out) == 0
    page = out.read_text()
    table = page[page.index("<th>clip</th>") :]
    listed = re.findall(r"<tr><td>([^<]+\.wav)</td><td>(\w+)</td><td>(\w+) ([\d.]+)</td>", table)
    order = losses.argsort(descending=True).tolist()[:20]
    names = [dataset.manifest.paths[index] for index in order]
    assert sorted(name for name, *_ in listed) == sorted(names) and listed[0][0] == names[0]


def test_broken_clips_are_left_out_of_the_page_and_said(place, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "low" / "00.wav").write_bytes(b"no sound")
    out = tmp_path / "page.html"
    assert run("report", place / "one", "--eval-data", data, "--out", out) == 0
    assert "1 skipped (AudioDecodeError 1)" in capsys.readouterr().out
    assert "<b>23</b><span>clips evaluated" in out.read_text()


def test_a_run_from_python_has_curves_and_says_what_is_missing(place, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(place / "one" / "log.jsonl", bare)
    assert run("report", bare) == 0
    assert "give --eval-data" in capsys.readouterr().out
    assert "Nothing was evaluated" in (bare / "report.html").read_text()
    assert run("report", bare, "--eval-data", place / "data") == 2
    assert "holds no final model" in capsys.readouterr().err
    assert run("report", tmp_path) == 2 and "holds no log.jsonl" in capsys.readouterr().err
    (bare / "run.json").write_text("{")
    assert run("report", bare) == 2 and "is not JSON" in capsys.readouterr().err


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(place, tmp_path):
    lines = (place / "one" / "log.jsonl").read_text().splitlines()
    for count in (1, len(lines) - 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "log.jsonl").write_text("\n".join(lines[:count]) + '\n{"kind": "st')
        assert run("report", folder) == 0
        picture(folder, "history")


def test_runs_that_differ_in_their_seed_are_one_setting(place, tmp_path, capsys):
    found = compare_runs([place / "one", place / "two", place / "slow"])
    assert found.groups == [0, 0, 1]
    assert list(found.different) == ["settings.train.lr"]
    assert found.different["settings.train.lr"] == [5e-4, 5e-4, 1e-5]
    header, rows = figure_table(found)
    assert [row[0] for row in rows] == ["one", "two", "slow"]
    accuracy = [run.final["accuracy"] for run in found.runs]
    assert [row[header.index("accuracy")] for row in rows] == [f"{x:.4f}" for x in accuracy]
    header, rows = seed_table(found)
    mean = (accuracy[0] + accuracy[1]) / 2
    half = 12.706 * abs(accuracy[0] - accuracy[1]) / 2
    assert rows[0][header.index("accuracy")] == f"{mean:.4f} +- {half:.4f}"
    assert rows[1][header.index("accuracy")] == f"{accuracy[2]:.4f}"
    assert setting_table(found)[1] == [["settings.train.lr", "0.0005", "0.0005", "1e-05"]]

    out = tmp_path / "compare.html"
    names = [place / name for name in ("one", "two", "slow")]
    assert run("compare", *names, "--out", out) == 0
    said = capsys.readouterr().out
    assert "settings that differ" in said and "over seeds" in said and "slow" in said
    for name in ("curves", "final_accuracy"):
        picture(tmp_path, name, "compare_plots")
    assert "95 % confidence interval" in out.read_text()


def test_comparing_what_cannot_be_compared_is_said(place, tmp_path, capsys):
    for arguments, says in (
        ((place / "one",), "expected at least two"),
        ((place / "one", place / "one"), "is given twice"),
        ((place / "one", tmp_path), "holds no log.jsonl"),
    ):
        assert run("compare", *arguments, "--out", tmp_path / "c.html") == 2
        assert says in capsys.readouterr().err
    shutil.copytree(place / "one", tmp_path / "one")
    found = compare_runs([place / "one", tmp_path / "one", place / "several"])
    assert [run.name for run in found.runs][:2] == [f"{place.name}/one", f"{tmp_path.name}/one"]
    assert seed_table(found) is not None and {"map", "accuracy"} <= set(found.figures)


def test_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 11, 31, 35, 50, 100, 500):
        values = rng.normal(0.8, 0.02, count)
        low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
        found = interval(values.tolist())
        assert found.mean == pytest.approx(values.mean()) and found.count == count
        assert found.half >= (high - low) / 2 * 0.999  # never too narrow
        assert found.half == pytest.approx((high - low) / 2, rel=1e-3 if count <= 31 else 0.02)
    assert interval([0.5]).half is None and str(interval([0.5])) == "0.5000"


def test_calibration_is_that_of_torchmetrics_and_of_a_hand():
    package = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 7, generator=generator)
    targets = torch.randint(0, 7, (2000,), generator=generator)
    found = reliability(*of_classes(logits.softmax(1), targets), bins=15)
    for norm, mine in (("l1", found.error), ("max", found.largest)):
        theirs = package.multiclass_calibration_error(logits, targets, 7, n_bins=15, norm=norm)
        assert mine == pytest.approx(float(theirs), abs=1e-6)
    several = torch.rand(500, 3, generator=generator)
    truth = (torch.rand(500, 3, generator=generator) < several).float()
    confidence, right = of_classes(several, truth)
    assert confidence.shape == right.shape == (1500,)
    assert reliability(confidence, right).error < 0.05
    assert reliability(1 - confidence, right).error > 0.3
    exact = reliability(torch.tensor([0.1, 0.1, 0.9, 1.0]), torch.tensor([0, 1, 1, 1]), bins=2)
    assert exact.counts.tolist() == [2, 2]
    assert exact.error == pytest.approx((0.4 * 2 + 0.05 * 2) / 4)
    for wrong in (torch.tensor([1.5]), torch.tensor([float("nan")]), torch.empty(0)):
        with pytest.raises(ValueError, match="expected"):
            reliability(wrong, torch.ones(len(wrong)))


def test_many_classes_show_the_worst_and_the_best():
    values = [index / 200 for index in range(200)]
    values[7] = float("nan")
    png = run_plots.class_bars([f"class {i}" for i in range(200)], values, [3] * 200, "Recall")
    assert png[:4] == b"\x89PNG"
    confusion = torch.tensor([[5, 3, 0], [1, 9, 0], [0, 0, 4]])
    rows = run_plots.confused_pairs(confusion, ("a", "b", "c"))
    assert rows == [["a", "b", "3", "38%"], ["b", "a", "1", "10%"]]


def test_reading_a_manifest_again_gives_the_clips_that_were_kept_aside(place):
    plan = RunFolder.read(place / "several").plan
    from ast_fast.run_data import drawn

    train, held = drawn(plan)
    everything = set(read_manifest(place / "several.csv").paths)
    assert set(train.paths) | set(held.paths) == everything
    assert not set(train.paths) & set(held.paths)
