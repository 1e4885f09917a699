"""What a newcomer does wrong, and what a machine does to them: one clear line, and nothing lost."""

import errno
import fcntl
import gzip
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile as sf

from ast_fast import audio, cli, create_model, plots
from ast_fast.config import AudioConfig, LogMelConfig
from ast_fast.data import ManifestError, read_data, read_parts
from ast_fast.training.recipe import read_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classes of four sounds, and a model of them, untrained, in a run's folder."""
    root = tmp_path_factory.mktemp("newcomer")
    rng = np.random.default_rng(0)
    for name in ("high", "low"):
        (root / "data" / name).mkdir(parents=True)
        for index in range(4):
            sound = 0.1 * rng.standard_normal(4000)
            sf.write(root / "data" / name / f"{index}.wav", sound, 16000)
    front = LogMelConfig(num_frames=32, num_mel_bins=32)
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}
    model = create_model(
        "ast_mini_p16_s10", 2, labels=("high", "low"), frontend_config=front, **sizes
    )
    model.save_pretrained(root / "run" / "model")
    return root


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.epochs=abc", "epochs='abc': expected a whole number"),
        ("train.epochs=1.5", "epochs=1.5: expected a whole number"),
        ("train.batch_size=true", "batch_size=True: expected a whole number"),
        ("train.lr=fast", "lr='fast': expected a number"),
        ("train.betas=[1]", "expected a list of 2, each a number"),
        ("train.tune.freeze=v", "freeze='v': expected a list, each text"),
        ("train.tensorboard=1", "tensorboard=1: expected true or false"),
        ("train.precision=7", "precision=7: expected one of float32"),
        ("train=3", "train=3: expected a section"),
        ("train.augment=null", "augment='null': expected a section"),
        ("frontend=7", "frontend=7: expected a section"),
        ("model=3", "model=3: expected the name of a model"),
    ],
)
def test_settings_of_another_kind_are_named(setting, says):
    with pytest.raises(ValueError) as raised:
        read_config(None, [setting])
    assert says in str(raised.value)


def test_whole_numbers_may_be_written_with_an_exponent():
    warmup = read_config(None, ["train.warmup_steps=1e3"]).train.warmup_steps
    assert warmup == 1000 and isinstance(warmup, int)


def test_recipes_of_windows_editors_are_read(tmp_path):
    file = tmp_path / "own.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 3\r\n")
    assert read_config(str(file)).train.epochs == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tag", "DATA", "--model", "RUN"), "is the folder of a run: name its model"),
        (("eval", "--data", "DATA", "--model", "MODEL", "--json", "no/e.json"), "make it first"),
        (("eval", "--data", "DATA", "--model", "MODEL", "--per-class", "no/c"), "make it first"),
        (("verify", "--json", "no/v.json"), "--json 'no/v.json': 'no' is not a folder"),
        (("verify", "--device", "nosuch"), "device='nosuch': expected cpu"),
        (("convert", "MODEL", "RUN"), "holds something already"),
        (("train", "--data", "DATA", "--holdout", "0.999"), "leaves none to train on"),
    ],
)
def test_mistakes_are_told_before_the_work(arguments, says, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"DATA": place / "data", "RUN": place / "run", "MODEL": place / "run" / "model"}
    assert run(*(known.get(argument, argument) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("ast-fast: error:") == 1
    assert not said.out and not list(tmp_path.iterdir())


def test_labels_are_not_learnt_as_numbers_and_the_run_folder_stays_free(place, tmp_path, capsys):
    arguments = ("train", "--data", place / "data", "--run", tmp_path / "run", "--holdout", "0")
    assert run(*arguments, "--set", "train.loss=mean_squared_error") == 2
    assert "learns numbers, and the data hold labels" in capsys.readouterr().err
    assert run(*arguments, "--set", "train.epochs=1") == 0


def test_numbers_are_not_learnt_as_labels(place, tmp_path, capsys):
    table = tmp_path / "songs.csv"
    table.write_text("path,valence\n" + "".join(f"low/{i}.wav,{i}\n" for i in range(4)))
    arguments = ("train", "--data", table, "--root", place / "data", "--values", "valence")
    assert run(*arguments, "--run", tmp_path / "run", "--holdout", "0.5") == 2
    assert "expected --set train.loss=mean_squared_error" in capsys.readouterr().err


def test_training_names_the_files_it_left_out_once(place, tmp_path, capsys):
    for name in ("high", "low"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in (place / "data" / name).iterdir():
            (tmp_path / "data" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data" / "low" / "broken.wav").write_text("no sound")
    arguments = ("--data", tmp_path / "data", "--run", tmp_path / "run", "--holdout", "0")
    assert run("train", *arguments, "--set", "train.epochs=2") == 0
    said = capsys.readouterr().out
    assert said.count("broken.wav") == 1 and "2 skipped (AudioDecodeError 2)" in said
    assert f"ast-fast report {tmp_path / 'run'}" in said


def test_finite_samples_that_overflow_the_front_end_are_refused(tmp_path):
    file = tmp_path / "huge.wav"
    sf.write(file, np.full(8000, 3e38, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(
        audio.AudioNonFiniteError, match="8000 of 8000 samples are NaN, infinite or beyond"
    ):
        audio.load(file)
    zeroed = audio.load(file, AudioConfig(non_finite="zero"))
    assert zeroed.report.zeroed_samples == 8000 and not zeroed.wave.any()
    # what is over scale by a factor, as 16-bit numbers in a float file, is still read
    sf.write(file, np.full(8000, 32767.0, np.float32), 16000, subtype="FLOAT")
    assert audio.load(file).report.over_scale == 1


def test_a_file_that_the_disk_will_not_give_is_one_bad_file(place, capsys, tmp_path, monkeypatch):
    good, bad = place / "data" / "low" / "0.wav", tmp_path / "bad.wav"
    bad.write_bytes(good.read_bytes())
    inner, number = os.pread, bad.stat().st_ino

    def failing(handle, count, offset):
        if os.fstat(handle).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return inner(handle, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(audio.AudioDecodeError, match="cannot be read: Input/output error"):
        audio.load(bad)
    assert run("tag", bad, good, "--model", place / "run" / "model") == 1
    said = capsys.readouterr()
    assert "bad.wav': cannot be read" in said.err and "0.wav" in said.out


def test_files_whose_names_are_no_text_are_prepared_and_read_back(place, tmp_path):
    (tmp_path / "data" / "low").mkdir(parents=True)
    for name in (b"latin\xff.wav", b"plain.wav"):
        file = tmp_path / "data" / "low" / os.fsdecode(name)
        file.write_bytes((place / "data" / "low" / "0.wav").read_bytes())
    out = tmp_path / "out"
    assert run("prepare", "--data", tmp_path / "data", "--out", out, "--to", "manifest") == 0
    assert not (out / "manifest.csv").exists()
    assert len(read_data(out, tmp_path / "data")) == 2


def test_a_share_that_leaves_nothing_to_train_on_is_refused(place):
    with pytest.raises(ValueError, match="leaves none to train on"):
        read_parts(place / "data", holdout=0.99)


def test_short_curves_are_not_flattened():
    short, middle = [3.0, 1.0, 5.0, 2.0], [float(i % 2) for i in range(12)]
    assert plots._running_mean(short) == short and plots._of_several(short) == ""
    assert plots._running_mean(middle)[5] == pytest.approx(1 / 3)
    assert plots._of_several(middle) == " (mean of 3)"
    assert plots._of_several([0.0] * 40, " lines") == " (mean of 9 lines)"


def test_version_and_an_interruption_are_said(capsys, monkeypatch):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("ast_fast ")

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", interrupted)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "ast-fast: interrupted\n"


def test_commands_begin_without_what_they_do_not_need():
    """PyTorch's compiler and Lightning take seconds to load: longer than most commands work."""
    commands = "infer_command prepare_command report_command compare_command ensemble_command"
    heavy = "torch._dynamo lightning_fabric torchmetrics matplotlib triton transformers"
    code = (
        "import importlib, sys\n"
        f"for name in '{commands} export_command train_command commands'.split():\n"
        "    importlib.import_module('ast_fast.' + name)\n"
        f"print(sorted(set('{heavy}'.split()) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_too_high_up_is_no_class(place, tmp_path, capsys):
    (tmp_path / "one" / "only").mkdir(parents=True)
    for file in (place / "data" / "low").iterdir():
        (tmp_path / "one" / "only" / file.name).write_bytes(file.read_bytes())
    arguments = ("--data", tmp_path / "one", "--run", tmp_path / "run", "--holdout", "0.5")
    assert run("train", *arguments) == 2
    said = capsys.readouterr().err
    assert "all clips are of one class, 'only'" in said and not (tmp_path / "run").exists()


def shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_a_shard_cut_off_within_a_clip_loses_that_clip_alone(place, tmp_path):
    sound = (place / "data" / "low" / "0.wav").read_bytes()
    file = tmp_path / "cut.tar"
    shard(
        file, [(f"{n}{end}", c) for n in range(3) for end, c in ((".wav", sound), (".cls", b"1"))]
    )
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"2.wav") + 2000])
    found = read_data(file)
    assert len(found) == 2
    assert "1 damaged clips are left out" in found.notes[0] and "is cut off" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello" * 1000, "is compressed, or no tar"),
        (gzip.compress(bytes(10**6)), "is compressed, or no tar"),
        (None, "that is no object with names"),
    ],
    ids=["text", "compressed", "labels"],
)
def test_files_that_are_no_shards_say_why(content, says, place, tmp_path):
    file = tmp_path / "x.tar"
    if content is None:
        sound = (place / "data" / "low" / "0.wav").read_bytes()
        shard(file, [("a.wav", sound), ("a.json", b"{")])
    else:
        file.write_bytes(content)
    with pytest.raises(ManifestError, match="holds no clip that can be read") as raised:
        read_data(file)
    assert says in str(raised.value)


def test_columns_of_one_name_are_refused(place, tmp_path):
    table = tmp_path / "twice.csv"
    table.write_text("path,label,label\nlow/0.wav,a,b\n")
    with pytest.raises(ManifestError, match="line 1: two columns are called 'label'"):
        read_data(table, place / "data")


def test_a_second_ctrl_c_leaves_no_traceback():
    code = (
        "import os, signal, sys, threading, time\n"
        "from ast_fast import cli\n"
        "def work():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "cli.COMMANDS['doctor'] = work\n"
        "sys.argv = ['ast-fast', 'doctor']\n"
        "status = cli.main()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ast-fast: interrupted\n")


def test_a_full_disk_keeps_what_was_prepared(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ("prepare", "--data", place / "data", "--out", out)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ast_fast.data.shard_writer.ShardStore.finish", full)
        assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert f"{out}: cannot be written: No space left on device" in said and "--resume" in said
    assert run(*arguments, "--resume") == 0
    assert len(read_data(out)) == 8


def test_clips_longer_than_the_model_hears_are_said(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(2):
            sf.write(tmp_path / "data" / name / f"{index}.wav", 0.1 * rng.random(32000), 16000)
    arguments = ("--data", tmp_path / "data", "--run", tmp_path / "run", "--holdout", "0")
    settings = ("--set", "train.epochs=1", "--set", "frontend.num_frames=64")
    assert run("train", *arguments, *settings) == 0
    assert "hears 64 frames, 0.66 s" in capsys.readouterr().out


def test_parts_that_nobody_uses_are_told(place, tmp_path, caplog):
    table = tmp_path / "typo.csv"
    rows = [
        f"{name}/{i}.wav,{name},{'trian' if i else 'train'}"
        for name in ("high", "low")
        for i in range(4)
    ]
    table.write_text("path,label,split\n" + "\n".join(rows) + "\n")
    train, held = read_parts(table, place / "data")
    assert len(train) == 2 and held is None
    assert "6 clips are in parts that are not used: trian" in caplog.text


def test_two_processes_do_not_prepare_into_one_folder(place, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert run("prepare", "--data", place / "data", "--out", out, "--resume") == 2
        assert "another process is preparing here" in capsys.readouterr().err
        assert not list(out.iterdir())
    finally:
        os.close(handle)
    assert run("prepare", "--data", place / "data", "--out", out, "--resume") == 0
