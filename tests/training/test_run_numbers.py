"""Reports on runs that predict numbers: figures by scikit-learn, and pictures with something in them."""

import math
import re

import numpy as np
import pytest
import soundfile as sf
import torch
from sklearn import metrics as oracle

from ast_fast import cli
from ast_fast.run_numbers import fits, scatter

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


def made(count, noise=0.4, targets=2):
    rng = np.random.default_rng(count)
    true = rng.normal(5.0, 1.2, (count, targets))
    return torch.from_numpy(0.7 * true + 1.5 + noise * rng.normal(size=true.shape)).float(), (
        torch.from_numpy(true).float()
    )


def test_figures_are_those_of_scikit_learn():
    said, true = made(200, targets=3)
    for place, fit in enumerate(fits(("a", "b", "c"), said, true)):
        one, two = true[:, place].double().numpy(), said[:, place].double().numpy()
        assert fit.name == "abc"[place]
        assert fit.r2 == pytest.approx(oracle.r2_score(one, two))
        assert fit.rmse == pytest.approx(oracle.root_mean_squared_error(one, two))
        assert fit.mae == pytest.approx(oracle.mean_absolute_error(one, two))
        assert fit.bias == pytest.approx((two - one).mean())
        assert fit.spread == pytest.approx(one.std())


def test_a_target_that_never_changes_has_no_r2():
    (fit,) = fits(("a",), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [3.0]]))
    assert math.isnan(fit.r2) and fit.spread == 0 and fit.mae == 1.5


def colours(png):
    """Shares of pixels that are drawn in the colour of points (or of density), and of the mean line."""
    image = np.asarray(Image.open(png).convert("RGB")).astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    points = (blue - red > 30).mean()
    line = ((red > 180) & (green < 110) & (blue < 130)).mean()
    return float(points), float(line), image.shape


@pytest.mark.parametrize(
    ("count", "targets"), [(1, 1), (2, 2), (40, 2), (5000, 3), (60, 4), (60, 9)]
)
def test_the_picture_shows_points_and_what_is_left_over(tmp_path, count, targets):
    said, true = made(count, targets=targets)
    file = tmp_path / "picture.png"
    file.write_bytes(scatter([f"target {n}" for n in range(targets)], said, true))
    points, line, shape = colours(file)
    assert points > (2e-5 if count < 3 else 1e-3)
    assert line > 1e-5
    columns = 2 if targets == 4 else min(3, targets)
    rows = -(-min(targets, 6) // columns)
    assert shape[0] == 768 * rows and shape[1] == pytest.approx(120 * (1.2 + 3.6 * columns), abs=2)


def test_constant_and_wild_values_are_drawn(tmp_path):
    same = torch.full((5, 1), 3.0)
    assert scatter(("a",), same, same)
    assert scatter(("a",), torch.tensor([[-1e20], [1e20], [0.0]]), torch.zeros(3, 1))


def test_the_page_of_a_run_that_predicts_numbers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = ["path,pitch,level"]
    for index in range(24):
        hz, level = 200 + 100 * index, 0.05 + 0.01 * (index % 5)
        at = np.arange(4000 + 50 * index) / 16000
        sf.write(tmp_path / f"{index:02}.wav", level * np.sin(2 * np.pi * hz * at), 16000)
        lines.append(f"{index:02}.wav,{hz / 1000 + 0.01 * rng.normal():.4f},{10 * level:.4f}")
    (tmp_path / "songs.csv").write_text("\n".join(lines))
    arguments = ["train", "--data", tmp_path / "songs.csv", "--values", "pitch", "level"]
    settings = ("train.epochs=2", "train.batch_size=8", "train.loss=mean_squared_error")
    settings += (
        "frontend.num_mel_bins=32",
        "frontend.num_frames=32",
        "train.monitor.check_every=0",
    )
    options = ["--run", tmp_path / "run", "--holdout", "0.5"]
    options += [part for setting in settings for part in ("--set", setting)]
    assert cli.main([str(part) for part in (*arguments, *options)]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Predicted and true values" in page and "calibration" not in page
    rows = re.findall(r"<tr><td>(pitch|level)</td>(.*?)</tr>", page)
    assert [name for name, _ in rows] == ["pitch", "level"]
    cells = [[float(cell) for cell in re.findall(r">(-?[\d.]+)<", row)] for _, row in rows]
    assert all(len(row) == 5 for row in cells)
    # the card above shows the mean over targets
    r2 = float(re.search(r"(-?[\d.]+)</\w+>\s*<\w+[^>]*>R2", page).group(1))
    assert r2 == pytest.approx(np.mean([row[0] for row in cells]), abs=2e-4)
    points, line, _ = colours(tmp_path / "run" / "plots" / "values.png")
    assert points > 1e-4 and line > 1e-4
    # on a table of other clips, whose columns are the model's
    options = ["--eval-data", tmp_path / "songs.csv", "--out", tmp_path / "all.html"]
    assert cli.main([str(part) for part in ("report", tmp_path / "run", *options)]) == 0
    whole = (tmp_path / "all.html").read_text()
    assert "Predicted and true values" in whole and "24</" in whole
