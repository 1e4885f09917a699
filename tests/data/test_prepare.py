"""Preparing a set: what is found in it, what is stored, and that interruptions and workers leave no trace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import cli, sample_sets
from ast_fast.config import AudioConfig, LogMelConfig
from ast_fast.data import (
    AudioDataset,
    ManifestError,
    ShardSet,
    dataset_of,
    read_data,
    read_folder,
    write_shards,
)
from ast_fast.data.examine import Moments, as_stored
from ast_fast.data.file_store import FileStore, ManifestStore
from ast_fast.data.prepare import prepare_clips, read_lines
from ast_fast.frontend import log_mel_features

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(5)


def noise(samples, scale=0.1):
    return (RNG.normal(0, scale, samples) * 32768).clip(-32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A manifest of clips with everything that can be wrong with them; the kind is the name."""
    root = tmp_path_factory.mktemp("messy")
    audio = root / "audio"
    audio.mkdir()
    good = [noise(4000 + 160 * n) for n in range(6)]
    for number, wave in enumerate(good):
        sf.write(audio / f"good{number}.wav", wave, 16000)
    sf.write(audio / "copy.flac", good[1], 16000)
    sf.write(audio / "stereo.wav", np.stack([good[2], good[3][: good[2].size]], 1), 16000)
    sf.write(audio / "other_rate.wav", noise(8000), 22050)
    sf.write(audio / "silent.wav", np.zeros(3000, np.int16), 16000)
    sf.write(audio / "clipped.wav", np.sign(RNG.normal(size=3000)) * 0.99999, 16000)
    sf.write(audio / "loud.wav", np.full(3000, 1.5, np.float32), 16000, subtype="FLOAT")
    sf.write(audio / "short.wav", noise(100), 16000)
    bad = np.zeros(3000, np.float32)
    bad[7] = np.nan
    sf.write(audio / "nan.wav", bad, 16000, subtype="FLOAT")
    whole = (audio / "good0.wav").read_bytes()
    (audio / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (audio / "undecodable.wav").write_bytes(b"RIFF nonsense")
    (audio / "web.wav").write_bytes(b"<!DOCTYPE html><html>")
    (audio / "empty.wav").write_bytes(b"")
    sf.write(audio / "header.wav", noise(0), 16000)
    names = sorted(path.name for path in audio.iterdir())
    labels = ["a" if name < "n" else "b" for name in names]
    rows = [
        f"audio/{name},{label},{'test' if name in ('copy.flac', 'loud.wav') else 'train'}"
        for name, label in zip(names, labels, strict=True)
    ]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows, "audio/gone.wav,a,train"]))
    return root


def prepared(*arguments):
    assert cli.main(["prepare", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def reported(messy, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "shards"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prepared("--data", messy / "list.csv", "--out", out, "--workers", "2")
    torch.set_num_threads(threads)
    return out, json.loads((out / "report.json").read_text())


def names_in(entry):
    return {Path(text.partition(":")[0].strip("'")).name for text in entry["examples"]}


def test_the_report_names_everything_that_is_wrong(reported):
    _, report = reported
    problems = report["problems"]
    assert {kind: names_in(entry) for kind, entry in problems.items()} == {
        "missing": {"gone.wav"},
        "undecodable": {"undecodable.wav", "web.wav"},
        "empty": {"empty.wav", "header.wav"},
        "truncated": {"truncated.wav"},
        "NaN or Inf": {"nan.wav"},
    }
    found = {kind.split(" ")[0]: names_in(entry) for kind, entry in report["findings"].items()}
    assert found.pop("of") & {"other_rate.wav", "stereo.wav"}
    assert found == {
        "silent": {"silent.wav"},
        "clipped": {"clipped.wav", "loud.wav"},
        "float": {"loud.wav"},
        "beyond": {"loud.wav"},
        "shorter": {"short.wav"},
    }
    assert names_in(report["findings"]["of another rate, resampled"]) == {"other_rate.wav"}
    double = report["duplicates"]
    assert double["count"] == 1 and "copy.flac" in double["examples"][0]
    assert double["in_several_parts"] == 1 and double["with_other_labels"] == 0
    assert report["listed"] == 20 and report["stored"] == 13
    assert report["classes"] == {"a": 9, "b": 4} and report["splits"] == {"train": 11, "test": 2}


def test_the_text_says_the_same(reported):
    out, report = reported
    text = (out / "report.txt").read_text()
    for part in ("missing: 1", "undecodable: 2", "silent", "13 stored at 16000 Hz", "       9  a"):
        assert part in text
    assert f"mean {report['statistics']['mean']:.7f}" in text and text.isascii()


def stored_waves(out):
    shards = ShardSet(out)
    return [shards[index].wave for index in range(len(shards))]


def test_statistics_are_those_of_all_values_at_once(reported):
    out, report = reported
    front = LogMelConfig(num_frames=None, mean=0.0, std=0.5)
    everything = [log_mel_features(wave[None], front)[0] for wave in stored_waves(out)]
    values = torch.cat(everything).double()
    statistics = report["statistics"]
    assert statistics["values"] == values.numel()
    assert statistics["mean"] == pytest.approx(values.mean().item(), rel=1e-13)
    assert statistics["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-13)
    padded = torch.stack(
        [torch.nn.functional.pad(x, (0, 0, 0, 1024 - len(x))) for x in everything]
    ).double()
    original = statistics["as_get_norm_stats"]
    assert original["mean"] == pytest.approx(padded.mean().item(), rel=1e-12)
    std = np.std(padded.numpy(), ddof=1)
    assert original["std"] == pytest.approx(std, rel=1e-12)


def test_the_originals_statistics_average_batches_of_1000_and_cut_long_clips(tmp_path):
    waves = [noise(1000 + 37 * (n % 9)) for n in range(1100)]
    from ast_fast.data import WaveformDataset
    from ast_fast.data.prepare_report import summarise

    dataset = WaveformDataset(list(map(torch.from_numpy, waves)), [(0,)] * 1100, ("x",))
    front = LogMelConfig(num_mel_bins=16, num_frames=None, mean=0.0, std=0.5)
    from ast_fast.data.shard_writer import ShardStore

    lines = prepare_clips(
        dataset,
        tmp_path / "s",
        ShardStore(dataset),
        energies=lambda wave: log_mel_features(wave, front),
        frames=5,
    )
    report = summarise(read_lines(lines), dataset, frames=5, num_mel_bins=16)
    fixed = front.replace(num_frames=5)
    padded = torch.cat(
        [log_mel_features(torch.from_numpy(wave)[None], fixed) for wave in waves]
    ).double()
    parts = (padded[:1000], padded[1000:])
    found = report["statistics"]["as_get_norm_stats"]
    assert found["batches"] == 2
    assert found["mean"] == pytest.approx(
        np.mean([part.mean().item() for part in parts]), rel=1e-12
    )
    stds = [np.std(part.numpy(), ddof=1) for part in parts]
    assert found["std"] == pytest.approx(np.mean(stds), rel=1e-12)


def test_moments_merge_without_loss_far_from_zero():
    values = 1e8 + RNG.normal(size=3000)
    merged = Moments()
    for part in np.array_split(values, 7):
        merged = merged.merged(Moments.of(part))
    assert merged.n == 3000 and merged.mean == pytest.approx(values.mean(), rel=1e-15)
    assert merged.std() == pytest.approx(values.std(), rel=1e-6)
    assert Moments().merged(Moments()) == Moments() and Moments.of(np.empty(0)) == Moments()


def test_samples_beyond_full_scale_are_counted():
    wave = torch.tensor([1.0, -1.0, 1.00002, -1.5, 0.5])
    samples, beyond = as_stored(wave)
    assert samples.tolist() == [32767, -32768, 32767, -32768, 16384] and beyond == 2


# ---- the forms


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("form", ["shards", "files", "manifest"])
def test_workers_change_nothing(messy, tmp_path, form):
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        arguments = ("--data", messy / "list.csv", "--to", form, "--out", out)
        prepared(*arguments, "--workers", workers, "--shard-mb", "1")
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


def test_copies_are_flac_of_the_same_samples_and_train_as_they_are(messy, tmp_path, capsys):
    out = tmp_path / "out"
    prepared("--data", messy / "list.csv", "--to", "files", "--out", out)
    assert f"train on it with: ast-fast train --data {out}" in capsys.readouterr().out
    data = read_data(out)
    source = read_data(messy / "list.csv", leave_out_missing=True)
    before = dataset_of(source, AudioConfig(dtype="int16"))
    assert len(data) == 13 and data.classes == ("a", "b") and set(data.splits) == {"train", "test"}
    lines = {line["clip"]: line for line in read_lines(out / "clips.jsonl")}
    kept = [number for number, line in lines.items() if "error" not in line]
    for index, origin in enumerate(kept):
        assert data.labels[index] == source.labels[origin]
        info = sf.info(data.file(index))
        assert (info.format, info.subtype, info.samplerate) == ("FLAC", "PCM_16", 16000)
        clip = before[origin]
        assert np.array_equal(sf.read(data.file(index), dtype="int16")[0], clip.wave.numpy())
    again = read_data(out / "manifest.csv")
    assert again.paths == data.paths and again.splits == data.splits
    assert [again.classes[x[0]] for x in again.labels] == [data.classes[x[0]] for x in data.labels]


def test_a_verified_manifest_lists_the_good_files_where_they_are(messy, tmp_path, capsys):
    out = tmp_path / "out"
    prepared("--data", messy / "list.csv", "--to", "manifest", "--out", out)
    assert f"--data {out} --root {messy}" in capsys.readouterr().out
    data = read_data(out, root=messy)
    assert len(data) == 13 and data.paths[0] == "audio/clipped.wav"
    report = json.loads((out / "report.json").read_text())
    assert report["stored"] == 13 and not list(out.rglob("*.flac"))
    dataset = dataset_of(read_data(tmp_path / "out", root=messy), AudioConfig())
    assert all(dataset[i].report.num_skipped == 0 for i in range(13))


def test_names_that_meet_and_names_like_formulas_keep_apart(tmp_path):
    for name in ("x/-1.wav", "x/-1.flac", "x/=2.ogg", "-y/3.wav"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "data" / name, noise(900), 16000)
    out = tmp_path / "out"
    prepared("--data", tmp_path / "data", "--to", "files", "--out", out)
    assert len(set(read_data(out).paths)) == 4 and len(list(out.rglob("*.flac"))) == 4
    # a class called "-y" would not come back from CSV as it was
    assert not (out / "manifest.csv").exists() and read_data(out).classes == ("-y", "x")
    (tmp_path / "data" / "-y").rename(tmp_path / "data" / "y")
    prepared("--data", tmp_path / "data", "--to", "manifest", "--out", tmp_path / "list")
    rows = (tmp_path / "list" / "manifest.csv").read_text().splitlines()
    assert all(row[0] not in "=+-@" for row in rows)
    data = read_data(tmp_path / "list" / "manifest.csv", root=tmp_path / "data")
    assert len(data) == 4


def test_numbers_to_predict_are_prepared_too(tmp_path):
    sample_sets.make_deam(tmp_path / "deam", songs=4, seconds=0.3)
    source = read_data(tmp_path / "deam")
    for form in ("shards", "files"):
        prepared("--data", tmp_path / "deam", "--to", form, "--out", tmp_path / form)
        data = read_data(tmp_path / form)
        assert np.array_equal(data.values, source.values) and data.classes == source.classes
    assert not (tmp_path / "files" / "classes.csv").exists()


def test_what_is_asked_for_is_dropped_kept_or_zeroed(messy, tmp_path):
    out = tmp_path / "out"
    options = ("--drop", "silent", "duplicates", "--keep-truncated", "--zero-non-finite")
    prepared("--data", messy / "list.csv", "--out", out, *options)
    report = json.loads((out / "report.json").read_text())
    # the NaN file is silence but for its NaN, and so a copy of nothing that is kept
    assert report["dropped"] == 3 and report["stored"] == 12
    assert "truncated" not in report["problems"] and "NaN or Inf" not in report["problems"]
    dropped = {
        Path(x["path"]).name: x["dropped"]
        for x in read_lines(out / "clips.jsonl")
        if "dropped" in x
    }
    assert dropped == {"good1.wav": "duplicate", "silent.wav": "silent", "nan.wav": "silent"}
    assert len(ShardSet(out)) == 12


def test_other_sources_are_prepared_and_only_files_can_be_listed(messy, reported, tmp_path):
    out, _ = reported
    prepared("--data", out, "--to", "files", "--out", tmp_path / "files")
    data = read_data(tmp_path / "files")
    assert len(data) == 13 and data.paths[12] == "audio/000000/000000012.flac"
    waves = stored_waves(out)
    for index, wave in enumerate(waves):
        assert np.array_equal(sf.read(data.file(index), dtype="int16")[0], wave.numpy())
    with pytest.raises(ManifestError, match="no files that a manifest could list"):
        ManifestStore(ShardSet(out))
    assert read_data(tmp_path / "files").splits == ShardSet(out).splits


# ---- interruptions


def test_folders_in_use_are_refused(messy, reported, tmp_path, capsys):
    out, _ = reported
    assert cli.main(["prepare", "--data", str(messy / "list.csv"), "--out", str(out)]) == 2
    assert "holds shards already" in capsys.readouterr().err
    prepared("--data", messy / "list.csv", "--to", "files", "--out", tmp_path / "f")
    arguments = ["prepare", "--data", str(messy / "list.csv"), "--out", str(tmp_path / "f")]
    assert cli.main([*arguments, "--to", "files"]) == 2
    assert "holds a manifest already" in capsys.readouterr().err
    assert cli.main([*arguments, "--to", "manifest", "--resume"]) == 2
    assert "was prepared with other form" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["list", "progress", "report", "nothing"])
def test_a_run_killed_between_its_last_clip_and_its_report_resumes(messy, tmp_path, step):
    arguments = ("--data", messy / "list.csv", "--to", "shards", "--out")
    prepared(*arguments, tmp_path / "whole")
    prepared(*arguments, tmp_path / "cut")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    files = {path.name: path.read_bytes() for path in cut.iterdir()}
    if step != "nothing":
        for name in ("report.json", "report.txt"):
            (cut / name).unlink()
    if step in ("list", "progress"):
        (cut / "prepare.json").rename(cut / "prepare.partial.json")
    if step == "list":
        (cut / "clips.jsonl").rename(cut / "clips.jsonl.partial")
    prepared(*arguments, cut, "--resume")
    assert files == {path.name: path.read_bytes() for path in cut.iterdir()}
    assert files == {path.name: path.read_bytes() for path in whole.iterdir()}


class Interrupted(AudioDataset):
    """Stops as if by Ctrl-C when a clip beyond the limit is read."""

    limit = 10**9

    def __getitem__(self, index):
        if index >= self.limit:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("form", ["files", "manifest"])
def test_interrupted_copies_resume_to_the_same_files(tmp_path, monkeypatch, form):
    monkeypatch.setattr("ast_fast.data.file_store._COMMIT_CLIPS", 5)
    for number in range(40):
        place = tmp_path / "data" / "xy"[number % 2] / f"{number:02}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        sf.write(place, noise(500 + number), 16000)
    (tmp_path / "data" / "x" / "04.wav").write_bytes(b"")
    dataset = Interrupted(read_folder(tmp_path / "data"))

    def go(folder, resume=True, drop=("duplicates",)):
        store = FileStore(dataset) if form == "files" else ManifestStore(dataset)
        return prepare_clips(dataset, tmp_path / folder, store, resume=resume, drop=drop)

    go("whole")
    for limit in (3, 17, 33):
        dataset.limit = limit
        with pytest.raises(KeyboardInterrupt):
            go("cut")
        assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    dataset.limit = 10**9
    with pytest.raises(ManifestError, match="interrupted run: resume"):
        go("cut", resume=False)
    with pytest.raises(ManifestError, match="other drop"):
        go("cut", drop=())
    dataset.audio = dataset.audio.replace(truncated="keep")
    with pytest.raises(ManifestError, match="other audio"):
        go("cut")
    dataset.audio = dataset.audio.replace(truncated="error")
    dataset.labels[3], before = (1 - dataset.labels[3][0],), dataset.labels[3]
    with pytest.raises(ManifestError, match="other source"):
        go("cut")
    dataset.labels[3] = before
    go("cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("moments", [(2,), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, moments):
    """kill -9 once so many shards are there, with workers under way."""
    for number in range(120):
        place = tmp_path / "data" / "xy"[number % 2] / f"{number:03}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        sf.write(place, noise(24000), 16000)
    arguments = ["prepare", "--data", tmp_path / "data", "--shard-mb", "1", "--encoding", "flac"]
    prepared(*arguments[1:], "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "ast_fast", *map(str, arguments)]
    command += ["--out", str(tmp_path / "cut"), "--workers", "2", "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for shards in moments:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "cut").glob("[0-9]*.tar"))) >= shards:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert kills >= 1 and done.returncode == 0, done.stderr
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


class Deadly(AudioDataset):
    """One clip ends the process that reads it."""

    def __getitem__(self, index):
        if index == 2:
            os._exit(9)
        return super().__getitem__(index)


def test_a_file_that_ends_its_process_is_a_line_of_its_own(tmp_path):
    for number in range(6):
        (tmp_path / "data" / "x").mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "data" / "x" / f"{number}.wav", noise(800), 16000)
    report = write_shards(Deadly(read_folder(tmp_path / "data")), tmp_path / "out", workers=2)
    assert report.clips == 5 and report.skipped == {"AudioCrashError": 1}
    lines = list(read_lines(tmp_path / "out" / "clips.jsonl"))
    assert lines[2]["error"] == "AudioCrashError" and "x/2.wav" in lines[2]["reason"]


def test_a_set_without_one_good_clip_is_an_error_with_a_report(tmp_path, capsys):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "1.wav").write_bytes(b"RIFF")
    out = tmp_path / "out"
    assert cli.main(["prepare", "--data", str(tmp_path / "data"), "--out", str(out)]) == 2
    assert "no clip of" in capsys.readouterr().err
    assert "undecodable: 1" in (out / "report.txt").read_text()


def test_impossible_settings_are_refused(messy, tmp_path):
    dataset = dataset_of(read_data(messy / "list.csv", leave_out_missing=True), AudioConfig())
    for options in ({"workers": -1}, {"frames": 0}, {"drop": ("loud",)}):
        with pytest.raises(ValueError, match="expected 0 or more, 1 or more, and silent"):
            prepare_clips(dataset, tmp_path / "o", ManifestStore(dataset), **options)
