"""The quick start, the page for users of the original, and the site that all pages make."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile as sf

from ast_fast import cli
from ast_fast.data.syllables import read_syllables

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.usefixtures("one_thread")


def run_page(name, small=()):
    names: dict[str, object] = {}
    for kind, text in BLOCK.findall((ROOT / "docs" / name).read_text()):
        if kind == "python":
            exec(compile(text, name, "exec"), names)
            continue
        assert kind == "sh"
        for line in text.splitlines():
            _, *arguments = shlex.split(line)
            more = small if arguments[0] == "train" else ()
            assert cli.main([*arguments, *more]) == 0, line
    return names


def test_a_newcomer_gets_from_sounds_to_an_exported_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    found = read_syllables()
    for index in range(64):
        folder = tmp_path / "sounds" / f"tone-{found.tones[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{index}.wav", found.waves[index].numpy(), 16000)
    names = run_page("index.md", ("--set", "train.epochs=2"))
    said = capsys.readouterr().out
    assert Path("model.onnx").is_file() and Path("runs/first/report.html").is_file()
    assert Path("checked/report.txt").is_file()
    assert len(Path("labels.csv").read_text().splitlines()) > 64
    assert names["model"].labels == ("tone-1", "tone-2", "tone-3", "tone-4")
    assert "budget" in said


def test_the_page_for_users_of_the_original_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_page("original.md")
    assert "159 144" in capsys.readouterr().out
    assert names["again"].config.label_dim == 35
    assert (tmp_path / "for_transformers" / "config.json").is_file()


def test_the_site_builds_and_every_link_of_it_leads_somewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in (
        "index.html",
        "training/index.html",
        "NUMERICS/index.html",
        "benchmarks/index.html",
    ):
        text = (tmp_path / page).read_text()
        assert "</html>" in text
        for target in re.findall(r'(?:href|src)="(?!\w+:|//)([^"#?]+)', text):
            place = (tmp_path / page).parent / target
            assert place.exists() or (place / "index.html").exists(), (page, target)
