"""`ast-fast listen` as a process: raw samples in, a line a hop out at once, clean ends."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from ast_fast import StreamingTagger, cli, create_model, listen_command
from ast_fast.config import LogMelConfig

SAMPLES = (np.random.default_rng(0).normal(0, 0.1, 16000) * 32768).astype("<i2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(
        "ast_mini_p16_s10",
        num_classes=3,
        labels=("cat", "dog", "rain"),
        embed_dim=32,
        depth=1,
        num_heads=1,
        input_fdim=32,
        input_tdim=32,
        frontend_config=LogMelConfig(num_mel_bins=32, num_frames=32),
    )
    folder = tmp_path_factory.mktemp("listen") / "model"
    model.save_pretrained(folder)
    return folder


def start(saved, *arguments, **options):
    command = [sys.executable, "-m", "ast_fast", "listen", "--model", str(saved), *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def listen(saved, data, monkeypatch, *arguments):
    """The command in this process, with these bytes on standard input."""
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)
    return cli.main(["listen", "--model", str(saved), *arguments])


def test_each_line_comes_at_its_hop_and_ctrl_c_ends_cleanly(saved):
    # whatever goes wrong, the process ends
    process = start(saved, "--hop", "0.25", "--top", "2")
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        data = SAMPLES.tobytes()
        # an odd number of bytes, and only then the rest of the sample
        process.stdin.write(data[:8001])
        process.stdin.flush()
        first = process.stdout.readline().decode()
        process.stdin.write(data[8001:16000])
        process.stdin.flush()
        second = process.stdout.readline().decode()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
    expected = StreamingTagger(saved, hop_s=0.25, top_k=2).push(SAMPLES[:8000])
    for line, result in zip((first, second), expected, strict=True):
        for name, score in result.labels:
            assert f"{name} {score:.4f}" in line
    assert first.startswith("     0.00 -     0.25 s") and "(72 % filled)" in first
    assert second.startswith("     0.16 -     0.50 s") and "filled" not in second
    assert process.returncode == 130 and out == b""
    assert b"stopped after 0.50 s of audio" in err and b"Traceback" not in err


def test_a_closed_reader_ends_it_quietly(saved):
    process = start(saved, "--hop", "0.25")
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        process.stdin.write(SAMPLES.tobytes()[:8000])
        process.stdin.flush()
        assert process.stdout.readline()
        process.stdout.close()
        process.stdin.write(SAMPLES.tobytes())
        process.stdin.close()
        status = process.wait(timeout=60)
        err = process.stderr.read()
    finally:
        watchdog.cancel()
        process.kill()
    assert status == 141
    assert b"Traceback" not in err and b"Exception" not in err


def test_a_terminal_on_standard_input_is_refused_with_a_way_out(saved, capsys, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        status = cli.main(["listen", "--model", str(saved), "--rate", "8000"])
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert "is a terminal" in said.err and "arecord -t raw -f S16_LE -r 8000" in said.err


def test_json_lines_hold_what_the_tagger_gives(saved, capsys, monkeypatch):
    status = listen(
        saved, SAMPLES.tobytes(), monkeypatch, *("--hop", "0.3", "--json", "--window", "0.2")
    )
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    tagger = StreamingTagger(saved, window_s=0.2, hop_s=0.3)
    results = tagger.push(SAMPLES) + tagger.flush()
    assert status == 0 and len(rows) == len(results) == 4
    for row, result in zip(rows, results, strict=True):
        assert (row["start_s"], row["end_s"]) == (result.start_s, result.end_s)
        assert row["filled"] == 1.0
        assert [item["label"] for item in row["labels"]] == [name for name, _ in result.labels]
        # the command packs the weights first
        scores = [item["score"] for item in row["labels"]]
        assert scores == pytest.approx([score for _, score in result.labels], rel=1e-5)
        assert len(scores) == 3
    assert "the stream ended after 1.00 s" in said.err


def test_another_rate_and_the_last_part_of_a_hop(saved, capsys, monkeypatch):
    pytest.importorskip("soxr")
    status = listen(saved, SAMPLES.tobytes(), monkeypatch, "--rate", "8000", "--hop", "0.8")
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert [line.split("s")[0].split()[-1] for line in lines] == ["0.80", "1.60", "2.00"]


def test_half_a_sample_at_the_end_is_said(saved, capsys, monkeypatch):
    assert listen(saved, SAMPLES.tobytes() + b"\0", monkeypatch) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "1 byte was dropped" in said.err


@pytest.mark.parametrize("data", [b"", b"\0"])
def test_no_samples_at_all_is_an_error(saved, capsys, monkeypatch, data):
    assert listen(saved, data, monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == "" and "held no samples: expected raw 16-bit mono at 16000 Hz" in said.err


def test_a_stream_shorter_than_a_frame_is_said(saved, capsys, monkeypatch):
    assert listen(saved, bytes(200), monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out == "" and "0.0063 s is shorter than one frame" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hop", "0.001"), "hop_s=0.001"),
        (("--rate", "12"), "source_rate_hz=12"),
        (("--window", "100"), "window_s=100"),
        (("--smoothing", "1"), "smoothing=1.0"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_wrong_arguments_are_one_line(saved, capsys, monkeypatch, arguments, message):
    assert listen(saved, SAMPLES.tobytes(), monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_a_model_slower_than_the_hop_is_said_once(saved, capsys, monkeypatch):
    clock = iter(float(second) for second in range(1000))  # each look at it takes a second
    monkeypatch.setattr(listen_command.time, "perf_counter", lambda: next(clock))
    pace = listen_command._Pace(0.5)
    for results in (1, 1, 0, 1, 1, 1):
        pace.begin()
        pace.end(results)
    said = capsys.readouterr().err
    assert said.count("longer than the hop of 0.5 s") == 1 and "takes 1.00 s" in said
    steady = listen_command._Pace(1.5)
    for _ in range(9):
        steady.begin()
        steady.end(1)
    assert capsys.readouterr().err == ""
