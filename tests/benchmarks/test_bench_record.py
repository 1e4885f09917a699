"""Result files: the schema, the committed ones, README tables and pictures made from them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import record, tables

ENVIRONMENT = {
    "device": "cpu",
    "device_name": "Some CPU (avx2)",
    "torch": "2.14.1",
    "commit": "0123456789ab",
    "date": "2026-11-20T10:00:00Z",
    "threads": 1,
    "packages": {},
}


def _row(provider: str, **changes: object) -> record.Row:
    values = {
        "suite": "frontend",
        "case": "log_mel",
        "mode": "forward",
        "shape": {"B": 1, "N": 160000},
        "dtype": "f32",
        "provider": provider,
        "status": "ok",
        "clock": "host",
        "rounds": 5,
        "calls": 10,
        "ms": {"p20": 0.29, "p50": 0.3, "p80": 0.31},
        "error": 1e-4,
        "budget": 1e-3,
        "worst": "features max_abs",
    }
    return record.Row(**(values | changes))


def _file(**environment: object) -> record.ResultFile:
    peer = _row(
        "torchaudio",
        ms={"p20": 3.4, "p50": 3.6, "p80": 3.9},
        ratio={"p20": 11.0, "p50": 12.0, "p80": 13.0},
    )
    return record.ResultFile(
        suite="frontend",
        environment=ENVIRONMENT | environment,
        settings={},
        rows=[_row("ast_fast[cpp]"), peer],
    )


def test_a_written_file_reads_back_and_keeps_the_schema(tmp_path):
    path = tmp_path / record.file_name(ENVIRONMENT, "frontend")
    assert path.name == "some_cpu_avx2-frontend-2026-11-20.json"
    _file().write(path)
    content = record.read(path)
    assert content["rows"][1]["ratio"]["p50"] == 12.0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["rows"][0].pop("budget"), "keys differ by \\['budget'\\]"),
        (lambda c: c["rows"][0].update(status="great"), "status 'great'"),
        (lambda c: c["rows"][0].update(status="wrong", reason="off"), "and yet a speed"),
        (lambda c: c["rows"][0].update(status="failed", ms=None), "without a reason"),
        (lambda c: c["rows"][0].update(error=None), "a speed without an error"),
        (lambda c: c["rows"][0]["ms"].update(p20=9.0), "not positive and ascending"),
        (lambda c: c["environment"].pop("commit"), "environment lacks commit"),
        (lambda c: c["environment"].update(date="yesterday"), "environment.date"),
        (lambda c: c.update(schema=99), "schema is 99"),
        (lambda c: c.pop("settings"), "top-level keys"),
    ],
)
def test_files_that_break_the_schema_are_refused(tmp_path, change, complaint):
    content = copy.deepcopy(_file().to_dict())
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint):
        record.read(path)


def test_a_result_that_is_not_a_number_is_stored_as_json(tmp_path):
    file = _file()
    file.rows[0] = _row("ast_fast[cpp]", status="wrong", reason="NaN", ms=None, error=float("nan"))
    file.write(tmp_path / "nan.json")
    assert record.read(tmp_path / "nan.json")["rows"][0]["error"] is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    _file().write(path)
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        _file().write(path)
    assert path.read_text() == before


def test_a_second_run_on_a_day_gets_a_name_of_its_own(tmp_path):
    path = tmp_path / "h200-tune-2026-12-01.json"
    assert record.unused(path) == path
    for number in (2, 3):
        path.write_text("{}")
        path = record.unused(tmp_path / "h200-tune-2026-12-01.json")
        assert path.name == f"h200-tune-2026-12-01-{number}.json"


def test_committed_results_follow_the_schema():
    for path in sorted(record.RESULTS.glob("*.json")):
        content = record.read(path)
        usual = Path(record.file_name(content["environment"], content["suite"])).stem
        assert re.fullmatch(rf"{re.escape(usual)}(-\d)?", path.stem)
        assert not content["settings"].get("quick") and not content["settings"].get("dry_run")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "benchmarks/README.md",
        "docs/data.md",
        "docs/training.md",
        "docs/transformers.md",
    ],
)
def test_readme_tables_agree_with_the_committed_results(root, name):
    text = (root / name).read_text(encoding="utf-8")
    assert tables.rewrite(text, tables.load()) == text


def test_tables_are_made_from_results_and_checked(tmp_path, capsys):
    _file().write(tmp_path / "a.json")
    readme = tmp_path / "page.md"
    readme.write_text(
        "# x\n<!-- benchmarks:begin cpu-frontend -->\n<!-- benchmarks:end cpu-frontend -->\nend\n"
    )
    arguments = ["--results", str(tmp_path)]
    assert tables.main(["--check", str(readme), *arguments]) == 1
    assert tables.main(["--write", str(readme), *arguments]) == 0
    assert tables.main(["--check", str(readme), *arguments]) == 0
    text = readme.read_text()
    assert (
        "| log_mel | B=1 N=160000 | f32 | 300 us | torchaudio | 3.6 ms | 12.00x (11.00 - 13.00) |"
        in text
    )
    assert "Some CPU (avx2), 1 thread; torch 2.14.1, commit 0123456789, 2026-11-20." in text
    assert text.endswith("end\n")
    readme.write_text(text.replace("12.00x", "99.00x"))
    assert tables.main(["--check", str(readme), *arguments]) == 1
    assert "out of step" in capsys.readouterr().out


def test_tables_of_what_no_gpu_measured_say_so(tmp_path):
    assert tables.table("gpu-models", []) == tables.OWED


def test_only_the_newest_file_of_a_suite_counts():
    old, new = _file(), _file(date="2026-11-21T10:00:00Z")
    picked = tables.newest([old.to_dict(), new.to_dict()], "cpu", ("frontend",))
    assert [content["environment"]["date"] for content in picked] == ["2026-11-21T10:00:00Z"]


def test_unknown_or_unpaired_markers_are_refused():
    with pytest.raises(ValueError, match="expected pairs of"):
        tables.rewrite("<!-- benchmarks:begin nothing -->\n<!-- benchmarks:end nothing -->", [])
    with pytest.raises(ValueError, match="expected pairs of"):
        tables.rewrite("<!-- benchmarks:begin cpu-models -->", [])


def test_pictures_are_drawn_from_results(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    _file().write(tmp_path / "a.json")
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["cpu-ceilings.png", "cpu-ceilings.svg", "cpu-frontend.png", "cpu-frontend.svg"]
    assert (tmp_path / "out" / "cpu-frontend.png").stat().st_size > 5000
