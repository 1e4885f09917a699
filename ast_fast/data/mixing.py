"""Mixup partners from the whole set, drawn ahead of reading, as the original AST draws them.

Partners from the batch cost no reading; these are read beside it. A draw depends on seed, step and clip
alone: not on the batch, the workers or the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..seeding import clip_seeds, draw_partners
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
        clips = torch.tensor(indices, dtype=torch.int64)
        seeds = clip_seeds(self.seed, step, clips, self.num_clips)
        partners, weights = draw_partners(seeds, self.num_clips, self.probability, self.alpha)
        rows = (weights < 1.0).nonzero()[:, 0]
        return MixPlan(rows.tolist(), partners[rows].tolist(), weights[rows].tolist())
