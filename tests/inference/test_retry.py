"""Clips that failed are run again, in unfinished and in finished jobs, and land where they belong."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from ast_fast import cli
from ast_fast.inference import Engine, Wanted
from ast_fast.inference.job import JobError, run_job
from ast_fast.inference.retry import retry_file
from ast_fast.inference.rows import TagRows, encode_embedding
from ast_fast.inference.sources import units_of
from ast_fast.inference.writers import embedding_writer, index_of, tag_writer

NAMES = ("cat", "dog", "rain", "=sum")
BAD = ("05b.wav", "11.flac")
SUFFIXES = ("jsonl", "csv", "parquet", "npy", "safetensors")


def start(model, out, sources, slow_s=0.0, **options):
    """Labels, or vectors where the suffix is one of theirs alone; windows in both."""
    tags = out.suffix in (".jsonl", ".csv")
    wanted = Wanted(scores=tags, embedding=not tags, windows=True)
    engine = Engine(model, "softmax", wanted, batch_size=1)
    rows = TagRows(NAMES, 2)
    encode = rows.encode if tags else encode_embedding
    writer = tag_writer(out, rows) if tags else embedding_writer(out, 32)

    def slowly(output):
        time.sleep(slow_s)
        return encode(output)

    units = list(units_of(sources))
    return run_job(out, units, engine, slowly, writer, {"top_k": 2}, progress=False, **options)


def rows_of(path):
    """The rows of any output, as plain values: the file of each first, by name."""
    if path.suffix == ".jsonl":
        return [[Path(row["file"]).name, row] for row in map(json.loads, path.open())]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return [
            [Path(row["file"]).name, row] for row in pyarrow.parquet.read_table(path).to_pylist()
        ]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header[0] == "file"
        return [[Path(row[0]).name, *row[1:]] for row in rows]
    if path.suffix == ".npy":
        vectors, spans = np.load(path), None
    else:
        from safetensors.numpy import load_file

        found = load_file(path)
        assert sorted(found) == ["embeddings", "spans_s"]
        vectors, spans = found["embeddings"], found["spans_s"]
    with index_of(path).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["row"]) for row in table] == list(range(len(vectors)))
    if spans is not None:
        told = [(float(row["start_s"]), float(row["end_s"])) for row in table]
        assert told == [tuple(span) for span in spans.tolist()]
    return [
        [Path(row["file"]).name, row["start_s"], vector.tolist()]
        for row, vector in zip(table, vectors, strict=True)
    ]


@pytest.fixture
def copies(clips, tmp_path):
    """The folder of clips, to be mended."""
    return Path(shutil.copytree(clips, tmp_path / "copies"))


def mend(folder, names=BAD):
    for name in names:
        shutil.copyfile(folder / "04.wav", folder / name)


def same_rows(found, expected):
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert str(found) == str(expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_finished_file_is_mended_in_place(tiny_model, copies, tmp_path, suffix):
    out, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    sources = [copies, copies / "05b.wav", copies / "00.wav"]
    summary = start(tiny_model, out, sources)
    assert (summary.clips, summary.failed) == (14, 3)
    first = rows_of(out)
    # one of two is mended; then the other
    mend(copies, BAD[:1])
    summary = start(tiny_model, out, sources, retry_failed=True)
    assert (summary.clips, summary.failed, summary.before) == (14, 1, 11)
    assert [row for row in rows_of(out) if row[0] != BAD[0]] == first
    (error,) = map(json.loads, summary.errors.open())
    assert error["file"].endswith(BAD[1])
    again = start(
        tiny_model, out, sources, retry_failed=True
    )  # it fails again, and nothing changes
    assert (again.failed, again.before) == (1, 13)
    mend(copies)
    summary = start(tiny_model, out, sources, retry_failed=True)
    assert (summary.failed, summary.before, summary.errors) == (0, 13, None)
    assert start(tiny_model, whole, sources).failed == 0
    same_rows(rows_of(out), rows_of(whole))
    left = {path.name for path in tmp_path.iterdir()} - {"copies"}
    assert left == {p.name for f in (out, whole) for p in (f, index_of(f)) if p.exists()}
    done = start(tiny_model, out, sources, retry_failed=True)  # nothing is left to be mended
    assert (done.before, done.failed) == (14, 0)


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_an_unfinished_job_reads_again_what_failed_only_if_asked(
    tiny_model, copies, tmp_path, suffix
):
    out, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"

    class Stop(Exception):
        pass

    def stopping(path):
        raise Stop

    engine = Engine(tiny_model, "softmax", Wanted(scores=True, windows=True), batch_size=1)
    rows = TagRows(NAMES, 2)
    with pytest.raises(Stop):  # at the merge: all clips are in the parts
        if suffix == "jsonl":
            units = list(units_of([copies]))
            run_job(out, units, engine, rows.encode, stopping, {"top_k": 2}, progress=False)
        else:
            engine = Engine(tiny_model, "softmax", Wanted(embedding=True, windows=True))
            units = list(units_of([copies]))
            run_job(out, units, engine, encode_embedding, stopping, {"top_k": 2}, progress=False)
    mend(copies)
    other = tmp_path / f"other.{suffix}"
    shutil.copytree(f"{out}.parts", f"{other}.parts")
    assert start(tiny_model, other, [copies], resume=True).failed == 2
    summary = start(tiny_model, out, [copies], retry_failed=True)
    assert (summary.failed, summary.before) == (0, 10)
    start(tiny_model, whole, [copies])
    assert [row[0] for row in rows_of(out)] == [row[0] for row in rows_of(whole)]
    assert len(rows_of(out)) == len(rows_of(other)) + len(
        [row for row in rows_of(out) if row[0] in BAD]
    )


def in_child(action):
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
        sys.stdout.flush()
        os._exit(status)


@pytest.mark.parametrize("suffix", ["csv", "safetensors"])
def test_a_retry_killed_at_random_moments_loses_nothing_and_writes_nothing_twice(
    tiny_model, copies, tmp_path, suffix
):
    sources = [copies] * 6
    out, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    assert start(tiny_model, out, sources).failed == 12
    before = out.read_bytes()
    mend(copies)
    start(tiny_model, whole, sources)
    rng, kills = random.Random(1), 0
    while True:
        child = in_child(lambda: start(tiny_model, out, sources, 0.02, retry_failed=True))
        # later and later: a busy machine must come to an end too
        time.sleep(rng.uniform(0.05, 0.3) * (1 + kills / 20))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        assert kills < 100, "no progress"
        if retry_file(out).exists() and out.read_bytes() != before:
            pytest.fail("the file changed and still owes clips")
    assert kills >= 2, "the retry was too quick to be killed"
    same_rows(rows_of(out), rows_of(whole))
    assert not Path(f"{out}.parts").exists() and not Path(f"{out}.errors.jsonl").exists()


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_a_kill_in_the_last_steps_of_a_retry_leaves_a_job_that_ends_well(
    tiny_model, copies, tmp_path, suffix
):
    made = tmp_path / f"made.{suffix}"
    start(tiny_model, made, [copies])
    mend(copies, BAD[:1])
    whole = tmp_path / f"whole.{suffix}"
    start(tiny_model, whole, [copies])
    expected, kills = rows_of(whole), 0
    for step in range(14):  # every rename, deletion and flush
        folder = tmp_path / str(step)
        folder.mkdir()
        out = folder / made.name
        for path in (made, index_of(made), retry_file(made), Path(f"{made}.errors.jsonl")):
            if path.exists():
                shutil.copyfile(path, folder / path.name)

        def killed(step=step, out=out):
            calls = 0

            def after(real):
                def call(*arguments, **named):
                    nonlocal calls
                    found = real(*arguments, **named)
                    calls += 1
                    if calls == step + 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return found

                return call

            os.replace, os.rename, os.unlink = map(after, (os.replace, os.rename, os.unlink))
            os.fsync = after(os.fsync)
            start(tiny_model, out, [copies], retry_failed=True)

        _, status = os.waitpid(in_child(killed), 0)
        kills += os.WIFSIGNALED(status)
        summary = start(tiny_model, out, [copies], retry_failed=True)
        assert summary.failed == 1 and rows_of(out) == expected, step
        assert not Path(f"{out}.parts").exists()
    assert kills >= 8


def test_a_file_that_is_not_as_it_was_written_or_another_job_is_not_mended(
    tiny_model, copies, tmp_path
):
    out = tmp_path / "out.jsonl"
    start(tiny_model, out, [copies])
    mend(copies)
    content = out.read_bytes()
    with pytest.raises(JobError, match="begun otherwise: other clips"):
        start(tiny_model, out, [copies, copies / "00.wav"], retry_failed=True)
    out.write_bytes(content[:-10])
    with pytest.raises(JobError, match="is not as it was written"):
        start(tiny_model, out, [copies], retry_failed=True)
    assert start(tiny_model, out, [copies], resume=True).before == 12  # as ever
    out.write_bytes(content)
    told = retry_file(out).read_text()
    retry_file(out).unlink()
    with pytest.raises(JobError, match="where the clips that failed belong is not known"):
        start(tiny_model, out, [copies], retry_failed=True)
    retry_file(out).write_text(told)
    assert start(tiny_model, out, [copies], retry_failed=True).failed == 0


def test_a_retry_whose_file_is_gone_says_so(tiny_model, copies, tmp_path):
    out = tmp_path / "out.jsonl"
    start(tiny_model, out, [copies])

    def stopping(path):
        raise KeyboardInterrupt

    engine = Engine(tiny_model, "softmax", Wanted(scores=True, windows=True))
    with pytest.raises(KeyboardInterrupt):
        run_job(
            *(out, list(units_of([copies])), engine, TagRows(NAMES, 2).encode, stopping),
            {"top_k": 2},
            retry_failed=True,
            progress=False,
        )
    out.unlink()
    with pytest.raises(JobError, match="which is gone"):
        start(tiny_model, out, [copies], resume=True)


def test_the_command_line_mends_a_file(model_folder, copies, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    command = ["tag", copies, "--model", model_folder, "--out", out]
    assert cli.main([str(part) for part in command]) == 1
    assert "--retry-failed" in capsys.readouterr().out
    mend(copies)
    assert cli.main([str(part) for part in (*command, "--retry-failed")]) == 0
    assert {row[0] for row in rows_of(out)} == {path.name for path in copies.iterdir()}
    vectors = tmp_path / "vectors.safetensors"
    command = ["embed", copies, "--model", model_folder, "--out", vectors, "--retry-failed"]
    assert cli.main([str(part) for part in command]) == 0
    assert len(rows_of(vectors)) == 12
