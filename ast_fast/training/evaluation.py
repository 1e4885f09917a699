"""Evaluation of a model on a dataset, waveforms in, figures out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..audio import AudioReport
from ..config import Task
from ..data.dataset import Batch, ClipSet, check_one_label, max_samples
from ..data.feeder import Feeder
from ..data.shard_sampler import sampler_for
from ..finite import check_results
from ..optimized import refresh_packed, stale_packs
from .logs import Progress
from .metrics import Metrics
from .processes import from_all
from .weights import is_sharded

_log = logging.getLogger("ast_fast.training")

Part = tuple[Tensor, Tensor, Tensor]  # places in the set [B], logits [B, C], targets of a batch


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        figures: loss and metrics by name.
        per_class: one figure a class (see `Metrics.per_class`).
        confusion: [C, C] counts, rows are the truth; None but for one label a clip.
        num_clips: clips evaluated.
        report: what reading the files changed and skipped.
        metrics: logits and targets of every clip, for other figures of the same clips.
    """

    figures: dict[str, float]
    per_class: list[float]
    confusion: Tensor | None
    num_clips: int
    report: AudioReport
    metrics: Metrics

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
    task: Task = "single_label",
    binary: bool = False,
    on_sigmoids: bool = False,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    progress: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation:
    """Run a model (with `forward_waveform`) over a whole set and measure it.

    Packed weights that are out of date (see `optimize_for_inference`) are packed again, with a warning.

    Args:
        model: a module with `forward_waveform`, on the device to use.
        dataset: clips and labels.
        batch_size: clips a batch, over all processes together.
        task: what the labels are, see `Metrics`.
        binary: one label a clip was trained with binary cross-entropy.
        on_sigmoids: the loss is that of the original's validation, see `Metrics`.
        num_workers: loader processes.
        autocast: run under autocast to this dtype.
        progress: show a bar or lines.
        rank: of this process; each evaluates its share, and all get the figures of the whole.
        world_size: processes of the default group of torch.distributed.
        on_batch: gets each batch and its logits [B, C], for what the figures do not tell.

    Raises:
        NotFiniteError: logits are NaN or infinite; says which weights are to blame.
        ValueError: no clip could be read; or one has no label or several where one is expected.
    """
    if task == "single_label":
        check_one_label(dataset)
    stale = stale_packs(model)
    if stale:
        _log.warning(
            "packed weights of %d blocks (%s, ...) were out of date: weights were written to past autograd; packed "
            "again (ast_fast.refresh_packed does it after such writes)",
            len(stale),
            stale[0],
        )
        refresh_packed(model)
    device = next(model.parameters()).device
    was_training = model.training
    together = is_sharded(model)  # a process without clips helps the others
    model.eval()
    parts: list[Part] = []
    report = AudioReport()
    sampler = sampler_for(dataset, batch_size, shuffle=False, rank=rank, world_size=world_size)
    feeder = Feeder(
        dataset,
        sampler,
        multi_label=binary or task == "multi_label",
        regression=task == "regression",
        device=device,
        most_samples=max_samples(model.frontend_config),
        num_workers=num_workers,
    )
    bar = Progress(len(sampler), title="evaluation", enabled=progress)
    try:
        for batch, _ in feeder:
            report.merge(batch.report)
            if len(batch) or together:
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    logits = model.forward_waveform(batch.wave, batch.lengths)
            if len(batch):
                parts.append((batch.indices, logits.float().cpu(), batch.targets.cpu()))
                if on_batch is not None:
                    on_batch(batch, logits)
            bar.step()
    finally:
        feeder.close()
        bar.close()
        model.train(was_training)
    if world_size > 1:
        parts, report = _of_all(parts, report, world_size)
    metrics = Metrics(len(dataset.classes), task, binary=binary, on_sigmoids=on_sigmoids)
    for _, logits, targets in parts:
        check_results(logits, "logits", model)
        metrics.update(logits, targets)
    return Evaluation(
        metrics.compute(),
        metrics.per_class(),
        metrics.confusion() if task == "single_label" else None,
        metrics.num_clips,
        report,
        metrics,
    )


def _of_all(
    parts: list[Part], report: AudioReport, world_size: int
) -> tuple[list[Part], AudioReport]:
    """The clips of all processes in the order of the set, each once, and what reading them changed.

    A short last batch is filled up with clips that another process has too.
    """
    found = from_all((parts, report), world_size)
    whole = AudioReport()
    for _, each in found:
        whole.merge(each)
    every = [part for each, _ in found for part in each]
    if not every:
        return [], whole
    indices, logits, targets = (torch.cat(columns) for columns in zip(*every, strict=True))
    order = indices.argsort(stable=True)
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = indices[order][1:] != indices[order][:-1]
    kept = order[first]
    return [(indices[kept], logits[kept], targets[kept])], whole
