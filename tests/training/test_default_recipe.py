"""What a newcomer's run comes to: length and settings from the clips, explicit settings win, and all of it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import ASTModel, cli, create_model
from ast_fast.training.default_recipe import (
    MOST_FRAMES,
    default_recipe,
    frames_for,
    stride_for,
)
from ast_fast.training.recipe import RunConfig, merged

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("train.epochs=1", "frontend.num_mel_bins=32")


def sounds(place, seconds, count=8):
    """Two classes of clips that last so long, in turns."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
        for index in range(count):
            length = seconds[index % len(seconds)]
            sf.write(place / name / f"{index}.wav", 0.1 * rng.random(round(length * 16000)), 16000)
    return place


def train(data, run, *arguments, sets=QUICK):
    options = [part for setting in sets for part in ("--set", setting)]
    return cli.main(
        ["train", "--data", str(data), "--run", str(run), *map(str, arguments), *options]
    )


def settings(run):
    return json.loads((run / "run.json").read_text())["settings"]


# ---- the length


@pytest.mark.parametrize(("patch", "stride"), [(16, 10), (16, 16), (4, 1), (32, 7)])
def test_a_length_holds_the_frames_asked_for_in_whole_patches(patch, stride):
    before = 0
    for wanted in sorted((0, 1, patch, patch + 1, 26, 27, 98, 500, 1000)):
        frames = frames_for(wanted, patch, stride)
        assert frames >= max(wanted, before) and (frames - patch) % stride == 0
        assert frames == patch or frames - wanted < stride
        before = frames
    most = frames_for(10**9, patch, stride)
    assert (
        MOST_FRAMES - stride
        < most
        == frames_for(MOST_FRAMES + stride, patch, stride)
        <= MOST_FRAMES
    )


@pytest.mark.parametrize("numbers", [(-1, 16, 10), (5, 0, 10), (5, 16, 0)])
def test_a_length_of_nonsense_is_refused(numbers):
    with pytest.raises(ValueError, match="expected at least"):
        frames_for(*numbers)


def test_the_length_is_that_of_the_clips_and_is_said(tmp_path, capsys):
    data = sounds(tmp_path / "data", [1.2])
    assert train(data, tmp_path / "run", "--holdout", "0") == 0
    # 19200 samples are 118 frames, and 126 the next length of whole patches
    assert settings(tmp_path / "run")["frontend"]["num_frames"] == 126
    model = ASTModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.input_tdim == model.frontend_config.num_frames == 126
    said = capsys.readouterr().out
    assert (
        "length: the model hears 126 frames, 1.28 s: of 16 of 16 training clips 95% last at most 1.20 s"
        in said
    )
    assert "cut to the model's input length" not in said


def test_a_length_that_is_said_wins(tmp_path, capsys):
    data = sounds(tmp_path / "data", [1.2])
    sets = (*QUICK, "frontend.num_frames=36")
    assert train(data, tmp_path / "run", "--holdout", "0", sets=sets) == 0
    assert settings(tmp_path / "run")["frontend"]["num_frames"] == 36
    said = capsys.readouterr().out
    assert (
        "95% last at most" not in said
        and "the model hears 36 frames, 0.38 s: of longer clips the start" in said
    )


def test_one_long_clip_does_not_set_the_length_and_the_longest_is_said(tmp_path, capsys):
    data = sounds(tmp_path / "data", [0.5] * 39 + [6.0], count=40)
    assert train(data, tmp_path / "run", "--holdout", "0") == 0
    assert settings(tmp_path / "run")["frontend"]["num_frames"] == 56
    said = capsys.readouterr().out
    assert (
        "95% last at most 0.50 s, the longest 6.00 s" in said
        and "of longer clips the start" in said
    )


def test_a_recipe_file_without_a_length_takes_that_of_the_clips(tmp_path):
    data = sounds(tmp_path / "data", [0.5])
    recipe = tmp_path / "own.toml"
    recipe.write_text('model = "ast_mini_p16_s10"\n[train]\nepochs = 1\nlr = 2e-4\n')
    arguments = ["train", recipe, "--data", data, "--run", tmp_path / "own", "--holdout", "0"]
    assert cli.main(list(map(str, arguments))) == 0
    found = settings(tmp_path / "own")
    assert found["frontend"] == {"num_frames": 56} and found["train"]["lr"] == 2e-4
    # the rest is as the file has it, or as it always was
    assert found["statistics"] == "given" and found["train"]["augment"]["gain_db"] == 0.0


# ---- the other settings


def test_every_setting_of_the_default_is_an_ordinary_one_that_a_run_takes():
    for clips in (1, 2, 31, 32, 33, 500, 10_000, 2_000_000):
        for frames in (16, 26, 106, MOST_FRAMES):
            for loss in ("cross_entropy", "binary_cross_entropy", "mean_squared_error"):
                values = default_recipe(clips, 5, frames, loss=loss)
                values["frontend"] = {"num_frames": frames}
                found = RunConfig.from_dict(merged(values, {"train": {"loss": loss}}))
                assert 0 <= found.train.augment.time_mask_frames <= frames
                assert found.train.augment.freq_mask_bins <= 64
                assert 0 <= found.train.augment.roll_frames < frames


def test_more_clips_take_fewer_epochs_and_never_fewer_steps():
    epochs, steps = [], []
    for clips in (1, 10, 100, 200, 500, 1000, 5000, 100_000):
        train = default_recipe(clips, 10, 106)["train"]
        epochs.append(train["epochs"])
        steps.append(train["epochs"] * -(-clips // train["batch_size"]))
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] >= 10
    assert steps[-1] > steps[0]


@pytest.mark.parametrize("place", range(3))
def test_nonsense_is_refused_by_name(place):
    numbers = [100, 10, 106]
    numbers[place] = 0
    name = ("num_clips", "num_classes", "num_frames")[place]
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        default_recipe(*numbers)


def test_the_default_is_used_and_said_and_what_is_set_wins(tmp_path, capsys):
    data = sounds(tmp_path / "data", [0.5])
    sets = (*QUICK, "train.augment.gain_db=1.0")
    assert train(data, tmp_path / "run", "--holdout", "0", sets=sets) == 0
    found, wanted = settings(tmp_path / "run"), default_recipe(16, 2, 56)
    assert "default recipe for 16 clips of 2 classes" in capsys.readouterr().out
    assert found["statistics"] == wanted["statistics"] == "measure"
    assert found["train"]["epochs"] == 1 and found["train"]["augment"]["gain_db"] == 1.0
    assert found["train"]["label_smoothing"] == wanted["train"]["label_smoothing"]
    masks = wanted["train"]["augment"]["time_mask_frames"]
    assert found["train"]["augment"]["time_mask_frames"] == masks


def test_a_model_that_is_named_is_trained_as_before(tmp_path, capsys):
    data = sounds(tmp_path / "data", [0.5])
    sets = (*QUICK, "model=ast_mini_p16_s10")
    assert train(data, tmp_path / "run", "--holdout", "0", sets=sets) == 0
    found = settings(tmp_path / "run")
    assert found["train"]["lr"] == 5e-4 and found["train"]["label_smoothing"] == 0.0
    assert found["frontend"]["num_frames"] == 56
    assert found["sizes"] is None
    assert "default recipe" not in capsys.readouterr().out


def test_runs_of_several_seeds_and_folds_are_of_one_setting(tmp_path):
    data = sounds(tmp_path / "data", [0.5, 0.7, 0.9])
    assert train(data, tmp_path / "runs", "--holdout", "0.25", "--seeds", "3", "4") == 0
    first, second = (settings(tmp_path / "runs" / f"seed-{seed}") for seed in (3, 4))
    assert first["train"].pop("seed") == 3 and second["train"].pop("seed") == 4
    assert first == second and first["statistics"] == "measure"
    # the second begins again with what the first decided, however the clips are now
    (tmp_path / "runs" / "seed-4" / "result.json").unlink()
    assert cli.main(["train", "--run", str(tmp_path / "runs"), "--resume"]) == 0
    assert settings(tmp_path / "runs" / "seed-4")["train"]["lr"] == first["train"]["lr"]


def test_long_clips_have_fewer_patches_and_large_sets_the_larger_model():
    assert [stride_for(frames) for frames in (16, 416, 417, 1024)] == [10, 10, 16, 16]
    short, long = (default_recipe(100, 2, frames)["sizes"] for frames in (416, 417))
    assert "tstride" not in short and short["fstride"] == 6
    assert long["tstride"] == long["fstride"] == 16
    small, large = (default_recipe(clips, 2, 106)["sizes"] for clips in (2000, 2001))
    assert small["embed_dim"] == 96 and "embed_dim" not in large


def test_a_stride_that_is_set_shapes_the_length(tmp_path):
    data = sounds(tmp_path / "data", [0.5])
    sets = (*QUICK, "sizes.tstride=16", "sizes.depth=1")
    assert train(data, tmp_path / "run", "--holdout", "0", sets=sets) == 0
    found = settings(tmp_path / "run")
    # 48 frames
    assert found["frontend"]["num_frames"] == 48 and found["sizes"]["depth"] == 1
    assert found["sizes"]["embed_dim"] == 96


@pytest.mark.parametrize("frames", [106, 1016])
@pytest.mark.parametrize("clips", [100, 5000])
def test_every_mel_bin_is_in_a_patch(frames, clips):
    sizes = {"input_fdim": 64, "input_tdim": frames, **default_recipe(clips, 2, frames)["sizes"]}
    model = create_model("ast_mini_p16_s10", num_classes=2, **sizes).eval()
    x = torch.zeros(1, frames, 64, requires_grad=True)
    model(x).sum().backward()
    assert (x.grad.abs().amax((0, 1)) > 0).all()
