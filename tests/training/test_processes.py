"""Several processes: started by torchrun, and when one of them dies."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "model=ast_mini_p16_s10",
    "frontend.num_frames=32",
    "frontend.num_mel_bins=32",
    "train.epochs=2",
    "train.batch_size=8",
    "train.devices=2",
    "train.accelerator=cpu",
    "train.log_every=1",
)


def torchrun(*arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import numpy as np
    import soundfile as sf

    root = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    for name in ("high", "low"):
        (root / name).mkdir()
        for index in range(12):
            sf.write(root / name / f"{index}.wav", 0.1 * rng.standard_normal(4000), 16000)
    return root


@pytest.mark.slow
def test_torchrun_starts_the_command_line_with_several_seeds(data, tmp_path):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    done = torchrun(
        *("-m", "ast_fast", "--", "train", "--data", data, "--run", tmp_path / "run"),
        *("--seeds", "1", "2", "--holdout", "0.25", *settings),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["runs"]) == ["seed-1", "seed-2"]
    assert done.stdout.count("mean of 2 runs") == 1  # one process speaks for all
    assert "files, each once an epoch: 36 clips read" in done.stdout  # those of both


DYING = """
    import importlib.util, os, torch
    spec = importlib.util.spec_from_file_location("loop_tests", {tests!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
    config = tests.CONFIG.replace(devices=2, accelerator="cpu", augment=tests.BY_CLIP)
    run = tests.trainer({folder!r}, config, data=tests.tones(40))
    inner = run._train_step
    def dying(fed, log):
        if run.step == 3 and run.fabric.global_rank == 1:
            os._exit(17)
        return inner(fed, log)
    run._train_step = dying
    run.fit()
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_all_of_them_within_a_minute(tmp_path):
    script = tmp_path / "dying.py"
    tests = str(Path(__file__).with_name("test_loop.py"))
    script.write_text(textwrap.dedent(DYING).format(tests=tests, folder=str(tmp_path / "run")))
    started = time.monotonic()
    done = torchrun(script)
    assert done.returncode != 0 and "exitcode  : 17" in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_machines_of_one_process_train_as_one(strategy, data, tmp_path):
    """Two launchers that meet on this machine stand for the machines."""
    settings = [s for s in SETTINGS if "devices" not in s]
    settings = [part for setting in settings for part in ("--set", setting)]
    common = [*("-m", "ast_fast", "--", "train", "--data", str(data)), "--holdout", "0.25"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "localhost")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *meet, "--master-port", str(port)),
                *("--node-rank", str(rank), *common, "--run", str(tmp_path / "two"), *settings),
                *("--set", f"train.strategy={strategy}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    one = subprocess.run(
        [
            *(sys.executable, "-m", "ast_fast", *common[3:]),
            "--run",
            str(tmp_path / "one"),
            *settings,
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert one.returncode == 0, one.stderr
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses.append([row["loss"] for row in rows if row["kind"] in ("step", "eval")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
