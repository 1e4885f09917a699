"""The tests notice when a C++ kernel is wrong: a bound moved, a rounding dropped, a sum not carried on.

Each file of mutants/ lists changes to files of csrc/: `find` occurs once in `file` and becomes `replace`;
then a test of the file `tests` must fail. Every kernel's mutants count together. The module is built in a
copy of the package; a mutant costs the objects that read its file, for the best instruction set of this
CPU, which is the one that runs, and a link.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ast_fast import _C

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MUTANTS = [
    mutant
    for path in sorted((HERE / "mutants").glob("*.json"))
    for mutant in json.loads(path.read_text())
]
# of 20 mutants, 19 must be noticed
SHARE = 0.95
PASSED, FAILED, TOO_LONG = 0, 1, -1
LIMIT_S = 180


def build_settings() -> dict:
    """The constants of setup.py: kernels and flags are those of the real build."""
    path = ROOT / "setup.py"
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    names: dict = {"__file__": str(path), "Path": Path}
    exec(compile(ast.Module(body, []), str(path), "exec"), names)
    return names


class Checkout:
    """A copy of the package and of the tests that watch over the kernels, and how to build it."""

    def __init__(self, folder: Path) -> None:
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "assets")
        for name in ("ast_fast", "kernels", "csrc", "tests/cpp", "tests/ops", "tests/frontend"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for name in ("pyproject.toml", "tests/conftest.py"):
            shutil.copy(ROOT / name, folder / name)
        self.folder = folder
        self.csrc = folder / "csrc"
        self.compiler = shutil.which("g++")
        if self.compiler is None:
            pytest.skip("g++ is not installed")
        self.settings = build_settings()
        self.isas = _C.isas()
        self.objects = {
            (name, isa): folder / f"{name}.{isa}.o"
            for name in self.settings["KERNELS"]
            for isa in self.isas
        }
        self.built("bindings", "bindings")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda key: self.built(*key), self.objects))
        self.link(self.objects)

    def built(self, name: str, isa: str, suffix: str = "") -> Path:
        """Compile one source for one instruction set."""
        import pybind11

        names = self.settings
        if isa == "bindings":
            includes = [pybind11.get_include(), sysconfig.get_path("include")]
            flags = [word for folder in includes for word in ("-isystem", folder)]
            flags += [f"-DAST_HAS_{each.upper()}=1" for each in self.isas]
        else:
            flags = [*names["KERNEL_FLAGS"], *names["X86_ISAS"][isa], f"-DAST_ISA={isa}"]
        target = self.folder / f"{name}.{isa}{suffix}.o"
        source = str(self.csrc / f"{name}.cpp")
        # results are the same and half the time is saved without the last optimisations
        options = [*names["BASE_FLAGS"], "-O1", "-fopenmp", "-I", str(self.csrc), *flags]
        self.call([str(self.compiler), *options, "-c", source, "-o", str(target)])
        return target

    def link(self, objects: dict) -> None:
        """Make the module of these objects, aside and moved: nothing may have the old one mapped."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = self.folder / "ast_fast" / f"_C{suffix}"
        partial = target.with_suffix(".partial")
        parts = [self.folder / "bindings.bindings.o", *objects.values()]
        options = ["-shared", "-fopenmp", "-lstdc++", "-o", str(partial)]
        self.call([str(self.compiler), *map(str, parts), *options])
        partial.replace(target)

    def call(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # a mutant that does not compile would prove nothing
        assert done.returncode == 0, done.stderr[-3000:]

    def readers(self, file: str) -> list[str]:
        """Kernels whose source is this file or includes it, at any depth."""
        if file.endswith(".cpp"):
            return [file.removesuffix(".cpp")]
        reach = {file}
        while True:
            more = {
                path.name
                for path in self.csrc.iterdir()
                if reach & set(re.findall(r'#include "(.+)"', path.read_text()))
            }
            if more <= reach:
                kernels = {name.removesuffix(".cpp") for name in reach if name.endswith(".cpp")}
                return sorted(kernels - {"bindings"})
            reach |= more

    def status_with(self, mutant: dict) -> int:
        """Exit status of the tests that watch over `mutant`, with it built in."""
        path = self.csrc / mutant["file"]
        text = path.read_text(encoding="utf-8")
        count = text.count(mutant["find"])
        assert count == 1, f"{label(mutant)} occurs {count} times: rewrite the mutant"
        path.write_text(text.replace(mutant["find"], mutant["replace"]), encoding="utf-8")
        best = self.isas[-1]
        try:
            names = self.readers(mutant["file"])
            with ThreadPoolExecutor(2) as pool:
                made = list(pool.map(lambda name: self.built(name, best, ".mutant"), names))
            changed = {(name, best): each for name, each in zip(names, made, strict=True)}
            self.link({**self.objects, **changed})
            return self.status_of(mutant["tests"])
        finally:
            path.write_text(text, encoding="utf-8")

    def status_of(self, tests: str) -> int:
        """Exit status of one file of tests; a run that hangs counts as ended by force."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        # fresh memory is full of 0xfe, a large number in any type: a kernel that counts on zeros shows
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "MALLOC_PERTURB_": "1"}
        environment.pop("AST_FAST_CPU_ISA", None)
        try:
            done = subprocess.run(
                [*command, "-m", "not slow and not gpu and not interpret", f"tests/{tests}"],
                cwd=self.folder, env=environment, capture_output=True, timeout=LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return TOO_LONG
        return done.returncode


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("checkout"))


def label(mutant: dict) -> str:
    """The change in one line."""
    return f"{mutant['file']}: {mutant['find']!r} -> {mutant['replace']!r}"


def test_unchanged_kernels_pass_what_watches_over_them(checkout):
    watches = sorted({mutant["tests"] for mutant in MUTANTS})
    failing = [tests for tests in watches if checkout.status_of(tests) != PASSED]
    assert not failing, failing


def test_nearly_every_mutant_is_noticed(checkout, capsys):
    survivors = []
    for mutant in MUTANTS:
        status = checkout.status_with(mutant)
        # a wild address ends the process by a signal: noticed as well
        noticed = status == FAILED or status < 0
        if not noticed:
            survivors.append(f"status {status}: {label(mutant)}")
        with capsys.disabled():
            print(f"\n{'noticed ' if noticed else 'SURVIVED'} {label(mutant)}", end="", flush=True)
    assert len(MUTANTS) >= 20
    noticed_count = len(MUTANTS) - len(survivors)
    assert noticed_count >= SHARE * len(MUTANTS), survivors


def test_every_kernel_has_a_mutant(checkout):
    mutated = {name for mutant in MUTANTS for name in checkout.readers(mutant["file"])}
    assert mutated == set(checkout.settings["KERNELS"])
