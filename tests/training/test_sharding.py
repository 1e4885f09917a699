"""FSDP2 on two processes: the same training as on one, with half of everything in each."""

import importlib.util
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

from ast_fast import ASTModel
from ast_fast.config import AverageConfig, DistillConfig, MonitorConfig, TrainConfig, TuneConfig
from ast_fast.data import AudioDataset, read_folder
from ast_fast.training import TrainingError, evaluate
from ast_fast.training.logs import read_log
from ast_fast.training.sharding import shard

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "loop_of_sharding", Path(__file__).with_name("test_loop.py")
)
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
# 36 clips are three whole batches: a short one is filled up where there are several processes
CONFIG = loop.CONFIG.replace(
    epochs=2, batch_size=12, augment=loop.BY_CLIP, checkpoint_every=2, accelerator="cpu"
)
QUICK = {
    "plain": {},
    "averaged": {
        "accumulate": 2,
        "average": AverageConfig(ema=0.9, cumulative=True),
        "monitor": MonitorConfig(check_every=3),
    },
    "tuned": {
        "tune": TuneConfig(freeze=("v.blocks.0.*",), layer_decay=0.7, head_rate=3.0),
        "optimizer": "adam",
        "grad_clip": 0.05,
    },
}
SLOW = {
    "mean": {"average": AverageConfig(first_epoch=1), "grad_clip": 0.0},
    "less": {"activation_memory": "less", "accumulate": 3},
    "least": {"activation_memory": "least"},
    "taught": {"distill": DistillConfig(weight=0.7, temperature=2.0)},
    "patchout": {"augment": loop.BY_CLIP.replace(patchout_patches=1)},
    "compiled": {"compile": "regional"},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16-master": {
        "precision": "bfloat16-master",
        "accumulate": 2,
        "activation_memory": "least",
        "monitor": MonitorConfig(check_every=2),
    },
    "float16": {"precision": "float16"},
    "fp8": {"precision": "fp8"},
}
CASES = QUICK | SLOW
NARROW = ("bfloat16", "bfloat16-master", "float16", "fp8")

pytestmark = pytest.mark.usefixtures("one_thread")


def start(folder, case, strategy="fsdp2", devices=2, **options):
    """A run of the case, from weights that only the first process has."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    config = CONFIG.replace(strategy=strategy, devices=devices, **CASES[case])
    return loop.trainer(
        folder,
        config,
        network=loop.model(seed=1 + rank, depth=2),
        data=loop.tones(36),
        eval_set=loop.tones(11, 1),
        teacher=loop.model(seed=7, depth=2) if case == "taught" else None,
        **options,
    )


def numbers(tensors):
    return sum(each.numel() for each in tensors)


def complete(folder, case, strategy="fsdp2"):
    """Train a case to its end and note what this process holds."""
    run = start(folder / case, case, strategy)
    run.fit()
    run.save_model(folder / case / "model")
    state = [value for each in run.optimizer.state.values() for value in each.values()]
    held = {
        "weights": numbers(p.to_local() for p in run.model.parameters()),
        "all": numbers(run.model.parameters()),
        "updated": numbers(run.parameters.values()),
        "optimizer": numbers(value for value in state if value.dim()),
        "gradients": numbers(p.grad for p in run.parameters.values()),
        "average": numbers(run.average.weights().values()),
    }
    (folder / f"{case}-{run.fabric.global_rank}.json").write_text(json.dumps(held))


PREAMBLE = f"""
    import importlib.util, os, signal, torch
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("sharding_tests", {__file__!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
"""


def launch(folder, script, **how):
    file = folder / "script.py"
    file.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(script))
    return launched(file, **how)


def launched(*arguments, torchrun=True, processes=2):
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += [
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )


def all_of(folder, cases, torchrun):
    script = f"""
        for case in {list(cases)!r}:
            tests.complete(Path({str(folder)!r}), case)
    """
    done = launch(folder, textwrap.dedent(script), torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The processes are started by the trainer itself."""
    return all_of(tmp_path_factory.mktemp("sharded"), QUICK, torchrun=False)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return all_of(tmp_path_factory.mktemp("sharded"), SLOW, torchrun=True)


def figures(folder, *names):
    rows = [row for row in read_log(folder / "log.jsonl") if row["kind"] != "check"]
    return torch.tensor([row.get(name, 0.0) for row in rows for name in names])


def alone(folder, case):
    run = start(folder, case, strategy="ddp", devices=1)
    run.fit()
    run.save_model(folder / "model")
    return run


def same_as_alone(together, folder, case):
    alone(folder, case)
    close = {"rtol": 3e-2, "atol": 1e-3} if case in NARROW else {"rtol": 1e-5, "atol": 1e-6}
    names = ("loss",) if case in NARROW else ("loss", "grad_norm")
    torch.testing.assert_close(figures(together, *names), figures(folder, *names), **close)
    found, wanted = (load_file(each / "model/model.safetensors") for each in (together, folder))
    assert found.keys() == wanted.keys()
    checks = [
        [(row["step"], row["ok"]) for row in read_log(each / "log.jsonl") if row["kind"] == "check"]
        for each in (together, folder)
    ]
    assert checks[0] == checks[1] and all(ok for _, ok in checks[0])
    # Adam takes steps of full length where a gradient is rounding alone: some weights may wander
    for name, value in {} if case in NARROW else wanted.items():
        distance = (found[name] - value).norm() / value.norm().clamp(min=1.0)
        assert distance < 1e-3, name


@pytest.mark.parametrize("case", QUICK)
def test_two_sharded_processes_train_as_one(case, quick, tmp_path):
    same_as_alone(quick / case, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_every_way_to_train_can_be_sharded(case, slow, tmp_path):
    """float16 and fp8 overflow and round by the batch of a process: loosely the same."""
    if case not in ("float16", "fp8"):
        same_as_alone(slow / case, tmp_path, case)
        return
    done = launch(tmp_path, f"tests.start({str(tmp_path / 'ddp')!r}, {case!r}, 'ddp').fit()")
    assert done.returncode == 0, done.stderr
    found, wanted = figures(slow / case, "loss"), figures(tmp_path / "ddp", "loss")
    torch.testing.assert_close(found, wanted, rtol=1e-1 if case == "fp8" else 3e-3, atol=0)


@pytest.mark.parametrize("case", QUICK)
def test_each_process_holds_half(case, quick):
    held = [json.loads((quick / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    whole = held[0]["all"]
    assert sum(each["weights"] for each in held) == whole
    for each in held:
        assert abs(each["weights"] - whole / 2) <= 0.01 * whole
        assert each["optimizer"] == 2 * each["updated"] and each["gradients"] == each["updated"]
        assert each["average"] == (each["weights"] if case == "averaged" else 0)
    updated = sum(each["updated"] for each in held)
    assert updated == whole if case != "tuned" else updated < whole


def test_the_model_of_a_sharded_run_is_a_model_like_any_other(quick):
    model = ASTModel.from_pretrained(quick / "averaged" / "model")
    data = loop.tones(11, 1)
    found = evaluate(model, data).figures
    said = [row for row in read_log(quick / "averaged" / "log.jsonl") if row["kind"] == "eval"][-1]
    for name, value in found.items():
        assert value == pytest.approx(said[name], rel=1e-5), name
    states = load_file(next((quick / "averaged/checkpoints").glob("step-*/state.safetensors")))
    weights = model.state_dict()
    for prefix in ("average.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        kept = {n.removeprefix(prefix): v for n, v in states.items() if n.startswith(prefix)}
        assert len(kept) == len(weights)
        assert all(kept[name].shape == value.shape for name, value in weights.items())


DYING = """
    run = tests.start({folder!r}, "averaged", {strategy!r}, {devices}, resume={resume})
    inner = run._train_step
    def dying(fed, log):
        if run.step == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(fed, log)
    run._train_step = dying
    run.fit()
"""


def dying(place, folder, at, strategy="fsdp2", processes=2, resume=False):
    script = DYING.format(
        folder=str(folder), strategy=strategy, devices=processes, resume=resume, at=at
    )
    return launch(place, script, processes=processes)


def same_files(*folders):
    for name in ("model/model.safetensors", "state.safetensors"):
        states = [load_file(each / "checkpoints/step-00000006" / name) for each in folders]
        assert loop.same(*states)


@pytest.mark.slow
def test_parts_of_different_lengths_are_saved_and_found_again(tmp_path):
    """Two classes over three processes: the last one has no part of the head's bias."""
    dying(tmp_path, tmp_path / "killed", 5, processes=3)
    for folder, resume in (("killed", True), ("whole", False)):
        done = dying(tmp_path, tmp_path / folder, -1, processes=3, resume=resume)
        assert done.returncode == 0, done.stderr
    same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("at", "saved"), [(3, 3), (5, 4)])
def test_a_sharded_run_killed_with_sigkill_resumes_to_the_same_bits(at, saved, quick, tmp_path):
    def run(resume, at):
        return dying(tmp_path, tmp_path / "run", at, resume=resume)

    killed = run(False, at)
    assert killed.returncode != 0 and str(-signal.SIGKILL.value) in killed.stderr
    latest = tmp_path / "run/checkpoints/latest"
    assert latest.read_text().strip() == f"step-{saved:08d}"
    done = run(True, -1)
    assert done.returncode == 0, done.stderr
    assert latest.read_text().strip() == "step-00000006"
    same_files(tmp_path / "run", quick / "averaged")


@pytest.mark.slow
def test_a_run_may_go_on_with_another_strategy(quick, tmp_path):
    for first, then in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        dying(tmp_path, tmp_path / first, 4, first)
        done = dying(tmp_path, tmp_path / first, -1, then, resume=True)
        assert done.returncode == 0, done.stderr
        found, wanted = figures(tmp_path / first, "loss"), figures(quick / "averaged", "loss")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


UNREADABLE = """
    from ast_fast.data import AudioDataset, read_folder
    for strategy in ("fsdp2", "ddp"):
        config = tests.CONFIG.replace(strategy=strategy, devices=2, batch_size=4, accumulate=2)
        data = AudioDataset(read_folder({data!r}))
        tests.loop.trainer({folder!r} + strategy, config, data=data, eval_set=data).fit()
"""


@pytest.mark.slow
def test_a_process_without_clips_takes_part_in_a_step_and_in_an_evaluation(tmp_path):
    import soundfile as sf

    rng = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(6):
            file = tmp_path / "data" / name / f"{index}.wav"
            if index in (1, 2, 3):
                file.write_bytes(b"nothing")
            else:
                sf.write(file, 0.1 * torch.randn(4000, generator=rng).numpy(), 16000)
    folder = str(tmp_path) + "/"
    done = launch(tmp_path, UNREADABLE.format(folder=folder, data=str(tmp_path / "data")))
    assert done.returncode == 0, done.stderr
    found, wanted = (figures(tmp_path / name, "loss") for name in ("fsdp2", "ddp"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_command_line_shards_under_torchrun(tmp_path):
    import soundfile as sf

    rng = torch.Generator().manual_seed(0)
    for name in ("high", "low"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            wave = 0.1 * torch.randn(4000, generator=rng).numpy()
            sf.write(tmp_path / "data" / name / f"{index}.wav", wave, 16000)
    settings = (
        *("model=ast_mini_p16_s10", "frontend.num_frames=32", "frontend.num_mel_bins=32"),
        *("train.epochs=1", "train.batch_size=8", "train.accelerator=cpu", "train.devices=2"),
        *("train.strategy=fsdp2", "train.precision=bfloat16-master", "train.average.ema=0.9"),
    )
    command = ("-m", "ast_fast", "--", "train", "--data", tmp_path / "data")
    done = launched(
        *(*command, "--run", tmp_path / "run", "--holdout", "0.25"),
        *(part for setting in settings for part in ("--set", setting)),
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run/result.json").read_text())
    assert saved["steps"] == 3
    model = ASTModel.from_pretrained(tmp_path / "run/model")
    assert model.v.pos_embed.dtype == torch.float32
    data = AudioDataset(read_folder(tmp_path / "data"))
    assert evaluate(model, data).num_clips == 24


def test_what_cannot_be_sharded_is_refused_at_once(tmp_path):
    packed, merging = loop.model(), loop.model(depth=2)
    packed.v.runner = object()
    merging.set_token_merging(1)
    assert merging.v.merging
    with pytest.raises(TrainingError, match="optimize_for_inference packed: expected"):
        shard(packed, None)
    with pytest.raises(TrainingError, match="token merging, which reads the blocks' weights"):
        shard(merging, None)
    with pytest.raises(ValueError, match="strategy='fsdp': expected one of ddp, fsdp2"):
        TrainConfig(strategy="fsdp")
    with pytest.raises(ValueError, match="compile='graph' with strategy='fsdp2'"):
        TrainConfig(strategy="fsdp2", compile="graph")
    with pytest.raises(TrainingError, match="fsdp2' in one process: expected several"):
        loop.trainer(tmp_path, CONFIG.replace(strategy="fsdp2"))
