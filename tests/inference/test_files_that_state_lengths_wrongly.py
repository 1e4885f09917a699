"""Joined and streamed files through every entrance: loader workers, `prepare`, windows in spans, the command line."""

import io
import json

import numpy as np
import pytest
import soundfile as sf

from ast_fast import _mpeg, audio, cli
from ast_fast.config import AudioConfig
from ast_fast.data import BatchSampler, Feeder, dataset_of, read_data

NOISE = np.random.default_rng(3).normal(0, 0.1, 32000).astype(np.float32)


def encoded(format, **options):
    file = io.BytesIO()
    sf.write(file, NOISE, 16000, format=format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of files whose header says less than they hold, or nothing."""
    root = tmp_path_factory.mktemp("wrong")
    mp3 = encoded("MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    header = int.from_bytes(mp3[:4], "big")
    flac, wav = encoded("FLAC"), encoded("WAV", subtype="PCM_16")
    streamed = int.from_bytes(flac[18:26], "big") >> 36 << 36
    files = {
        "a/joined.mp3": mp3 + mp3,
        "a/chained.ogg": encoded("OGG") * 2,
        "a/joined.flac": flac * 2,
        "b/no_xing.mp3": mp3[_mpeg._kind(header).length(header) :],
        "b/streamed.flac": flac[:18] + streamed.to_bytes(8, "big") + flac[26:],
        "b/small.wav": wav[:40] + (1000).to_bytes(4, "little") + wav[44:],
    }
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


def least(name):
    return 64000 if name.startswith("a/") else 32000


@pytest.mark.parametrize("workers", [0, 2])
def test_training_gets_every_sample_and_the_count(folder, workers):
    data = read_data(folder)
    dataset = dataset_of(data, AudioConfig())
    count = len(dataset)
    with Feeder(dataset, BatchSampler(count, count, shuffle=False), num_workers=workers) as feeder:
        (batch,) = [fed.batch for fed in feeder]
    assert len(batch) == 6 and batch.report.restated == 4
    for index, length in zip(batch.indices.tolist(), batch.lengths.tolist(), strict=True):
        assert length >= least(data.paths[index])


def test_prepare_stores_every_sample_and_reports_the_files(folder, tmp_path):
    arguments = ["prepare", "--data", str(folder), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert cli.main(arguments) == 0
    for line in (tmp_path / "out" / "clips.jsonl").read_text().splitlines():
        told = json.loads(line)
        assert told["samples"] >= least(told["path"])
    found = json.loads((tmp_path / "out" / "report.json").read_text())["findings"]
    (kind,) = [kind for kind in found if "than they state" in kind]
    assert found[kind]["count"] == 4
    assert "than they state" in (tmp_path / "out" / "report.txt").read_text()


def test_tags_cover_the_whole_file_and_carry_the_note(folder, model_folder, tmp_path):
    out = tmp_path / "tags.jsonl"
    arguments = ["tag", str(folder), "--model", str(model_folder), "--out", str(out)]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        name = row["file"].removeprefix(f"{folder}/")
        assert row["seconds"] >= least(name) / 16000
        said = "all are read" in str(row["notes"]) or "read as audio" in str(row["notes"])
        assert said == (name not in ("b/no_xing.mp3", "b/streamed.flac"))
        assert row["seconds"] == pytest.approx(len(audio.load(row["file"]).wave) / 16000)
