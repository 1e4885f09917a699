"""One page on a training run: how it went, what it came to, and where it fails.

Curves come from the log; the rest from running the trained model over the evaluation set once.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plots, run_numbers, run_plots
from ._text import without_nan
from .calibration import of_classes, reliability
from .config import Task
from .data import ClipSet, class_counts
from .data.dataset import Batch, Collate
from .report import HtmlReport
from .run_folder import NAMES, RunFolder
from .saliency import attention_picture
from .training.evaluation import Evaluation, evaluate

WORST = 4  # clips shown
_LISTED = 20  # clips listed
_TITLE = 22  # letters over a picture


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """A model over an evaluation set, clip by clip.

    Attributes:
        evaluation: the figures.
        logits: [N, C].
        targets: [N] class indices, or [N, C] vectors or numbers.
        indices: [N], places in the dataset.
    """

    evaluation: Evaluation
    logits: Tensor
    targets: Tensor
    indices: Tensor

    @property
    def task(self) -> Task:
        """What the clips were measured for."""
        return self.evaluation.metrics.task

    @property
    def multi_label(self) -> bool:
        """Whether clips may have several labels."""
        return self.task == "multi_label"

    @property
    def probabilities(self) -> Tensor:
        """[N, C]; of a regression the numbers themselves."""
        if self.task == "regression":
            return self.logits
        return self.logits.sigmoid() if self.multi_label else self.logits.softmax(1)

    @property
    def losses(self) -> Tensor:
        """[N], each clip's own."""
        functional = torch.nn.functional
        if self.task == "regression":
            return (self.logits - self.targets).square().mean(1)
        if self.multi_label:
            return functional.binary_cross_entropy_with_logits(
                self.logits, self.targets, reduction="none"
            ).mean(1)
        return functional.cross_entropy(self.logits, self.targets, reduction="none")


def measure(
    model: Any,
    dataset: ClipSet,
    *,
    task: Task,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = False,
) -> Measured:
    """Evaluate a model and keep what it said of each clip."""
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    indices: list[Tensor] = []

    def keep(batch: Batch, found: Tensor) -> None:
        logits.append(found.float().cpu())
        targets.append(batch.targets.cpu())
        indices.append(batch.indices)

    evaluation = evaluate(
        model,
        dataset,
        batch_size=batch_size,
        task=task,
        num_workers=num_workers,
        progress=progress,
        on_batch=keep,
    )
    return Measured(evaluation, torch.cat(logits), torch.cat(targets), torch.cat(indices))


def write_run_report(
    run: RunFolder,
    out: Path,
    model: Any = None,
    dataset: ClipSet | None = None,
    measured: Measured | None = None,
) -> Path:
    """Write the page.

    Args:
        run: the run.
        out: the page; pictures are put beside it, in `plots/` or PAGE_plots/.
        model: the model that was measured.
        dataset: what it was measured on.
        measured: what came out; without it the page has the curves and settings alone.
    """
    steps = run.of_kind("step")
    report = HtmlReport(
        f"Training run {run.name}",
        f"{run.settings.get('settings.model', 'A model')} trained on "
        f"{run.settings.get('data', 'clips')} for {steps[-1]['step'] if steps else 0} steps.",
    )
    _cards(report, run, measured)
    report.section("How it went", _history_text(run))
    report.picture("history", run_plots.history(run), "By optimiser step.")
    _checks(report, run)
    if measured is not None and dataset is not None:
        if measured.task == "regression":
            _fits(report, dataset, measured)
        else:
            _classes(report, dataset, measured)
            _confusion(report, dataset, measured)
            _calibration(report, measured)
        _worst(report, model, dataset, measured)
    else:
        report.section(
            "Evaluation",
            "Nothing was evaluated for this page: the run kept no clips aside and none were given.",
        )
    report.section("Settings")
    rows = [(name, _text(value)) for name, value in sorted(run.settings.items())]
    report.table(("setting", "value"), rows)
    # of another page in the same folder, the pictures are others
    return report.write(out, "plots" if out.name == "report.html" else f"{out.stem}_plots")


def _cards(report: HtmlReport, run: RunFolder, measured: Measured | None) -> None:
    cards = []
    figures = measured.evaluation.figures if measured is not None else run.final
    for name in ("map", "accuracy", "macro_accuracy", "auc", "r2", "rmse", "mae", "loss"):
        if name in figures:
            cards.append((f"{figures[name]:.4f}", NAMES.get(name, name)))
    best, judge = run.best, run.judge
    if best is not None and judge is not None:
        cards.append((f"{best[judge]:.4f}", f"best {NAMES.get(judge, judge)}, step {best['step']}"))
    if measured is not None and measured.task != "regression":
        found = reliability(*of_classes(measured.probabilities, measured.targets))
        cards.append((f"{found.error:.4f}", "expected calibration error"))
    if measured is not None:
        cards.append((str(measured.evaluation.num_clips), "clips evaluated"))
    speed = run.typical("clips_per_second")
    if speed is not None:
        cards.append((f"{speed:.0f}", "clips a second in training"))
    report.cards(cards)


def _history_text(run: RunFolder) -> str:
    said = []
    waited = run.typical("wait_share")
    if waited is not None:
        said.append(
            f"Half of the logged steps had waited for data for {waited:.1%} of the time or less."
        )
    checks = run.of_kind("check")
    if checks:
        over = sum(not row["ok"] for row in checks)
        said.append(
            f"The reference checked {len(checks)} steps; {over} were over the error budget."
        )
    return " ".join(said)


def _checks(report: HtmlReport, run: RunFolder) -> None:
    checks = run.of_kind("check")
    if checks:
        report.section(
            "Is the fast path right?",
            "The reference ran on the same clips and weights. Errors must stay under their budgets, or "
            "the run stops.",
        )
        report.picture(
            "checks", plots.check_curves(checks), "Error of the fast path and its budget, by step."
        )


def _classes(report: HtmlReport, dataset: ClipSet, measured: Measured) -> None:
    names, values = dataset.classes, measured.evaluation.per_class
    kept = [dataset.labels[index] for index in measured.indices.tolist()]
    counts = class_counts(kept, len(names))
    title = "Average precision" if measured.multi_label else "Recall"
    said = f"{title} of each class on the evaluation set."
    absent = [name for name, value in zip(names, values, strict=True) if value != value]
    if absent:
        listed = ", ".join(absent[:10]) + (" and others" if len(absent) > 10 else "")
        said += f" {len(absent)} classes have no clip in it: {listed}."
    report.section("Classes", said)
    report.picture(
        "classes", run_plots.class_bars(names, values, counts, title), "The worst first."
    )


def _fits(report: HtmlReport, dataset: ClipSet, measured: Measured) -> None:
    """What takes the place of classes where numbers are predicted."""
    found = run_numbers.fits(dataset.classes, measured.logits, measured.targets)
    report.section(
        "Predicted and true values",
        "R2 is the share of the spread that is explained: 0 is what always saying the mean would reach. "
        "Points on the dashed line are right; a slope below it means that extremes are drawn to the middle.",
    )
    shown = "Above: every clip. Below: what is left over, and its mean over clips of like truth."
    left_out = len(found) - run_numbers.MOST_SHOWN
    if left_out > 0:
        shown += f" The first {run_numbers.MOST_SHOWN} targets; {left_out} more are in the table."
    picture = run_numbers.scatter(dataset.classes, measured.logits, measured.targets)
    report.picture("values", picture, shown)
    rows = [
        (fit.name, *(f"{v:.4f}" for v in (fit.r2, fit.rmse, fit.mae, fit.bias, fit.spread)))
        for fit in found
    ]
    header = ("target", "R2", "RMSE", "MAE", "mean of predicted - true", "std of true values")
    report.table(header, rows)


def _confusion(report: HtmlReport, dataset: ClipSet, measured: Measured) -> None:
    confusion = measured.evaluation.confusion
    if confusion is None:
        return
    report.section("What it confuses")
    report.picture(
        "confusion",
        plots.confusion_matrix(confusion, dataset.classes),
        "Clips of the evaluation set: truth in rows, prediction in columns.",
    )
    rows = run_plots.confused_pairs(confusion, dataset.classes)
    if rows:
        report.table(("truth", "said", "clips", "of the class"), rows)


def _calibration(report: HtmlReport, measured: Measured) -> None:
    found = reliability(*of_classes(measured.probabilities, measured.targets))
    what = "a class (all classes of all clips)" if measured.multi_label else "the label given"
    report.section(
        "Do its probabilities mean what they say?",
        f"Of what was said with 80 % certainty, 80 % should be right. The expected calibration error, "
        f"the mean distance from that over {len(found.counts)} bins, is {found.error:.4f}; the largest "
        f"distance is {found.largest:.4f}.",
    )
    report.picture(
        "calibration",
        run_plots.reliability_diagram(found, what),
        "Above: probability against truth. Below: how often it was said.",
    )


def _worst(report: HtmlReport, model: Any, dataset: ClipSet, measured: Measured) -> None:
    losses = measured.losses
    order = losses.argsort(descending=True, stable=True).tolist()
    report.section("Worst clips", "Those with the highest loss: mislabelled, odd, or hard.")
    report.picture("losses", run_plots.loss_histogram(losses), "How the loss is spread.")
    shown = list(order[:WORST])
    items = [dataset[int(measured.indices[row])] for row in shown]
    batch = Collate(len(dataset.classes), multi_label=True)(items)
    if len(batch) == len(shown):
        batch = batch.to(next(model.parameters()).device)
        titles = [
            "\n".join(
                (
                    f"{number + 1}. {_end(clip_name(dataset, int(measured.indices[row])))}",
                    f"is {_start(_truth(dataset, measured, row))}",
                    f"said {_start(_said(dataset, measured, row, 1))}",
                )
            )
            for number, row in enumerate(shown)
        ]
        report.picture(
            "worst",
            attention_picture(model, batch.wave, batch.lengths, titles),
            "Log-mel spectrograms of the worst clips, and the attention of the prefix tokens over them.",
        )
    rows = [
        (
            clip_name(dataset, int(measured.indices[row])),
            _truth(dataset, measured, row),
            _said(dataset, measured, row, 3 if measured.multi_label else 1),
            f"{float(losses[row]):.3f}",
        )
        for row in order[:_LISTED]
    ]
    report.table(("clip", "truth", "said", "loss"), rows)


def clip_name(dataset: ClipSet, index: int) -> str:
    """Where a clip of a dataset comes from, as far as it is known."""
    manifest = getattr(dataset, "manifest", None)
    if manifest is not None:
        return str(manifest.paths[index])
    name = getattr(dataset, "name", None)
    return str(name(index)) if callable(name) else f"clip {index}"


def _numbers(dataset: ClipSet, values: Tensor) -> str:
    pairs = zip(dataset.classes, values.tolist(), strict=True)
    return ", ".join(f"{name} {value:.2f}" for name, value in pairs)


def _truth(dataset: ClipSet, measured: Measured, row: int) -> str:
    if measured.task == "regression":
        return _numbers(dataset, measured.targets[row])
    labels = dataset.labels[int(measured.indices[row])]
    return ", ".join(dataset.classes[label] for label in labels) or "none"


def _said(dataset: ClipSet, measured: Measured, row: int, most: int) -> str:
    """The most probable labels of a clip and their probabilities, or its numbers."""
    logits = measured.logits[row]
    if measured.task == "regression":
        return _numbers(dataset, logits)
    probabilities = logits.sigmoid() if measured.multi_label else logits.softmax(0)
    best = probabilities.topk(min(most, len(probabilities)))
    return ", ".join(
        f"{dataset.classes[index]} {value:.2f}"
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def _start(text: str) -> str:
    """As much as fits over a picture."""
    return text if len(text) <= _TITLE else f"{text[: _TITLE - 3]}..."


def _end(text: str) -> str:
    """The same from its end: of a path the file's name."""
    return text if len(text) <= _TITLE else f"...{text[3 - _TITLE :]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(without_nan(value), allow_nan=False)
