"""A training run as a process of its own: started, watched through its log, killed, compared."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ast_fast.sample_sets import make_audioset
from ast_fast.training.logs import read_log

ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.02
_ENDING_S = 20.0


def sample_set(folder: Path, clips: int, seconds: float) -> Path:
    """Real speech laid out as AudioSet's balanced set is."""
    return make_audioset(folder, clips=clips, absent=0, seconds=seconds)


def prepare(data: Path, out: Path) -> Path:
    """The same set as int16 shards, by `ast-fast prepare`."""
    arguments = ("prepare", "--data", str(data), "--out", str(out))
    status = _command(*arguments, said=subprocess.DEVNULL).wait()
    if status:
        raise RuntimeError(f"ast-fast prepare: exit status {status}")
    return out


def _command(*arguments: str, processes: int = 1, said: Any = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-port", "0", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "-m"]
    command += ["ast_fast", *(["--"] if processes > 1 else []), *arguments]
    return subprocess.Popen(command, env=environment, stdout=said, stderr=said)


class Run:
    """One `ast-fast train` in a folder.

    Args:
        folder: of the run.
        data: what to train on.
        settings: of the recipe, KEY=VALUE.
        processes: by torchrun if there are several.
        model: its name.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        settings: Sequence[str],
        processes: int,
        model: str = "ast_mini_p16_s10",
    ) -> None:
        self.folder, self.data, self.processes = folder, data, processes
        common = (f"model={model}", "weights=random", "train.log_every=1", "train.accelerator=cpu")
        self.settings = (*common, *settings, f"train.devices={processes}")
        self._process: subprocess.Popen[bytes] | None = None
        self._said = folder.with_name(folder.name + ".txt")

    def start(self) -> None:
        """Begin, or go on where it stands."""
        arguments = ["train", "--run", str(self.folder)]
        # killed before its plan was written it has nothing to go on from
        if (self.folder / "run.json").is_file():
            arguments.append("--resume")
        else:
            arguments[1:1] = ["audioset-balanced", "--data", str(self.data), "--holdout", "0.25"]
            arguments += [part for setting in self.settings for part in ("--set", setting)]
        with self._said.open("ab") as said:
            self._process = _command(*arguments, processes=self.processes, said=said)

    def finish(self, patience_s: float) -> None:
        """Run to the end.

        Raises:
            RuntimeError: it failed.
        """
        self.start()
        assert self._process is not None
        try:
            status = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"no end within {patience_s:.0f} s: {self.said()}") from None
        if status:
            raise RuntimeError(f"exit status {status}: {self.said()}")

    def wait_for_step(self, step: int, patience_s: float) -> bool:
        """Whether a row of the log tells of another step than the one before, while it runs."""
        assert self._process is not None
        until, begun = time.monotonic() + patience_s, self._rows_written()
        while time.monotonic() < until and self._process.poll() is None:
            if self._rows_written() != begun and self.last_step() != step:
                return True
            time.sleep(_POLL_S)
        return False

    def _rows_written(self) -> int:
        path = self.folder / "log.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    def kill(self) -> bool:
        """SIGKILL to all of its processes, as when a machine dies; whether it ran still."""
        assert self._process is not None
        running = self._process.poll() is None
        # torchrun's processes are in sessions of their own
        doomed = _family(self._process.pid) if running else []
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + _ENDING_S
        while any(_command_line(pid) for pid in doomed):
            if time.monotonic() > until:
                raise RuntimeError(f"some of {doomed} outlived SIGKILL: {self.said()}")
            time.sleep(_POLL_S)
        return running

    def kill_one_process(self, which: int, patience_s: float) -> float:
        """SIGKILL to one of torchrun's processes; seconds until the last has ended."""
        assert self._process is not None
        trained = [pid for pid in _children(self._process.pid) if b"ast_fast" in _command_line(pid)]
        started = time.monotonic()
        os.kill(trained[which], signal.SIGKILL)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
        alive = [pid for pid in trained if _command_line(pid)]
        if alive or self._process.returncode == 0:
            raise RuntimeError(f"processes {alive} outlived the launcher: {self.said()}")
        return time.monotonic() - started

    def said(self) -> str:
        """The end of what it printed."""
        return self._said.read_text(encoding="utf-8", errors="replace")[-2000:]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of the log of a kind, the last one of each step."""
        found = {
            row["step"]: row for row in read_log(self.folder / "log.jsonl") if row["kind"] == kind
        }
        return [found[step] for step in sorted(found)]

    def last_step(self) -> int:
        """The newest step in the log."""
        rows = read_log(self.folder / "log.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def last_checkpoint(self) -> int:
        """The step of the newest checkpoint."""
        pointer = self.folder / "checkpoints" / "latest"
        return int(pointer.read_text().strip().rpartition("-")[2]) if pointer.exists() else 0

    def losses(self) -> list[float]:
        """Of every step."""
        return [row["loss"] for row in self.rows("step")]

    def figures(self) -> list[float]:
        """Of every evaluation."""
        return [row[name] for row in self.rows("eval") for name in ("loss", "map", "auc")]

    def epoch_rates(self) -> list[float]:
        """Clips a second of each epoch, evaluation and checkpoints left out."""
        ends = {row["epoch"]: row["clips_per_second"] for row in self.rows("step")}
        return [ends[epoch] for epoch in sorted(ends)]

    def clips_per_second(self) -> float:
        """Of the best epoch: the first one warms up."""
        return max(self.epoch_rates())

    def seconds_per_step(self) -> float:
        """As long as a step of the best epoch takes."""
        batch = next(s for s in reversed(self.settings) if s.startswith("train.batch_size="))
        return int(batch.partition("=")[2]) / self.clips_per_second()

    def wait_share(self) -> float:
        """Of the last epoch."""
        return float(self.rows("step")[-1]["wait_share"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the last checkpoint holds."""
        folder = self.folder / "checkpoints"
        folder = folder / (folder / "latest").read_text().strip()
        found = {f"model.{k}": v for k, v in load_file(folder / "model/model.safetensors").items()}
        return found | load_file(folder / "state.safetensors")


def _children(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):  # a list for each thread
        with contextlib.suppress(OSError):
            found += [int(number) for number in thread.read_text(encoding="ascii").split()]
    return found


def _family(pid: int) -> list[int]:
    """A process and all that it has started, and they in turn; itself first, lest it start another."""
    return [pid, *(found for child in _children(pid) for found in _family(child))]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def differing(a: Run, b: Run) -> int:
    """Tensors of the last checkpoints that are not the same bits, and rows that do not say the same."""
    left, right = a.tensors(), b.tensors()
    names = left.keys() | right.keys()
    count = sum(
        name not in left or name not in right or not torch.equal(left[name], right[name])
        for name in names
    )
    same = a.losses() == b.losses() and a.figures() == b.figures()
    return count + (not same)


def worst_apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference of two series; infinite if they are not of one length."""
    if len(a) != len(b) or not a:
        return float("inf")
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a, b, strict=True))
