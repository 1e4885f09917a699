"""The order of an epoch over shards: blocks shuffled, and clips shuffled within windows of blocks.

A window is what the shuffle needs in memory at a time. The order is known before anything is read,
from seed, epoch and index alone; so a run resumes at any batch, and every rank knows its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .dataset import ClipSet
from .sampler import BatchSampler
from .shards import ShardSet

WINDOW_BYTES = 96 << 20


class ShardSampler(BatchSampler):
    """Lists of clip numbers, such that clips near in the list lie near in the shards.

    Ranks read different blocks, except for the one in which two shares meet.

    Args:
        dataset: the shards.
        batch_size: clips a batch, over all ranks together.
        seed: of the order.
        shuffle: shuffle shards, blocks and clips; otherwise 0, 1, 2...
        drop_last: leave out a last batch that is not full.
        rank: of this process.
        world_size: processes that share the work.
        window_bytes: clips are shuffled within this much of the shards.
    """

    def __init__(
        self,
        dataset: ShardSet,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        super().__init__(
            len(dataset),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        if len(dataset) < world_size:
            raise ValueError(f"{len(dataset)} clips do not split over {world_size} processes")
        self._blocks, self.window_bytes = dataset.blocks, window_bytes

    def __iter__(self) -> Iterator[list[int]]:
        order = self._share()
        size = self.batch_size // self.world_size
        for number in range(self.batch, len(self)):
            yield order[number * size : (number + 1) * size].tolist()

    def _share(self) -> np.ndarray:
        """The clips of this rank in the order of the epoch."""
        begin, end = (
            place * self.num_clips // self.world_size for place in (self.rank, self.rank + 1)
        )
        mine = np.arange(begin, end)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
            places = torch.randperm(len(self._blocks), generator=generator).tolist()
            blocks = [self._blocks[place] for place in places]
            # drawn for all clips, so that a clip's neighbours do not hang on the number of ranks
            keys = torch.rand(self.num_clips, generator=generator, dtype=torch.float64).numpy()
            clips = np.concatenate([np.arange(b.first, b.first + b.count) for b in blocks])
            reached = np.cumsum([block.end - block.begin for block in blocks])
            counts = [block.count for block in blocks]
            window = np.repeat((reached - 1) // self.window_bytes, counts)[begin:end]
            mine = clips[begin:end][np.lexsort((keys[begin:end], window))]
        # every rank takes part in every step: a share that is one short repeats its last clip
        missing = -(-self.num_clips // self.world_size) - len(mine)
        return np.concatenate([mine, mine[-1:].repeat(missing)])

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on."""
        return super().state_dict() | {
            "blocks": len(self._blocks),
            "window_bytes": self.window_bytes,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to other shards, settings or (within an epoch) ranks.
        """
        names = ["blocks", "window_bytes"] + (["world_size"] if state["batch"] else [])
        for name in names:
            mine = self.state_dict()[name]
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved run has {name}={state.get(name)}, this one {mine}: resume with the "
                    "same shards and settings, or start a new run folder"
                )
        super().load_state_dict(state)


def sampler_for(
    dataset: ClipSet,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    weights: Sequence[float] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchSampler:
    """The sampler that suits a dataset: block by block for shards, unless clips are drawn by weight."""
    if isinstance(dataset, ShardSet) and weights is None:
        return ShardSampler(
            dataset, batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size
        )
    return BatchSampler(
        len(dataset),
        batch_size,
        seed=seed,
        shuffle=shuffle,
        weights=weights,
        rank=rank,
        world_size=world_size,
    )
