"""Results in files: right, whole or absent, and resumable after a kill at any moment."""

import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ast_fast import ASTModel, cli, embed, tag
from ast_fast.inference import Engine, Failure, Wanted
from ast_fast.inference.job import JobError, run_job
from ast_fast.inference.ranks import RankLostError, Ranks
from ast_fast.inference.records import Record, RecordWriter, read_records
from ast_fast.inference.rows import TagRows
from ast_fast.inference.sources import units_of
from ast_fast.inference.writers import index_of, tag_writer

NAMES = ("cat", "dog", "rain", "=sum")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(model, out, sources, slow_s=0.0, **options):
    """A job that labels clips, slowed down so that a kill meets it at work."""
    engine = Engine(model, "softmax", Wanted(scores=True, windows=True), batch_size=3)
    rows = TagRows(NAMES, 2)

    def encode(output):
        time.sleep(slow_s)
        return rows.encode(output)

    units = list(units_of(sources))
    settings = {"top_k": 2}
    return run_job(
        out, units, engine, encode, tag_writer(out, rows), settings, progress=False, **options
    )


def in_child(action):
    """Run an action in a process of its own: its id. Status 0 if it ended well, 3 if it raised."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def test_records_survive_and_a_torn_end_is_left_out(tmp_path):
    writer = RecordWriter(tmp_path, 0)
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.int32)}
    for number in range(5):
        writer.write(Record(number, {"file": f"\u00fc {number}\n"}, arrays))
    writer.close()
    content = writer.path.read_bytes()
    found = list(read_records(writer.path))
    assert [record.number for record in found] == list(range(5))
    assert found[3].meta == {"file": "\u00fc 3\n"}
    np.testing.assert_array_equal(found[4].arrays["a"], arrays["a"])
    assert found[0].arrays["b"].shape == (0, 4)
    size = len(content) // 5
    for cut in range(len(content) + 1):
        writer.path.write_bytes(content[:cut])
        assert [r.number for r in read_records(writer.path)] == list(range(cut // size))
    rng = random.Random(0)
    for _ in range(200):  # a flipped bit ends the file where it lies
        broken = bytearray(content)
        place = rng.randrange(len(content))
        broken[place] ^= 1 << rng.randrange(8)
        writer.path.write_bytes(broken)
        assert [r.number for r in read_records(writer.path)] == list(range(place // size))
    assert RecordWriter(tmp_path, 0).path != writer.path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_labels_in_files_are_those_of_tag(tiny_model, model_folder, clips, tmp_path, suffix):
    out = tmp_path / f"labels.{suffix}"
    arguments = ["tag", clips, "--model", model_folder, "--out", out, "--top-k", "2"]
    options = ["--windows", "--frames", "--batch-size", "5", "--num-workers", "1"]
    assert cli.main([str(a) for a in (*arguments, *options)]) == 1
    errors = rows_of(tmp_path / f"labels.{suffix}.errors.jsonl")
    assert [Path(e["file"]).name for e in errors] == ["05b.wav", "11.flac"]
    assert errors[1]["error"] == "AudioEmptyError" and "0 bytes" in errors[1]["reason"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        out.name,
        f"{out.name}.errors.jsonl",
        f"{out.name}.retry.json",
    ]
    expected = [
        r
        for r in tag([clips], tiny_model, top_k=2, windows=True, frames=True)
        if not isinstance(r, Failure)
    ]
    if suffix == "csv":
        with out.open(newline="") as file:
            table = list(csv.DictReader(file))
        for kind, count in (
            ("clip", 2 * len(expected)),
            ("window", 2 * sum(r.windows for r in expected)),
            ("frame", 2 * sum(len(r.frames.times_s) for r in expected)),
        ):
            lines = [line for line in table if line["kind"] == kind]
            assert len(lines) == count
        best = [line for line in table if line["kind"] == "clip"][::2]
        # a label that a spreadsheet would compute is quoted
        names = [r.labels[0][0].replace("=sum", "'=sum") for r in expected]
        assert [line["label"] for line in best] == names
        assert {line["file"] for line in table} == {r.path for r in expected}
        return
    if suffix == "jsonl":
        rows = rows_of(out)
        labels = [[(x["label"], x["score"]) for x in row["labels"]] for row in rows]
        first = [[x["label"] for x in row["parts"][0]["labels"]] for row in rows]
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(out).to_pylist()
        labels = [list(zip(row["labels"], row["scores"], strict=True)) for row in rows]
        first = [row["parts"][0]["labels"] for row in rows]
    assert len(rows) == len(expected)
    for row, found, window, result in zip(rows, labels, first, expected, strict=True):
        assert row["file"] == result.path and row["windows"] == result.windows
        assert row["seconds"] == pytest.approx(result.seconds)
        assert [name for name, _ in found] == [name for name, _ in result.labels]
        assert [s for _, s in found] == pytest.approx([s for _, s in result.labels], abs=1e-5)
        assert window == [name for name, _ in result.parts[0].labels]
        assert len(row["parts"]) == result.windows
        assert row["frames"]["labels"] == [name for name, _ in found]
        assert row["frames"]["times_s"] == pytest.approx(result.frames.times_s.tolist(), abs=1e-5)
        curve = result.frames.probabilities[:, NAMES.index(found[0][0])]
        assert row["frames"]["scores"][0] == pytest.approx(curve.tolist(), abs=1e-5)


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("windows", [False, True])
def test_embeddings_in_files_are_those_of_embed(
    tiny_model, model_folder, clips, tmp_path, suffix, windows
):
    out = tmp_path / f"vectors.{suffix}"
    arguments = ["embed", clips, "--model", model_folder, "--out", out, "--hop", "0.25"]
    assert cli.main([str(a) for a in (*arguments, *(["--windows"] if windows else []))]) == 1
    expected, files = [], []
    for result in embed([clips], tiny_model, hop_s=0.25, windows=True):
        if not isinstance(result, Failure):
            found = result.window_vectors if windows else result.vector[None]
            expected.append(found.numpy())
            files += [result.path] * len(found)
    expected = np.concatenate(expected)
    if suffix in ("npy", "safetensors"):
        found = np.load(out) if suffix == "npy" else load_file(out)["embeddings"]
        with index_of(out).open(newline="") as file:
            index = list(csv.DictReader(file))
        assert [row["file"] for row in index] == files
        assert [int(row["row"]) for row in index] == list(range(len(found)))
    elif suffix == "csv":
        with out.open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [row["file"] for row in table] == files
        found = np.array([[float(row[f"e{i}"]) for i in range(32)] for row in table])
    elif suffix == "jsonl":
        rows = rows_of(out)
        parts = [row["parts"] if windows else [row] for row in rows]
        found = np.array([part["embedding"] for each in parts for part in each])
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(out).to_pylist()
        assert [row["file"] for row in rows] == files
        found = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_all_labels_are_kept_if_asked_for(model_folder, clips, tmp_path):
    out = tmp_path / "all.jsonl"
    arguments = ("tag", clips / "03.flac", "--model", model_folder, "--out", out, "--all")
    assert cli.main([str(a) for a in arguments]) == 0
    (row,) = rows_of(out)
    assert {x["label"] for x in row["labels"]} == set(NAMES)
    assert sum(x["score"] for x in row["labels"]) == pytest.approx(1.0, abs=1e-5)


def test_a_job_killed_at_random_moments_loses_nothing_and_writes_nothing_twice(
    tiny_model, clips, tmp_path
):
    sources = [clips] * 6
    whole = tmp_path / "whole.jsonl"
    summary = start(tiny_model, whole, sources)
    assert (summary.clips, summary.failed, summary.before) == (72, 12, 0)
    out, rng, kills = tmp_path / "killed.jsonl", random.Random(0), 0
    while not out.exists():
        child = in_child(lambda: start(tiny_model, out, sources, 0.01, resume=True))
        # later and later: a busy machine must come to an end too
        time.sleep(rng.uniform(0.02, 0.2) * (1 + kills / 20))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        assert kills < 200, "no progress"
    assert kills >= 3, "the job was too quick to be killed"
    last = start(tiny_model, out, sources, resume=True)
    assert last.before == 72 and not (tmp_path / "killed.jsonl.parts").exists()
    ours, theirs = rows_of(out), rows_of(whole)
    assert [row["file"] for row in ours] == [row["file"] for row in theirs]
    for mine, row in zip(ours, theirs, strict=True):
        assert [x["label"] for x in mine["labels"]] == [x["label"] for x in row["labels"]]
        assert [x["score"] for x in mine["labels"]] == pytest.approx(
            [x["score"] for x in row["labels"]], rel=1e-4, abs=1e-6
        )
        assert len(mine["parts"]) == len(row["parts"])
    errors = [tmp_path / f"{name}.jsonl.errors.jsonl" for name in ("killed", "whole")]
    assert rows_of(errors[0]) == rows_of(errors[1])


def test_a_kill_in_the_last_steps_leaves_a_job_that_ends_well(tiny_model, clips, tmp_path):
    whole = tmp_path / "whole.csv"
    start(tiny_model, whole, [clips])
    for step in range(12):  # every rename, deletion and flush of the end
        out = tmp_path / f"{step}.csv"

        def action(out=out, step=step):
            import ast_fast.inference.job as job

            count = 0

            def counted(function):
                def run(*arguments, **options):
                    nonlocal count
                    count += 1
                    if count == step + 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return run

            job.sync = counted(job.sync)
            job.shutil.rmtree = counted(job.shutil.rmtree)
            job.Path.replace = counted(job.Path.replace)
            start(tiny_model, out, [clips])

        os.waitpid(in_child(action), 0)
        start(tiny_model, out, [clips], resume=True)
        assert out.read_text() == whole.read_text()
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith((f"{step}.", "."))}
        assert left == {out.name, f"{out.name}.errors.jsonl", f"{out.name}.retry.json"}


def test_a_job_is_not_begun_over_another_nor_resumed_as_another(tiny_model, clips, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(JobError, match="no audio files"):
        start(tiny_model, out, [tmp_path])
    with pytest.raises(JobError, match="is not a folder"):
        start(tiny_model, tmp_path / "no" / "out.jsonl", [clips])

    def broken():
        raise_at = iter(range(5))

        def encode(output):
            if next(raise_at) == 4:
                raise KeyboardInterrupt
            return TagRows(NAMES, 2).encode(output)

        engine = Engine(tiny_model, "softmax", Wanted(scores=True), batch_size=2)
        units = list(units_of([clips]))
        writer = tag_writer(out, TagRows(NAMES, 2))
        run_job(out, units, engine, encode, writer, {"top_k": 2}, progress=False)

    with pytest.raises(KeyboardInterrupt, match=r"4 of 12 clips.*--resume"):
        broken()
    with pytest.raises(JobError, match="unfinished run"):
        start(tiny_model, out, [clips])
    with pytest.raises(JobError, match=r"other clips \(12, now 24\)"):
        start(tiny_model, out, [clips, clips], resume=True)
    engine = Engine(tiny_model, "softmax", Wanted(scores=True))
    rows = TagRows(NAMES, 3)
    units, writer = list(units_of([clips])), tag_writer(out, rows)
    with pytest.raises(JobError, match="top_k was 2, is 3"):
        run_job(out, units, engine, rows.encode, writer, {"top_k": 3}, resume=True, progress=False)
    # what two processes have both done is written once
    (part,) = (tmp_path / "out.jsonl.parts").glob("part-*")
    shutil.copy(part, part.with_name("part-00007-00000.records"))
    assert start(tiny_model, out, [clips], resume=True).before == 4
    assert len(rows_of(out)) == 10
    with pytest.raises(JobError, match="exists already"):
        start(tiny_model, out, [clips])


def test_two_processes_at_one_job_are_told_apart(tiny_model, clips, tmp_path):
    out = tmp_path / "out.jsonl"
    child = in_child(lambda: start(tiny_model, out, [clips], 0.2))
    while not list(tmp_path.glob("out.jsonl.parts/part*")):
        time.sleep(0.01)
    with pytest.raises(JobError, match="another process is at this job"):
        start(tiny_model, out, [clips], resume=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    start(tiny_model, out, [clips], resume=True)
    assert len(rows_of(out)) == 10


def test_ctrl_c_says_how_to_go_on(model_folder, clips, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    (tmp_path / "many.txt").write_text(f"{clips}/09.flac\n" * 3000)
    arguments = ["tag", str(tmp_path / "many.txt"), "--model", str(model_folder), "--out", str(out)]
    child = in_child(lambda: os._exit(cli.main([*arguments, "--num-workers", "1", "--resume"])))
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.glob("out.jsonl.parts/part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 130
    said = capfd.readouterr().err
    assert re.search(r"interrupted after \d+ of 3000 clips; .*--resume", said), said
    assert "Traceback" not in said and not out.exists()
    # other weights do not go on with it, wherever they lie
    other = ASTModel.from_pretrained(model_folder)
    torch.nn.init.zeros_(other.mlp_head[1].bias)
    other.save_pretrained(tmp_path / "other")
    arguments[arguments.index(str(model_folder))] = str(tmp_path / "other")
    assert cli.main([*arguments, "--resume"]) == 2
    assert "weights was" in capfd.readouterr().err


def test_a_full_disk_is_said_and_what_was_done_is_kept(tiny_model, clips, tmp_path):
    out = tmp_path / "out.jsonl"

    def limited():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        with pytest.raises(OSError, match=r"cannot be written: File too large.*--resume"):
            start(tiny_model, out, [clips])

    assert os.waitpid(in_child(limited), 0)[1] == 0
    summary = start(tiny_model, out, [clips], resume=True)
    assert 0 < summary.before < 12 and len(rows_of(out)) == 10


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_file_names_need_not_be_text(tiny_model, clips, tmp_path, suffix):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"\xff.wav", "\u00e4 \n b.wav".encode()):
        (folder / os.fsdecode(name)).write_bytes((clips / "02.wav").read_bytes())
    engine, rows = Engine(tiny_model, "softmax", Wanted(scores=True)), TagRows(NAMES, 2)
    out = tmp_path / f"out.{suffix}"
    units, writer = list(units_of([folder])), tag_writer(out, rows)
    summary = run_job(out, units, engine, rows.encode, writer, {}, progress=False)
    assert summary.clips == 2 and summary.failed == 0
    text = out.read_bytes()
    assert (b"udcff" in text) if suffix != "parquet" else text.startswith(b"PAR1")


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def as_rank(rank, size, port, action):
    def run():
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
        )
        action(Ranks.from_environment())

    return in_child(run)


def test_two_ranks_share_the_clips_and_one_writes_the_file(tiny_model, clips, tmp_path):
    whole, out, port = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", free_port()
    start(tiny_model, whole, [clips] * 3)
    children = [
        as_rank(rank, 2, port, lambda ranks: start(tiny_model, out, [clips] * 3, ranks=ranks))
        for rank in range(2)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    ours, theirs = rows_of(out), rows_of(whole)
    assert [row["file"] for row in ours] == [row["file"] for row in theirs]
    for mine, row in zip(ours, theirs, strict=True):
        assert mine["labels"][0]["score"] == pytest.approx(row["labels"][0]["score"], rel=1e-4)


def test_a_rank_that_dies_ends_the_others_and_any_number_of_ranks_goes_on(
    tiny_model, clips, tmp_path
):
    out, port = tmp_path / "out.jsonl", free_port()
    sources = [clips] * 3

    def first(ranks):
        with pytest.raises(RankLostError, match="--resume"):
            start(tiny_model, out, sources, ranks=ranks)

    children = [
        as_rank(0, 2, port, first),
        as_rank(1, 2, port, lambda ranks: start(tiny_model, out, sources, 0.2, ranks=ranks)),
    ]
    parts = tmp_path / "out.jsonl.parts"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in parts.glob("part-00001-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(children[1], signal.SIGKILL)
    assert os.waitpid(children[0], 0)[1] == 0 and os.WIFSIGNALED(os.waitpid(children[1], 0)[1])
    assert not out.exists()
    summary = start(tiny_model, out, sources, resume=True)  # one process now
    assert 18 <= summary.before < 36 and len(rows_of(out)) == 30


@pytest.mark.parametrize(
    ("values", "says"),
    [({"RANK": "x"}, "RANK='x'"), ({"RANK": "2", "WORLD_SIZE": "2"}, "below the size")],
)
def test_a_wrong_environment_is_named(monkeypatch, values, says):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        Ranks.from_environment()


@pytest.mark.slow
def test_torchrun_shares_the_work(model_folder, clips, tmp_path):
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "ast_fast", "embed", clips]
    command += ["--model", model_folder, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    # two of the files cannot be read: the first rank says so
    assert done.returncode == 1 and "10 clips" in done.stdout, done.stderr
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(out).num_rows == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tag", "CLIPS", "--out", "x.xlsx"), "expected one of .jsonl, .csv, .parquet"),
        (("embed", "CLIPS", "--out", "x.npz"), "expected one of .jsonl, .csv, .parquet, .npy"),
        (("tag", "CLIPS", "--resume"), "give --out FILE"),
        (("tag", "CLIPS", "--frames"), "add --json, or --out FILE"),
        (("tag", "CLIPS", "--hop", "9"), "hop=9"),
        (("tag", "none.csv"), "none.csv"),
        (("tag", "CLIPS", "--top-k", "0"), "--top-k 0"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says, model_folder, clips, capsys):
    named = [str(clips) if a == "CLIPS" else a for a in arguments]
    assert cli.main([*named, "--model", str(model_folder)]) == 2
    assert says in capsys.readouterr().err


def test_windows_and_curves_on_the_terminal(model_folder, clips, capsys):
    arguments = ["tag", str(clips / "03.flac"), "--model", str(model_folder), "--windows"]
    assert cli.main([*arguments, "--hop", "0.2", "--top-k", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("(10 windows)") and "  0.20 to 0.54 s" in said
    assert cli.main([*arguments, "--json", "--frames"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert len(row["parts"]) == row["windows"] == 7
    assert len(row["frames"]["times_s"]) == len(row["frames"]["scores"][0])


def test_packed_weights_give_the_same_vectors(tiny_model, clips):
    from ast_fast.inference import load_for_inference
    from ast_fast.optimized import why_not

    if why_not("exact") is not None or torch.cuda.is_available():
        pytest.skip(f"{why_not('exact')}")
    import copy

    packed = load_for_inference(copy.deepcopy(tiny_model))
    for mine, other in zip(embed([clips], packed), embed([clips], tiny_model), strict=True):
        if not isinstance(mine, Failure):
            torch.testing.assert_close(mine.vector, other.vector, rtol=1e-4, atol=1e-5)
