"""What `ast-fast report` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .config import DataConfig
from .data import ClipSet, dataset_of, read_data
from .data.split_file import SPLIT
from .inference import load_for_inference
from .run_data import held_clips, trained_on
from .run_folder import RunFolder
from .run_report import measure, write_run_report
from .training import RunConfig
from .training.logs import say, say_figures
from .training.tasks import task_of


def report(
    folder: Path,
    eval_data: Path | None,
    root: Path | None,
    checkpoint: Literal["final", "best"],
    out: Path | None,
    batch_size: int,
    num_workers: int,
) -> int:
    """See `cli.report`."""
    run = RunFolder.read(folder)
    out = out or folder / "report.html"
    if eval_data is None and not run.plan:
        say(f"{folder}: begun without ast-fast train: give --eval-data to have more than curves")
        say(f"report: {write_run_report(run, out)}")
        return 0
    model = load_for_inference(str(run.model_folder(checkpoint)))
    dataset = _evaluation_set(run, model, eval_data, root)
    if dataset is None:
        say(f"report: {write_run_report(run, out)}")
        return 0
    measured = measure(
        model,
        dataset,
        task=task_of(model),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=True,
    )
    model.set_precision("exact")  # attention maps come of the plain blocks, without packed weights
    say_figures(measured.evaluation.figures)
    if measured.evaluation.report.changes():
        say(f"files: {measured.evaluation.report.summary()}")
    say(f"report: {write_run_report(run, out, model, dataset, measured)}")
    return 0


def _evaluation_set(
    run: RunFolder, model: Any, eval_data: Path | None, root: Path | None
) -> ClipSet | None:
    """What is given, else what the run kept aside; None if it kept nothing."""
    settings = RunConfig.from_dict(run.plan["settings"]) if run.plan else RunConfig()
    if eval_data is not None:
        # a table's columns have to be named; other layouts hold numbers as such
        named = task_of(model) == "regression" and eval_data.suffix.lower() == ".csv"
        how = DataConfig(values=tuple(model.labels or ())) if named else DataConfig()
        held = read_data(eval_data, root, None if named else model.labels, None, how)
        for note in trained_on(run.folder, held):
            say(f"  {note}")
    else:
        kept = held_clips(run.plan, run.folder / SPLIT)
        if kept is None:
            return None
        held = kept
    return dataset_of(
        held, settings.audio.replace(sample_rate_hz=model.frontend_config.sample_rate_hz)
    )
