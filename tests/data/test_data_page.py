"""docs/data.md: every block of it runs, on sets laid out as the page names them."""

import re
import shlex
from pathlib import Path

import pytest

from ast_fast import cli, sample_sets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = (
    *("--set", "frontend.num_mel_bins=32", "--set", "frontend.num_frames=32"),
    *("--set", "train.epochs=1", "--set", "train.batch_size=8"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    sample_sets.make_esc50(tmp_path / "ESC-50-master", clips=1)
    sample_sets.make_speech_commands(tmp_path / "speech_commands_v0.02")
    sample_sets.make_audioset(tmp_path / "audioset", seconds=0.5)
    sample_sets.make_deam(tmp_path / "DEAM", seconds=0.5)
    sample_sets.make_huggingface(seconds=0.3).save_to_disk("hf_dataset")
    song = next((tmp_path / "DEAM").rglob("*.mp3")).relative_to(tmp_path)
    Path("songs.csv").write_text(f"path,valence,arousal\n{song},5.5,3\n")
    return tmp_path


def test_every_block_of_the_page_runs(sets, capsys):
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 10 and PAGE.read_text().count("```") == 2 * len(blocks)
    names: dict[str, object] = {}
    commands = 0
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "ast-fast"
            quick = QUICK if arguments[0] == "train" else ()
            run = (
                ("--run", f"runs/{commands}")
                if arguments[0] == "train" and "--run" not in line
                else ()
            )
            assert cli.main([*arguments, *quick, *run]) == 0, line
            commands += 1
    assert commands >= 8
    assert names["dataset"][0].wave.shape == (80000,) and names["songs"].values.shape == (8, 2)
    assert names["statistics"]["mean"] == names["front_end"]["mean"] < 0
    assert (sets / "sample" / "testing_list.txt").is_file()


def test_the_page_names_every_layout_and_option():
    from typing import get_args

    from ast_fast.config import DataConfig, Layout

    text = PAGE.read_text()
    for layout in get_args(Layout):
        assert layout == "auto" or f"| `{layout}` |" in text
    for name in DataConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
