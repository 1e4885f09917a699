"""Where a measurement was taken: device, driver, versions, commit, date, threads."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "triton",
    "numpy",
    "transformers",
    "timm",
    "torchaudio",
    "kaldi-native-fbank",
    "soundfile",
    "onnxruntime",
    "openvino",
)

# stands in a device's name before an instruction set below what the CPU has (AST_FAST_CPU_ISA)
HELD_TO = ", ours held to "


def collect(device: str) -> dict[str, Any]:
    """Facts about this process and machine, without names of hosts, users or folders."""
    revision, changed = commit()
    facts: dict[str, Any] = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_in_use(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": revision,
        "uncommitted_changes": changed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": versions(),
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "cpp_isa": _cpp_isa(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "float32_matmul": torch.get_float32_matmul_precision(),
        }
    return facts


def same_arithmetic() -> None:
    """float32 means float32 for every candidate: PyTorch's convolutions default to TF32 on a GPU."""
    torch.backends.cudnn.allow_tf32 = False


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpp_isa() -> str:
    try:
        from ast_fast import _C
    except ImportError:
        return ""
    return str(_C.isa())


def _cpu_in_use() -> str:
    """The CPU, and the instruction set that our kernels were held to, if they were."""
    held = os.environ.get("AST_FAST_CPU_ISA")
    return _cpu_name() + (f"{HELD_TO}{held}" if held else "")


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines[:40] if ":" in line)
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    name = facts.get("model name") or platform.processor() or platform.machine()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    family = facts.get("cpu family", "")
    detail = f" family {family}" if len(name) < 12 and family else ""
    return f"{name}{detail}" + (f" ({has[-1]})" if has else "")


def _run(*command: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> tuple[str, bool]:
    """The checkout's commit, `unknown` outside of one, and whether watched files differ from it."""
    # a copy of the checkout without its .git may be told its commit
    told = os.environ.get("AST_FAST_COMMIT", "")[:12]
    revision = _run("git", "rev-parse", "--short=12", "HEAD") or told or "unknown"
    watched = ("ast_fast", "kernels", "csrc", "benchmarks/*.py", "benchmarks/suites")
    changed = bool(_run("git", "status", "--porcelain", "--untracked-files=no", "--", *watched))
    return revision, changed


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (_run(*command).splitlines() or ["unknown"])[0]
