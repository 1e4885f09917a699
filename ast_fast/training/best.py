"""Which epoch of a run becomes its model, and what is said of that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..hub import CheckpointError, read_weights
from .checkpoints import read_checkpoint
from .evaluation import Evaluation
from .metrics import MAIN_FIGURE
from .snapshot import averages_of

if TYPE_CHECKING:
    from .loop import Trainer

Keep = Literal["best", "last"]


class Kept(NamedTuple):
    """What a run leaves behind.

    Attributes:
        what: "best" or "last" epoch, or "average" of the weights of several.
        epoch: counted from 1; of an average the last.
        evaluation: of these weights, if clips are held out.
        text: a line on it, for people.
    """

    what: Literal["best", "last", "average"]
    epoch: int
    evaluation: Evaluation | None
    text: str


def save_kept(trainer: Trainer, folder: Path, keep: Keep, last: Evaluation | None) -> Kept:
    """Write the model of a finished run. All processes call it; the first one writes.

    The best epoch is that of the highest main figure on the clips held out, of equals that of the lowest loss.
    It is evaluated again, so that what is said is of what was written.

    Args:
        trainer: after `fit`.
        folder: gets the model.
        keep: the best epoch, where clips are held out and weights are not averaged over epochs, or the last.
        last: what `fit` returned.
    """
    epochs = trainer.config.epochs
    name = MAIN_FIGURE[trainer.task]
    if trainer.config.average.first_epoch and trainer.average.ready:
        trainer.save_model(folder)
        text = f"the mean of the weights of {trainer.average.count} epochs"
        return Kept("average", epochs, last, text)
    if last is None:
        trainer.save_model(folder)
        return Kept(
            "last", epochs, None, f"of the last epoch, {epochs}: no clips are held out to choose by"
        )
    place = best_checkpoint(trainer)
    best_epoch = epochs if place is None else _epoch_of(trainer, place)
    if keep == "last" or place is None or best_epoch == epochs:
        trainer.save_model(folder)
        if best_epoch == epochs and place is not None:
            text = f"of epoch {epochs} of {epochs}, the best on the clips held out"
            return Kept("best" if keep == "best" else "last", epochs, last, text)
        text = f"of the last epoch, {epochs}"
        if place is not None:
            text += (
                f" (the best on the clips held out was epoch {best_epoch}; --keep best keeps that)"
            )
        return Kept("last", epochs, last, text)
    weights = _weights(place)
    evaluation = trainer.evaluate_weights(weights)
    if trainer.fabric.is_global_zero:
        trainer.model.save_pretrained(folder, state_dict=weights)
    text = f"of epoch {best_epoch} of {epochs}, the best on the clips held out"
    if name in last.figures:
        found, latest = evaluation.figures[name], last.figures[name]
        text += f" ({name} {found:.4f}; of the last epoch {latest:.4f})"
    return Kept("best", best_epoch, evaluation, text)


def best_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint of the best epoch so far; None if there is none."""
    found = trainer.store.pointer("best")
    return None if found is None else trainer.store.folder / found


def _epoch_of(trainer: Trainer, place: Path) -> int:
    # checkpoints of evaluations are made at the end of an epoch
    step = int(place.name.removeprefix("step-"))
    return step // (trainer.total_steps // trainer.config.epochs)


def _weights(place: Path) -> dict[str, Any]:
    """What was evaluated: averaged weights in the places of those that were trained.

    Raises:
        CheckpointError: the checkpoint was damaged.
    """
    try:
        checkpoint = read_checkpoint(place)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best epoch's {error}; resume with --keep last to have the last epoch's model"
        ) from error
    weights, _ = read_weights(place / "model")
    return {**weights, **averages_of(checkpoint)}
