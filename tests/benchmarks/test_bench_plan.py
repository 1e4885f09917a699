"""The plan of a GPU run: its steps and clock, what ends a step, and the archive of what was found."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from benchmarks import archive, background, gpu, jobs, plan, record
from benchmarks.book import Book
from benchmarks.case import Settings, listed

FACTS = {
    "device": "cuda",
    "device_name": "x",
    "torch": "2",
    "commit": "c",
    "date": "2026-11-30T00:00:00Z",
    "threads": 1,
    "packages": {},
}
CUDA = plan.settings_of_plan(
    Settings(device="cuda", backend="triton", dtypes=("bf16", "f16", "f32")), compiled=False
)


class Clock:
    """A clock that is set, not waited for."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class PretendPool:
    """Jobs take as long as they are told to, on a clock that is set."""

    def __init__(self, clock: Clock, seconds: float, slots: list, broken: str = "") -> None:
        self.clock, self.seconds, self.slots, self.broken = clock, seconds, slots, broken
        self.done: list[tuple[str, float]] = []

    def __enter__(self) -> PretendPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, given, finished, *, slots, deadline, grace_s=10.0):
        self.slots.append(slots)
        waiting = list(given)
        while waiting and self.clock.time < deadline:
            batch, waiting = waiting[:slots], waiting[slots:]
            # what runs at the deadline is ended soon after it
            self.clock.time += min(self.seconds, deadline + grace_s - self.clock.time)
            for job in batch:
                self.done.append((job["title"], self.clock.time))
                if job["kind"] == "device":
                    finished(job, {"rows": [], "environment": FACTS, "ceilings": {}})
                elif self.broken and job["group"] == self.broken:
                    raise OSError("no space left on device")
                else:
                    row = jobs.failed_row(job, "", "ok")
                    answer = {"rows": [vars(row)], "digests": {"o": "0123"}}
                    finished(job, answer)
        return waiting


def follow(tmp_path, seconds: float, broken: str = "", only=(), minutes: float = 9.5):
    """A run of the whole plan with jobs of a given length; its pretended pool, book and clock."""
    clock, slots = Clock(), []
    workers = PretendPool(clock, seconds, slots, broken)
    book = Book(tmp_path, {}, shown=False)
    options = argparse.Namespace(minutes=minutes, dry_run=False)
    settings = Settings(**{**vars(CUDA), "only": only})
    run = gpu.Run(options, settings, book, clock)
    run.follow(plan.steps(), workers, lambda extra: workers, lambda: None)
    return workers, book, clock, run


def test_a_plan_of_short_jobs_does_everything_most_important_first(tmp_path):
    workers, book, _, run = follow(tmp_path, 0.5)
    order = [title for title, _ in workers.done]
    wanted = [
        "device and ceilings",
        "smoke attention_qkv bf16",
        "check attention_qkv 4x1214x3x12x64 bf16",
        "attention/attention forward B64 T1214 H12 D64 bf16",
        "attention/attention backward B64 T1214 H12 D64 bf16",
        "inference/base_waveform forward B64 N160000 bf16",
        "training/base_waveform_step step B64 S1024 bf16-master",
        "proof deterministic bf16",
        "smoke attention_qkv bf16 by the machine's ptxas",
    ]
    places = [order.index(title) for title in wanted]
    assert places == sorted(places)
    assert not any(row.status == "late" for file in book.files.values() for row in file.rows)
    assert len(order) == len(set(order)), "no job runs twice"
    assert run.elapsed() < 570


@pytest.mark.parametrize("seconds", [5.0, 29.0, 500.0])
def test_slow_jobs_cut_their_own_step_and_no_other(tmp_path, seconds):
    workers, book, _, run = follow(tmp_path, seconds)
    assert run.elapsed() <= 570 - gpu._LAST_S + gpu._GRACE_S < 570 - gpu._WATCHDOG_S
    started = {}
    for title, end in workers.done:
        started.setdefault(title, end)
    # every step has begun: the headline figures are reached whatever came before
    for title in (
        "smoke attention_qkv bf16",
        "check inference/base_features forward B32 S1024 bf16",
        "attention/attention forward B64 T1214 H12 D64 bf16",
        "inference/base_waveform forward B64 N160000 bf16",
        "proof deterministic bf16",
    ):
        assert title in started, title
    late = [row.case for file in book.files.values() for row in file.rows if row.status == "late"]
    done = {title for title, _ in workers.done}
    everything = {job["title"] for step in plan.steps() for job in step.jobs(run.known)}
    assert set(late) == everything - done
    assert len(late) == len(set(late))


def test_each_step_ends_when_the_plan_says(tmp_path):
    workers, _, _, run = follow(tmp_path, 500.0)
    ends = sorted({end - run.started for _, end in workers.done})
    lead, *others = [step for step in plan.steps() if step.jobs(run.known)]
    late = lead.end(9.5) + gpu._DEVICE_GRACE_S
    # the first takes from the second, which has a right to some time all the same
    smoke = late + others[0].at_least_s + gpu._GRACE_S
    # one batch a step, each cut off at the end of its own step
    assert ends == pytest.approx(
        [late, smoke, *(step.end(9.5) + gpu._GRACE_S for step in others[1:])]
    )


def test_a_shorter_run_has_the_same_plan_in_proportion(tmp_path):
    _, _, _, run = follow(tmp_path, 500.0, minutes=4.0)
    assert run.elapsed() <= 240
    assert [step.end(4.75) for step in plan.steps()] == pytest.approx(
        [step.end(9.5) / 2 for step in plan.steps()]
    )


def test_a_step_that_breaks_off_is_said_and_the_next_begins(tmp_path):
    workers, book, _, _ = follow(tmp_path, 0.5, broken="checks")
    assert any("checks: broke off: OSError: no space left" in line for line in book.steps)
    titles = [title for title, _ in workers.done]
    assert "attention/attention forward B64 T1214 H12 D64 bf16" in titles
    assert "broke off" in book.summary()


def test_a_device_that_does_not_answer_ends_the_run_with_its_reason(tmp_path):
    class Dead(PretendPool):
        def run(self, given, finished, **_):
            (job,) = given
            finished(job, {"rows": [vars(jobs.failed_row(job, "no kernel image"))]})
            return []

    clock = Clock()
    book = Book(tmp_path, {}, shown=False)
    run = gpu.Run(argparse.Namespace(minutes=9.5, dry_run=False), CUDA, book, clock)
    dead = Dead(clock, 1.0, [])
    with pytest.raises(RuntimeError, match="no kernel image"):
        run.follow(plan.steps(), dead, lambda extra: dead, lambda: None)


def test_checks_run_twelve_at_a_time_and_what_is_timed_alone(tmp_path):
    workers, *_ = follow(tmp_path, 0.5)
    by_step = dict(zip([step.name for step in plan.steps()], workers.slots, strict=True))
    assert by_step["smoke"] == by_step["checks"] == by_step["ptxas"] == 12
    assert by_step["kernels"] == by_step["tune"] == by_step["models"] == 1


def test_what_is_timed_has_the_machine_to_itself(tmp_path):
    stopped = []
    clock = Clock()
    workers = PretendPool(clock, 0.5, [])
    run = gpu.Run(
        argparse.Namespace(minutes=9.5, dry_run=False), CUDA, Book(tmp_path, {}, shown=False), clock
    )
    run.follow(plan.steps(), workers, lambda extra: workers, lambda: stopped.append(clock.time))
    first = next(end for title, end in workers.done if title.startswith("attention/attention"))
    assert stopped and stopped[0] < first


def test_several_texts_choose_jobs(tmp_path):
    workers, *_ = follow(tmp_path, 0.5, only=("smoke mlp", "gemm_qkv forward"))
    assert [title for title, _ in workers.done] == [
        "device and ceilings",
        "smoke mlp bf16",
        "smoke mlp_fp8 bf16",
        "decisions/gemm_qkv forward B64 T1214 bf16",
        "smoke mlp bf16 by the machine's ptxas",
        "smoke mlp_fp8 bf16 by the machine's ptxas",
    ]
    assert listed("a/b forward", ("x", "b f")) and listed("a/b forward", ("a*ward",))
    assert not listed("a/b forward", ("x",)) and listed("anything", ())


def test_compiled_peers_take_part_only_when_asked_for():
    asked = plan.settings_of_plan(Settings(device="cuda"), compiled=True)
    for name in ("torch-compile", "transformers-amp-compile", "regional", "flex"):
        assert not CUDA.wants(name) and asked.wants(name), name
    for name in ("sdpa-cudnn", "sdpa-flash", "transformers", "one pass", "graph"):
        assert CUDA.wants(name), name
    titles = [job["title"] for step in plan.steps() for job in step.jobs(plan.Known(CUDA))]
    assert not [title for title in titles if "compile" in title and "proof" not in title]


def test_every_wish_of_the_plan_names_cases_that_exist():
    known = plan.Known(CUDA)
    titles = {job["title"] for job in [*plan._kernels(known), *plan._models(known)]}
    for pattern in (*plan.KERNELS, *plan.MODELS):
        text = pattern.format(d="bf16")
        assert any(listed(title, (text,)) for title in titles), text
    assert {job["name"] for job in plan._proofs(known)} == set(plan.PROOFS)


def test_bits_that_another_assembler_changes_are_a_finding(tmp_path, monkeypatch):
    from benchmarks import smoke

    settings = Settings(dtypes=("f32",), backend="reference", tiny=True)
    runner = jobs.Runner(settings, limits=None)
    (job,) = [j for j in jobs.smoke_jobs(settings, 10) if j["name"] == "layer_norm"]
    first = runner.run(job)
    book = Book(tmp_path, {}, shown=False)
    book.environment = FACTS
    book.add(job, first)
    assert set(book.digests["layer_norm"]) == {"y", "dx", "dweight", "dbias"}
    again = job | {"before": book.digests["layer_norm"], "what": "those of Triton's own ptxas"}
    same = runner.run(again)
    assert [row["reason"] for row in same["rows"]] == [""] * 4
    real = smoke.digest
    monkeypatch.setattr(smoke, "digest", lambda tensor: real(tensor + 1e-7))
    changed = runner.run(again)
    assert all(row["status"] == "ok" for row in changed["rows"])
    assert all("other bits than those of Triton's" in row["reason"] for row in changed["rows"])
    book.add(again, changed)
    assert "finding: other bits" in book.summary()


def test_whole_models_run_by_the_measured_choice_and_say_what_did_not_launch(monkeypatch):
    from ast_fast import backend

    for job in plan._models(plan.Known(CUDA)):
        assert job["backend"] == "auto"
    settings = Settings(dtypes=("f32",), backend="reference", tiny=True, peers=("none",))
    runner = jobs.Runner(settings, jobs.Limits(seconds=0.0, min_rounds=2, max_rounds=2))
    job = next(jobs.case_jobs(settings, "block")) | {"backend": "auto"}
    (row,) = (row for row in runner.run(job)["rows"] if row["provider"] == "ast_fast[auto]")
    assert row["ms"] and row["reason"] == ""
    failing = [{"op": "mlp", "failed": "forward of bfloat16: triton (no registers)"}]
    monkeypatch.setattr(backend, "status", lambda: failing)
    (row,) = (row for row in runner.run(job)["rows"] if row["provider"] == "ast_fast[auto]")
    assert row["reason"].startswith("finding: not by our kernels alone: mlp: forward of bfloat16")


def test_the_second_assembler_has_a_cache_of_its_own(monkeypatch, tmp_path):
    own = tmp_path / "ptxas"
    own.write_text("")
    monkeypatch.setattr(plan, "own_ptxas", lambda: own)
    (step,) = [step for step in plan.steps() if step.name == "ptxas"]
    found = step.extra(plan.Known(CUDA))
    assert found["TRITON_PTXAS_PATH"] == str(own)
    usual = os.environ.get("TRITON_CACHE_DIR", "cache")
    assert found["TRITON_CACHE_DIR"] != usual and found["TRITON_CACHE_DIR"].endswith("own-ptxas")
    assert all(step.extra(plan.Known(CUDA)) is None for step in plan.steps()[:-1])


def test_every_op_has_a_smoke_line():
    from ast_fast import backend
    from benchmarks import smoke

    found = set(smoke.checks("triton"))
    for op in backend.OPS:
        assert op in found, op
    assert {"attention_one_pass", "linear_fp8", "mlp_fp8", "gemm_gelu_backward"} <= found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def packed_names(path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_the_archive_is_rewritten_while_the_run_goes_on(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    folder.mkdir()
    with archive.Archive(folder, out, every_s=0.05) as packed:
        (folder / "a.json").write_text("{}")
        until = time.monotonic() + 20
        while not (packed.path.exists() and "a.json" in packed_names(packed.path)):
            assert time.monotonic() < until, "nothing was packed before the end"
            time.sleep(0.02)
        (folder / "b.json").write_text("{}")
    assert packed_names(packed.path) == ["a.json", "b.json"]
    assert names_in(out) == [archive.NAME], "one file, nothing half written"


def test_a_long_log_is_packed_from_its_end(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("first line\n" + "x" * 2**20 + "\nlast line")
    with archive.Archive(folder, tmp_path / "out", every_s=0) as packed:
        pass
    with tarfile.open(packed.path) as tar:
        text = tar.extractfile("log.txt").read().decode()
    assert text.endswith("last line") and "first line" not in text and len(text) == 2**20


def test_an_archive_is_unpacked_to_result_files_alone(tmp_path, capsys):
    folder, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    folder.mkdir()
    (folder / "log.txt").write_text("x")
    (folder / "x-checks-2026-11-30.json").write_text(json.dumps({"suite": "checks"}))
    archive.Archive(folder, out, every_s=0).close()
    assert gpu.main(["--unpack", str(out / archive.NAME), "--out", str(back)]) == 0
    assert names_in(back) == ["x-checks-2026-11-30.json"]
    assert "x-checks-2026-11-30.json" in capsys.readouterr().out


def pack(folder: Path, out: Path, **files: dict) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    archive.Archive(folder, out, every_s=0).close()
    return out / archive.NAME


def test_unpacking_takes_nothing_away_from_an_earlier_run_of_the_day(tmp_path):
    back = tmp_path / "back"
    one = pack(tmp_path / "a", tmp_path / "one", x={"suite": "tune", "rows": [1]})
    two = pack(tmp_path / "b", tmp_path / "two", x={"suite": "tune", "rows": [2]})
    for path in (one, two, one, two):
        assert gpu.main(["--unpack", str(path), "--out", str(back)]) == 0
    assert names_in(back) == ["x-2.json", "x.json"], "unpacked again it is the same file"
    assert json.loads((back / "x.json").read_text())["rows"] == [1]
    assert json.loads((back / "x-2.json").read_text())["rows"] == [2]


def test_a_dry_run_is_unpacked_only_when_that_is_said(tmp_path, capsys):
    path = pack(tmp_path / "a", tmp_path / "one", x={"settings": {"dry_run": True}})
    arguments = ["--unpack", str(path), "--out", str(tmp_path / "back")]
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "of a dry run, whose times say nothing" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert gpu.main([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("content", [b"", b"not a tar", None])
def test_what_is_no_archive_is_refused_by_name(tmp_path, capsys, content):
    path = tmp_path / "results.tar.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        gpu.main(["--unpack", str(path), "--out", str(tmp_path)])
    assert "results.tar.gz: expected a whole results.tar.gz" in capsys.readouterr().err


def test_the_watchdog_says_its_last_words_and_ends_the_process():
    said, ended = [], threading.Event()
    with background.Watchdog(0.01, lambda: said.append("packed"), lambda status: ended.set()):
        assert ended.wait(10)
    assert said == ["packed"]


def test_the_watchdog_ends_the_process_whatever_its_last_words_run_into():
    ended = threading.Event()

    def fails() -> None:
        raise OSError("disk full")

    def hangs() -> None:
        time.sleep(600)

    threading.excepthook, before = lambda *_: None, threading.excepthook
    try:
        for last in (fails, hangs):
            ended.clear()
            with background.Watchdog(0.01, last, lambda status: ended.set(), last_s=0.1):
                assert ended.wait(10)
    finally:
        threading.excepthook = before


def test_a_watchdog_of_a_run_that_ends_does_not_bite():
    said = []
    with background.Watchdog(0.2, lambda: said.append("x"), lambda status: said.append("end")):
        pass
    time.sleep(0.4)
    assert said == []


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def test_what_runs_in_the_background_ends_with_its_children(tmp_path):
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    with background.Background([(sys.executable, "-c", script)], tmp_path) as running:
        until = time.monotonic() + 30
        while not (text := (tmp_path / "background-0.txt").read_text().strip()):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert alive(int(text))
        running.stop()
    until = time.monotonic() + 10
    while alive(int(text)):
        assert time.monotonic() < until, "the child outlives the run"
        time.sleep(0.02)


# what a bare machine with PyTorch and Triton may lack
ABSENT = [
    "soundfile",
    "soxr",
    "lightning_fabric",
    "lightning",
    "torchmetrics",
    "tyro",
    "rich",
    "tqdm",
    "safetensors",
    "transformers",
    "huggingface_hub",
    "timm",
    "torchvision",
    "torchaudio",
    "kaldi_native_fbank",
    "matplotlib",
    "sklearn",
    "scipy",
    "pybind11",
    "onnxruntime",
    "openvino",
    "hypothesis",
    "pytest",
]

BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

ABSENT = {set(ABSENT)!r}


class Finder:
    # found nowhere, exactly as a package that is not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT or name == "ast_fast._C":
            return None
        return PathFinder.find_spec(name, path, target)


# the finder of an editable install would still find the compiled module
sys.meta_path = [
    Finder() if finder is PathFinder else finder
    for finder in sys.meta_path
    if "__editable__" not in getattr(finder, "__module__", "")
]
"""


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


def unpacked(out, back) -> dict[str, list[dict]]:
    """Rows by suite of a run's archive."""
    found = [record.read(path) for path in archive.unpack(out / archive.NAME, back)]
    return {content["suite"]: content["rows"] for content in found}


def test_the_dry_run_of_the_plan_survives_a_crash_a_hang_and_a_lost_device(root, tmp_path):
    # on a machine that has nothing beyond PyTorch and Triton
    blocker = tmp_path / "path"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    process = dry_run(root, tmp_path / "out", "--minutes", "6", PYTHONPATH=str(blocker))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert names_in(tmp_path / "out") == [archive.NAME]
    rows = unpacked(tmp_path / "out", tmp_path / "back")
    probes = {row["case"]: row["reason"] for row in rows["probes"]}
    assert "asked to raise" in probes["probe: raise"]
    assert "ended with status 7" in probes["probe: exit"]
    assert "illegal memory access" in probes["probe: lose"]
    assert "took longer than" in probes["probe: hang"]
    assert {"smoke", "checks", "attention", "block", "inference", "training", "proofs"} <= set(rows)
    for suite, found in rows.items():
        if suite != "probes":
            assert all(row["status"] in ("ok", "skipped") for row in found), (suite, found)
    assert any(row["provider"] == "sdpa" and row["ratio"] for row in rows["attention"])
    # the compiled module cannot load: plain PyTorch stands in
    own = [row["provider"] for row in rows["inference"] if row["provider"].startswith("ast_fast")]
    assert own == ["ast_fast[reference]"]
    summary = output[output.rindex("\nsummary") :]
    for line in ("steps", "ptxas: ", "speed", "s of 360 s"):
        assert line in summary
    # the end of the output is all that some machines give back
    assert len(summary) < 12_000


def test_a_run_that_is_told_to_end_leaves_what_it_measured(root, tmp_path):
    process = dry_run(root, tmp_path / "out", "--minutes", "6")
    for line in process.stdout:
        if line.startswith("== smoke"):
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, output + errors
    rows = unpacked(tmp_path / "out", tmp_path / "back")
    assert rows["smoke"] and "summary" in output


def test_a_run_too_short_for_its_plan_ends_in_time_with_an_archive(root, tmp_path):
    began = time.monotonic()
    process = dry_run(root, tmp_path / "out", "--minutes", "0.4")
    output, errors = process.communicate(timeout=120)
    # starting Python is not part of its minutes
    assert time.monotonic() - began < 24 + 15, output + errors
    assert (tmp_path / "out" / archive.NAME).exists()
    assert "summary" in output
