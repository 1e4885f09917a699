"""Fewer tokens, as options of a model: patchout in training, token merging in evaluation.

Neither is part of a checkpoint, and both are off unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import token_merging
from ..patchout import Patchout
from ..reference.tokens import MergePlan
from ..token_merging import MergedTokens


class TokenOptions(nn.Module):
    """What a model with a `layers.Trunk` called `v` offers."""

    v: Any
    config: Any
    _check_input: Callable[[Tensor], None]

    @property
    def patchout(self) -> Patchout | None:
        """The patchout in use; its `seek` sets which draw comes next, its `kept` shows it."""
        patchout: Patchout | None = self.v.patchout
        return patchout

    def set_patchout(
        self, time: int = 0, frequency: int = 0, patches: int = 0, *, seed: int = 0
    ) -> None:
        """Train on a part of the patches (PaSST, Koutini et al. 2022); all zero switches it off.

        In train mode `forward` and `forward_waveform` then run on the prefix and the patches kept, one
        draw a call for all clips. Evaluation, `forward_features`, `frame_logits` and
        `attention_maps` see all patches.

        Args:
            time: columns of the patch grid left out. PaSST's setting for AudioSet is time=40,
                frequency=4: 474 of 1190 tokens at its 998 frames, 490 of 1214 at 1024.
            frequency: rows left out.
            patches: single patches left out of what remains (unstructured patchout).
            seed: of the draws.

        Raises:
            ValueError: nothing would be left.
        """
        if not (time or frequency or patches):
            self.v.patchout = None
            return
        config = self.config
        patchout = Patchout(
            config.grid, config.num_prefix_tokens, time, frequency, patches, seed=seed
        )
        self.v.patchout = patchout.to(self.v.pos_embed.device).train(self.training)

    def set_token_merging(self, r: int | Sequence[int]) -> None:
        """Merge similar tokens in evaluation (ToMe, Bolya et al. 2023); 0 switches it off.

        In eval mode `forward`, `forward_waveform`, `forward_features` and `frame_logits` then merge; the
        last two get a copy of the merged token for each of its patches. `attention_maps` does
        not merge. Gradients flow, but not on the fast path of attention. Packed weights
        (`optimize_for_inference`) are not used while it is on: on a CPU, weigh the two by time.

        Args:
            r: tokens to merge in every block but the last, or one number for each of these. A block
                merges at most half of its patches: what r is beyond that is cut, as in ToMe.

        Raises:
            ValueError: a number is negative, or there are not as many as blocks.
        """
        schedule = token_merging.check_schedule(r, self.config.depth)
        self.v.merging = schedule if any(schedule) else None

    def token_counts(self) -> list[int]:
        """Tokens after each block in eval mode, prefix included."""
        config, schedule = self.config, self.v.merging or (0,) * self.config.depth
        return token_merging.token_counts(schedule, config.num_tokens, config.num_prefix_tokens)

    def merged_tokens(self, x: Tensor, plans: dict[int, MergePlan] | None = None) -> MergedTokens:
        """Merged tokens of spectrograms [B, S, F], their sizes, and where each patch has gone.

        Args:
            x: [B, S, F].
            plans: merge by these, which another model's `merged_tokens` gave, instead of matching.

        Raises:
            ValueError: token merging is off.
        """
        self._check_input(x)
        if self.v.merging is None:
            raise ValueError("token merging is off: expected model.set_token_merging(r) before")
        return token_merging.run(self.v, self.v.embed(x), self.v.merging, plans=plans)
