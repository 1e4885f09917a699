"""Every configuration a launcher may pick compiles for every GPU it may run on, and fits it.

Each file of kernels/ that exports `aot_cases(arch)` is collected; one case on one architecture is one
test. A compiler process of its own does the work, so that a compiler that crashes fails one test.
AST_FAST_TRITON_DIR names a folder with another version of Triton, which then compiles instead of the
installed one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

from ast_fast.kernels import _aot

pytestmark = pytest.mark.aot

KERNELS = Path(_aot.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
TRITON_DIR = os.environ.get("AST_FAST_TRITON_DIR")


def kernel_modules() -> list[str]:
    """Names of the kernel files that export `aot_cases`."""
    names = (path.stem for path in sorted(KERNELS.glob("*.py")))
    return [
        name
        for name in names
        if hasattr(importlib.import_module(f"ast_fast.kernels.{name}"), "aot_cases")
    ]


def gate_cases() -> list:
    """(module, arch, index into its cases); what two modules share is listed once."""
    listed, seen = [], set()
    for name in kernel_modules():
        module = importlib.import_module(f"ast_fast.kernels.{name}")
        for arch in _aot.ARCHITECTURES:
            for index, case in enumerate(module.aot_cases(arch)):
                key = (arch, id(case.fn), case.name)
                if key not in seen:
                    seen.add(key)
                    label = f"{name}-{case.name}-sm{arch}"
                    marks = [pytest.mark.slow] if case.twin else []
                    listed.append(pytest.param(name, arch, index, id=label, marks=marks))
    return listed


class Compiler:
    """A process that compiles cases, started again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.version = ""

    def _start(self) -> subprocess.Popen:
        path = [TRITON_DIR] if TRITON_DIR else []
        path += [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        process = subprocess.Popen(
            [sys.executable, "-m", "ast_fast.kernels._aot", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
        self.version = json.loads(process.stdout.readline())["triton"]
        return process

    def compile(self, *request: str | int) -> dict:
        """What became of one case."""
        if self._process is None:
            self._process = self._start()
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        self._process = None
        return {"problems": [f"the compiler ended with status {status}"]}

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


@pytest.fixture(scope="module")
def compiler():
    process = Compiler()
    yield process
    process.close()


@pytest.mark.parametrize(("module", "arch", "index"), gate_cases())
def test_compiles_and_fits(compiler, module, arch, index):
    found = compiler.compile(module, arch, index)
    assert not found["problems"], f"Triton {compiler.version}: {found}"


def test_the_named_triton_does_the_compiling(compiler):
    compiler.compile("attention", 80, 0)
    if TRITON_DIR:
        (info,) = Path(TRITON_DIR).glob("triton-*.dist-info")
        assert info.name == f"triton-{compiler.version}.dist-info"
    else:
        assert compiler.version == importlib.import_module("triton").__version__


def test_a_spilling_kernel_fails_the_gate():
    case = _aot.AotCase("case", None, {}, {}, expect=("wgmma",), max_registers=128)
    report = _aot.AotReport("case", 90, 200, 16, 300_000, 600, frozenset({"mma"}))
    found = " ".join(_aot.problems(case, report))
    for word in ("stack is 16", "300000 bytes", "600 columns", "200 registers", "wgmma"):
        assert word in found
    assert "writes nothing" in " ".join(_aot.problems(case, report._replace(writes=False)))
    good = _aot.AotReport("case", 90, 128, 0, 1000, 0, frozenset({"wgmma"}))
    assert _aot.problems(case, good) == []


@pytest.mark.parametrize(
    ("body", "writes"),
    [
        ("trap;", False),
        ("st.shared.b32 [%r1], %r2;", False),
        ("@%p1 st.global.v4.b32 [ %rd1 + 0 ], { %r1 };", True),
        ("st.weak.global.b32 [%rd1], %r1;", True),
        ("red.global.add.f32 [%rd1], %f1;", True),
        ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1}], [%r3];", True),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd1], [%r3];", True),
        (
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1];",
            False,
        ),
    ],
)
def test_a_kernel_that_became_a_trap_is_told_from_one_that_writes(body, writes):
    assert (_aot._WRITES.search(body) is not None) == writes


def test_every_kernel_file_with_a_kernel_is_in_the_gate():
    gated = set()
    for name in kernel_modules():
        module = importlib.import_module(f"ast_fast.kernels.{name}")
        for arch in _aot.ARCHITECTURES:
            for case in module.aot_cases(arch):
                home = case.fn.fn.__module__.rsplit(".", 1)[-1]
                gated.add((home, case.fn.fn.__name__))
    written = {
        (path.stem, name)
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert written, "no kernel was found: their names end in _kernel"
    assert written <= gated, f"not in the gate: {sorted(written - gated)}"
