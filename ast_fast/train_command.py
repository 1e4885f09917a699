"""What `ast-fast train` does: data and settings to a model, a trainer, and a run that can be resumed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .audio import AudioReport
from .config import AudioConfig, LogMelConfig
from .data import AudioDataset, Collate, Manifest, read_folder, read_manifest
from .frontend import log_mel_features
from .labels import LabelSet, read_labels
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
) -> int:
    """See `cli.train`."""
    plan_file = run / "run.json"
    if resume:
        if data or eval_data or root or labels or config or overrides:
            raise ValueError(
                "--resume goes on with the data and settings the run began with: leave out "
                "--data, --eval-data, --root, --labels, --config and --set"
            )
        if not plan_file.is_file():
            raise FileNotFoundError(
                f"{str(run)!r} holds no run to resume: give --data to start one"
            )
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
    else:
        if data is None:
            raise ValueError("--data is missing: expected a manifest or a folder per class")
        settings = read_config(config, overrides)
        plan = {
            "data": str(data.resolve()),
            "eval_data": eval_data and str(eval_data.resolve()),
            "holdout": holdout,
            "root": root and str(root.resolve()),
            "labels": labels and str(labels.resolve()),
            "settings": settings.to_dict(),
        }
    settings = RunConfig.from_dict(plan["settings"])
    train_manifest, eval_manifest = _read_plan(plan, settings.train.seed)
    torch.manual_seed(settings.train.seed)
    model, audio = _build(settings, train_manifest)
    trainer = Trainer(
        model,
        AudioDataset(train_manifest, audio),
        settings.train,
        run,
        eval_set=None if eval_manifest is None else AudioDataset(eval_manifest, audio),
        resume=resume,
    )
    if not resume:
        partial = plan_file.with_name(".run.json.partial")
        partial.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        partial.replace(plan_file)
    counts = f"{len(train_manifest)} clips of {len(train_manifest.classes)} classes"
    held = "none" if eval_manifest is None else str(len(eval_manifest))
    where = f"step {trainer.step} of {trainer.total_steps}"
    say(f"{counts} to train on, {held} to evaluate on; {where}; log in {run / 'log.jsonl'}")
    try:
        evaluation = trainer.fit()
    except TrainingInterrupted as interrupt:
        raise KeyboardInterrupt(
            f"{interrupt}; go on with: ast-fast train --run {run} --resume"
        ) from None
    trainer.model.save_pretrained(run / "model")
    if evaluation is not None:
        say_figures(evaluation.figures)
    say(f"files: {trainer.audio_report.summary()}")
    say(f"model: {run / 'model'}")
    return 0


def _read_plan(plan: dict[str, Any], seed: int) -> tuple[Manifest, Manifest | None]:
    root = plan["root"] and Path(plan["root"])
    table = read_labels(plan["labels"]) if plan["labels"] else None
    manifest = read_data(Path(plan["data"]), root, None, table)
    if plan["eval_data"]:
        held = read_data(Path(plan["eval_data"]), root, manifest.classes, table)
        return manifest, held
    return _split(manifest, plan["holdout"], seed)


def read_data(
    path: Path,
    root: Path | None,
    classes: Sequence[str] | None,
    labels: LabelSet | None,
) -> Manifest:
    """A manifest from a file, or from a folder per class."""
    if labels is not None:
        classes = labels.names
    if path.is_dir():
        return read_folder(path, classes=classes)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected a manifest or a folder")
    aliases = None
    if labels is not None:
        aliases = {mid: index for index, mid in enumerate(labels.mids) if mid not in labels.names}
    return read_manifest(path, root=root, classes=classes, aliases=aliases)


def _split(manifest: Manifest, share: float, seed: int) -> tuple[Manifest, Manifest | None]:
    """Training and evaluation part, drawn within each label set so that rare classes stay in both."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"holdout={share}: expected 0 (no evaluation) to below 1")
    if share == 0.0:
        return manifest, None
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, labels in enumerate(manifest.labels):
        groups.setdefault(labels, []).append(index)
    rng = random.Random(seed)
    held: list[int] = []
    for indices in groups.values():
        held += rng.sample(indices, round(share * len(indices)))
    if not held:
        raise ValueError(
            f"holdout={share} of {len(manifest)} clips leaves none to evaluate on: give --eval-data, "
            "a larger share, or --holdout 0"
        )
    out = set(held)
    kept = [index for index in range(len(manifest)) if index not in out]
    return manifest.select(kept), manifest.select(sorted(held))


def _build(settings: RunConfig, manifest: Manifest) -> tuple[Any, AudioConfig]:
    """The model of a run, and how its files are read."""
    classes, given = manifest.classes, settings.frontend
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
        front = _measured(front, AudioDataset(manifest, audio), settings.train.seed)
    model.frontend_config = front
    return model, audio


def _measured(front: LogMelConfig, dataset: AudioDataset, seed: int) -> LogMelConfig:
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
