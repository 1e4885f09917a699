"""Ahead-of-time compilation of Triton kernels: what a machine without a GPU can prove.

A kernel file lists its cases with `aot_cases(arch)`; `compile_case` compiles one for one architecture
with the installed Triton and reads back what decides whether it can run at all: registers, stack
(spills), shared memory, and which special instructions the compiler used. `problems` holds a report
against the limits of the chip. Nothing here needs a driver.

    python -m ast_fast.kernels._aot attention --arch 80 90     a table of one kernel file
    python -m ast_fast.kernels._aot attention --json FILE      the same as JSON, all architectures
    python -m ast_fast.kernels._aot --warm 90 --jobs 8         fill Triton's cache; one line with counts
    python -m ast_fast.kernels._aot --serve                    one request a line, for the two above
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from . import _aot_ptxas
from ._aot_barriers import races
from ._aot_buffers import places_of_plain_copies

# Compute capability (major * 10 + minor) of every architecture that kernels are compiled for.
ARCHITECTURES: tuple[int, ...] = (75, 80, 86, 89, 90, 100, 120)

# Largest dynamic shared memory one block may ask for, in bytes.
SHARED_LIMIT_BYTES: dict[int, int] = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

# Kernel files in the order in which a cache is warmed: what a model's step takes longest in comes first.
WARM_ORDER: tuple[str, ...] = (
    "attention",
    "layer_norm",
    "add_layer_norm",
    "mlp",
    "log_mel",
    "patch_embed",
    "gemm",
    "attention_varlen",
    "attention_masked",
    "attention_biased",
    "fp8_aot",
    "_candidates",
)

# Columns of tensor memory a Blackwell data-centre block may hold.
TENSOR_MEMORY_LIMIT = 512

# Names used in `AotCase.expect` and `AotReport.instructions`, and their trace in PTX.
_INSTRUCTIONS: dict[str, str] = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "tma reduction": r"\bcp\.reduce\.async\.bulk\.tensor",
    "setmaxnreg": r"\bsetmaxnreg",
    "atomic": r"\b(?:red|atom)\.(?:global|async|gpu|relaxed)",
}
_WRITES = re.compile(
    r"\bst\.(?:\w+(?:::\w+)?\.)*global|\b(?:red|atom)\.|\bcp\.(?:reduce\.)?async\.bulk\.[\w.]*global\.shared"
)


class AotCase(NamedTuple):
    """One specialisation of one kernel, the way a launcher would request it."""

    name: str
    # the JITFunction; an InterpretedFunction cannot be compiled
    fn: Any
    # every non-constexpr argument: "*bf16", "i32", "i64", "fp32", "tensordesc<bf16[64,64]>"
    signature: dict[str, str]
    constexprs: dict[str, Any]
    # arguments (pointers and integers) known to be multiples of 16
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    # instructions that must be there, of _INSTRUCTIONS
    expect: tuple[str, ...] = ()
    max_registers: int = 255
    # left to the slow run of the gate: a twin of another case, in another 16-bit type or on a GPU of
    # the same family
    twin: bool = False
    # most registers a thread that the compiler may use; None leaves it to the compiler
    maxnreg: int | None = None
    # the only version of Triton that the case is for; empty for all
    triton: str = ""


class AotReport(NamedTuple):
    """What one compilation produced."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: frozenset[str]
    races: tuple[str, ...] = ()  # copies that may overwrite what a product still reads
    writes: bool = True  # whether anything reaches global memory


def build(case: AotCase, arch: int) -> Any:
    """`case` compiled for `arch`, or taken from Triton's cache, as a launch would."""
    return triton.compile(source(case), target=GPUTarget("cuda", arch, 32), options=options(case))


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile `case` for `arch` and read back its resources."""
    compiled = build(case, arch)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    found = frozenset(name for name, trace in _INSTRUCTIONS.items() if re.search(trace, ptx))
    return AotReport(
        name=case.name,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=int(compiled.metadata.shared),
        tensor_memory=int(getattr(compiled.metadata, "tmem_size", None) or 0),
        instructions=found,
        writes=_WRITES.search(ptx) is not None,
        races=tuple(
            f"line {race.copy_line} of the PTX, {race.copy}: no barrier of all warps since the wait of "
            f"line {race.wait_line}"
            for race in races(
                ptx, compiled.metadata.num_warps, places_of_plain_copies(compiled.asm["ttgir"])
            )
        ),
    )


def problems(case: AotCase, report: AotReport) -> list[str]:
    """Why `report` is not acceptable, one sentence each; empty when it is."""
    found = []
    if not report.writes:
        # what LLVM cannot give a meaning becomes one trap, whose registers and stack look good
        found.append("the kernel writes nothing: the compiler made it a trap")
    if report.stack:
        found.append(f"stack is {report.stack} bytes, expected 0: registers spill")
    limit = SHARED_LIMIT_BYTES[report.arch]
    if report.shared > limit:
        found.append(f"shared memory is {report.shared} bytes, sm_{report.arch} has {limit}")
    if report.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory is {report.tensor_memory} columns of {TENSOR_MEMORY_LIMIT}")
    if report.registers > case.max_registers:
        found.append(f"{report.registers} registers a thread, at most {case.max_registers}")
    found += (f"a copy may overwrite what a product reads: {race}" for race in report.races)
    missing = sorted(set(case.expect) - report.instructions)
    if missing:
        found.append(f"missing instructions {missing}, found {sorted(report.instructions)}")
    return found


def options(case: AotCase) -> dict[str, Any]:
    """What a launch of `case` hands to the compiler."""
    found = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return found if case.maxnreg is None else found | {"maxnreg": case.maxnreg}


def source(case: AotCase) -> ASTSource:
    """What a launch of `case` hands to the compiler: the same cache entry serves both."""
    names = list(case.fn.arg_names)
    given = set(case.signature) | set(case.constexprs)
    if given != set(names) or set(case.signature) & set(case.constexprs):
        raise ValueError(
            f"case {case.name}: arguments do not match {case.fn.__name__}: "
            f"missing {sorted(set(names) - given)}, unknown {sorted(given - set(names))}, "
            f"given twice {sorted(set(case.signature) & set(case.constexprs))}"
        )
    unknown = sorted(set(case.divisible) - set(case.signature))
    if unknown:
        raise ValueError(f"case {case.name}: divisible names {unknown} are not in the signature")
    # the JIT's own code makes the rest of it, so that the name of the cache entry is that of a launch
    values = {name: case.constexprs.get(name) for name in names}
    kinds = [_specialised(case, parameter) for parameter in case.fn.params]
    backend = make_backend(GPUTarget("cuda", 80, 32))
    _, signature, constants, attributes = case.fn._pack_args(backend, {}, values, kinds, {})
    return ASTSource(case.fn, signature, constants, attributes)


def _specialised(case: AotCase, parameter: Any) -> tuple[str, Any]:
    """Type of an argument and what a launch finds out about its value."""
    if parameter.name in case.constexprs:
        return "constexpr", case.constexprs[parameter.name]
    kind = case.signature[parameter.name]
    if kind[0] not in "*iu" or parameter.do_not_specialize:
        return kind, None
    return kind, "D" if parameter.name in case.divisible else ""


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes of the one kernel in `cubin`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if len(usage) != 1:
        raise RuntimeError(f"cuobjdump described {len(usage)} kernels, expected 1: {done.stdout}")
    return int(usage[0][0]), int(usage[0][1])


def cases_of(module: str, arch: int) -> list[AotCase]:
    """The cases of one kernel file."""
    found: list[AotCase] = importlib.import_module(f"ast_fast.kernels.{module}").aot_cases(arch)
    return found


def describe(module: str, arch: int, index: int, only_build: bool = False) -> dict[str, Any]:
    """Compile case `index` of `aot_cases(arch)` of a kernel file; what came of it, ready for JSON."""
    case = cases_of(module, arch)[index]
    found: dict[str, Any] = {"module": module, "case": case.name, "arch": arch}
    if not triton.__version__.startswith(case.triton):
        return {**found, "problems": [], "left_out": f"for Triton {case.triton} alone"}
    try:
        if only_build:
            build(case, arch)
            return {**found, "problems": []}
        report = compile_case(case, arch)
    # the compiler fails in as many ways as it has passes, and the report of a gate must name them all
    except Exception as error:
        return {**found, "problems": [f"{type(error).__name__}: {error}"[-2000:]]}
    found |= {
        "registers": report.registers,
        "stack": report.stack,
        "shared": report.shared,
        "tensor_memory": report.tensor_memory,
        "instructions": sorted(report.instructions),
        "problems": problems(case, report),
    }
    ptxas = _aot_ptxas.path()
    if ptxas and arch == _aot_ptxas.ARCHITECTURE and not case.twin:
        try:
            name = f"ptxas {_aot_ptxas.version(ptxas)}"
            usage = _aot_ptxas.assemble(build(case, arch).asm["ptx"], arch, ptxas)
        except (RuntimeError, ValueError) as error:
            found["problems"].append(str(error))
        else:
            found[name] = usage._asdict()
            other = problems(case, report._replace(**usage._asdict()))
            new = [problem for problem in other if problem not in found["problems"]]
            found["problems"] += (f"{name}: {problem}" for problem in new)
    return found


def serve() -> None:
    """Answer requests [module, arch, index, whether to build only] of standard input, one JSON line each."""
    # the compiler writes to standard output as it pleases: the answers keep a copy of it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"triton": triton.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(describe(*json.loads(line))), file=answers, flush=True)


def main() -> None:
    """The table of one kernel file, a warm cache, or a compiler that serves requests."""
    parser = argparse.ArgumentParser(prog="python -m ast_fast.kernels._aot")
    parser.add_argument("module", nargs="*", help="a kernel file without .py: attention")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="file that takes the figures")
    parser.add_argument("--twins", action="store_true", help="compile twins of other cases too")
    parser.add_argument("--warm", type=int, metavar="ARCH", help="fill the cache for this GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of --warm")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.warm:
        from . import _aot_warm

        print(json.dumps(_aot_warm.warm(options.warm, options.jobs, options.module)))
        return
    if len(options.module) != 1:
        parser.error(f"name one kernel file, got {len(options.module)}; or give --warm or --serve")
    (module,) = options.module
    figures: dict[str, dict[str, Any]] = {}
    for arch in options.arch:
        for index, case in enumerate(cases_of(module, arch)):
            if case.twin and not options.twins:
                continue
            found = describe(module, arch, index)
            print(
                f"sm_{arch:<4}{case.name:44}{found.get('registers', '-'):>4} registers"
                f"{found.get('stack', '-'):>5} stack{found.get('shared', '-'):>8} shared  "
                f"{'; '.join(found['problems']) or 'ok'}",
                flush=True,
            )
            figures.setdefault(f"sm_{arch}", {})[case.name] = {
                name: found.get(name) for name in ("registers", "stack", "shared", "tensor_memory")
            }
    if options.json:
        text = json.dumps({"triton": triton.__version__, "figures": figures}, indent=1)
        # one case a line
        text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", _on_one_line, text)
        options.json.write_text(text + "\n", encoding="utf-8")


def _on_one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match.group(1)) + "}"


if __name__ == "__main__":
    main()
