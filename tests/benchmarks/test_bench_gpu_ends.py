"""How a GPU run ends when something is against it: signals, full disks, other runs, arguments that mean nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from benchmarks import archive, background, book, gpu, jobs, plan, pool, record
from benchmarks.case import Settings

FACTS = {
    "device": "cuda",
    "device_name": "x",
    "torch": "2",
    "commit": "c",
    "date": "2026-11-30T00:00:00Z",
    "threads": 1,
    "packages": {},
}
CUDA = Settings(device="cuda", backend="triton", dtypes=("bf16",))


def dry_run(root, out, *arguments, **environment) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def a_book(tmp_path) -> book.Book:
    kept = book.Book(tmp_path, {}, shown=False)
    kept.environment = FACTS
    return kept


def row(case: str, status: str = "ok", reason: str = "", **more) -> record.Row:
    facts = {"mode": "forward", "shape": {"B": 64, "T": 1214}, "dtype": "bf16"}
    facts |= {"provider": "ast_fast[triton]", "suite": "x", "status": status, "reason": reason}
    return record.Row(case=case, **(facts | more))


def test_a_run_that_is_interrupted_packs_and_ends_with_its_summary(root, tmp_path):
    how = signal.SIGINT
    assert {how, signal.SIGTERM, signal.SIGHUP} == set(gpu._SIGNALS)
    process = dry_run(root, tmp_path / "out", "--minutes", "6", "--suite", "smoke,attention")
    for line in process.stdout:
        if line.startswith("smoke attention_qkv"):
            process.send_signal(how)
            # whoever is impatient does not break off the packing
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + how, output + errors
    assert "summary" in output and errors == ""
    files = archive.unpack(tmp_path / "out" / archive.NAME, tmp_path / "back")
    assert any("-smoke-" in path.name for path in files)


def test_a_second_run_leaves_what_the_first_found(tmp_path):
    out = tmp_path / "out"
    for number in range(3):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / f"{number}.json").write_text("{}")
        archive.Archive(folder, out, every_s=0).close()
    assert sorted(path.name for path in out.iterdir()) == [
        "results-1.tar.gz",
        "results-2.tar.gz",
        "results.tar.gz",
    ]
    for name, content in (("results-1.tar.gz", "0.json"), (archive.NAME, "2.json")):
        with tarfile.open(out / name) as tar:
            assert tar.getnames() == [content]


def test_two_runs_at_a_time_do_not_share_an_archive(tmp_path):
    with archive.Archive(tmp_path, tmp_path / "out", every_s=0) as first:
        with pytest.raises(RuntimeError, match="another run packs into it; give one of its own"):
            archive.Archive(tmp_path, tmp_path / "out", every_s=0)
        assert first.path.exists()
    archive.Archive(tmp_path / "none", tmp_path / "out", every_s=0).close()


@pytest.mark.parametrize("where", ["/proc/nowhere", "a file"])
def test_a_folder_that_takes_nothing_is_refused_at_the_start(tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr(gpu, "_SIGNALS", ())
    if where == "a file":
        (tmp_path / "out").write_text("")
        where = str(tmp_path / "out")
    assert gpu.main(["--dry-run", "--minutes", "6", "--out", where]) == 1
    said = capsys.readouterr()
    assert f"--out {where}: expected a folder to write to" in said.err
    assert said.out == ""


def test_what_cannot_be_packed_at_the_end_stays_where_it_is(tmp_path, monkeypatch):
    def fill() -> None:
        with archive.run_folder() as folder:
            folders.append(folder)
            packed = archive.Archive(folder, tmp_path / "out", every_s=0)
            (folder / "a.json").write_text("{}")
            original = archive._add

            def full(tar, path, name):
                original(tar, path, name)
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(archive, "_add", full)
            packed.close()

    folders = []
    with pytest.raises(archive.NotPacked, match="No space left") as found:
        fill()
    (folder,) = folders
    assert str(folder) in str(found.value) and (folder / "a.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [archive.NAME]
    with tarfile.open(tmp_path / "out" / archive.NAME) as tar:  # the one before
        assert tar.getnames() == []
    with archive.run_folder() as other:
        pass
    assert not other.exists()


def test_a_full_disk_does_not_end_a_run_that_can_still_print(tmp_path, monkeypatch, capsys):
    kept = book.Book(tmp_path / "gone", {})
    kept.environment = FACTS
    (tmp_path / "gone").write_text("no folder can be here")
    job = {"kind": "case", "title": "x", "group": "attention"}
    for name in ("one", "two"):
        kept.add(job, {"rows": [vars(row(name))]})
    said = capsys.readouterr().out
    assert said.count("result files cannot be written") == 1
    assert "attention: 2 ok" in kept.summary() and "cannot be written" in kept.summary()


def test_a_summary_fits_into_what_is_kept_of_an_output(tmp_path):
    kept = a_book(tmp_path)
    long = "a reason of many words that goes on " * 10
    for number in range(60):
        for status, reason in (
            ("late", "out of time"),
            ("wrong", long),
            ("ok", f"finding: {long}"),
        ):
            kept._file("checks").rows.append(row(f"case {number} {long}", status, reason))
        spread = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
        timed = row(f"attention backward {number}", ms=spread, error=0.0, budget=1.0)
        peer = row(timed.case, provider="sdpa-cudnn", ms=spread, ratio=spread)
        kept._file("attention").rows += [timed, peer]
    text = kept.summary()
    assert len(text) < 11_500
    assert "attention backward 0 " in text and "more" in text.splitlines()[-1]


def test_last_words_that_fail_are_packed_all_the_same(tmp_path, monkeypatch):
    """The watchdog's come from a thread of its own, while jobs still report."""
    monkeypatch.setattr(book.Book, "summary", lambda _: 1 / 0)
    monkeypatch.setattr(
        gpu.Run, "take", lambda self, *_: (self.book.out / "a.json").write_text("{}")
    )
    monkeypatch.setattr(gpu, "warming", lambda _: [])
    options = argparse.Namespace(minutes=1.0, dry_run=True, out=tmp_path)
    packed = []
    original = archive.Archive.pack
    monkeypatch.setattr(archive.Archive, "pack", lambda self: packed.append(original(self)))
    monkeypatch.setattr(archive.Archive, "close", lambda self: None)
    with pytest.raises(ZeroDivisionError):
        gpu.execute(options, Settings(dtypes=("f32",), tiny=True, backend="reference"), ["smoke"])
    with tarfile.open(tmp_path / archive.NAME) as tar:
        assert "a.json" in tar.getnames()


def test_importing_is_part_of_a_run_s_minutes(tmp_path, monkeypatch):
    """On a cold disk it may take the half minute that lies between the plan's end and a limit of ten."""
    asked = {}

    class Watched:
        def __init__(self, seconds, last):
            asked["watchdog"] = seconds
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "Watchdog", Watched)
    options = argparse.Namespace(minutes=9.5, dry_run=False, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gpu.execute(options, CUDA, None, began=time.monotonic() - 40)
    assert asked["watchdog"] == pytest.approx(9.5 * 60 - gpu._WATCHDOG_S - 40, abs=5)
    run = gpu.Run(options, CUDA, a_book(tmp_path), lambda: 1040.0, 1000.0)
    assert (run.elapsed(), run.end) == (40.0, 1000.0 + 570 - gpu._LAST_S)


def test_a_device_that_fails_to_answer_once_is_asked_again(tmp_path):
    answers = [{"rows": [vars(row("device", "failed", "the process ended"))]}]
    answers.append({"rows": [], "environment": FACTS, "ceilings": {}})

    class Pool:
        def run(self, given, finished, **_):
            finished(given[0], answers.pop(0))
            return []

    kept = book.Book(tmp_path, {}, shown=False)
    run = gpu.Run(argparse.Namespace(minutes=9.5, dry_run=False), CUDA, kept, time.monotonic)
    run.device(Pool(), time.monotonic() + 20)
    assert kept.environment == FACTS and not answers


def test_pools_that_share_a_folder_keep_each_other_s_logs(tmp_path, monkeypatch):
    class Logged:
        def __init__(self, setup, extra, log, limit_s):
            with log.open("x") as file:
                file.write(setup)

    monkeypatch.setattr(pool, "Worker", Logged)
    for setup in ("of the run", "of its last step"):
        pool.Pool(setup, logs=tmp_path)._started(time.monotonic() + 9)
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs == {"worker-1.txt": "of the run", "worker-2.txt": "of its last step"}


@pytest.mark.parametrize("awaited", ["benchmarks.worker", "^sleep 600"])
def test_what_runs_in_the_background_ends_when_the_run_is_killed(root, tmp_path, awaited):
    script = (
        "import sys, time; from pathlib import Path; from benchmarks import background;"
        "b = background.Background([('sleep', '600')], Path(sys.argv[1]));"
        "print(b._processes[0].pid, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    session = int(run.stdout.readline())

    def members() -> list[str]:
        found = subprocess.run(
            ["ps", "-s", str(session), "-o", "args="], capture_output=True, text=True
        )
        return [line for line in found.stdout.splitlines() if "defunct" not in line]

    try:
        until = time.monotonic() + 120
        while not any(re.search(awaited, line) for line in members()):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    until = time.monotonic() + 120
    while members():
        assert time.monotonic() < until, members()
        time.sleep(0.05)


def test_a_machine_without_nice_warms_up_all_the_same(monkeypatch):
    monkeypatch.setattr(background.shutil, "which", lambda _: None)
    assert all(command[0] == sys.executable for command in background.warming(plan.Known(CUDA)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "smoke mlp,zzz"], "--only zzz: no job's title has it; --list prints them all"),
        (["--suite", "smoke", "--only", "zzz"], "--only zzz: no job's title has it"),
        (["--minutes", "inf"], "--minutes inf: expected more than 0 and at most 1440"),
        (["--minutes", "1e9"], "--minutes 1000000000.0: expected more than 0 and at most 1440"),
    ],
)
def test_arguments_that_would_waste_a_run_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", *arguments])
    assert said in capsys.readouterr().err


def test_a_gpu_without_bfloat16_is_said_where_nothing_else_was_asked_for(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(SystemExit):
        gpu.main(["--dtype", "bf16"])
    assert "this GPU has no bfloat16; expected some of f16, f32" in capsys.readouterr().err


def test_what_is_listed_is_what_would_run(capsys):
    assert gpu.main(["--list", "--suite", "attention", "--quick", "--dtype", "bf16"]) == 0
    quick = capsys.readouterr().out
    assert "attention/attention forward" in quick and "smoke" not in quick
    assert gpu.main(["--list", "--suite", "attention", "--dtype", "bf16"]) == 0
    assert len(capsys.readouterr().out) > len(quick)
    assert gpu.main(["--list", "--quick"]) == 0
    plan_of_quick = capsys.readouterr().out
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out == plan_of_quick, "the plan names its own shapes"
    assert gpu.main(["--list", "--dry-run"]) == 0
    assert "probe: hang" in capsys.readouterr().out


def test_what_a_plan_wants_and_no_suite_has_is_said():
    notes = {}
    for dtype in ("bf16", "f16"):
        known = plan.Known(
            plan.settings_of_plan(Settings(**{**vars(CUDA), "dtypes": (dtype,)}), False)
        )
        notes[dtype] = {step.name: step.note(known) for step in plan.steps()}
    assert notes["bf16"]["kernels"] == notes["bf16"]["models"] == notes["f16"]["kernels"] == ""
    assert "no such case: training/base_waveform_step step" in notes["f16"]["models"]


def test_an_assembler_that_does_not_run_is_none(tmp_path, monkeypatch):
    """Triton would take its own in its place, without a word, and find the same bits."""
    broken, works = tmp_path / "ptxas", tmp_path / "works"
    for path, text in ((broken, "exit 1"), (works, "echo release 13.0, V13.0.88")):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(plan, "_OWN_PTXAS", works)
    assert plan.own_ptxas() == works
    (step,) = [step for step in plan.steps() if step.name == "ptxas"]
    assert step.note(plan.Known(CUDA)) == f"{works} 13.0"
    monkeypatch.setattr(plan, "_OWN_PTXAS", tmp_path)
    assert plan.own_ptxas() is None
    assert "nothing was compared" in step.note(plan.Known(CUDA))
    assert [job["title"] for job in step.jobs(plan.Known(CUDA))] == [
        "proof sanitizer memcheck bf16"
    ]


def test_bits_that_there_is_nothing_to_compare_with_are_not_the_same(monkeypatch):
    settings = Settings(dtypes=("f32",), backend="reference", tiny=True)
    runner = jobs.Runner(settings, limits=None)
    (job,) = [j for j in jobs.smoke_jobs(settings, 10) if j["name"] == "layer_norm"]
    rows = runner.run(job | {"before": {}, "what": "x"})["rows"]
    assert rows and all("finding: not compared" in row["reason"] for row in rows)
    assert all(row["reason"] == "" for row in runner.run(job)["rows"])


def test_an_archive_can_be_read_at_any_moment(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.json").write_text(json.dumps(list(range(2000))))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            partial = folder / "0.json.partial"
            partial.write_text(json.dumps([time.monotonic()] * 3000))
            partial.replace(folder / "0.json")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with archive.Archive(folder, out, every_s=0.001) as packed:
            for _ in range(60):
                with tarfile.open(packed.path) as tar:
                    for member in tar.getmembers():
                        json.load(tar.extractfile(member))
    finally:
        stop.set()
        thread.join()
