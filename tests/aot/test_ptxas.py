"""The assembler of an installed CUDA toolkit in the compile gate."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton

from ast_fast.kernels import _aot, _aot_ptxas

pytestmark = pytest.mark.aot

BUNDLED = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
CUDA = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"


def index_of(arch: int) -> int:
    cases = _aot.cases_of("attention", arch)
    return next(i for i, case in enumerate(cases) if case.name.startswith("forward-bf16-d64"))


def pretended(folder: Path, says: str) -> str:
    """A ptxas that writes `says` and makes nothing."""
    tool = folder / "ptxas"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if '--version' in sys.argv:\n    print('release 99.0, V99.0.1')\n"
        f"else:\n    sys.stderr.write({says!r})\n"
    )
    tool.chmod(0o755)
    return str(tool)


@pytest.mark.parametrize("module", ["attention", "layer_norm"])
def test_tritons_own_assembler_gives_what_triton_got(module):
    case = _aot.cases_of(module, 90)[5]
    report = _aot.compile_case(case, 90)
    usage = _aot_ptxas.assemble(_aot.build(case, 90).asm["ptx"], 90, BUNDLED)
    assert usage == (report.registers, report.stack)


def test_a_spill_under_the_other_assembler_fails_the_gate(monkeypatch, tmp_path):
    says = "16 bytes stack frame, 8 bytes spill stores\nUsed 255 registers, used 1 barriers\n"
    monkeypatch.setenv("AST_FAST_PTXAS", pretended(tmp_path, says))
    found = _aot.describe("attention", 90, index_of(90))
    assert found["problems"] == ["ptxas 99.0.1: stack is 16 bytes, expected 0: registers spill"]
    # registers and stack of Triton's own stay
    assert found["stack"] == 0 and found["ptxas 99.0.1"] == {"registers": 255, "stack": 16}
    assert _aot.describe("attention", 80, index_of(80))["problems"] == []


def test_ptx_that_the_other_assembler_refuses_fails_the_gate(monkeypatch, tmp_path):
    monkeypatch.setenv("AST_FAST_PTXAS", pretended(tmp_path, "nothing is said of registers"))
    (problem,) = _aot.describe("attention", 90, index_of(90))["problems"]
    assert "described 0 kernels" in problem
    with pytest.raises(RuntimeError, match="ptxas 1"):
        _aot_ptxas.assemble(".version 8.0\n.target sm_90a\nnonsense\n", 90, BUNDLED)


def test_a_path_that_is_no_assembler_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"AST_FAST_PTXAS is .*missing"):
        _aot_ptxas.version(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"AST_FAST_PTXAS is .*no version"):
        _aot_ptxas.version(shutil.which("true"))


def test_a_wrong_path_fails_every_case_and_not_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("AST_FAST_PTXAS", str(tmp_path / "missing"))
    (problem,) = _aot.describe("attention", 90, index_of(90))["problems"]
    assert "AST_FAST_PTXAS is" in problem


@pytest.mark.skipif(not Path(CUDA).exists(), reason="no CUDA toolkit with a ptxas is installed")
def test_the_toolkits_assembler_is_another_one_and_assembles_too(monkeypatch):
    assert _aot_ptxas.version(CUDA) != _aot_ptxas.version(BUNDLED)
    monkeypatch.setenv("AST_FAST_PTXAS", CUDA)
    found = _aot.describe("attention", 90, index_of(90))
    assert found["problems"] == [] and f"ptxas {_aot_ptxas.version(CUDA)}" in found
