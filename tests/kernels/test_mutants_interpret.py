"""The interpreter tests notice when a kernel is wrong: a mask flipped, a cast dropped, a < made a <=.

Each file of mutants/ lists changes to kernel files: `find` occurs once in `file` and becomes `replace`;
then the tests of `tests` that `select` (as pytest -k) must fail. Every kernel's mutants count together.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.interpret, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MUTANTS = [
    mutant
    for path in sorted((HERE / "mutants").glob("*.json"))
    for mutant in json.loads(path.read_text())
]
# of 20 mutants, 19 must be noticed
SHARE = 0.95
PASSED, FAILED = 0, 1


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package and of these tests."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "assets")
    for name in ("ast_fast", "kernels", "tests/kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def run(checkout: Path, mutant: dict) -> int:
    """Exit status of the tests that watch over `mutant`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/kernels/{mutant['tests']}", "-k", mutant["select"]],
        cwd=checkout,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    return done.returncode


def label(mutant: dict) -> str:
    """The change in one line."""
    return f"{mutant['file']}: {mutant['find']!r} -> {mutant['replace']!r}"


def test_unchanged_kernels_pass_what_watches_over_them(checkout):
    watches = {(m["tests"], m["select"]): m for m in MUTANTS}
    failing = [
        f"{m['tests']} -k {m['select']!r}" for m in watches.values() if run(checkout, m) != PASSED
    ]
    assert not failing, failing


def test_nearly_every_mutant_is_noticed(checkout, capsys):
    survivors = []
    for mutant in MUTANTS:
        path = checkout / "kernels" / mutant["file"]
        text = path.read_text(encoding="utf-8")
        assert text.count(mutant["find"]) == 1, (
            f"{label(mutant)} occurs {text.count(mutant['find'])} times"
        )
        path.write_text(text.replace(mutant["find"], mutant["replace"]), encoding="utf-8")
        try:
            status = run(checkout, mutant)
        finally:
            path.write_text(text, encoding="utf-8")
        # a wild address ends the process by a signal: noticed as well
        if status != FAILED and status >= 0:
            survivors.append(f"status {status}: {label(mutant)}")
        with capsys.disabled():
            print(
                f"\n{'survived' if status == PASSED else 'noticed '} {label(mutant)}",
                end="",
                flush=True,
            )
    assert len(MUTANTS) >= 20
    noticed = len(MUTANTS) - len(survivors)
    assert noticed >= SHARE * len(MUTANTS), survivors
