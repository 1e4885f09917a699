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
import torch

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


FIRST_STEP = """
    import importlib.util, sys, torch
    spec = importlib.util.spec_from_file_location("loop_tests", {tests!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
    folder, devices, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = tests.CONFIG.replace(
        devices=devices, accelerator="cpu", augment=tests.BY_CLIP, epochs=1, accumulate=parts,
        batch_size=12, grad_clip=0.0,
    )
    run = tests.trainer(folder, config, data=tests.tones(12))
    found = []
    def keep(*_):
        found.append({{name: p.grad.clone() for name, p in run.model.named_parameters()}})
    run.optimizer.register_step_pre_hook(keep)
    run.fit()
    if run.fabric.global_rank == 0:
        torch.save(found, f"{{folder}}/gradients.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Of one batch, in one part and in two: within the rounding of float32."""
    script = tmp_path / "first_step.py"
    tests = str(Path(__file__).with_name("test_loop.py"))
    script.write_text(textwrap.dedent(FIRST_STEP).format(tests=tests))
    found = {}
    for devices, parts in ((1, 1), (2, 1), (2, 2)):
        folder = tmp_path / f"{devices}-{parts}"
        # one process starts the other, as from Python
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(devices), str(parts)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        # Fabric wraps the optimizer, whose hooks then run twice a step: before anything changed
        found[devices, parts] = torch.load(folder / "gradients.pt")[0]
    one = found.pop((1, 1))
    scale = torch.cat([each.double().flatten() for each in one.values()]).norm()
    assert scale > 0 and len(one) > 20
    for case, two in found.items():
        assert two.keys() == one.keys()
        off = torch.cat([(two[k].double() - one[k].double()).flatten() for k in one]).norm()
        assert off <= 1e-6 * scale, (case, float(off / scale))


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
