"""Equivalence runs: the whole table for `ast-fast verify`, or one model of the user's."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..optimized import Precision
from .cases import op_cases
from .report import Report, Row, current_commit, device_name
from .run_log_mel import log_mel_cases, run_log_mel_case, run_log_mel_gradient
from .run_models import build, model_configs, model_rows
from .run_ops import run_op_case
from .run_packed import packed_precisions, packed_rows

Progress = Callable[[int, int, str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtypes(device: torch.device) -> list[torch.dtype]:
    """What the device's fast backend takes: float16 only on a GPU, bfloat16 only where it has it."""
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    if torch.cuda.get_device_capability(device) < (8, 0):
        return [torch.float32, torch.float16]
    return [torch.float32, torch.bfloat16, torch.float16]


def check_equivalence(
    model: nn.Module | ModelConfig | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    backend: str = "auto",
    inputs: Tensor | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare the fast path with the reference in float64, next to plain PyTorch's own error.

    Args:
        model: an `ast_fast.ASTModel` to check with its weights, a config to check with random ones, or
            None for every op and the standard models.
        device: where to run: the model's device, else the GPU if there is one.
        dtype: one or several of float32, bfloat16 and float16; by default what the device is fast in.
        backend: "auto" takes the fast backend where it can and says where not; a name asks for it.
        inputs: features [B, S, F] to check the model on; random ones by default.
        full: base width and full depth instead of shapes that a CPU does in a minute.
        progress: called with done, total and what comes next.

    Returns:
        A report: `.ok`, `.rows`, `.table()`, `.to_json()`.

    >>> import ast_fast
    >>> config = ast_fast.config.ModelConfig(label_dim=3, input_tdim=64, embed_dim=64, num_heads=2, depth=1)
    >>> ast_fast.check_equivalence(config, device="cpu", dtype=torch.float32).ok
    True
    """
    given = None
    if model is not None:
        given = build(model) if isinstance(model, ModelConfig) else model
        device = device or (next(given.parameters()).device if given is model else None)
    place = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtypes = default_dtypes(place)
    else:
        dtypes = [dtype] if isinstance(dtype, torch.dtype) else list(dtype)
    jobs = _jobs(given, place, dtypes, backend, inputs, full)
    started, rows = time.perf_counter(), []
    for done, (what, job) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), what)
        rows += job()
    if progress is not None:
        progress(len(jobs), len(jobs), "done")
    seconds = time.perf_counter() - started
    return Report(rows, device_name(place), seconds, current_commit())


def _jobs(
    model: nn.Module | None,
    device: torch.device,
    dtypes: list[torch.dtype],
    backend: str,
    inputs: Tensor | None,
    full: bool,
) -> list[tuple[str, Callable[[], list[Row]]]]:
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    # TF32 is a precision of its own, and only a GPU has it
    settings = [(dtype, False) for dtype in dtypes]
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if ampere and torch.float32 in dtypes:
        settings.append((torch.float32, True))
    if model is None:
        seconds = 10.0 if full else 2.0
        for mel in log_mel_cases():
            name = f"log_mel {mel.signal.__name__}"
            jobs.append((name, partial(run_log_mel_case, mel, device, seconds, backend)))
        jobs.append(("log_mel gradient", partial(run_log_mel_gradient, device, seconds, backend)))
    for dtype, tf32 in settings:
        options = (device, dtype, backend, tf32)
        if model is not None:
            jobs.append((f"model {dtype}", partial(model_rows, "model", model, *options, inputs)))
            continue
        for case in op_cases(full):
            name = f"{case.op} {case.shape} {dtype}"
            jobs.append((name, partial(run_op_case, case, *options)))
        for name, config in model_configs(full):
            jobs.append((f"{name} {dtype}", partial(_config_rows, name, config, *options)))
    if model is None and device.type == "cpu" and backend in ("auto", "cpp"):
        for precision in packed_precisions():
            for name, config in model_configs(full):
                job = partial(_packed_rows, name, config, precision)
                jobs.append((f"{name} packed {precision}", job))
    return jobs


def _packed_rows(name: str, config: ModelConfig, precision: Precision) -> list[Row]:
    return packed_rows(name, build(config), precision)


def _config_rows(
    name: str,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    allow_tf32: bool,
) -> list[Row]:
    # built when its turn comes, so that one model is held at a time
    return model_rows(name, build(config), device, dtype, backend, allow_tf32)


def run_verify(
    device: str | torch.device | None = None,
    dtypes: Sequence[str] | None = None,
    full: bool = False,
    json_path: str | Path | None = None,
    progress: Progress | None = None,
    backend: str = "auto",
) -> Report:
    """What `ast-fast verify` does: check every op and the standard models, and write the JSON.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; the GPU if there is one.
        dtypes: names of dtypes; by default what the device is fast in.
        full: full-size shapes.
        json_path: file to write the report to.
        progress: called with done, total and what comes next.
        backend: as `use_backend`.

    Raises:
        ValueError: a dtype is unknown.
    """
    wanted = None
    if dtypes:
        unknown = sorted(set(dtypes) - set(DTYPES))
        if unknown:
            raise ValueError(
                f"dtypes has {', '.join(unknown)}: expected some of {', '.join(DTYPES)}"
            )
        wanted = [DTYPES[name] for name in dtypes]
    report = check_equivalence(
        device=device, dtype=wanted, backend=backend, full=full, progress=progress
    )
    if json_path is not None:
        report.to_json(json_path)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line for machines that have nothing but torch; exit status 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(
        prog="python -m ast_fast.equivalence", description="Prove that the fast path is right here."
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the GPU if there is one")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cpp", "reference"))
    parser.add_argument("--full", action="store_true", help="full-size shapes and depth")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args(arguments)

    def progress(done: int, total: int, what: str) -> None:
        line = f"[{done}/{total}] {what}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done % 20 == 0 or done == total:
            print(line, file=sys.stderr, flush=True)

    report = run_verify(
        options.device, options.dtypes, options.full, options.json, progress, options.backend
    )
    print(report.table())
    return 0 if report.ok else 1
