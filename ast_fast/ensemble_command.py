"""What `ast-fast ensemble` and `ast-fast average` do: several finished runs as one model."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from .config import DataConfig
from .data import Data, dataset_of, read_data, reading_notes
from .data.dataset import read_for
from .hub import CheckpointError
from .inference import class_names, load_for_inference
from .labels import read_labels
from .models.ast import ASTModel
from .run_data import evaluated_alike, held_clips, split_of, trained_on
from .run_folder import RunFolder
from .training import Evaluation, evaluate
from .training.ensembles import ensemble as mean_of_models
from .training.ensembles import mean_of_weights
from .training.logs import check_writable, figures_text, say
from .training.tasks import task_of


def ensemble(
    models: Sequence[str],
    data: Path | None,
    root: Path | None,
    labels: Path | None,
    multi_label: bool,
    batch_size: int,
    num_workers: int,
    json: Path | None,
    how: DataConfig,
) -> int:
    """See `cli.ensemble`."""
    check_writable("--json", json)
    if len(models) < 2:
        raise ValueError(f"{len(models)} model: expected at least two to be an ensemble")
    how = how.one_part()
    places = [str(model_of(name)) for name in models]
    first = load_for_inference(places[0])
    table = read_labels(labels, first.config.label_dim) if labels else None
    names = class_names(first, table.names if table else None)
    task = task_of(first, multi_label)
    if data is None:
        clips = _held_out(models)
    else:
        clips = read_data(data, root, names, table, how)
        told = (note for place in places for note in trained_on(place, clips))
        for note in (*reading_notes(clips), *told):
            say(f"  {note}")

    def evaluations() -> Iterator[Evaluation]:
        for number, place in enumerate(places, start=1):
            network = first if number == 1 else load_for_inference(place)
            theirs = network.labels or names
            if tuple(theirs) != tuple(names):
                raise ValueError(
                    f"{place} has other classes than {places[0]}, or in another order: expected "
                    "models of the same labels"
                )
            audio = read_for(network.frontend_config)
            found = evaluate(
                network,
                dataset_of(clips, audio),
                batch_size=batch_size,
                task=task,
                num_workers=num_workers,
                progress=True,
            )
            say(f"{models[number - 1]}: {figures_text(found.figures)}")
            yield found

    made = mean_of_models(evaluations())
    say(f"mean of the predictions of {len(models)} models: {figures_text(made.figures)}")
    if json is not None:
        content = {
            "models": [
                {"model": model, "figures": figures}
                for model, figures in zip(models, made.each, strict=True)
            ],
            "ensemble": made.figures,
            "data": "held out by the runs" if data is None else str(data),
        }
        json.write_text(json_module.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return 0


def _held_out(models: Sequence[str]) -> Data:
    """What all of the runs held out alike."""
    if not evaluated_alike(models):
        raise ValueError(
            "--data is missing, and the models are no runs that all held out the same clips "
            "(split.jsonl): expected clips that none of them was trained on"
        )
    file = split_of(models[0])
    assert file is not None
    clips = held_clips(RunFolder.read(file.parent).plan, file)
    if clips is None:
        raise ValueError("--data is missing, and the runs held out nothing: expected some clips")
    return clips


def average(models: Sequence[str], out: Path) -> int:
    """See `cli.average`."""
    if len(models) < 2:
        raise ValueError(f"{len(models)} model: expected at least two to average")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something already: choose another folder")
    places = [model_of(name) for name in models]

    kept: dict[str, ASTModel] = {}

    def read(place: str | Path) -> dict[str, Tensor]:
        network = ASTModel.from_pretrained(place)
        kept.setdefault("first", network)
        # sizes may agree where what they mean does not: strides, front ends, the order of classes
        for what in ("config", "frontend_config"):
            if getattr(network, what) != getattr(kept["first"], what):
                raise CheckpointError(
                    f"{place} has another {what} than {places[0]}: expected models of one recipe"
                )
        return network.state_dict()

    state = mean_of_weights(read, places)
    kept["first"].save_pretrained(out, state_dict=state)
    say(f"mean of the weights of {len(models)} models: {out}")
    if evaluated_alike(places) is False:
        say(
            "  the runs held out different clips, so what one held out others were trained on: evaluate the "
            "mean on clips that none of them had"
        )
    return 0


def model_of(name: str) -> Path | str:
    """A model's folder: a run's own if it is a run, or else what it says.

    Raises:
        CheckpointError: the run is not finished.
    """
    place = Path(name)
    if (place / "model").is_dir():
        return place / "model"
    if (place / "checkpoints").is_dir():
        raise CheckpointError(
            f"{name!r} is a run that is not finished: resume it, or name one of its "
            "checkpoints/step-*/model"
        )
    return name
