"""Training runs with patchout: the setting reaches the model, and the draws belong to the steps."""

from __future__ import annotations

import pytest
import torch

from ast_fast import create_model
from ast_fast.config import AugmentConfig, LogMelConfig, MonitorConfig, TrainConfig
from ast_fast.data import WaveformDataset
from ast_fast.training import Trainer
from ast_fast.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    epochs=2,
    batch_size=8,
    lr=2e-3,
    warmup_steps=2,
    log_every=1,
    seed=5,
    augment=AugmentConfig(patchout_time=2, patchout_frequency=1, patchout_patches=1),
    monitor=MonitorConfig(check_every=2),
)


def network():
    torch.manual_seed(1)
    return create_model(
        "ast_mini_p16_s10",
        num_classes=2,
        embed_dim=32,
        depth=1,
        num_heads=1,
        input_fdim=48,
        input_tdim=48,
        frontend_config=LogMelConfig(num_mel_bins=48, num_frames=48),
    )


def noise(count=24):
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(5000, generator=generator) for _ in range(count)]
    return WaveformDataset(waves, [(i % 2,) for i in range(count)], ("a", "b"))


def trained(folder, config=CONFIG, **options):
    run = Trainer(network(), noise(), config, folder, progress=False, **options)
    run.fit()
    return run


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_uses_it_and_the_monitor_agrees_on_the_kept_tokens(tmp_path):
    run = trained(tmp_path)
    assert run.model.patchout.num_kept == (4 - 2) * (4 - 1) - 1
    checks = [row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "check"]
    assert len(checks) == 3 and all(row["ok"] for row in checks)


def test_draws_belong_to_steps(tmp_path):
    first = trained(tmp_path / "a")
    # the last step was number 5, and its call counted on
    assert int(first.model.patchout.step) == 6
    unchecked = trained(tmp_path / "b", CONFIG.replace(monitor=MonitorConfig()))
    assert same(weights(first), weights(unchecked))
    whole = trained(tmp_path / "c", CONFIG.replace(augment=AugmentConfig()))
    assert whole.model.patchout is None and not same(weights(first), weights(whole))


def test_a_resumed_run_repeats_the_draws(tmp_path):
    whole = trained(tmp_path / "whole")
    run = Trainer(network(), noise(), CONFIG, tmp_path / "parts", progress=False)
    inner = run._train_step

    def stopping(fed, log):
        run._stop = run.step == 3
        return inner(fed, log)

    run._train_step = stopping
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 4"):
        run.fit()
    resumed = trained(tmp_path / "parts", resume=True)
    assert same(weights(whole), weights(resumed))


def test_a_setting_that_leaves_nothing_is_refused_before_training(tmp_path):
    config = CONFIG.replace(augment=AugmentConfig(patchout_time=4))
    with pytest.raises(ValueError, match=r"time=4: expected 0 to 3"):
        Trainer(network(), noise(), config, tmp_path, progress=False)
    with pytest.raises(ValueError, match="patchout_time=-1"):
        AugmentConfig(patchout_time=-1)
