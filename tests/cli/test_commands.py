"""The command line on tiny data: what it prints, writes and returns."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import ASTModel, cli, create_model, inference, optimized
from ast_fast.config import LogMelConfig
from ast_fast.optimized import why_not

SETTINGS = (
    'model = "ast_mini_p16_s10"',
    "[frontend]",
    "num_mel_bins = 32",
    "num_frames = 32",
    "[train]",
    "epochs = 2",
    "batch_size = 8",
    "log_every = 1",
    "[train.monitor]",
    "check_every = 4",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder per class with one broken file, a settings file, and a trained run."""
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for name, hz in (("low", 250), ("high", 2500)):
        (root / "data" / name).mkdir(parents=True)
        for index in range(16):
            time_s = np.arange(4000) / 16000
            sound = 0.3 * np.sin(2 * np.pi * hz * (1 + 0.1 * rng.random()) * time_s)
            sf.write(root / "data" / name / f"{index:02}.wav", sound, 16000)
    (root / "data" / "low" / "broken.wav").write_bytes(b"RIFF")
    (root / "run.toml").write_text("\n".join(SETTINGS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = [
        "train",
        root / "run.toml",
        "--data",
        root / "data",
        "--run",
        root / "run",
    ]
    status = run(*arguments, "--holdout", "0.25", "--set", "statistics=measure")
    torch.set_num_threads(threads)
    assert status == 0
    return root


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ast_fast", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_help_comes_without_loading_pytorch():
    script = (
        "import sys\n"
        "from ast_fast import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'numpy', 'triton', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "print('loaded:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert "loaded: []" in done.stderr
    for name in ("demo", "train", "eval", "tag", "listen", "verify", "bench", "convert", "doctor"):
        assert name in done.stdout


def test_commands_begin_without_the_compiler_of_pytorch():
    # its import takes as long as that of everything else together
    script = (
        "import sys\n"
        "import ast_fast.prepare_command, ast_fast.infer_command, ast_fast.train_command\n"
        "from ast_fast import LogMel\n"
        "print('loaded:', sorted({'torch._dynamo', 'sympy', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    assert "loaded: []" in done.stdout


def test_training_writes_model_log_and_checkpoints(place, capsys):
    rows = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"step", "eval", "check"}
    assert (place / "run" / "model" / "model.safetensors").is_file()
    assert (place / "run" / "checkpoints" / "latest").is_file()
    plan = json.loads((place / "run" / "run.json").read_text())
    assert plan["settings"]["train"]["epochs"] == 2 and plan["holdout"] == 0.25
    status = run("train", "--run", place / "run", "--resume")  # nothing is left to do
    assert status == 0 and "step 8 of 8" in capsys.readouterr().out


def test_evaluation_says_figures_skips_and_the_check(place, capsys, tmp_path):
    status = run(
        *("eval", "--data", place / "data", "--model", place / "run" / "model"),
        *("--json", tmp_path / "e.json", "--per-class", tmp_path / "classes.csv"),
    )
    said = capsys.readouterr().out
    assert status == 0
    assert "accuracy" in said and "1 skipped (AudioDecodeError 1)" in said and "broken.wav" in said
    assert "checked against the float64 reference" in said
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["num_clips"] == 32 and found["check"]["ok"]
    with (tmp_path / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["high", "low"]


def test_tag_prints_names_and_reports_bad_files(place, capsys):
    files = [place / "data" / "low" / "00.wav", place / "data" / "low" / "broken.wav"]
    status = run("tag", *files, place / "nowhere.wav", "--model", place / "run" / "model")
    said = capsys.readouterr()
    assert status == 1
    assert "00.wav" in said.out and "low" in said.out and "high" in said.out
    assert "skipped" in said.err and "broken.wav" in said.err and "no such file" in said.err
    assert run("tag", files[0], "--model", place / "run" / "model", "--top-k", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_evaluation_and_tagging_in_other_precisions(place, capsys, tmp_path, precision):
    if why_not(precision) is not None:
        pytest.skip(why_not(precision))
    figures = {}
    for name in ("exact", precision):
        file = tmp_path / f"{name}.json"
        arguments = ("--data", place / "data", "--model", place / "run" / "model")
        assert run("eval", *arguments, "--json", file, "--precision", name) == 0
        figures[name] = json.loads(file.read_text())
    check = figures[precision]["check"]
    columns = {"exact": "float32", "bf16": "bfloat16", "int8": "int8"}
    assert check["ok"] and check["precision"] == columns[precision]
    # it is that precision which ran: not as good as float32, and not as bad as nonsense
    if precision != "exact":
        assert 1e-5 < check["logits"][1] < 4e-2
    losses = [entry["figures"]["loss"] for entry in figures.values()]
    assert losses[0] == pytest.approx(losses[-1], rel=5e-2)
    clip = place / "data" / "low" / "00.wav"
    capsys.readouterr()
    assert run("tag", clip, "--model", place / "run" / "model", "--precision", precision) == 0
    assert "low" in capsys.readouterr().out


def test_a_precision_that_is_not_to_be_had_is_refused_by_name(place, capsys, monkeypatch):
    monkeypatch.setattr(inference.loading, "why_not", lambda precision: "this CPU has no VNNI")
    monkeypatch.setattr(optimized, "why_not", lambda precision: "this CPU has no VNNI")
    clip, model = place / "data" / "low" / "00.wav", place / "run" / "model"
    if not torch.cuda.is_available():
        assert run("tag", clip, "--model", model, "--precision", "int8") == 2
        said = capsys.readouterr().err
        assert "precision='int8' is not to be had: this CPU has no VNNI" in said
        assert run("tag", clip, "--model", model) == 0  # the model as it is


def test_tag_takes_folders_json_and_other_labels(place, capsys, tmp_path):
    table = tmp_path / "class_labels_indices.csv"
    table.write_text('index,mid,display_name\n0,/m/a,"Whistle, high"\n1,/m/b,Hum\n')
    status = run(
        *("tag", place / "data" / "high", "--model", place / "run" / "model"),
        *("--json", "--labels", table),
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 0 and len(rows) == 16
    assert {row["labels"][0]["label"] for row in rows} <= {"Whistle, high", "Hum"}
    assert rows[0]["file"].endswith("00.wav")
    assert sum(entry["score"] for entry in rows[0]["labels"]) == pytest.approx(1.0)


def test_manifests_train_too_and_classes_come_from_the_table(place, capsys, tmp_path):
    lines = ["path,labels"]
    for index in range(8):
        lines += [f"low/{index:02}.wav,/m/b", f"high/{index:02}.wav,/m/a"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    table = tmp_path / "labels.csv"
    table.write_text("index,mid,display_name\n0,/m/a,Whistle\n1,/m/b,Hum\n")
    status = run(
        *(
            "train",
            place / "run.toml",
            "--data",
            tmp_path / "train.csv",
            "--root",
            place / "data",
            "--labels",
            table,
        ),
        *("--run", tmp_path / "run", "--set", "train.epochs=1"),
        *("--holdout", "0", "--set", "train.monitor.check_every=0"),
    )
    assert status == 0 and "16 clips of 2 classes" in capsys.readouterr().out
    assert ASTModel.from_pretrained(tmp_path / "run" / "model").labels == ("Whistle", "Hum")


def test_fine_tuning_starts_from_a_saved_model(place, capsys, tmp_path):
    status = run(
        *("train", "--data", place / "data", "--run", tmp_path / "run", "--holdout", "0.25"),
        *("--set", f"model={place / 'run' / 'model'}", "--set", "train.epochs=1"),
        *("--set", "train.lr=1e-6", "--set", "train.batch_size=8"),
    )
    assert status == 0
    capsys.readouterr()
    old = ASTModel.from_pretrained(place / "run" / "model")
    new = ASTModel.from_pretrained(tmp_path / "run" / "model")
    assert new.frontend_config == old.frontend_config
    torch.testing.assert_close(
        new.v.blocks[0].mlp.fc1.weight, old.v.blocks[0].mlp.fc1.weight, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("encoding", ["s16", "flac"])
def test_shards_are_written_trained_on_and_evaluated_as_the_files_are(
    place, capsys, tmp_path, encoding
):
    shards = tmp_path / "shards"
    arguments = ("prepare", "--data", place / "data", "--out", shards, "--encoding", encoding)
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "1 skipped (AudioDecodeError 1)" in said and "broken.wav" in said
    assert len(list(shards.glob("*.tar"))) == 1 and (shards / "index.json").is_file()
    assert run(*arguments) == 2 and "holds shards already" in capsys.readouterr().err

    figures = []
    for data in (place / "data", shards):
        file = tmp_path / "e.json"
        options = ("--model", place / "run" / "model", "--json", file)
        assert run("eval", "--data", data, *options, "--per-class", tmp_path / "c.csv") == 0
        figures.append(json.loads(file.read_text())["figures"])
        capsys.readouterr()
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)

    status = run(
        *("train", place / "run.toml", "--data", shards, "--run", tmp_path / "run"),
        *("--holdout", "0.25", "--set", "train.epochs=1", "--set", "train.num_workers=2"),
        *("--set", "statistics=measure"),
    )
    assert status == 0
    assert "24 clips of 2 classes to train on, 8 to evaluate on" in capsys.readouterr().out
    assert ASTModel.from_pretrained(tmp_path / "run" / "model").labels == ("high", "low")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train",), "--data is missing"),
        (("train", "--data", "nowhere.csv"), "does not exist: expected a manifest or a folder"),
        (("train", "--data", "DATA", "--set", "train.epoch=3"), "has no setting epoch"),
        (("train", "--data", "DATA", "--set", "train.lr=-1"), "lr=-1"),
        (("train", "--data", "DATA", "--set", "epochs"), "expected section.name=value"),
        (("train", "--data", "DATA", "--holdout", "1.5"), "holdout=1.5"),
        (("train", "--data", "DATA", "--set", "model=nothing"), "nothing"),
        (("train", "--data", "DATA", "--set", "model.depth=2"), "expected the name of a model"),
        (("train", "--run", "nowhere", "--resume"), "holds no run to resume"),
        (("train", "--data", "DATA", "--run", "RUN"), "holds a run already"),
        (("train", "--data", "DATA", "--run", "RUN", "--resume"), "leave out"),
        (("tag", "x.wav", "--model", "nowhere"), "nowhere"),
        (("tag", "EMPTY", "--model", "MODEL"), "no audio files"),
        (("tag", "x.wav", "--model", "MODEL", "--labels", "nowhere.csv"), "nowhere.csv"),
        (("eval", "--data", "DATA/low", "--model", "MODEL"), "one folder per class"),
        (("convert", "nowhere.pth", "out"), "nowhere.pth"),
        (("verify", "--device", "cuda"), "sees no GPU"),
        (("train", "--data", "DATA", "--set", "train.accelerator=cuda"), "sees no GPU"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, says, place, capsys, tmp_path, monkeypatch):
    if any("cuda" in text for text in arguments) and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    known = {
        "DATA": place / "data",
        "DATA/low": place / "data" / "low",
        "RUN": place / "run",
        "MODEL": place / "run" / "model",
        "EMPTY": tmp_path / "empty",
    }
    assert run(*(known.get(argument, argument) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert says in said and said.count("ast-fast: error:") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="--data is missing"):
        run("train", "--debug")


def test_unknown_options_exit_with_status_2(capsys):
    with pytest.raises(SystemExit) as left:
        run("tag", "--wrong")
    assert left.value.code == 2
    capsys.readouterr()


def test_convert_round_trips_between_ours_and_transformers(place, capsys, tmp_path):
    front = LogMelConfig(num_frames=64, num_mel_bins=32)
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 1, "input_fdim": 32, "input_tdim": 64}
    model = create_model(
        "ast_mini_p16_s10", num_classes=3, head_eps=1e-6, frontend_config=front, **sizes
    )
    model.save_pretrained(tmp_path / "ours")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nrain\n")
    assert run("convert", tmp_path / "ours", tmp_path / "hf", "--to", "transformers") == 0
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--labels", names) == 0
    assert "3 classes" in capsys.readouterr().out
    back = ASTModel.from_pretrained(tmp_path / "back")
    assert back.labels == ("cat", "dog", "rain")
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(x), model.eval()(x))


def test_doctor_names_packages_devices_and_backends(capsys):
    assert run("doctor") == 0
    said = capsys.readouterr().out
    for text in ("torch", "soundfile", "CPU:", "GPU:", "attention_varlen", "why not the others"):
        assert text in said


def test_bench_is_passed_to_the_benchmarks_of_the_checkout(capsys):
    with pytest.raises(SystemExit) as left:
        run("bench", "--help")
    assert not left.value.code and "--suite" in capsys.readouterr().out


def test_a_model_trained_in_bfloat16_is_written_with_its_masters(place, tmp_path):
    status = run(
        *("train", place / "run.toml", "--data", place / "data", "--run", tmp_path),
        *("--holdout", "0", "--set", "train.epochs=1", "--set", "train.monitor.check_every=0"),
        *("--set", "train.precision=bfloat16-master"),
    )
    assert status == 0
    weights = ASTModel.from_pretrained(tmp_path / "model").state_dict()
    weight = weights["v.blocks.0.attn.qkv.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_ctrl_c_leaves_a_state_that_resumes(place, tmp_path):
    folder = tmp_path / "run"
    child = start(
        *("train", place / "run.toml", "--data", place / "data", "--run", folder),
        *(
            "--set",
            "train.epochs=4000",
            "--set",
            "train.monitor.check_every=0",
            "--holdout",
            "0.25",
        ),
    )
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not list(folder.glob("checkpoints/step-*")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=400)
    assert child.returncode == 130, said
    assert f"ast-fast train --run {folder} --resume" in said and "Traceback" not in said
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    step = int(latest.removeprefix("step-"))
    assert f"after step {step}" in said
    again = start("train", "--run", folder, "--resume")
    line = again.stdout.readline()
    again.send_signal(signal.SIGINT)
    _, said = again.communicate(timeout=400)
    assert f"step {step} of " in line and again.returncode == 130, said


def test_python_dash_m_works_and_broken_pipes_are_quiet():
    child = start("doctor")
    child.stdout.close()
    said = child.stderr.read()
    child.wait(timeout=400)
    assert "Traceback" not in said and "BrokenPipe" not in said
