"""Rates against the original's loop, simulated with PyTorch's own scheduler."""

import itertools

import pytest
import torch

from ast_fast.config import AverageConfig, TrainConfig
from ast_fast.training.recipe import list_recipes, read_config
from ast_fast.training.schedules import rate_factor, run_factor, stairs_factor


def originals_rates(epochs, epoch_steps, start, every, gamma, warmup):
    """What the original's loop sets: a staircase by hand, MultiStepLR once an epoch."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, list(range(start, 1000, every)), gamma=gamma
    )
    rates, step = [], 0
    for _ in range(epochs):
        for _ in range(epoch_steps):
            if warmup and step <= 1000 and step % 50 == 0:
                for group in optimizer.param_groups:
                    group["lr"] = step / 1000
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            step += 1
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(
    ("epochs", "epoch_steps", "start", "every", "gamma"),
    [(5, 400, 2, 1, 0.5), (25, 90, 10, 5, 0.5), (30, 37, 5, 1, 0.85), (8, 250, 1, 1, 0.5), (3, 1001, 1, 2, 0.1)],
)  # fmt: skip
def test_stairs_are_the_originals_to_the_last_step(
    epochs, epoch_steps, start, every, gamma, warmup
):
    expected = originals_rates(epochs, epoch_steps, start, every, gamma, warmup)
    found = [
        stairs_factor(step, epoch_steps, start, every, gamma, 1000 if warmup else 0)
        for step in range(epochs * epoch_steps)
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


# starts, steps, decays of the table of recipes; warm-up or not
ORIGINALS = {
    "audioset": (1e-5, 5, 12, 2, 1, 0.5, True),
    "audioset-balanced": (5e-5, 25, 12, 10, 5, 0.5, True),
    "esc50": (1e-5, 25, 48, 5, 1, 0.85, False),
    "speechcommands": (2.5e-4, 30, 128, 5, 1, 0.85, False),
}


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_recipes_run_at_the_originals_rates(name):
    lr, epochs, batch, start, every, gamma, warmup = ORIGINALS[name]
    config = read_config(name).train
    assert (config.lr, config.epochs, config.batch_size) == (lr, epochs, batch)
    assert (config.optimizer, config.weight_decay, config.betas) == ("adam", 5e-7, (0.95, 0.999))
    assert config.grad_clip == 0.0 and config.accumulate == 1
    expected = originals_rates(epochs, 120, start, every, gamma, warmup)
    found = [run_factor(config, step, 120) for step in range(epochs * 120)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_every_recipe_reads_and_says_what_it_is_for():
    assert set(ORIGINALS) < set(list_recipes())
    for name in list_recipes():
        config = read_config(name)
        assert config.train.task_of_run == config.train.task and config.frontend is not None
    averaged = read_config("audioset-balanced").train.average
    assert (averaged.first_epoch, averaged.last_epoch, averaged.cumulative) == (6, 25, True)
    assert read_config("audioset").train.class_balanced
    assert not read_config("audioset-balanced").train.class_balanced
    augment = read_config("speechcommands").train.augment
    assert (augment.freq_mask_bins, augment.time_mask_frames, augment.mixup) == (48, 48, 0.6)
    assert augment.noise and augment.roll_frames == 10
    assert read_config("music-emotion").train.task == "regression"


def test_settings_of_a_recipe_may_be_changed_and_misspelt_ones_are_named():
    config = read_config("esc50", ["weights=imagenet", "train.lr=1e-4", "train.augment.mixup=0.5"])
    assert (config.weights, config.train.lr, config.train.augment.mixup) == ("imagenet", 1e-4, 0.5)
    with pytest.raises(ValueError, match=r"esc50: TrainConfig has no setting learning_rate"):
        read_config("esc50", ["train.learning_rate=1"])
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a recipe.*speechcommands"):
        read_config("esc-50")


def test_a_staircase_before_a_cosine_and_a_line_before_stairs():
    staircase = TrainConfig(epochs=4, warmup="staircase", warmup_steps=100, schedule="cosine")
    rates = [run_factor(staircase, step, 100) for step in range(400)]
    assert rates[:6] == [0.0] * 5 + [0.05] and rates[100] == 1.0 and rates[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    stairs = TrainConfig(epochs=4, warmup_steps=10, schedule="stairs", decay_start=1)
    rates = [run_factor(stairs, step, 100) for step in range(400)]
    assert rates[:2] == [0.1, 0.2] and rates[9:12] == [1.0] * 3
    assert [rates[100], rates[200], rates[300]] == [0.5, 0.25, 0.125]
    usual = TrainConfig(epochs=4)
    assert run_factor(usual, 7, 100) == rate_factor(7, 400, usual.warmup_steps, "cosine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "steps"}, "schedule='steps': expected one of constant, cosine, stairs"),
        ({"decay_factor": 0.0}, "decay_factor=0.0"),
        ({"task": "regression"}, "task='regression' with loss='cross_entropy': expected single"),
        ({"loss": "mean_squared_error", "class_balanced": True}, "there are no classes"),
        ({"reproduce": ("sigmoids",)}, "expected some of sigmoid_validation_loss"),
        ({"reproduce": ("truncated_labels",), "loss": "binary_cross_entropy"}, "is a fault of"),
        ({"divergence": 0.5}, "divergence=0.5: expected 0"),
        ({"accumulate": 0}, "accumulate=0: expected at least 1"),
        (
            {"epochs": 3, "average": AverageConfig(first_epoch=2, last_epoch=25)},
            "average.last_epoch=25: expected at most epochs=3; set them too",
        ),
        ({"epochs": 3, "average": AverageConfig(first_epoch=6)}, "average.first_epoch=6"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
