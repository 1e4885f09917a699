"""Patchout: training on a part of the patches (Koutini et al. 2022, PaSST).

Structured patchout leaves out whole time columns and frequency rows of the patch grid, unstructured
patchout single patches of what is left. Kept patches keep their positions and their order; prefix
tokens stay. One set is drawn a batch, so that all clips have equally many tokens and every step the
same shapes. With a third of the tokens a step costs about a third.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .seeding import counted_bits, draw_numbers, stream_key


class Patchout(nn.Module):
    """Keeps the tokens of a random part of the patch grid: [B, P + f*t, C] to [B, P + K, C].

    Each call draws anew. A draw follows from the seed and from the number of the call alone, which is
    counted on the device: CUDA graphs and compiled steps draw anew, too, and `seek` sets it.

    Args:
        grid: rows (frequency) and columns (time) of the patch grid, f and t.
        num_prefix_tokens: P.
        time: columns left out.
        frequency: rows left out.
        patches: single patches left out of the rest.
        seed: of the draws.

    Raises:
        ValueError: nothing would be left, or a number is negative.

    >>> Patchout((12, 99), 2, time=40, frequency=4)(torch.zeros(1, 1190, 8)).shape[1]
    474
    """

    step: Tensor
    numbers: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        time: int = 0,
        frequency: int = 0,
        patches: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rows, columns = grid
        for name, dropped, there, what in (
            ("time", time, columns, "columns"),
            ("frequency", frequency, rows, "rows"),
        ):
            if not 0 <= dropped < there:
                raise ValueError(
                    f"patchout {name}={dropped}: expected 0 to {there - 1}, the patch grid is "
                    f"{rows} x {columns} and at least one of its {there} {what} has to stay"
                )
        left = (rows - frequency) * (columns - time)
        if not 0 <= patches < left:
            raise ValueError(
                f"patchout patches={patches}: expected 0 to {left - 1}, time={time} and "
                f"frequency={frequency} leave {rows - frequency} x {columns - time} patches"
            )
        self.grid, self.num_prefix_tokens = (rows, columns), num_prefix_tokens
        self.time, self.frequency, self.patches, self.seed = time, frequency, patches, seed
        self.num_kept = left - patches
        self._keys = {
            name: stream_key(seed, f"patchout {name}") for name in ("time", "frequency", "patches")
        }
        # not in checkpoints: a setting of the run, like the seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("numbers", draw_numbers(max(rows, columns, left)), persistent=False)

    def seek(self, step: int) -> None:
        """The next call draws as call number `step` of a run."""
        self.step.fill_(step)

    def _chosen(self, name: str, there: int, dropped: int) -> Tensor:
        """Rising numbers below `there`, `dropped` of them left out at random."""
        if not dropped:
            return torch.arange(there, device=self.step.device)
        bits = counted_bits(self._keys[name], self.step, self.numbers[:there])
        order = bits.argsort(stable=True)
        return order[: there - dropped].sort().values

    def kept(self) -> Tensor:  # [K] int64
        """Patches that the next call keeps, rising: number i_f * t + i_t, without the prefix."""
        rows, columns = self.grid
        in_time = self._chosen("time", columns, self.time)
        in_frequency = self._chosen("frequency", rows, self.frequency)
        patches = (in_frequency[:, None] * columns + in_time).flatten()
        return patches[self._chosen("patches", len(patches), self.patches)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Prefix and kept patches of tokens with positions."""
        prefix = torch.arange(self.num_prefix_tokens, device=self.step.device)
        index = torch.cat((prefix, self.kept() + self.num_prefix_tokens))
        self.step.add_(1)
        return tokens.index_select(1, index)

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"time={self.time}, frequency={self.frequency}, patches={self.patches}, "
            f"keeps {self.num_kept} of {self.grid[0]} x {self.grid[1]}"
        )
