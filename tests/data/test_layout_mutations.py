"""Damaged tables of every layout: a named error with the file, or what is there; nothing else."""

import random

import pytest

from ast_fast import sample_sets
from ast_fast.config import AudioConfig
from ast_fast.data import ManifestError, dataset_of, read_data, write_shards

BYTES = [
    b"\0",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"../",
    b"/",
    b"\xff",
    b"\xef\xbb\xbf",
    b"#",
    b"-1",
    b"nan",
    b"{",
    b"9" * 30,
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """What is read and the file that decides: by layout."""
    root = tmp_path_factory.mktemp("mutations")
    sample_sets.make_esc50(root / "esc50", clips=1, classes=("dog", "cat"))
    sample_sets.make_speech_commands(root / "speech", clips=5, words=("bed", "cat"))
    listing = sample_sets.make_audioset(root / "audioset", clips=4, seconds=0.1)
    original = sample_sets.make_original(root / "original", clips=4, seconds=0.1)
    sample_sets.make_deam(root / "deam", songs=3, seconds=0.2)
    averages = next((root / "deam").rglob("*_1_2000.csv"))
    songs = dataset_of(read_data(root / "deam"), AudioConfig())
    write_shards(songs, root / "shards")
    rows = [
        f'{{"path": "audio/{path.name}", "values": {{"v": 1.5, "a": 2}}, "split": "x"}}\n'
        for path in sorted((root / "esc50" / "audio").iterdir())[:4]
    ]
    (root / "esc50" / "list.jsonl").write_text("".join(rows))
    return {
        "esc50": (root / "esc50", root / "esc50" / "meta" / "esc50.csv"),
        "speech": (root / "speech", root / "speech" / "testing_list.txt"),
        "audioset": (listing, listing),
        "original": (original, original),
        "deam": (root / "deam", averages),
        "jsonl": (root / "esc50" / "list.jsonl", root / "esc50" / "list.jsonl"),
        "index": (root / "shards", root / "shards" / "index.json"),
    }


@pytest.mark.parametrize(
    "layout", ["esc50", "speech", "audioset", "original", "deam", "jsonl", "index"]
)
def test_damaged_tables_are_refused_by_name_or_read(tables, layout):
    place, file = tables[layout]
    whole = file.read_bytes()
    rng = random.Random(layout)
    refused = 0
    try:
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(content))
                what = rng.randrange(4)
                if what == 0:
                    content[at] = rng.randrange(256)
                elif what == 1:
                    del content[at : at + rng.randint(1, 40)]
                elif what == 2:
                    content[at:at] = rng.choice(BYTES)
                else:
                    del content[at:]
                if not content:
                    content = bytearray(b" ")
            file.write_bytes(content)
            try:
                data = read_data(place)
            except ManifestError as error:
                refused += 1
                assert file.name in str(error) or str(place) in str(error), str(error)
                assert len(str(error)) < 2000
            else:
                assert len(data) == len(data.labels) > 0
                assert data.values is None or data.values.shape == (len(data), len(data.classes))
    finally:
        file.write_bytes(whole)
    assert refused >= 15
    assert len(read_data(place)) > 0
