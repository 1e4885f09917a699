"""What `ast-fast train` does: data and settings to a model, a trainer, and a run that can be resumed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .audio import AudioReport
from .config import AudioConfig, DataConfig, LogMelConfig
from .data import ClipSet, Collate, Data, dataset_of, read_data, read_parts, reading_notes
from .frontend import log_mel_features
from .labels import read_labels
from .models.ast import ASTModel
from .models.registry import create_model, list_models
from .training import RunConfig, Trainer, TrainingInterrupted
from .training.recipe import read_config

_MEASURED_CLIPS = 500  # enough for mean and std to the second digit


def train(
    data: Path | None,
    run: Path,
    eval_data: Path | None,
    holdout: float,
    root: Path | None,
    labels: Path | None,
    config: Path | None,
    overrides: Sequence[str],
    resume: bool,
    how: DataConfig,
) -> int:
    """See `cli.train`."""
    plan_file = run / "run.json"
    if resume:
        if data or eval_data or root or labels or config or overrides or how != DataConfig():
            raise ValueError(
                "--resume goes on with the data and settings the run began with: leave out "
                "--data and all that says how to read it, --config and --set"
            )
        if not plan_file.is_file():
            raise FileNotFoundError(
                f"{str(run)!r} holds no run to resume: give --data to start one"
            )
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
    else:
        if data is None:
            raise ValueError("--data is missing: expected a manifest, a folder per class or shards")
        settings = read_config(config, overrides)
        plan = {
            "data": str(data.resolve()),
            "eval_data": eval_data and str(eval_data.resolve()),
            "holdout": holdout,
            "root": root and str(root.resolve()),
            "labels": labels and str(labels.resolve()),
            "how": how.to_dict(),
            "settings": settings.to_dict(),
        }
    settings = RunConfig.from_dict(plan["settings"])
    train_data, held_data = _read_plan(plan, settings.train.seed)
    torch.manual_seed(settings.train.seed)
    model, audio = _build(settings, train_data)
    trainer = Trainer(
        model,
        dataset_of(train_data, audio),
        settings.train,
        run,
        eval_set=None if held_data is None else dataset_of(held_data, audio),
        resume=resume,
    )
    if not resume:
        partial = plan_file.with_name(".run.json.partial")
        partial.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        partial.replace(plan_file)
    counts = f"{len(train_data)} clips of {len(train_data.classes)} classes"
    held = "none" if held_data is None else str(len(held_data))
    where = f"step {trainer.step} of {trainer.total_steps}"
    say(f"{counts} to train on, {held} to evaluate on; {where}; log in {run / 'log.jsonl'}")
    try:
        evaluation = trainer.fit()
    except TrainingInterrupted as interrupt:
        raise KeyboardInterrupt(
            f"{interrupt}; go on with: ast-fast train --run {run} --resume"
        ) from None
    trainer.save_model(run / "model")
    if evaluation is not None:
        say_figures(evaluation.figures)
    say(f"files: {trainer.audio_report.summary()}")
    say(f"model: {run / 'model'}")
    return 0


def _read_plan(plan: dict[str, Any], seed: int) -> tuple[Data, Data | None]:
    root = plan["root"] and Path(plan["root"])
    table = read_labels(plan["labels"]) if plan["labels"] else None
    how = DataConfig.from_dict(plan.get("how", {}))
    path = Path(plan["data"])
    if plan["eval_data"] and how.fold is not None:
        raise ValueError(
            f"fold={how.fold} and --eval-data both say what to evaluate on: leave one out"
        )
    if not plan["eval_data"]:
        data, held = read_parts(path, root, table, how, holdout=plan["holdout"], seed=seed)
        parts = (data,) if held is None else (data, held)
    else:
        data = read_data(path, root, None, table, how)
        # the part that is trained on is no part of another set
        how = how.replace(layout="auto", split=None)
        held = read_data(Path(plan["eval_data"]), root, data.classes, table, how)
        parts = (data, held)
    for note in dict.fromkeys(note for part in parts for note in reading_notes(part)):
        say(f"  {note}")
    for purpose, part in zip(("train", "evaluate"), parts, strict=False):
        if part.splits is not None:
            say(f"  parts to {purpose} on: {', '.join(sorted(set(part.splits)))}")
    return data, held


def _build(settings: RunConfig, data: Data) -> tuple[Any, AudioConfig]:
    """The model of a run, and how its files are read."""
    classes, given = data.classes, settings.frontend
    sizes: dict[str, Any] = {}
    if given is not None:
        sizes = {"input_fdim": given.num_mel_bins, "input_tdim": given.num_frames}
    model: Any
    if settings.model in list_models():
        model = create_model(
            settings.model, len(classes), labels=classes, frontend_config=given, **sizes
        )
    else:
        model = ASTModel.from_pretrained(
            settings.model, label_dim=len(classes), labels=classes, **sizes
        )
    front: LogMelConfig = given or model.frontend_config
    audio = settings.audio.replace(sample_rate_hz=front.sample_rate_hz)
    if settings.statistics == "measure":
        front = _measured(front, dataset_of(data, audio), settings.train.seed)
    model.frontend_config = front
    return model, audio


def _measured(front: LogMelConfig, dataset: ClipSet, seed: int) -> LogMelConfig:
    """The front end with mean and std of the energies of some clips, padding left out."""
    chosen = random.Random(seed).sample(range(len(dataset)), min(_MEASURED_CLIPS, len(dataset)))
    raw = front.replace(num_frames=None, mean=0.0, std=0.5)
    report, count, total, squares = AudioReport(), 0, 0.0, 0.0
    for index in chosen:
        batch = Collate(len(dataset.classes), multi_label=True)([dataset[index]])
        report.merge(batch.report)
        if len(batch):
            energies = log_mel_features(batch.wave, raw).double()
            count += energies.numel()
            total += float(energies.sum())
            squares += float(energies.square().sum())
    if not count:
        raise ValueError(f"no clip could be read to measure statistics: {report.summary()}")
    mean = total / count
    std = max(squares / count - mean * mean, 1e-8) ** 0.5
    say(f"statistics of {report.clips} clips: mean {mean:.4f}, std {std:.4f}")
    return front.replace(mean=mean, std=std)


def say_figures(figures: dict[str, float]) -> None:
    """Print figures by name on one line."""
    say(", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def say(text: str) -> None:
    """Print a line at once, into pipes and files too."""
    print(text, flush=True)
