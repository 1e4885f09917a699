"""Evaluation of a model on a dataset, waveforms in, figures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..audio import AudioReport
from ..data.dataset import Batch, ClipSet, max_samples
from ..data.feeder import Feeder
from ..data.shard_sampler import sampler_for
from .logs import Progress
from .metrics import Metrics


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        figures: loss and metrics by name.
        per_class: one figure a class (see `Metrics.per_class`).
        confusion: [C, C] counts, rows are the truth; None for multi-label sets.
        num_clips: clips evaluated.
        report: what reading the files changed and skipped.
    """

    figures: dict[str, float]
    per_class: list[float]
    confusion: Tensor | None
    num_clips: int
    report: AudioReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        confusion = None if self.confusion is None else self.confusion.tolist()
        return {
            "figures": self.figures,
            "per_class": [None if value != value else value for value in self.per_class],
            "confusion": confusion,
            "num_clips": self.num_clips,
            "audio": self.report.to_dict(),
        }


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: ClipSet,
    *,
    batch_size: int = 64,
    multi_label: bool = False,
    num_workers: int = 0,
    bfloat16: bool = False,
    progress: bool = False,
    on_batch: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation:
    """Run a model (with `forward_waveform`) over a whole set and measure it.

    Args:
        model: a module with `forward_waveform`, on the device to use.
        dataset: clips and labels.
        batch_size: clips a batch.
        multi_label: whether clips have several labels.
        num_workers: loader processes.
        bfloat16: run under autocast to bfloat16.
        progress: show a bar or lines.
        on_batch: gets each batch and its logits [B, C], for what the figures do not tell.

    Raises:
        ValueError: no clip could be read.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    metrics = Metrics(len(dataset.classes), multi_label)
    report = AudioReport()
    sampler = sampler_for(dataset, batch_size, shuffle=False)
    feeder = Feeder(
        dataset,
        sampler,
        multi_label=multi_label,
        device=device,
        most_samples=max_samples(model.frontend_config),
        num_workers=num_workers,
    )
    bar = Progress(len(sampler), title="evaluation", enabled=progress)
    try:
        for batch, _ in feeder:
            report.merge(batch.report)
            if len(batch):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    logits = model.forward_waveform(batch.wave, batch.lengths)
                metrics.update(logits, batch.targets)
                if on_batch is not None:
                    on_batch(batch, logits)
            bar.step()
    finally:
        feeder.close()
        bar.close()
        model.train(was_training)
    return Evaluation(
        metrics.compute(),
        metrics.per_class(),
        None if multi_label else metrics.confusion(),
        metrics.num_clips,
        report,
    )
