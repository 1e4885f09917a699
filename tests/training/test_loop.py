"""The loop: it learns, repeats itself bit by bit, resumes exactly, and stops when it must."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ast_fast import ASTModel, create_model, use_backend
from ast_fast.config import (
    AugmentConfig,
    AverageConfig,
    LogMelConfig,
    MonitorConfig,
    TrainConfig,
)
from ast_fast.data import WaveformDataset
from ast_fast.equivalence import EquivalenceError
from ast_fast.hub import CheckpointError
from ast_fast.training import NonFiniteLossError, Trainer, TrainingError, TrainingInterrupted
from ast_fast.training.logs import read_log

ROOT = Path(__file__).resolve().parents[2]
FRONT = LogMelConfig(num_mel_bins=32, num_frames=32)
TINY = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 1,
    "input_fdim": 32,
    "input_tdim": 32,
    "frontend_config": FRONT,
}
EVERYTHING = AugmentConfig(
    freq_mask_bins=4,
    time_mask_frames=4,
    mixup=0.5,
    noise=True,
    roll_frames=3,
    roll_waveforms=True,
    gain_db=3.0,
    snr_db=(10.0, 30.0),
)
# mixing alone depends on who shares a batch with whom
BY_CLIP = EVERYTHING.replace(mixup=0.0)
CONFIG = TrainConfig(
    epochs=3, batch_size=8, lr=2e-3, warmup_steps=2, log_every=1, augment=EVERYTHING, seed=5
)
KILLED_CONFIG = CONFIG.replace(checkpoint_every=2, average=AverageConfig(ema=0.9, cumulative=True))

pytestmark = pytest.mark.usefixtures("one_thread")


def tones(count=44, seed=0, multi_label=False):
    generator = torch.Generator().manual_seed(seed)
    waves, labels = [], []
    for index in range(count):
        label = index % 2
        length = 4000 + 100 * (index % 7)
        hz = (300.0, 2500.0)[label] * (1 + 0.2 * float(torch.rand((), generator=generator)))
        time = torch.arange(length) / 16000
        noise = 0.05 * torch.randn(length, generator=generator)
        waves.append(0.3 * torch.sin(2 * torch.pi * hz * time) + noise)
        labels.append((0, 1) if multi_label and index % 5 == 0 else (label,))
    return WaveformDataset(waves, labels, ("low", "high"))


def model(seed=1, **settings):
    torch.manual_seed(seed)
    return create_model("ast_mini_p16_s10", num_classes=2, **{**TINY, **settings})


def trainer(folder, config=CONFIG, network=None, data=None, **options):
    options = {"progress": False, **options}
    return Trainer(network or model(), data or tones(), config, folder, **options)


def weights(trained):
    return {name: value.clone() for name, value in trained.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_evaluates(tmp_path):
    run = trainer(
        tmp_path,
        CONFIG.replace(epochs=12, augment=AugmentConfig()),
        data=tones(120),
        eval_set=tones(40, 1),
    )
    result = run.fit()
    assert result.figures["accuracy"] >= 0.95
    assert int(result.confusion.sum()) == 40 == result.num_clips
    rows = read_log(tmp_path / "log.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    assert len(losses) == 12 * 15 and sum(losses[-15:]) < 0.5 * sum(losses[:15])
    assert [row["epoch"] for row in rows if row["kind"] == "eval"] == list(range(12))


def test_the_same_seed_repeats_bitwise_and_another_does_not(tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run = trainer(tmp_path / name, CONFIG.replace(seed=seed))
        run.fit()
        runs.append(weights(run))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_several_labels_a_clip_train_with_binary_cross_entropy(tmp_path):
    config = CONFIG.replace(loss="binary_cross_entropy", class_balanced=True, epochs=2)
    data = tones(multi_label=True)
    run = trainer(tmp_path, config, data=data, eval_set=data)
    result = run.fit()
    assert {"loss", "map", "auc"} <= set(result.figures) and result.confusion is None
    # what tagging needs to know is saved with the model
    run.model.save_pretrained(tmp_path / "model")
    saved = ASTModel.from_pretrained(tmp_path / "model").config
    assert saved.problem_type == "multi_label_classification"


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_narrow_precisions_train_and_keep_float32_weights(precision, tmp_path):
    run = trainer(tmp_path, CONFIG.replace(precision=precision, epochs=2), eval_set=tones(16, 1))
    assert run.model.precision == ("fp8" if precision == "fp8" else "exact")
    before = weights(run)
    run.fit()
    after = weights(run)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not same(before, after)
    losses = [r["loss"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "step"]
    assert losses[-1] < losses[0]


def test_fp8_has_no_state_to_lose_between_runs(tmp_path):
    config = CONFIG.replace(precision="fp8", monitor=MonitorConfig(check_every=4))
    whole = trainer(tmp_path / "whole", config, eval_set=tones(12, 1))
    whole.fit()
    first = trainer(tmp_path / "parts", config, eval_set=tones(12, 1))
    inner = first._train_step

    def stop(fed, log):
        first._stop = first.step == 7
        return inner(fed, log)

    first._train_step = stop
    with pytest.raises(TrainingInterrupted):
        first.fit()
    second = trainer(tmp_path / "parts", config, eval_set=tones(12, 1), resume=True)
    second.fit()
    assert same(weights(whole), weights(second))
    checks = [r for r in read_log(tmp_path / "whole" / "log.jsonl") if r["kind"] == "check"]
    assert checks and all(row["ok"] and row["precision"] == "fp8" for row in checks)


@pytest.mark.parametrize("stop_at", [1, 4, 6, 7, 11])
def test_a_stopped_run_resumes_to_the_same_bits(stop_at, tmp_path):
    """6 steps an epoch: within the first, at its end, within the second."""
    whole = trainer(tmp_path / "whole", eval_set=tones(12, 1))
    whole.fit()
    first = trainer(tmp_path / "parts", eval_set=tones(12, 1))
    inner = first._train_step

    def stopping(batch, log):
        values = inner(batch, log)
        if first.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    first._train_step = stopping
    with pytest.raises(TrainingInterrupted) as stopped:
        first.fit()
    assert stopped.value.step == stop_at
    assert "saved" in str(stopped.value)
    second = trainer(tmp_path / "parts", network=model(seed=99), eval_set=tones(12, 1), resume=True)
    assert second.step == stop_at
    second.fit()
    assert same(weights(whole), weights(second))
    for parameter, other in zip(whole.parameters.values(), second.parameters.values(), strict=True):
        for name, value in whole.optimizer.state[parameter].items():
            assert torch.equal(value, second.optimizer.state[other][name])

    def rows(name):
        kept = []
        for row in read_log(tmp_path / name / "log.jsonl"):
            kept.append(
                {k: v for k, v in row.items() if k not in ("clips_per_second", "wait_share")}
            )
        return kept

    assert rows("whole") == rows("parts")


KILLED = """
    import os, signal, sys, torch
    import importlib.util
    spec = importlib.util.spec_from_file_location("loop_tests", {tests!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
    run = tests.trainer(
        {folder!r}, tests.KILLED_CONFIG, eval_set=tests.tones(12, 1), resume={resume}
    )
    inner = run._train_step
    def killed(batch, log):
        if run.step == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(batch, log)
    run._train_step = killed
    run.fit()
"""


# steps drawn once; an epoch has six
@pytest.mark.parametrize(
    "kill_at",
    [9, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 4, 8, 11, 13, 16))],
)
def test_a_run_killed_with_sigkill_resumes_to_the_same_bits(kill_at, tmp_path):
    def start(resume, kill_at):
        script = textwrap.dedent(KILLED).format(
            tests=__file__, folder=str(tmp_path / "killed"), resume=resume, kill_at=kill_at
        )
        command = [sys.executable, "-c", script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    assert start(False, kill_at).returncode == -signal.SIGKILL
    last = start(True, -1)
    assert last.returncode == 0, last.stderr
    whole = trainer(tmp_path / "whole", KILLED_CONFIG, eval_set=tones(12, 1))
    whole.fit()
    latest = (tmp_path / "killed" / "checkpoints" / "latest").read_text().strip()
    assert latest == "step-00000018"
    found = load_file(tmp_path / "killed/checkpoints" / latest / "model/model.safetensors")
    assert same(found, weights(whole))
    # optimiser, averaged weights, predictions of all epochs, random state
    states = [
        load_file(tmp_path / name / "checkpoints" / latest / "state.safetensors")
        for name in ("killed", "whole")
    ]
    assert same(*states) and any(name.startswith("average.") for name in states[0])
    assert "cumulative.predictions" in states[0]


def test_a_finished_run_resumes_to_nothing_more_to_do(tmp_path):
    first = trainer(tmp_path)
    first.fit()
    again = trainer(tmp_path, network=model(seed=9), resume=True)
    assert again.fit() is None
    assert same(weights(first), weights(again)) and again.step == first.step


def test_other_settings_cannot_be_resumed_and_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path, CONFIG.replace(epochs=1)).fit()
    with pytest.raises(CheckpointError, match=r"lr=0\.002"):
        trainer(tmp_path, CONFIG.replace(epochs=1, lr=1e-4), resume=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        trainer(tmp_path, CONFIG)
    resumed = trainer(tmp_path, CONFIG.replace(epochs=1, log_every=3), resume=True)
    assert resumed.step == 6  # how often to log may change


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_stops_the_run_with_the_weights_unchanged_and_the_batch_saved(what, tmp_path):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (float("nan") if what == "loss" else 1.0)

        @staticmethod
        def backward(ctx, dy):
            return dy * float("inf")

    run = trainer(tmp_path)
    kept = {}
    inner, original = run._train_step, run.model.mlp_head.forward
    calls = 0

    def poisoned(x):
        nonlocal calls
        calls += 1
        return original(x) if calls < 4 else Poison.apply(original(x))

    run.model.mlp_head.forward = poisoned

    def remembering(batch, log):
        kept.update(weights(run))
        return inner(batch, log)

    run._train_step = remembering
    with pytest.raises(NonFiniteLossError, match="step 3") as caught:
        run.fit()
    assert same(kept, weights(run))
    (saved,) = (tmp_path / "bad-batch").glob("*.safetensors")
    assert saved.name in str(caught.value)
    batch = load_file(saved)
    assert batch["features"].shape == (8, 32, 32) and batch["indices"].shape == (8,)


def test_a_nan_in_one_clip_is_caught_too(tmp_path):
    data = tones()
    data.waves[13][100] = float("nan")
    with pytest.raises(NonFiniteLossError) as caught:
        trainer(tmp_path, CONFIG.replace(augment=AugmentConfig()), data=data).fit()
    (saved,) = (tmp_path / "bad-batch").glob("*.safetensors")
    assert 13 in load_file(saved)["indices"].tolist() and "nan" in str(caught.value)


def test_the_monitor_logs_errors_beside_budgets(tmp_path):
    config = CONFIG.replace(monitor=MonitorConfig(check_every=5), epochs=2)
    trainer(tmp_path, config).fit()
    rows = [row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "check"]
    assert [row["step"] for row in rows] == [0, 5, 10]
    for row in rows:
        assert row["ok"] and row["clips"] == 4
        assert row["logits"][1] <= row["logits_budget"][1]
        assert row["gradient"][1] <= row["gradient_budget"][1]
        assert row["loss_error"] <= row["loss_budget"]


def test_the_monitor_changes_nothing_about_the_run(tmp_path):
    plain = trainer(tmp_path / "a")
    plain.fit()
    watched = trainer(tmp_path / "b", CONFIG.replace(monitor=MonitorConfig(check_every=2)))
    watched.fit()
    assert same(weights(plain), weights(watched))


def test_a_wrong_fast_path_stops_the_run(tmp_path):
    run = trainer(tmp_path, CONFIG.replace(monitor=MonitorConfig(check_every=4)))
    block = run.model.v.blocks[0]
    original = block.attn.forward
    # attention that is off by a thousandth: far too little to see in a loss curve
    block.attn.forward = lambda x: original(x) * 1.001
    with pytest.raises(EquivalenceError, match="differs from the reference"):
        run.fit()


def test_a_training_set_without_a_readable_clip_is_an_error(tmp_path):
    from ast_fast.data import AudioDataset, read_folder

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.wav").write_bytes(b"nothing")
    data = AudioDataset(read_folder(tmp_path / "data"))
    with pytest.raises(TrainingError, match=r"2 skipped \(AudioDecodeError 2\)"):
        trainer(tmp_path / "run", data=data).fit()


def test_the_log_of_steps_done_again_is_replaced_not_repeated(tmp_path):
    run = trainer(tmp_path, CONFIG.replace(checkpoint_every=4, epochs=1))
    inner = run._train_step

    def failing(batch, log):
        if run.step == 5:
            raise RuntimeError("power cut")
        return inner(batch, log)

    run._train_step = failing
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')  # cut short by the crash
    trainer(tmp_path, CONFIG.replace(checkpoint_every=4, epochs=1), resume=True).fit()
    steps = [r["step"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_plain_pytorch_trains_alike(tmp_path):
    """The same run on the reference backend ends where ours does, up to rounding."""
    config = CONFIG.replace(epochs=1, augment=AugmentConfig(freq_mask_bins=4))
    ours = trainer(tmp_path / "ours", config)
    ours.fit()
    with use_backend("reference"):
        plain = trainer(tmp_path / "plain", config)
        plain.fit()

    def losses(name):
        return torch.tensor(
            [r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "step"]
        )

    torch.testing.assert_close(losses("ours"), losses("plain"), rtol=1e-4, atol=0)


TWO = """
    import importlib.util, sys, torch
    spec = importlib.util.spec_from_file_location("loop_tests", {tests!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
    config = tests.CONFIG.replace(
        devices=2, accelerator="cpu", epochs=2, augment=tests.BY_CLIP, checkpoint_every=3,
        accumulate={parts},
    )
    tests.trainer({folder!r}, config, data=tests.tones(40), eval_set=tests.tones(11, 1)).fit()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_train_as_one_with_the_same_batches(parts, tmp_path):
    """And evaluate as one: 11 clips do not split evenly."""
    script = tmp_path / "two.py"
    folder = tmp_path / "two"
    script.write_text(textwrap.dedent(TWO).format(tests=__file__, folder=str(folder), parts=parts))
    # a script has its own folder on its path, not the checkout's
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    config = CONFIG.replace(epochs=2, augment=BY_CLIP)
    trainer(tmp_path / "one", config, data=tones(40), eval_set=tones(11, 1)).fit()

    def figures(name):
        rows = read_log(tmp_path / name / "log.jsonl")
        return torch.tensor([row["loss"] for row in rows if row["kind"] in ("step", "eval")])

    torch.testing.assert_close(figures("two"), figures("one"), rtol=1e-3, atol=1e-5)
