"""What only a device can prove of attention and whole steps: no races, the same bits, graphs, streams, memory, large tensors.

Each proof runs one claim and raises if it does not hold; `python -m benchmarks.gpu --suite proofs` runs them all, each in a
process of its own. `python -m benchmarks.proofs NAME` runs one here (the sanitizers call it that way).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import step_proofs
from .case import DTYPES, Skipped

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# what a process has compiled, it does not ask for again: counting needs one that has run nothing
FRESH = ("recompiled",)
_RUNS = 50
_RACE_RUNS = 250
_RACE_CLIPS = 60
# the largest number of compiled forms a kernel may take for calls that differ in batch size alone: one for grids that
# fill the GPU and one for those that do not; under a mask one for each tile of the table
_MOST_FORMS = 2
_MOST_FORMS_MASKED = 3

Step = Callable[[], list[Tensor]]


class Broken(AssertionError):
    """A claim does not hold."""


def _steps(device: str, dtype: torch.dtype, clips: int, tokens: int) -> Iterator[tuple[str, Step]]:
    """Forward and backward of every attention op, as functions that give all results."""
    from ast_fast import ops

    draw = torch.Generator(device=device).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=draw).to(dtype)

    heads, width = (12, 64) if device == "cuda" else (2, 64)
    qkv = normal(clips, tokens, 3, heads, width).requires_grad_()
    do = normal(clips, tokens, heads, width)

    def dense() -> list[Tensor]:
        o = ops.attention_qkv(qkv)
        return [o.detach(), *torch.autograd.grad(o, qkv, do)]

    lengths = torch.linspace(1, tokens, clips).int()
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int())).to(device)
    count = int(lengths.sum())
    packed = [normal(count, heads, width).requires_grad_() for _ in range(3)]
    dpacked = normal(count, heads, width)

    def varlen() -> list[Tensor]:
        o = ops.attention_varlen(*packed, starts, starts, tokens, tokens)
        return [o.detach(), *torch.autograd.grad(o, packed, dpacked)]

    f_dim = 12 if tokens > 300 else 3
    t_dim = (tokens - 2) // f_dim
    mask = ops.AttentionMask.factorised(f_dim, t_dim)
    leaves = [normal(clips, mask.queries, heads, width).requires_grad_() for _ in range(3)]
    dmasked = normal(clips, mask.queries, heads, width)

    def masked() -> list[Tensor]:
        o = ops.attention_masked(*leaves, mask)
        assert isinstance(o, Tensor)
        return [o.detach(), *torch.autograd.grad(o, leaves, dmasked)]

    yield "dense", dense
    yield "packed", varlen
    yield "masked", masked


def _sizes(device: str) -> tuple[int, int]:
    return (2, 1214) if device == "cuda" else (2, 62)


def _same(name: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not torch.equal(a, b):
            away = int((a != b).sum())
            raise Broken(f"{name}: result {number} differs in {away} of {a.numel()} elements")


def deterministic(device: str, dtype: torch.dtype) -> None:
    """Fifty runs give the same bits."""
    for name, step in _steps(device, dtype, *_sizes(device)):
        first = step()
        for _ in range(_RUNS - 1):
            _same(name, first, step())


def races(device: str, dtype: torch.dtype) -> None:
    """So do many runs of a grid that fills the device several times over, with other work in between."""
    cuda = device == "cuda"
    clips, tokens = (_RACE_CLIPS, 1214) if cuda else (3, 62)
    noise = torch.randn(512, 512, device=device)
    for name, step in _steps(device, dtype, clips, tokens):
        first = step()
        for run in range(_RACE_RUNS if cuda else 10):
            if run % 3 == 0:
                noise = (noise @ noise).clamp(-1, 1)
            _same(name, first, step())


def poisoned(device: str, dtype: torch.dtype) -> None:
    """What is left in memory before a call does not reach its results."""
    for name, step in _steps(device, dtype, *_sizes(device)):
        first = step()
        for value in (float("nan"), float("inf"), -1e30):
            # the allocator gives the next call these blocks
            blocks = [torch.full((size,), value, device=device) for size in (2**12, 2**18, 2**24)]
            blocks += [torch.full((x.numel(),), value, dtype=dtype, device=device) for x in first]
            del blocks
            _same(name, first, step())


def recompiled(device: str, dtype: torch.dtype) -> None:
    """Eight batch sizes take no more compiled forms of a kernel than its table has tiles.

    A form that comes from the cache on disk counts too: it is asked for in the same way.
    """
    _need_cuda(device)
    from triton.runtime.jit import JITFunction

    compiled: dict[str, int] = {}
    original = JITFunction._do_compile

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        compiled[self.__name__] = compiled.get(self.__name__, 0) + 1
        return original(self, *args, **options)

    JITFunction._do_compile = counted
    try:
        for clips in (1, 2, 3, 5, 8, 16, 17, 32):
            for _, step in _steps(device, dtype, clips, 402):
                step()
    finally:
        JITFunction._do_compile = original
    over = {name: forms for name, forms in compiled.items() if forms > _most_forms(name)}
    if not compiled:
        raise Broken(
            "no kernel was compiled at all: the count needs a process that has run nothing"
        )
    if over:
        raise Broken(f"compiled forms: {over}, more than a table has tiles for")


def _most_forms(kernel: str) -> int:
    return _MOST_FORMS_MASKED if "masked" in kernel else _MOST_FORMS


def streams(device: str, dtype: torch.dtype) -> None:
    """Two streams at a time give what one gives."""
    _need_cuda(device)
    steps = dict(_steps(device, dtype, 8, 1214))
    alone = {name: step() for name, step in steps.items()}
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        for first, second in (("dense", "packed"), ("masked", "dense"), ("packed", "masked")):
            found = {}
            for stream, name in zip(side, (first, second), strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found[name] = steps[name]()
            torch.cuda.synchronize()
            for name, results in found.items():
                _same(f"{name} beside another stream", alone[name], results)


def graph(device: str, dtype: torch.dtype) -> None:
    """A captured forward and backward replays to the same bits."""
    _need_cuda(device)
    from ast_fast.cuda_graphs import CudaGraphs

    for name, step in _steps(device, dtype, 2, 1214):
        eager = step()
        graphs = CudaGraphs()
        graphs.warm_up(step)
        results, replay = graphs.capture(step)
        for _ in range(3):
            for result in results:
                result.fill_(float("nan"))
            replay()
            torch.cuda.synchronize()
            _same(name, eager, results)


def failed_graph(device: str, dtype: torch.dtype) -> None:
    """A capture that fails says why, and leaves memory and the next capture as they were."""
    _need_cuda(device)
    from ast_fast.cuda_graphs import CudaGraphs

    name, step = next(_steps(device, dtype, 2, 1214))
    eager, graphs = step(), CudaGraphs()

    def waits() -> None:
        step()
        torch.cuda.synchronize()

    for _ in range(2):
        graphs.warm_up(step)
        stream = torch.cuda.current_stream()
        try:
            graphs.capture(waits)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise Broken(f"the error of a failed capture is {error}") from error
        else:
            raise Broken("a function that waits for the device was recorded")
        if torch.cuda.current_stream() != stream:
            raise Broken("a failed capture leaves its stream behind")
        torch.cuda.empty_cache()
    results, replay = graphs.capture(step)
    replay()
    torch.cuda.synchronize()
    _same(name, eager, results)


def large(device: str, dtype: torch.dtype) -> None:
    """A fused buffer of more than 2^31 elements: the first and last clips are what they are alone."""
    _need_cuda(device)
    from ast_fast import ops

    clips, tokens, heads, width = 768, 1214, 12, 64
    needed = clips * tokens * 3 * heads * width * 2 * 2.8
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise Skipped(
            f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free"
        )
    draw = torch.Generator(device=device).manual_seed(6)
    shape = (clips, tokens, 3, heads, width)
    qkv = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for part in qkv.split(64):
        part.normal_(generator=draw)
    assert qkv.numel() > 2**31
    qkv.requires_grad_()
    o = ops.attention_qkv(qkv)
    (grad,) = torch.autograd.grad(o, qkv, o.detach())
    for clip in (0, clips // 2, clips - 1):
        alone = qkv[clip : clip + 1].detach().clone().requires_grad_()
        part = ops.attention_qkv(alone)
        (dpart,) = torch.autograd.grad(part, alone, part.detach())
        # one clip may take another configuration than many: equal within rounding, not to the bit
        for whole, single in ((o[clip : clip + 1], part), (grad[clip : clip + 1], dpart)):
            error = float((whole.float() - single.float()).norm() / single.float().norm())
            if not error < 1e-2:
                raise Broken(f"clip {clip} of {clips}: relative error {error:.3g}")


def out_of_memory(device: str, dtype: torch.dtype) -> None:
    """Too little memory is an error that leaves everything usable, and nothing behind."""
    _need_cuda(device)
    from ast_fast import ops

    steps = dict(_steps(device, dtype, 4, 1214))
    before = steps["dense"]()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_allocated()
    big = torch.randn(64, 1214, 3, 12, 64, dtype=dtype, device=device)
    share = (torch.cuda.memory_reserved() + 2**20) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        ops.attention_qkv(big)
    except torch.cuda.OutOfMemoryError:
        pass
    else:
        raise Broken("64 clips fitted into memory that was capped below them")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del big
    torch.cuda.empty_cache()
    _same("after running out of memory", before, steps["dense"]())
    for _ in range(100):
        steps["dense"]()
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated() - held
    if left > 2**20:
        raise Broken(f"{left} bytes more are held after 100 steps")


def step_graph(device: str, dtype: torch.dtype) -> None:
    """A recorded training step is the unrecorded one to the bit."""
    step_proofs.step_graph(device, dtype, _same)


def forward_graph(device: str, dtype: torch.dtype) -> None:
    """Recorded inference gives the model's bits."""
    step_proofs.forward_graph(device, dtype, _same)


def step_memory(device: str, dtype: torch.dtype) -> None:
    """A step too large for memory is a clean error."""
    _need_cuda(device)
    step_proofs.step_memory(device, dtype, _same)


def _need_cuda(device: str) -> None:
    if device != "cuda":
        raise Skipped("needs a GPU")


def small(device: str, dtype: torch.dtype) -> None:
    """One small forward and backward of each op; what the sanitizers watch."""
    for _, step in _steps(device, dtype, 2, 146):
        step()
    if device == "cuda":
        torch.cuda.synchronize()


PROOFS: dict[str, Callable[[str, torch.dtype], None]] = {
    "deterministic": deterministic,
    "races": races,
    "poisoned": poisoned,
    "recompiled": recompiled,
    "streams": streams,
    "graph": graph,
    "failed graph": failed_graph,
    "step graph": step_graph,
    "forward graph": forward_graph,
    "large": large,
    "out of memory": out_of_memory,
    "step memory": step_memory,
}


def names() -> list[str]:
    """All proofs, the sanitizers last: they take longest."""
    return [*PROOFS, *(f"sanitizer {tool}" for tool in SANITIZERS)]


def run(name: str, device: str, dtype: str) -> None:
    """Run one proof.

    Raises:
        Broken: the claim does not hold.
        Skipped: it cannot be put to the test here.
    """
    if name.startswith("sanitizer "):
        _sanitize(name.split()[1], device, dtype)
    else:
        PROOFS[name](device, DTYPES[dtype])


def _sanitize(tool: str, device: str, dtype: str) -> None:
    _need_cuda(device)
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("compute-sanitizer is not installed")
    watched = [sys.executable, "-m", "benchmarks.proofs", "small", "--dtype", dtype]
    # compiling under the sanitizer would take minutes: the first run fills the cache
    # no limit here: the job's ends the whole session, a limit of ours the sanitizer but not what it runs
    subprocess.run(watched, cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", *watched],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "=====" in line]
        raise Broken(f"{tool} exit status {done.returncode}: {' | '.join(lines[:6])[-600:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one proof in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proofs", description=__doc__)
    parser.add_argument("name", choices=[*PROOFS, "small"])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    (small if options.name == "small" else PROOFS[options.name])(options.device, dtype)
    print(f"{options.name}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
