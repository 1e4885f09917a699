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
from .data import (
    AudioDataset,
    ClipSet,
    Collate,
    Manifest,
    ShardSet,
    is_shards,
    read_folder,
    read_manifest,
)
from .frontend import log_mel_features
from .labels import LabelSet, read_labels
from .models.ast import ASTModel
from .models.registry import create_model, list_models
from .training import RunConfig, Trainer, TrainingInterrupted
from .training.recipe import read_config

Data = Manifest | ShardSet
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
            raise ValueError("--data is missing: expected a manifest, a folder per class or shards")
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
    train_data, held_data = read_plan(plan, settings.train.seed)
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


def read_plan(plan: dict[str, Any], seed: int) -> tuple[Data, Data | None]:
    """The clips that a run (its run.json) trains on, and those it is evaluated on."""
    root = plan["root"] and Path(plan["root"])
    table = read_labels(plan["labels"]) if plan["labels"] else None
    data = read_data(Path(plan["data"]), root, None, table)
    if plan["eval_data"]:
        held = read_data(Path(plan["eval_data"]), root, data.classes, table)
        return data, held
    return _split(data, plan["holdout"], seed)


def read_data(
    path: Path,
    root: Path | None,
    classes: Sequence[str] | None,
    labels: LabelSet | None,
) -> Data:
    """Clips and their labels, from a manifest, a folder per class, or tar shards."""
    if labels is not None:
        classes = labels.names
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected a manifest or a folder")
    if is_shards(path):
        return ShardSet(path, classes=classes)
    if path.is_dir():
        return read_folder(path, classes=classes)
    aliases = None
    if labels is not None:
        aliases = {mid: index for index, mid in enumerate(labels.mids) if mid not in labels.names}
    return read_manifest(path, root=root, classes=classes, aliases=aliases)


def dataset_of(data: Data, audio: AudioConfig) -> ClipSet:
    """The clips as a dataset."""
    if audio.dtype == "float32":
        # half the memory where a file holds 16 bits, and the same features to the bit
        audio = audio.replace(dtype="auto")
    return data.read_as(audio) if isinstance(data, ShardSet) else AudioDataset(data, audio)


def _split(data: Data, share: float, seed: int) -> tuple[Data, Data | None]:
    """Training and evaluation part, drawn within each label set so that rare classes stay in both."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"holdout={share}: expected 0 (no evaluation) to below 1")
    if share == 0.0:
        return data, None
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, labels in enumerate(data.labels):
        groups.setdefault(labels, []).append(index)
    rng = random.Random(seed)
    held: list[int] = []
    for indices in groups.values():
        held += rng.sample(indices, round(share * len(indices)))
    if not held:
        raise ValueError(
            f"holdout={share} of {len(data)} clips leaves none to evaluate on: give --eval-data, "
            "a larger share, or --holdout 0"
        )
    out = set(held)
    kept = [index for index in range(len(data)) if index not in out]
    return data.select(kept), data.select(sorted(held))


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
