"""The batch that ended a run, kept to be looked at."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..data.dataset import Batch


def save_batch(folder: Path, step: int, batch: Batch, features: Tensor, targets: Tensor) -> Path:
    """Write waveforms, lengths, places in the set, features and targets; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "wave": batch.wave,
        "lengths": batch.lengths,
        "indices": batch.indices,
        "features": features,
        "targets": targets,
    }
    file = folder / f"step-{step:08d}.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
    return file
