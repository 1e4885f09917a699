"""What a run keeps on disk to go on from, to the bit: gathered from a trainer, and given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..hub import CheckpointError, read_weights
from .checkpoints import Checkpoint

if TYPE_CHECKING:
    from .loop import Trainer

AVERAGE = "average."  # before the names of averaged weights
# settings that a resumed run may change: they say how it runs
_FREE = frozenset(
    {
        *("log_every", "checkpoint_every", "keep_checkpoints", "num_workers", "monitor"),
        *("strategy", "compile", "activation_memory", "tensorboard", "divergence"),
    }
)


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Optimiser, averages, loss scale and random state, whole in the first process; all call it."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    device = trainer.fabric.device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in trainer.parameters.items():
        for key, value in trainer.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = trainer.weights.whole(name, value)
    if trainer.scaler is not None:
        tensors |= {f"scaler.{name}": value for name, value in trainer.scaler.state().items()}
    for name, mean in trainer.average.weights().items():
        tensors[f"{AVERAGE}{name}"] = trainer.weights.whole(name, mean)
    return tensors | trainer.cumulative.tensors()


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything else, plain values."""
    return {
        "step": trainer.step,
        "best": trainer.best,
        "best_loss": trainer.best_loss,
        "epoch_clips": trainer.epoch_clips,
        "epoch_loss": trainer.epoch_loss,
        "sampler": trainer.sampler.state_dict(),
        "averaged": trainer.average.count,
        "cumulated": trainer.cumulative.count,
        "losses": trainer.divergence.state(),
        "train": trainer.config.to_dict(),
    }


def check_settings(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Refuse to go on with settings that would make another run of it.

    A setting that the checkpoint does not know of counts as left at its default.

    Raises:
        CheckpointError: names the settings and what they were.
    """
    mine = as_json(config.to_dict())
    saved = _filled(checkpoint.state["train"], as_json(TrainConfig().to_dict()))
    changed = sorted(name for name in mine if saved.get(name) != mine[name])
    if set(changed) - _FREE:
        raise CheckpointError(
            f"{checkpoint.folder}: was trained with other settings: "
            + ", ".join(f"{name}={saved.get(name)!r}" for name in changed if name not in _FREE)
            + "; resume with the same, or choose another run folder"
        )


def averages_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Averaged weights by name; none if the run does not average."""
    return {
        name.removeprefix(AVERAGE): value
        for name, value in checkpoint.tensors.items()
        if name.startswith(AVERAGE)
    }


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a trainer where a checkpoint was made.

    Raises:
        CheckpointError: settings differ, or something is missing.
    """
    check_settings(checkpoint, trainer.config)
    device, tensors, state = trainer.fabric.device, checkpoint.tensors, checkpoint.state
    weights, _ = read_weights(checkpoint.folder / "model")
    trainer.weights.load(weights)
    for name, parameter in trainer.parameters.items():
        found = {
            key.split(".", 2)[1]: trainer.weights.part(name, value).to(parameter.device)
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        trainer.optimizer.state[parameter] = found
    if trainer.scaler is not None:
        trainer.scaler.load_state(
            {name: tensors[f"scaler.{name}"].to(device) for name in trainer.scaler.state()}
        )
    averages = averages_of(checkpoint)
    parts = {name: trainer.weights.part(name, value) for name, value in averages.items()}
    trainer.average.load(parts, int(state.get("averaged", 0)), device)
    trainer.cumulative.load(tensors, int(state.get("cumulated", 0)))
    if "losses" in state:
        trainer.divergence.load_state(state["losses"])
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    trainer.sampler.load_state_dict(state["sampler"])
    trainer.step = int(state["step"])
    trainer.best = state["best"]
    trainer.best_loss = state.get("best_loss")
    trainer.epoch_clips = int(state["epoch_clips"])
    trainer.epoch_loss = float(state.get("epoch_loss", 0.0))


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values with what they lack taken from defaults, in nested settings too."""
    return {
        **defaults,
        **{
            name: _filled(value, defaults[name])
            if isinstance(value, dict) and isinstance(defaults.get(name), dict)
            else value
            for name, value in values.items()
        },
    }


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
