"""What `ast-fast train` does: data and settings to a model, a trainer, and a run that can be resumed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import AudioConfig, DataConfig, LogMelConfig
from .data import Data, dataset_of
from .data.dataset import max_samples, read_for
from .data.layouts import DRAW
from .data.split_file import SPLIT
from .models.ast import ASTModel
from .models.pretrained import start_from_weights
from .models.registry import create_model, list_models
from .run_data import run_clips
from .run_settings import measured, settle
from .training import RunConfig, Trainer, TrainingInterrupted
from .training.best import Keep, save_kept
from .training.logs import figures_text, say
from .training.processes import by_torchrun, is_first
from .training.recipe import read_config
from .training.several import read_result, summary_lines, together, variants, write_json


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
    holdout_seed: int | None = None,
    keep: Keep | None = None,
) -> int:
    """See `cli.train`."""
    file = run / "run.json"
    if resume:
        given = (data, eval_data, root, labels, recipe, overrides, seeds, folds)
        if any(given) or how != DataConfig() or holdout_seed is not None:
            raise ValueError(
                "--resume goes on with the data and settings the run began with: leave out the recipe, "
                "--data and all that says how to read it, --seeds, --folds and --set"
            )
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(run)!r} holds no run to resume: give --data to start one"
            )
        plan = json.loads(file.read_text(encoding="utf-8"))
        if keep is not None:  # what is learnt is the same
            plan["settings"]["keep"] = keep
    else:
        if data is None:
            raise ValueError("--data is missing: expected a manifest, a folder per class or shards")
        overrides = [*overrides, *([] if keep is None else [f"keep={keep}"])]
        settings = read_config(recipe, overrides)
        plan = {
            "data": str(data.resolve()),
            "eval_data": eval_data and str(eval_data.resolve()),
            "holdout": holdout,
            "root": root and str(root.resolve()),
            "labels": labels and str(labels.resolve()),
            "how": how.to_dict(),
            "settings": settings.to_dict(),
            "seeds": list(seeds),
            "folds": list(folds),
            "holdout_seed": settings.train.seed if holdout_seed is None else holdout_seed,
            "draw": DRAW,
            # what the clips decide is settled when they are read; None of the recipe: what follows from them
            "unsettled": {"overrides": None if recipe is not None else overrides},
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
    earlier: dict[int | None, Path] = {}  # split files of runs before, by fold
    for number, (name, one) in enumerate(several.items(), start=1):
        folder = run / name
        fold = one["how"].get("fold")
        if first:
            say(f"run {number} of {len(several)}: {folder}")
        if read_result(folder) is None:
            one |= _settled_before(one, folder, run / next(iter(several)))
            like = earlier.get(fold), next(iter(earlier.values()), None)
            _train_one(one, folder, (folder / "run.json").is_file(), f"--run {run}", like)
        if (folder / SPLIT).is_file():
            earlier.setdefault(fold, folder / SPLIT)
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


def _train_one(
    plan: dict[str, Any],
    run: Path,
    resume: bool,
    whole: str = "",
    like: tuple[Path | None, Path | None] = (None, None),
) -> None:
    """Train a run, or go on with it.

    Args:
        plan: what it is.
        run: its folder.
        resume: go on.
        whole: how the command names the runs that it is one of.
        like: split files of earlier ones of these runs: one to use as it is, and one whose clips it must
            have.
    """
    settings = RunConfig.from_dict(plan["settings"])
    train_data, held_data, split = run_clips(plan, run / SPLIT if resume else None, *like)
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
    if plan.get("unsettled"):
        settings = settle(
            settings, train_data, plan["holdout_seed"], plan["unsettled"]["overrides"]
        )
        plan |= {"settings": settings.to_dict(), "unsettled": None}
    torch.manual_seed(settings.train.seed)
    model, audio = _build(settings, train_data, plan)
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
        assert split is not None
        split.write(run / SPLIT)
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
    kept = save_kept(trainer, run / "model", settings.keep, evaluation)
    if not first:
        return
    figures = {} if kept.evaluation is None else kept.evaluation.figures
    result = {"steps": trainer.step, "kept": kept.what, "epoch": kept.epoch, "figures": figures}
    write_json(run / "result.json", result)
    if kept.evaluation is not None:
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
    say(f"model: {run / 'model'}, {kept.text}")
    say(f"a page on the run: ast-fast report {shlex.quote(str(run))}")


def _settled_before(plan: dict[str, Any], *folders: Path) -> dict[str, Any]:
    """What the clips of one of several runs decided, for those after it and for itself when it goes on.

    Folds differ by a few clips, and are to be runs of one setting.
    """
    for folder in folders:
        if plan.get("unsettled") and (folder / "run.json").is_file():
            found = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
            mine = plan["settings"]
            train = {**found["train"], "seed": mine["train"]["seed"]}
            return {
                "settings": {**found, "train": train, "keep": mine["keep"]},
                "unsettled": None,
            }
    return {}


def _build(settings: RunConfig, data: Data, plan: dict[str, Any]) -> tuple[Any, AudioConfig]:
    """The model of a run, and how its files are read; what is measured is put into the plan."""
    classes, said = data.classes, settings.front_changes
    # what the recipe does not say of the front end is as the model has it
    sizes: dict[str, Any] = {
        size: said[name]
        for name, size in (("num_mel_bins", "input_fdim"), ("num_frames", "input_tdim"))
        if name in said
    }
    model: Any
    if settings.model in list_models():
        sizes |= settings.sizes or {}
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
    audio = read_for(front, settings.audio)
    if settings.statistics == "measure":
        if "measured" not in plan:
            # runs of several seeds have the same clips, and the same front end; older ones had not
            seed = settings.train.seed if plan.get("draw", 1) == 1 else plan["holdout_seed"]
            plan["measured"] = measured(front, data, audio, seed, Path(plan["data"]))
        found = plan["measured"]
        say(f"statistics of {found['of']}: mean {found['mean']:.4f}, std {found['std']:.4f}")
        front = front.replace(mean=found["mean"], std=found["std"])
    model.frontend_config = front
    return model, audio
