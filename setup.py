"""Build of ast_fast: where the packages lie, and the C++ kernels compiled once per instruction set.

The metadata is in pyproject.toml. Two things need code:

* `kernels/` (Triton) stays a flat folder of the checkout and is installed as `ast_fast.kernels`; it has no
  `__init__.py`, so that a checkout on `sys.path` never shadows another package called `kernels`.
* every kernel source in csrc/ is compiled several times with different instruction-set flags and all versions are
  linked into one module, `ast_fast._C`, which picks one by CPU feature when it is imported. Nothing is tuned to the
  machine that builds, so one wheel serves all.

A missing or broken compiler costs speed, not the installation: the build warns once and installs pure Python.

OpenMP: the module links to libgomp.so.1 by its plain name on purpose. torch ships its own copy under that name and
is imported first, so both share one runtime and one pool of threads; a vendored copy under a hashed name (what
`auditwheel repair` does by default) would start a second pool and halve the speed. Repair manylinux wheels with
`auditwheel repair --exclude libgomp.so.1`.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
KERNELS = (
    "attention_backward",
    "attention_forward",
    "attention_masked_backward",
    "attention_masked_forward",
    "flac",
    "gelu",
    "int8_rows",
    "layer_norm",
    "log_mel",
    "log_mel_backward",
    "patch_project",
    "patch_weight_gradient",
    "patches",
)
BASE_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # no errno, no traps: needed to vectorise; unlike -ffast-math they leave NaN, Inf and denormals as they are
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
# no ABI notes on vectors (all of ours are local), no false alarms from GCC 12's AVX-512 headers
KERNEL_FLAGS = [
    *("-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_ISAS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}


class NoCompilerError(Exception):
    """The C++ compiler is missing or cannot build for the reason in the message."""


def compiler_command() -> list[str]:
    """Return the C++ driver: $CXX, else $CC (any driver compiles by suffix), else what Python was built with."""
    for value in (os.environ.get("CXX"), os.environ.get("CC"), sysconfig.get_config_var("CXX")):
        if value:
            return shlex.split(value)
    return ["c++"]


def target_machine(cxx: list[str]) -> str:
    """Name the machine the compiler builds for, which in a cross build is not this one."""
    try:
        done = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCompilerError(f"{shlex.join(cxx)} does not run: {error}") from error
    return done.stdout.split("-")[0] or platform.machine()


def compiles(cxx: list[str], flags: list[str]) -> bool:
    """Tell whether a two-line program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int probe();\nint probe() { return 0; }\n")
        command = [
            *cxx,
            *flags,
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(Path(folder, "probe.so")),
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run_compiler(command: list[str]) -> None:
    """Run one compiler command; its messages go into the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoCompilerError(f"{shlex.join(command)}\n{done.stderr.strip()[-4000:]}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


class BuildKernels(build_ext):
    """Compile each kernel once per instruction set, in parallel, and link all of them with the bindings."""

    def run(self) -> None:
        """Build, or warn once and leave the package pure Python."""
        try:
            super().run()
        except (NoCompilerError, SetupError, OSError) as error:
            if os.environ.get("AST_FAST_REQUIRE_EXT") == "1":
                raise
            self.extensions = []
            warnings.warn(
                "ast_fast: the C++ kernels were not built, so CPU tensors will use plain PyTorch (slower, same "
                f"results). Install a C++17 compiler and reinstall to have them. Reason: {error}",
                stacklevel=2,
            )

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension (there is only `ast_fast._C`)."""
        import pybind11

        cxx = compiler_command()
        machine = target_machine(cxx)
        isas = X86_ISAS if machine in ("x86_64", "amd64") else {"baseline": []}
        isas = {name: flags for name, flags in isas.items() if not flags or compiles(cxx, flags)}
        openmp = ["-fopenmp"] if compiles(cxx, ["-fopenmp"]) else []
        objects_dir = Path(self.build_temp).resolve() / "ast_fast"
        objects_dir.mkdir(parents=True, exist_ok=True)
        includes = [
            *("-I", str(ROOT / "csrc")),
            *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        ]
        defines = [f"-DAST_HAS_{name.upper()}=1" for name in isas]

        bindings = objects_dir / "bindings.o"
        # the slowest file first, so that two jobs finish together
        jobs = [(ROOT / "csrc" / "bindings.cpp", bindings, ["-O1", *includes, *defines])]
        for name in KERNELS:
            for isa, flags in isas.items():
                special = [*KERNEL_FLAGS, *includes[:2], *flags, f"-DAST_ISA={isa}"]
                jobs.append(
                    (ROOT / "csrc" / f"{name}.cpp", objects_dir / f"{name}.{isa}.o", special)
                )

        headers = [path.stat().st_mtime for path in (ROOT / "csrc").glob("*.h")]
        newest_header = max([*headers, Path(__file__).stat().st_mtime])

        def compile_one(job: tuple[Path, Path, list[str]]) -> None:
            source, target, flags = job
            fresh = target.exists() and target.stat().st_mtime > max(
                newest_header, source.stat().st_mtime
            )
            if not fresh or self.force:
                run_compiler(
                    [*cxx, *BASE_FLAGS, *openmp, *flags, "-c", str(source), "-o", str(target)]
                )

        workers = int(os.environ.get("AST_FAST_BUILD_JOBS", "0")) or max(2, os.cpu_count() or 2)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_one, jobs))

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(target_object) for _, target_object, _ in jobs]
        link = (
            ["-shared", "-Wl,--as-needed"]
            if sys.platform != "darwin"
            else ["-bundle", "-undefined", "dynamic_lookup"]
        )
        stdlib = ["-lc++"] if sys.platform == "darwin" else ["-lstdc++", "-Wl,-s"]
        # written aside and moved: a process that has the old module mapped keeps it
        partial = target.with_suffix(".partial")
        run_compiler([*cxx, *link, *objects, *openmp, *stdlib, "-o", str(partial)])
        partial.replace(target)

    def get_outputs(self) -> list[str]:
        """Name what was built: nothing after a failed build."""
        return [path for path in super().get_outputs() if Path(path).exists()]


def python_packages() -> list[str]:
    """List the packages: ast_fast from its folder, ast_fast.kernels from the folder kernels/."""
    not_code = ["*__pycache__*", "*assets*", "*tuned*"]
    ours = find_namespace_packages(include=["ast_fast", "ast_fast.*"], exclude=not_code)
    nested = find_namespace_packages("kernels", exclude=not_code)
    return [*ours, "ast_fast.kernels", *(f"ast_fast.kernels.{name}" for name in nested)]


setup(
    packages=python_packages(),
    package_dir={"ast_fast.kernels": "kernels"},
    ext_modules=[Extension("ast_fast._C", [])],
    cmdclass={"build_ext": BuildKernels},
)
