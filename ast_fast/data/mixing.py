"""Mixup partners from the whole set, drawn ahead of reading, as the original AST draws them.

Partners from the batch cost no reading; these are read beside it. A draw depends on seed, step and clip
alone: not on the batch, the workers or the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..seeding import ClipSeeds, clip_numbers, draw_partners
from .dataset import MixPlan


class WholeSetMixup:
    """Draws for each step which of its clips are mixed, with which of the whole set, and how much.

    Partners are drawn evenly from all clips, the clip itself among them, whatever sampler draws the
    clips: so does the original.

    Args:
        seed: of the run.
        probability: that a clip is mixed.
        num_clips: clips in the set.
        alpha: weights follow Beta(alpha, alpha); the original has 10.

    Raises:
        ValueError: a number is out of range.

    >>> mixup = WholeSetMixup(0, 0.5, 100)
    >>> mixup.plan(3, [7, 8]) == mixup.plan(3, [7, 8])
    True
    """

    def __init__(self, seed: int, probability: float, num_clips: int, alpha: float = 10.0) -> None:
        if not 0.0 <= probability <= 1.0 or num_clips < 1 or not alpha > 0:
            raise ValueError(
                f"probability={probability}, num_clips={num_clips}, alpha={alpha}: expected 0 to 1, "
                "at least 1 and a positive number"
            )
        self.seed, self.probability = seed, probability
        self.num_clips, self.alpha = num_clips, alpha

    def plan(self, step: int, indices: Sequence[int]) -> MixPlan:
        """What is drawn for the clips of a step's batch.

        Args:
            step: of the run.
            indices: [B] places in the dataset.
        """
        return next(self.plans([(step, indices)]))

    def plans(self, steps: Iterable[tuple[int, Sequence[int]]]) -> Iterator[MixPlan]:
        """The plans of several steps, drawn together: what a draw costs is its calls, not its numbers.

        Args:
            steps: number of each, and places in the dataset of its clips.
        """
        drawn = [(step, list(indices)) for step, indices in steps]
        clips = torch.tensor([clip for _, indices in drawn for clip in self._visits(indices)])
        owners = [step for step, indices in drawn for _ in indices]
        seeds = ClipSeeds.of_steps(self.seed, owners, clips.to(torch.int64))
        partners, weights = draw_partners(seeds, self.num_clips, self.probability, self.alpha)
        begin = 0
        for _, indices in drawn:
            part = slice(begin, begin + len(indices))
            begin = part.stop
            rows = (weights[part] < 1.0).nonzero()[:, 0]
            yield MixPlan(
                rows.tolist(), partners[part][rows].tolist(), weights[part][rows].tolist()
            )

    def _visits(self, indices: list[int]) -> list[int]:
        """What `clip_seeds` draws by: a clip that comes up again in a batch gets other draws."""
        if len(set(indices)) == len(indices):
            return indices
        return clip_numbers(torch.tensor(indices), self.num_clips).tolist()
