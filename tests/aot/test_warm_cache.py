"""A cache filled from the compile cases is what launches read: under it nothing compiles.

Launches run in a process of their own, against a driver that only says which GPU it is, so that they
run under the Triton that AST_FAST_TRITON_DIR names.
"""

from __future__ import annotations

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

from ast_fast.kernels import _aot, _aot_warm

pytestmark = pytest.mark.aot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRITON_DIR = os.environ.get("AST_FAST_TRITON_DIR")


def environment(cache: Path) -> dict:
    path = [*filter(None, [TRITON_DIR]), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}


def python(cache: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(cache),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # nothing but the one line
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("arch", [90, 80])
def test_launches_of_every_batch_ask_for_what_a_warm_up_compiles(tmp_path, arch):
    found = python(tmp_path, str(HERE / "launches.py"), str(arch), "keys")
    assert found["asked"] > 20
    assert found["missing"] == [], f"Triton {found['triton']}"


def test_the_name_of_a_cache_entry_does_not_depend_on_what_was_launched_before(tmp_path):
    first = python(tmp_path, str(HERE / "launches.py"), "90", "names")["names"]
    last = python(tmp_path, str(HERE / "launches.py"), "90", "backwards")["names"]
    differ = [name for name in first if first[name] != last[name]]
    assert len(first) > 100 and differ == []


def test_every_file_of_kernels_has_its_functions_hashed_at_import():
    files = Path(_aot.__file__).parent.glob("*.py")
    texts = {path.stem: path.read_text() for path in files}
    unsettled = [
        name
        for name, text in texts.items()
        if re.search(r"^def \w+_kernel\(", text, re.MULTILINE)
        and not text.endswith("\n\nsettle(globals())\n")
    ]
    assert unsettled == []


def test_a_launch_after_a_warm_up_compiles_nothing(tmp_path):
    found = python(tmp_path, str(HERE / "launches.py"), "90", "binaries")
    assert {"_forward_kernel", "gemm_kernel", "attention_forward_kernel", "_mel_kernel"} <= set(
        found["served"]
    )


def test_the_warm_up_fills_the_cache_in_parallel_and_says_so_in_one_line(tmp_path):
    command = ("-m", "ast_fast.kernels._aot", "--warm", "90", "--jobs", "2", "mlp")
    first = python(tmp_path, *command)
    assert first["cases"] == first["compiled"] == len(_aot.cases_of("mlp", 90))
    assert first["failed"] == first["crashed"] == 0
    assert len(list(tmp_path.rglob("*.cubin"))) == first["cases"]
    python(tmp_path, *command)
    assert len(list(tmp_path.rglob("*.cubin"))) == first["cases"], "all came from the cache"


def test_what_takes_longest_in_a_step_is_warmed_first_and_all_kernels_are():
    wanted = _aot_warm.requests(90)
    order = list(dict.fromkeys(module for module, _, _ in wanted))
    assert order[:3] == ["attention", "layer_norm", "add_layer_norm"]
    gated = {
        path.stem
        for path in Path(_aot.__file__).parent.glob("*.py")
        if "\ndef aot_cases(" in path.read_text()
    }
    listed = {name.removesuffix("_aot") for name in _aot.WARM_ORDER}
    assert {name.removesuffix("_aot") for name in gated} <= listed


def test_a_compiler_that_dies_costs_one_case(monkeypatch):
    class Dying(_aot_warm._Worker):
        def compile(self, request):
            if request[2] == 0 and self._process is None:
                self._start().kill()
                return super().compile(request)
            self._process = None
            return "compiled"

    monkeypatch.setattr(_aot_warm, "_Worker", Dying)
    found = _aot_warm.warm(90, 1, ["mlp"])
    assert found["crashed"] == 1 and found["compiled"] == found["cases"] - 1
