"""Where the time of a whole pass goes: products, attention, what stands between them, optimiser, launch gaps.

    python -m benchmarks.components                          the first case of inference and of training in each precision
    python -m benchmarks.components --suite inference --only base_features

Each component's time stands beside what a model of the machine predicts: operations over the rate of a large matrix
product, bytes over the rate of a large copy, both measured here first. On a GPU times are those of kernels, by name,
and the gaps are what the clock says beyond their sum. On a CPU times are those of PyTorch's operators and ours, taken
by its profiler in training, and by clocks around the parts of the chain that runs in inference. Writes a result file
of the suite `components`; `share` in it is predicted over measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings, environment, harness, record, suites, timing
from .case import Case, Run, Settings, listed, texts
from .models import DEPTH, SIZES, num_tokens
from .run import default_backend
from .table import duration

ROUNDS = {"cpu": 7, "cuda": 20}
# names of operators and kernels, first match: the rest is "elementwise and other"
PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention", "_fmha", "flash_")),
    ("norms", ("layer_norm", "layernorm")),
    ("GELU", ("gelu", "ast_fast::mlp")),
    ("embedding", ("patch_embed", "patch_", "_project")),
    ("front end", ("log_mel",)),
    ("optimiser", ("adam", "clip_grad", "_foreach", "multi_tensor")),
    (
        "products",
        ("gemm", "nvjet", "cutlass", "cublas", "mkldnn", "addmm", "aten::mm", "linear", "bmm"),
    ),
    ("copies", ("memcpy", "memset", "copy_", "cat")),
)
OTHER, GAPS, WHOLE = "elementwise and other", "launch gaps", "whole"


def component_of(name: str) -> str:
    """The component that an operator or kernel belongs to."""
    lower = name.lower()
    for component, parts in PATTERNS:
        if any(part in lower for part in parts):
            return component
    return OTHER


@dataclasses.dataclass(frozen=True)
class Work:
    """What a component must do at least: operations and bytes of memory traffic."""

    flops: float = 0.0
    bytes: float = 0.0


def least_work(case: Case, depth: int = DEPTH) -> dict[str, Work]:
    """Operations and bytes of each component of one pass, from the sizes alone.

    Counted in entries of the residual stream, B T C a block. Products read and write 16 of them and the weights;
    a training step does three times that, and 3.5 times the forward's attention. A residual addition with its norm
    moves 4 tensors of that size forward and 4 backward, twice a block; GELU 8 and 16 (inference has it in the product
    before). Between products of bytes come 26 bytes an entry: products arrive as bfloat16, leave as bytes, and the
    stream is read and written. AdamW moves 7 float32 a parameter.
    """
    size = case.name.split("_")[0]
    width = SIZES[size][0]
    frames = case.shape.get("S", 1024)
    clips, tokens = case.clips or 1, num_tokens(frames)
    narrow = {"f32": 4, "int8": 1}.get(case.dtype, 2)
    entries = float(clips * tokens * width * depth)
    parameters = 12.0 * depth * width**2
    products, attention = 2 * entries * 12 * width, 4 * entries * tokens
    wide = max(narrow, 2)  # bytes stand in products alone
    if case.mode != "step":
        between = {"norms": Work(2 * 8 * entries, wide * 8 * entries)}
        if case.dtype == "int8":  # norms are part of that
            between = {"between products of bytes": Work(60 * entries, 26 * entries)}
        return {
            "products": Work(products, narrow * (16 * entries + parameters)),
            "attention": Work(attention, wide * 4 * entries),
            **between,
        }
    return {
        "products": Work(3 * products, 3 * narrow * (16 * entries + parameters)),
        "attention": Work(3.5 * attention, narrow * 12 * entries),
        "norms": Work(2 * 24 * entries, narrow * 16 * entries),
        "GELU": Work(4 * 60 * entries, narrow * 24 * entries),
        "optimiser": Work(12 * parameters, 28 * parameters),
    }


def predicted_ms(work: Work, tops: dict[str, float], dtype: str) -> float:
    """Milliseconds that the work takes at this machine's ceilings; 0 where one is unknown."""
    # bytes multiply twice as fast as bfloat16 where there is VNNI, four times float32
    name = {"int8": "bf16", "bf16-amp": "bf16", "bf16-master": "bf16"}.get(dtype, dtype)
    rate = tops.get(f"gemm_{name}_tflops", 0.0) * (2.0 if dtype == "int8" else 1.0)
    copy = tops.get("copy_gbps", 0.0)
    if not rate or not copy:
        return 0.0
    return 1e3 * max(work.flops / (rate * 1e12), work.bytes / (copy * 1e9))


class _Clocks:
    """Seconds spent in functions while they are wrapped; what one calls of another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def wrap(self, component: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    spent = time.perf_counter() - started
                    self.seconds[component] = self.seconds.get(component, 0.0) + spent

        return timed


@contextlib.contextmanager
def _clocked(clocks: _Clocks) -> Iterator[None]:
    """The parts of the CPU's inference chain under clocks."""
    from ast_fast.cpp import add_layer_norm, attention, layer_norm, log_mel, packed, patch_embed

    places: tuple[tuple[str, Any, str], ...] = (
        ("products", packed.PackedLinear, "__call__"),
        ("products", packed.Int8Linear, "__call__"),
        ("between products of bytes", packed, "int8_rows"),
        ("attention", attention, "forward"),
        ("norms", layer_norm, "forward"),
        ("norms", add_layer_norm, "forward"),
        ("embedding", patch_embed, "forward"),
        ("front end", log_mel, "forward"),
    )
    kept = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    try:
        for component, owner, name in places:
            setattr(owner, name, clocks.wrap(component, getattr(owner, name)))
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def _by_clocks(run: Run, rounds: int) -> list[dict[str, float]]:
    samples = []
    for index in range(rounds):
        clocks = _Clocks()
        with _clocked(clocks):
            started = time.perf_counter()
            run(index)
            whole = time.perf_counter() - started
        found = {name: 1e3 * seconds for name, seconds in clocks.seconds.items()}
        found[OTHER] = max(1e3 * whole - sum(found.values()), 1e-6)
        samples.append({**found, WHOLE: 1e3 * whole})
    return samples


def _by_profiler(run: Run, rounds: int, cuda: bool) -> list[dict[str, float]]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    samples = []
    for index in range(rounds):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run(index)  # without the profiler, whose own cost is no part of the whole
        if cuda:
            torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - started)
        with torch.profiler.profile(activities=activities) as profile:
            run(index)
            if cuda:
                torch.cuda.synchronize()
        found = _summed(profile.key_averages(), cuda)
        if cuda:
            found[GAPS] = max(whole - sum(found.values()), 1e-6)
        samples.append({**found, WHOLE: whole})
    return samples


def _summed(events: Iterable[Any], cuda: bool) -> dict[str, float]:
    """Milliseconds of each component.

    On a GPU a kernel is listed itself and in the time of the operator that launched it: only it counts.
    """
    found: dict[str, float] = {}
    for event in events:
        if cuda and not _is_kernel(event):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent:
            component = component_of(event.key)
            found[component] = found.get(component, 0.0) + spent / 1e3
    return found


def _is_kernel(event: Any) -> bool:
    # a range that the user names spans kernels; not every PyTorch marks it
    device = getattr(event, "device_type", None)
    return device == torch.autograd.DeviceType.CUDA and not (
        getattr(event, "is_user_annotation", False) or event.key.startswith("ProfilerStep")
    )


def split(
    case: Case, settings: Settings, tops: dict[str, float], depth: int = DEPTH
) -> list[record.Row]:
    """A row for each component of our candidate, and one for the whole; a wrong result has none."""
    quiet = dataclasses.replace(settings, peers=("none",))
    checked, runs, _ = harness.check(case, quiet)
    first = checked[case.candidates[0].name]
    if first.status != "ok":
        return [first]
    run = runs[first.provider]
    run(0)
    rounds = ROUNDS[settings.device]
    by_clocks = not settings.cuda and case.mode == "forward" and settings.backend == "cpp"
    samples = _by_clocks(run, rounds) if by_clocks else _by_profiler(run, rounds, settings.cuda)
    work = least_work(case, depth)
    rows = []
    for name in dict.fromkeys(name for sample in samples for name in sample):
        row = harness.blank(case, name, "ok")
        row.suite, row.rounds, row.calls = "components", rounds, 1
        row.clock = "events" if settings.cuda else "host"
        row.error, row.budget, row.worst = first.error, first.budget, first.worst
        row.ms = timing.spread([sample.get(name, 1e-6) for sample in samples])
        least = work.get(name, Work())
        # products alone are in bytes
        rounded = "bf16" if case.dtype == "int8" and name != "products" else case.dtype
        expected = predicted_ms(least, tops, rounded)
        if expected:
            rate = 1e-9 / row.ms["p50"]
            row.tflops, row.gbps = least.flops * rate, least.bytes * rate * 1e3
            copied = predicted_ms(Work(bytes=least.bytes), tops, rounded)
            row.ceiling = "copy" if copied == expected else "gemm"
            row.share = expected / row.ms["p50"]
        rows.append(row)
    return rows


def text(rows: Sequence[record.Row]) -> str:
    """Components, largest first, with shares of the whole and the prediction."""
    if rows[0].ms is None:
        return f"  {rows[0].provider}: {rows[0].status}, {rows[0].reason}"
    whole = next(row.ms["p50"] for row in rows if row.provider == WHOLE and row.ms)
    lines = []
    for row in sorted(rows, key=lambda row: -(row.ms or {"p50": 0.0})["p50"]):
        assert row.ms is not None
        at_ceiling = duration(row.ms["p50"] * row.share) if row.share else ""
        lines.append(
            f"  {row.provider:28}{duration(row.ms['p50']):>10}{row.ms['p50'] / whole:>7.0%}"
            f"{at_ceiling:>12}"
        )
    return "\n".join(lines)


def chosen(names: Sequence[str], settings: Settings, only: Sequence[str]) -> Iterator[Case]:
    """Cases whose titles have one of the texts; else the first of each suite and dtype."""
    for name in names:
        seen: set[str] = set()
        for case in suites.load(name, settings):
            if listed(case.title, only) if only else case.dtype not in seen:
                seen.add(case.dtype)
                yield case


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.components")
    parser.add_argument("--suite", default="inference,training")
    parser.add_argument(
        "--only", default="", metavar="TEXT,...", help="cases whose title has one of these"
    )
    parser.add_argument("--dtype", default="f32,bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="control flow alone; writes no file")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        device=device,
        dtypes=tuple(options.dtype.split(",")),
        backend=default_backend(device),
        tiny=options.tiny,
    )
    facts = environment.collect(device)
    tops = ceilings.measure(device, settings.dtypes, tiny=options.tiny)
    file = record.ResultFile(
        suite="components",
        environment=facts,
        settings={"rounds": ROUNDS[device], "backend": settings.backend},
        ceilings=tops,
    )
    from ast_fast.backend import use_backend

    good = True
    with use_backend(settings.backend):
        for case in chosen(suites.names(options.suite), settings, texts(options.only)):
            rows = split(case, settings, tops, 2 if options.tiny else DEPTH)
            print(f"\n{case.title}\n{text(rows)}", flush=True)
            good = good and rows[0].status == "ok"
            file.rows += rows
            if not options.tiny:
                file.write(options.out / record.file_name(facts, "components"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
