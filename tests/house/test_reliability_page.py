"""docs/reliability.md is true: thirty-five rows, tests that exist under the names it gives, states it may use."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
STATES = ("green", "weak", "owed", "void")
# a file with a name in it, or, after one, a further name of the same file
PROOF = re.compile(r"`((?:tests|benchmarks)/[\w/]+\.py)?(?:::(\w+))?`")


def rows() -> list[list[str]]:
    """The cells of every numbered row of the tables."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if re.match(r"\| \d+ \|", line)
    ]


@functools.cache
def functions(path: Path) -> frozenset[str]:
    """Functions at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing(proof: str) -> list[str]:
    """What a cell of proofs names and is not there."""
    found, path = [], None
    for file, name in PROOF.findall(proof):
        path = ROOT / file if file else path
        if path is None or not path.is_file():
            found.append(file or f"::{name} after no file")
        elif name and name not in functions(path):
            found.append(f"{path.relative_to(ROOT)}::{name}")
    return found


def test_every_promise_has_one_row_and_a_known_state():
    assert sorted(int(row[0]) for row in rows()) == list(range(1, 36))
    for row in rows():
        assert len(row) == 6, row[0]
        assert row[5].startswith(STATES), row
        # what falls short says in what
        assert not row[5].startswith("weak") or len(row[5]) > len("weak: "), row


def test_every_test_that_the_page_names_exists():
    gone = [f"row {row[0]}: {name}" for row in rows() for name in missing(row[2])]
    assert not gone, gone


def test_every_promise_but_a_void_one_names_a_test_of_its_own():
    for row in rows():
        names = [name for _, name in PROOF.findall(row[2]) if name]
        assert names or row[5] == "void", row


def test_names_that_do_not_exist_are_found():
    real = "`tests/house/test_reliability_page.py::test_every_test_that_the_page_names_exists`"
    assert missing(real) == []
    assert missing(f"{real}, `::nothing`") == ["tests/house/test_reliability_page.py::nothing"]
    assert missing("`tests/house/gone.py::x`") == ["tests/house/gone.py"]
    assert missing("`::x`") == ["::x after no file"]
