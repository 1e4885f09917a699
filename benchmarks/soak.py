"""Ten thousand training steps of a tiny model: memory, files and threads stay flat, every loss is finite.

    python -m benchmarks.soak                        10,000 steps (five to ten minutes on one core), to a result file
    python -m benchmarks.soak --only step --device cuda --minutes 5

`step` is a step alone, waveforms to updated weights, on any machine, on a GPU as one CUDA graph. `run` is the trainer: files
through the feeder, augmentation, the log, the equivalence monitor, checkpoints, evaluation each epoch; on a CPU only.

Flat means: between the second tenth of the steps and the last the median of what is held does not grow by more than the
bound. The first tenth fills caches and pools.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import record
from .environment import collect
from .record import Row

STEPS = 10_000
# of what the process holds: less than 2 kB for each of the 8,000 steps between the medians
BUDGET_MIB = 16.0
# of what PyTorch's allocator has given out on a GPU, which is exact
BUDGET_DEVICE_MIB = 1.0
_FEWEST_SAMPLES = 20
_CLIPS, _SAMPLES, _CLASSES = 4, 6000, 4
_EPOCH_STEPS = 100


@dataclass
class Held:
    """What a process holds, noted every so many steps."""

    steps: list[int] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    device_mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    bad_losses: int = 0

    def note(self, step: int) -> None:
        """One sample of this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.steps.append(step)
        self.resident_mib.append(pages * 4096 / 2**20)
        on_gpu = torch.cuda.is_initialized()
        self.device_mib.append(torch.cuda.memory_allocated() / 2**20 if on_gpu else 0.0)
        self.files.append(len(list(Path("/proc/self/fd").iterdir())))
        self.threads.append(threading.active_count())

    def growth(self, name: str) -> float:
        """From the median of the second tenth of the steps to that of the last.

        Raises:
            ValueError: there are too few samples to tell.
        """
        values, last = getattr(self, name), self.steps[-1] if self.steps else 0
        early = [v for s, v in zip(self.steps, values, strict=True) if last <= 10 * s < 2 * last]
        late = [v for s, v in zip(self.steps, values, strict=True) if 10 * s >= 9 * last]
        if len(values) < _FEWEST_SAMPLES or not early or not late:
            raise ValueError(f"{len(values)} samples: expected {_FEWEST_SAMPLES}; take more steps")
        return statistics.median(late) - statistics.median(early)


def _model(device: str) -> Any:
    import ast_fast
    from ast_fast.config import LogMelConfig

    torch.manual_seed(0)
    return ast_fast.create_model(
        "ast_mini_p16_s10", num_classes=_CLASSES, embed_dim=64, depth=2, num_heads=2,
        input_fdim=32, input_tdim=32,
        frontend_config=LogMelConfig(num_mel_bins=32, num_frames=32),
    ).to(device)  # fmt: skip


def soak_step(
    steps: int,
    device: str = "cpu",
    minutes: float = math.inf,
    after: Callable[[Tensor], object] = lambda values: None,
) -> Held:
    """Train on fresh random waveforms, step after step.

    Args:
        after: called with loss and gradient norm of each step.
    """
    from ast_fast.config import TrainConfig
    from ast_fast.frontend import log_mel_features
    from ast_fast.training.modes import prepared_step
    from ast_fast.training.optimizers import make_optimizer
    from ast_fast.training.step import TrainingStep

    model, held = _model(device), Held()
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mode = "graph" if device == "cuda" else "off"
    optimizer = make_optimizer(live, TrainConfig(lr=1e-3), 2, mode == "graph")
    plain = TrainingStep(
        model, torch.nn.functional.binary_cross_entropy_with_logits, optimizer, max_norm=1.0
    )
    step = prepared_step(plain, mode, model)
    draw = torch.Generator().manual_seed(1)
    every, until = max(1, steps // 200), time.monotonic() + 60 * minutes
    model.train()
    bad = torch.zeros((), device=device)
    for number in range(steps):
        sound = (0.1 * torch.randn(_CLIPS, _SAMPLES, generator=draw)).to(device)
        targets = (torch.rand(_CLIPS, _CLASSES, generator=draw) > 0.5).float().to(device)
        step.set_lr(1e-3 * (1 - number / steps))
        values = step(log_mel_features(sound, model.frontend_config), targets)
        bad += values.isfinite().all().logical_not()
        after(values)
        if number % every == every - 1:
            held.note(number + 1)
            if time.monotonic() > until:
                break
    held.bad_losses = int(bad)
    return held


def _speech_like(folder: Path, clips: int) -> None:
    """Tones in noise as 16-bit WAVs, a folder a class."""
    draw = torch.Generator().manual_seed(2)
    for index in range(clips):
        label = index % _CLASSES
        path = folder / f"tone-{label}" / f"{index:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        time_s = torch.arange(_SAMPLES + 10 * index) / 16000
        sound = 0.3 * torch.sin(2 * math.pi * 300 * (label + 1) * time_s)
        sound += 0.05 * torch.randn(len(sound), generator=draw)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((sound * 32767).short().numpy().tobytes())


def soak_run(steps: int, folder: Path) -> Held:
    """The trainer itself, in this process, on clips in files; watched from a second thread.

    Raises:
        ast_fast.training.NonFiniteLossError: a loss is not finite; the trainer looks at each.
    """
    from ast_fast.config import AugmentConfig, AverageConfig, MonitorConfig, TrainConfig
    from ast_fast.data import AudioDataset, read_folder
    from ast_fast.training import Trainer

    _speech_like(folder / "train", _EPOCH_STEPS * _CLIPS)
    _speech_like(folder / "eval", 4 * _CLIPS)
    config = TrainConfig(
        epochs=-(-steps // _EPOCH_STEPS), batch_size=_CLIPS, lr=1e-3, log_every=10, num_workers=0,
        accelerator="cpu", checkpoint_every=40, average=AverageConfig(ema=0.99, cumulative=True),
        augment=AugmentConfig(mixup=0.5, freq_mask_bins=4, time_mask_frames=4, noise=True),
        monitor=MonitorConfig(check_every=200),
    )  # fmt: skip
    train, evaluation = (AudioDataset(read_folder(folder / name)) for name in ("train", "eval"))
    trainer = Trainer(
        _model("cpu"), train, config, folder / "run", eval_set=evaluation, progress=False
    )
    held, ended = Held(), threading.Event()

    def watch() -> None:
        every, due = max(1, steps // 200), 0
        while not ended.wait(0.01):
            if trainer.step >= due:
                held.note(trainer.step)
                due += every

    watcher = threading.Thread(target=watch, name="soak")
    watcher.start()
    try:
        trainer.fit()
    finally:
        ended.set()
        watcher.join()
    held.note(trainer.step)
    return held


def rows_of(what: str, held: Held, device: str) -> Iterator[Row]:
    """A check for each thing held, and one for the losses."""
    found = [
        ("resident_mib", BUDGET_MIB, "MiB of resident memory more"),
        ("files", 0.0, "open files more"),
        ("threads", 0.0, "threads more"),
    ]
    if device == "cuda":
        found.append(("device_mib", BUDGET_DEVICE_MIB, "MiB of the device allocator's more"))
    figures = [(held.growth(name), budget, text) for name, budget, text in found]
    figures.append((float(held.bad_losses), 0.0, "steps whose loss or gradient is not finite"))
    for value, budget, text in figures:
        ok = value <= budget
        yield Row(
            suite="soak", case=f"soak, {what}", mode="check",
            shape={"steps": held.steps[-1], "samples": len(held.steps)}, dtype="f32",
            provider="ast_fast", status="ok" if ok else "wrong",
            reason="" if ok else f"{text}: {value:g}, allowed {budget:g}",
            error=value, budget=budget, worst=text, clock="host",
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and write a result file; exit status 1 if something grew or a loss was not finite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=("step", "run"), help="one of the two (default: both)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each (default: {STEPS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end a step's soak earlier")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write")
    options = parser.parse_args(arguments)
    device = options.device
    torch.set_num_threads(1)
    environment = collect(device)
    settings = {"steps": options.steps, "budget_mib": BUDGET_MIB}
    content = record.ResultFile(suite="soak", environment=environment, settings=settings)
    path = options.json or record.RESULTS / record.file_name(environment, "soak")
    kinds = [options.only] if options.only else ["step"] if device == "cuda" else ["step", "run"]
    for kind in kinds:
        if kind == "step":
            held = soak_step(options.steps, device, options.minutes)
        else:
            with tempfile.TemporaryDirectory(prefix="soak-") as folder:
                held = soak_run(options.steps, Path(folder))
        for row in rows_of(kind, held, device):
            content.rows.append(row)
            print(
                f"{row.case}, {row.shape['steps']} steps: {row.error:.4g} {row.worst} {row.status}"
            )
        content.write(path)
    print(path)
    return int(any(row.status != "ok" for row in content.rows))


if __name__ == "__main__":
    sys.exit(main())
