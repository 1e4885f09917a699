"""Batches of clip indices: seeded, class-balanced if asked, and resumable to the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class BatchSampler:
    """Lists of indices for one epoch after another, the same for the same seed.

    The order of an epoch follows from the seed and the number of the epoch alone. The position is
    moved by `step`, called for each batch that was trained on: batches that loader workers fetched
    ahead are not lost on resuming. Iterating starts at the position.

    Args:
        num_clips: clips in the set.
        batch_size: clips a batch, over all ranks together.
        seed: of the order.
        shuffle: draw an order each epoch; otherwise 0, 1, 2...
        weights: one a clip: draw with replacement in proportion (class-balanced sampling).
        drop_last: leave out a last batch that is not full.
        rank: of this process; it gets every `world_size`-th clip of each batch.
        world_size: processes that share the work.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_clips < 1 or batch_size < 1:
            raise ValueError(
                f"num_clips={num_clips}, batch_size={batch_size}: expected at least 1 of each"
            )
        if drop_last and num_clips < batch_size:
            raise ValueError(
                f"drop_last leaves nothing of {num_clips} clips in batches of {batch_size}"
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not split over {world_size} processes")
        self._cumulative = None
        if weights is not None:
            values = np.asarray(weights, dtype=np.float64)
            if values.shape != (num_clips,) or not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"weights: expected {num_clips} finite numbers of 0 or more")
            if values.sum() <= 0:
                raise ValueError("weights: expected at least one above 0")
            self._cumulative = np.cumsum(values)
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.num_clips, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for number in range(self.batch, len(self)):
            start = number * self.batch_size
            indices = order[start : start + self.batch_size]
            if self.world_size > 1:
                # every rank takes part in every step: a short last batch is filled from the start
                missing = -len(indices) % self.world_size
                indices = np.concatenate([indices, np.resize(order, missing)])
                indices = indices[self.rank :: self.world_size]
            yield indices.tolist()

    def _order(self) -> np.ndarray:
        # one stream per epoch: 2^20 epochs a seed
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        if self._cumulative is not None:
            draws = torch.rand(self.num_clips, generator=generator, dtype=torch.float64).numpy()
            draws = np.minimum(draws, np.nextafter(1.0, 0.0)) * self._cumulative[-1]
            chosen: np.ndarray = np.searchsorted(self._cumulative, draws, side="right")
            return chosen
        if self.shuffle:
            return torch.randperm(self.num_clips, generator=generator).numpy()
        return np.arange(self.num_clips)

    def step(self) -> None:
        """One batch was used; after the last, the next epoch begins."""
        self.batch += 1
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.seed,
            "num_clips": self.num_clips,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to another set, seed or batch size.
        """
        for name in ("seed", "num_clips", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved run has {name}={state[name]}, this one {getattr(self, name)}: "
                    "resume with the same data and settings, or start a new run folder"
                )
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])


def class_counts(labels: Sequence[Sequence[int]], num_classes: int) -> list[int]:
    """Clips that carry each class."""
    counts = [0] * num_classes
    for clip in labels:
        for label in clip:
            counts[label] += 1
    return counts


def balanced_weights(labels: Sequence[Sequence[int]], num_classes: int) -> list[float]:
    """Weight of each clip for class-balanced sampling, as the original AST has them.

    A class of n clips weighs 1000 / (n + 0.01); a clip weighs the sum over its labels. Clips without a
    label weigh as those of a class of their own: otherwise they were never drawn.
    """
    bare = 1000.0 / (sum(not clip for clip in labels) + 0.01)
    weight = [1000.0 / (count + 0.01) for count in class_counts(labels, num_classes)]
    return [sum(weight[label] for label in clip) if clip else bare for clip in labels]
