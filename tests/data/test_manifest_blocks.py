"""Rows read by the thousand are those read one by one, and complaints name the same lines."""

from __future__ import annotations

import csv
import json
import random

import pytest

from ast_fast.data import manifest_files
from ast_fast.data.manifest import ManifestError
from ast_fast.data.manifest_blocks import BLOCK_BYTES, uniform_columns
from ast_fast.data.manifest_files import read_manifest

LABELS = ["cat", "dog", "cat;dog", "  bird ", "", "a, b", 'say "hi"', "\u00e9t\u00e9"]


def outcome(path, monkeypatch, singly, **settings):
    """What a manifest reads as, by blocks or row by row; or the complaint."""
    with monkeypatch.context() as patch:
        if singly:
            for name in ("_plain_csv", "_plain_jsonl"):
                patch.setattr(manifest_files, name, lambda *_: None)
        try:
            found = read_manifest(path, check_files=False, **settings)
        except ManifestError as error:
            return str(error)
    return found.paths, found.labels, found.classes, found.lines, found.splits, found.notes


def written(tmp_path, draw, kind, rows):
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows)
        path.write_text(text + "\n" * draw.randrange(2), encoding="utf-8")
        return path
    ends, quoting = draw.choice(["\n", "\r\n"]), draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    with path.open("w", encoding=draw.choice(["utf-8", "utf-8-sig"]), newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=ends, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("seed", range(20))
def test_blocks_and_rows_read_alike(tmp_path, monkeypatch, kind, seed):
    draw = random.Random(seed)
    labels = draw.sample(LABELS, draw.randrange(2, len(LABELS)))
    parted = draw.random() < 0.4
    rows = []
    for number in range(draw.choice([3, 300, 12000])):
        row = {"path": f"clips/{number:06}.wav", "label": draw.choice(labels)}
        if parted:
            row["split"] = draw.choice(["Train", "test", " 3"])
        rows.append(row)
    if draw.random() < 0.5:
        place = draw.randrange(len(rows))
        odd = [
            "../x.wav",
            "",
            "a\\b.wav",
            "/etc/x.wav",
            "~x.wav",
            "two\nlines.wav",
            "c:/x.wav",
            'q"q.wav',
        ]
        rows[place]["path"] = draw.choice([*odd, ".hidden/..x.wav", "x" * 5000 + ".wav"])
    path = written(tmp_path, draw, kind, rows)
    settings = {} if draw.random() < 0.7 else {"classes": ["cat", "dog", "bird"]}
    by_blocks = outcome(path, monkeypatch, False, **settings)
    assert by_blocks == outcome(path, monkeypatch, True, **settings)


@pytest.mark.parametrize("bad", ["x.wav", "x.wav,cat,dog", '"x.wav', "", "x.wav,ca\rt", "x.wav,\0"])
def test_a_line_of_another_form_far_into_a_csv_is_named_as_before(tmp_path, monkeypatch, bad):
    lines = [f"clips/{number:06}.wav,cat" for number in range(2 * BLOCK_BYTES // 20)]
    lines.insert(len(lines) // 2 + 3000, bad)
    path = tmp_path / "list.csv"
    path.write_text("path,label\n" + "\n".join(lines), newline="")
    assert outcome(path, monkeypatch, False) == outcome(path, monkeypatch, True)


def test_columns_are_found_only_where_every_line_is_alike():
    line = '{"path": "%s", "label": "%s"}'
    alike = "\n".join(line % (f"{i}.wav", i % 3) for i in range(9))
    columns = uniform_columns(alike)
    assert columns[0][8] == "8.wav" and columns[1][:4] == list("0120")
    for other in (
        alike + "\n{}",
        alike.replace('"4.wav", ', '"4.wav",'),
        alike.replace('"4.wav"', '"4\\u0041.wav"'),
        alike.replace('"4.wav"', '"4\t.wav"'),
        alike.replace('"4.wav"', '"4\n.wav"'),
        alike.replace('"1"}\n', '"1"}', 1),
        alike + "\n",
        "\n" + alike,
        alike.replace('"4.wav"', '"4"wav"'),
        alike.replace('"4.wav", "label": "1"', '"4.wav", "label": "1", "label": "1"'),
        alike.replace('"5.wav", "label": "2"', '"5.wav"').replace('"4.wav"', '"4", "label": "1"'),
        "",
    ):
        assert other != alike
        assert uniform_columns(other) is None, other
