"""What `ast-fast train` does: data and settings to a model, a trainer, and a run that can be resumed."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .audio import AudioReport
from .config import AudioConfig, DataConfig, LogMelConfig
from .data import ClipSet, Collate, Data, dataset_of, read_data, read_parts, reading_notes
from .data.dataset import max_samples
from .frontend import log_mel_features
from .labels import read_labels
from .models.ast import ASTModel
from .models.pretrained import start_from_weights
from .models.registry import create_model, list_models
from .training import RunConfig, Trainer, TrainingInterrupted
from .training.logs import figures_text, say
from .training.processes import by_torchrun, is_first
from .training.recipe import read_config
from .training.several import read_result, summary_lines, together, variants, write_json

_MEASURED_CLIPS = 500  # enough for mean and std to the second digit


def train(
    data: Path | None,
    run: Path,
    eval_data: Path | None,
    holdout: float,
    root: Path | None,
    labels: Path | None,
    recipe: str | None,
    overrides: Sequence[str],
    resume: bool,
    how: DataConfig,
    seeds: tuple[int, ...],
    folds: tuple[int, ...],
) -> int:
    """See `cli.train`."""
    file = run / "run.json"
    if resume:
        given = (data, eval_data, root, labels, recipe, overrides, seeds, folds)
        if any(given) or how != DataConfig():
            raise ValueError(
                "--resume goes on with the data and settings the run began with: leave out the recipe, "
                "--data and all that says how to read it, --seeds, --folds and --set"
            )
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(run)!r} holds no run to resume: give --data to start one"
            )
        plan = json.loads(file.read_text(encoding="utf-8"))
    else:
        if data is None:
            raise ValueError("--data is missing: expected a manifest, a folder per class or shards")
        plan = {
            "data": str(data.resolve()),
            "eval_data": eval_data and str(eval_data.resolve()),
            "holdout": holdout,
            "root": root and str(root.resolve()),
            "labels": labels and str(labels.resolve()),
            "how": how.to_dict(),
            "settings": read_config(recipe, overrides).to_dict(),
            "seeds": list(seeds),
            "folds": list(folds),
        }
    if plan.get("seeds") or plan.get("folds"):
        return _train_several(plan, run, resume)
    _train_one(plan, run, resume)
    return 0


def _train_several(plan: dict[str, Any], run: Path, resume: bool) -> int:
    """One run after the other, each in a folder of its own, and what they come to together."""
    several = variants(plan)
    processes = int(plan["settings"]["train"]["devices"])
    if processes > 1 and not by_torchrun():
        raise ValueError(
            f"train.devices={processes} with several runs: start the command by torchrun, or give one "
            "seed or fold at a time"
        )
    # one process of torchrun's writes for all; what they go by is from before, and the same for all
    first = is_first()
    if first:
        if not resume and (run / "run.json").exists():
            raise ValueError(f"{run} holds runs already: resume them or choose another folder")
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", plan)
    figures = {}
    for number, (name, one) in enumerate(several.items(), start=1):
        folder = run / name
        if first:
            say(f"run {number} of {len(several)}: {folder}")
        if read_result(folder) is None:
            _train_one(one, folder, (folder / "run.json").is_file(), f"--run {run}")
        if first:
            found = read_result(folder)
            assert found is not None
            figures[name] = found["figures"]
    if not first:
        return 0
    summary = together(figures)
    write_json(run / "summary.json", summary)
    for line in summary_lines(summary):
        say(line)
    return 0


def _train_one(plan: dict[str, Any], run: Path, resume: bool, whole: str = "") -> None:
    settings = RunConfig.from_dict(plan["settings"])
    train_data, held_data = read_plan(plan)
    numbers = train_data.values is not None
    if (
        not numbers
        and len(train_data.classes) == 1
        and settings.train.task_of_run == "single_label"
    ):
        raise ValueError(
            f"{plan['data']}: all clips are of one class, {train_data.classes[0]!r}: expected two or "
            "more; of folders, give the one that holds a folder for each class"
        )
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
    first = trainer.fabric.is_global_zero
    if not resume and first:
        write_json(run / "run.json", plan)
    if first:
        counts = f"{len(train_data)} clips of {len(train_data.classes)} classes"
        held = "none" if held_data is None else str(len(held_data))
        where = f"step {trainer.step} of {trainer.total_steps}"
        say(f"{counts} to train on, {held} to evaluate on; {where}; log in {run / 'log.jsonl'}")
    try:
        evaluation = trainer.fit()
    except TrainingInterrupted as interrupt:
        raise KeyboardInterrupt(
            f"{interrupt}; go on with: ast-fast train {whole or f'--run {run}'} --resume"
        ) from None
    trainer.save_model(run / "model")
    if not first:
        return
    figures = {} if evaluation is None else evaluation.figures
    write_json(run / "result.json", {"steps": trainer.step, "figures": figures})
    if evaluation is not None:
        say(f"evaluation: {figures_text(figures)}")
    say(f"files, each once an epoch: {trainer.audio_report.summary()}")
    for note in trainer.audio_report.notes:
        say(f"  {note}")
    if trainer.audio_report.cut:
        front = model.frontend_config
        heard = (max_samples(front) or 0) / front.sample_rate_hz
        say(
            f"  the model hears {front.num_frames} frames, {heard:.2f} s: of longer clips the start; "
            "--set frontend.num_frames=... makes it hear more"
        )
    say(f"model: {run / 'model'}; a page on the run: ast-fast report {shlex.quote(str(run))}")


def read_plan(plan: dict[str, Any]) -> tuple[Data, Data | None]:
    """The clips that a run (its run.json) trains on, and those it is evaluated on."""
    # runs of several seeds are measured on the same clips
    seed = plan.get("holdout_seed", plan["settings"]["train"]["seed"])
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
    classes, said = data.classes, settings.front_changes
    # what the recipe does not say of the front end is as the model has it
    sizes: dict[str, Any] = {
        size: said[name]
        for name, size in (("num_mel_bins", "input_fdim"), ("num_frames", "input_tdim"))
        if name in said
    }
    model: Any
    if settings.model in list_models():
        model = create_model(settings.model, len(classes), labels=classes, **sizes)
        start_from_weights(model, settings.weights)
    else:
        if settings.weights != "random":
            raise ValueError(
                f"weights={settings.weights!r}: model={settings.model!r} has weights of its own; "
                "leave weights out"
            )
        known = {name: said[name] for name in ("mean", "std") if name in said}
        model = ASTModel.from_pretrained(
            settings.model, label_dim=len(classes), labels=classes, **sizes, **known
        )
    front: LogMelConfig = model.frontend_config.replace(**said)
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
