"""How the kernels are built: every instruction set, no leaking symbols, no changed floating point."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ast_fast import _C

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted(p for p in CSRC.glob("*.cpp") if p.name != "bindings.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
COMMON = [
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-I",
    str(CSRC),
]


def compile_all(folder, compiler, isa, options):
    """Compile every kernel, two at a time; return the objects."""

    def one(source):
        target = folder / f"{source.stem}.o"
        command = [
            compiler,
            *COMMON,
            *FLAGS[isa],
            *options,
            f"-DAST_ISA={isa}",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, KERNELS))


def check_program(folder, compiler, isa, options, runner=()):
    """Build and run tests/cpp/kernel_check.cpp; return its output."""
    objects = compile_all(folder, compiler, isa, options)
    program = folder / "check"
    source = Path(__file__).parent / "kernel_check.cpp"
    command = [
        compiler,
        *COMMON,
        *options,
        f"-DAST_ISA={isa}",
        str(source),
        *map(str, objects),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(
        [*runner, str(program)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def require(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return program


def test_the_best_usable_instruction_set_is_taken():
    usable = _C.isas()
    assert usable[0] == "baseline"
    forced = os.environ.get("AST_FAST_CPU_ISA")
    assert _C.isa() == (forced or usable[-1])


@pytest.mark.parametrize(
    "isa",
    [
        "baseline",
        "avx2",
        pytest.param("avx512", marks=pytest.mark.slow),
        pytest.param("avx512bf16", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_passes_on_every_instruction_set_with_memory_full_of_noise(isa):
    if os.environ.get("AST_FAST_CPU_ISA"):
        pytest.skip("already inside a run of one instruction set")
    if isa not in _C.isas():
        pytest.skip(f"this build on this CPU has {_C.isas()}")
    # this file is about the build, and the subprocess tests of threads do not depend on the instruction set
    files = sorted(
        str(p) for p in Path(__file__).parent.glob("test_cpp_*.py") if p != Path(__file__)
    )
    # log-mel's other transforms and filters
    files.append(str(ROOT / "tests" / "frontend" / "test_log_mel_settings.py"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            "-k",
            "not team and not child and not loader and not reference and not gradcheck",
            *files,
        ],
        cwd=ROOT,
        # glibc fills fresh memory with 0xfe: kernels must not count on zeros in their scratch
        env={
            **os.environ,
            "AST_FAST_CPU_ISA": isa,
            "OMP_NUM_THREADS": "2",
            "MALLOC_PERTURB_": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_unknown_instruction_set_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, "-c", "import ast_fast.cpp as c; print(c.why_unavailable())"],
        cwd=ROOT,
        env={**os.environ, "AST_FAST_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "avx1024" in done.stdout and "baseline" in done.stdout


def test_denormals_survive_the_import():
    code = (
        "import torch\nimport ast_fast._C\n"
        "x = torch.tensor([1e-40, 1e-39]); y = x * 0.5\n"
        "assert (y > 0).all() and (torch.tensor([2e-38]) * 0.25 > 0).all(), y\n"
        "assert float.fromhex('0x1p-1060') * 0.5 > 0.0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (torch.tensor([1e-39]) * 0.5 > 0).all()


def test_kernel_objects_export_their_own_functions_and_nothing_weak(tmp_path):
    compiler = require("g++")
    require("nm")
    isa = "avx512bf16" if os.uname().machine == "x86_64" else "baseline"
    # without optimisation nothing is inlined away, so every template instance shows
    for path in compile_all(
        tmp_path, compiler, isa, ["-O0", "-fPIC", "-fno-exceptions", "-fno-rtti"]
    ):
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        lines = [line.split(maxsplit=2) for line in symbols.splitlines() if len(line.split()) >= 3]
        weak = [line for line in lines if line[1] in "WVu"]
        assert not weak, f"{path.name} exports weak symbols: {weak[:5]}"
        functions = [line[2] for line in lines if line[1] == "T"]
        assert functions and all(name.startswith(f"ast_fast_{isa}_") for name in functions)


@pytest.mark.slow
@pytest.mark.parametrize("isa", list(FLAGS))
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path, isa):
    compiler = require("g++")
    if isa not in _C.isas():
        pytest.skip(f"this CPU runs {_C.isas()}")
    options = [
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize=alignment",
        "-fno-sanitize-recover=all",
    ]
    assert "TOO LARGE" not in check_program(tmp_path, compiler, isa, options)


@pytest.mark.slow
def test_the_baseline_builds_for_aarch64_and_runs_under_emulation(tmp_path):
    compiler = require("aarch64-linux-gnu-g++")
    objects = compile_all(tmp_path, compiler, "baseline", ["-O2", "-Wall", "-Wextra"])
    assert len(objects) == len(KERNELS)
    emulator = require("qemu-aarch64-static")
    output = check_program(tmp_path, compiler, "baseline", ["-O2", "-static"], runner=[emulator])
    assert "attention" in output and "TOO LARGE" not in output
