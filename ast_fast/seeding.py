"""Random draws that belong to a clip: the same numbers in any batch, on any device, in any order.

A generator's draws depend on everything drawn before, so on the composition of the batch. Here every
number is a hash of (seed, step, clip, stream, counter): SplitMix64 (Steele, Lea and Flood 2014) in
torch's 64-bit integers, whose products wrap. Bits and uniform numbers are equal on every device;
normal ones pass through a logarithm and a cosine and may differ in their last bit.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _mixed_int(word: int) -> int:
    word &= _WORD
    word = (word ^ (word >> 30)) * _FIRST & _WORD
    word = (word ^ (word >> 27)) * _SECOND & _WORD
    return word ^ (word >> 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    # torch shifts signed numbers: the copies of the sign have to go
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    bits = _shifted(bits, 30).bitwise_xor_(bits).mul_(_signed(_FIRST))
    bits = _shifted(bits, 27).bitwise_xor_(bits).mul_(_signed(_SECOND))
    return _shifted(bits, 31).bitwise_xor_(bits)


def _base(seed: int, step: int) -> int:
    return _signed(_mixed_int(_mixed_int(seed + _GOLDEN) + step * _GOLDEN))


class ClipSeeds:
    """The source of every draw for the clips of a batch; takes a generator's place in `frontend`.

    Args:
        seed: of the run.
        step: epoch or step: what makes a clip's next visit differ from this one.
        clips: [B] integers, the clips' numbers in the dataset; they live where draws are wanted.

    Raises:
        ValueError: clips is not a vector of integers.

    >>> seeds = ClipSeeds(0, 1, torch.tensor([7, 3]))
    >>> again = ClipSeeds(0, 1, torch.tensor([3]))
    >>> bool(seeds.uniform("gain")[1] == again.uniform("gain")[0])
    True
    """

    def __init__(self, seed: int, step: int, clips: Tensor) -> None:
        if clips.dim() != 1 or clips.is_floating_point():
            raise ValueError(
                f"clips has shape {tuple(clips.shape)} and {clips.dtype}: expected [B] integers"
            )
        self.keys = _mixed(clips.to(torch.int64) * _signed(_GOLDEN) + _base(seed, step))

    @classmethod
    def of_steps(cls, seed: int, steps: Sequence[int], clips: Tensor) -> Self:
        """The draws of several steps at once: those of a clip are as if made for its step alone.

        Args:
            seed: of the run.
            steps: [B], of each clip.
            clips: [B] integers, on the CPU.
        """
        bases = {step: _base(seed, step) for step in set(steps)}
        seeds = object.__new__(cls)
        offsets = torch.tensor([bases[step] for step in steps], dtype=torch.int64)
        seeds.keys = _mixed(clips * _signed(_GOLDEN) + offsets)
        return seeds

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Where draws are made."""
        return self.keys.device

    def to(self, device: torch.device | str) -> ClipSeeds:
        """The same draws on another device."""
        moved = object.__new__(ClipSeeds)
        moved.keys = self.keys.to(device, non_blocking=True)
        return moved

    def fork(self, name: str) -> ClipSeeds:
        """Other draws for the same clips, for a second use of the same function."""
        forked = object.__new__(ClipSeeds)
        forked.keys = self._stream(name)
        return forked

    def _stream(self, name: str) -> Tensor:
        return _mixed(self.keys ^ _signed(_mixed_int(zlib.crc32(name.encode()) + 1)))

    def bits(self, stream: str, count: int = 1) -> Tensor:  # [B, count] int64
        """Words of 64 random bits; the first ones do not depend on `count`."""
        counters = torch.arange(1, count + 1, device=self.device) * _signed(_GOLDEN)
        return _mixed(self._stream(stream)[:, None] + counters)

    def uniform(self, stream: str, *shape: int) -> Tensor:  # [B, *shape]
        """Multiples of 2^-24 in [0, 1), float32."""
        count = 1
        for size in shape:
            count *= size
        high, low = self._halves(stream, -(-count // 2))
        values = torch.stack((high, low), dim=2).flatten(1)[:, :count]
        return values.reshape(len(self), *shape)

    def _halves(self, stream: str, words: int) -> tuple[Tensor, Tensor]:
        bits = self.bits(stream, words)
        high = _shifted(bits, 40).to(torch.float32).mul_(2.0**-24)
        low = (bits >> 16).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)
        return high, low

    def normal(self, stream: str, count: int) -> Tensor:  # [B, count]
        """Standard normal numbers, float32, within 5.8: Box and Muller's two a word."""
        high, turn = self._halves(stream, -(-count // 2))
        # 1 - high is above 0, and exact
        radius = high.neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
        turn.mul_(2.0 * torch.pi)
        pairs = torch.stack((turn.cos().mul_(radius), turn.sin().mul_(radius)), dim=2)
        return pairs.flatten(1)[:, :count]


def beta_quantile(probability: Tensor, alpha: float) -> Tensor:
    """Numbers that follow Beta(alpha, alpha), from uniform ones in [0, 1), both float64.

    The distribution is symmetric, and of x^alpha its density is smooth below 1/2: a table of its
    integral, inverted linearly, is good to 1e-6.

    Raises:
        ValueError: alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: expected a positive number")
    grid, mass = _beta_table(alpha)
    wanted = torch.minimum(probability, 1.0 - probability).to(torch.float64).contiguous()
    place = torch.searchsorted(mass, wanted, right=True).clamp(1, len(grid) - 1)
    part = (wanted - mass[place - 1]) / (mass[place] - mass[place - 1])
    at = grid[place - 1] + part * (grid[place] - grid[place - 1])
    smaller = 0.5 * (at if alpha > 1.0 else at.pow(1.0 / alpha))
    return torch.where(probability < 0.5, smaller, 1.0 - smaller)


@functools.lru_cache(maxsize=16)
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Points, and the share of the distribution's lower half below each; made once an alpha."""
    grid = torch.linspace(0.0, 1.0, 4097, dtype=torch.float64)
    if alpha > 1.0:
        # the mass lies far from 0, where x^alpha would crowd it: x itself is smooth enough
        x = 0.5 * grid
        density = (x * (1.0 - x)).pow(alpha - 1.0)
    else:
        x = 0.5 * grid.pow(1.0 / alpha)
        density = (1.0 - x).pow(alpha - 1.0)
    mass = torch.cumulative_trapezoid(density, grid)
    return grid, torch.nn.functional.pad(0.5 * mass / mass[-1], (1, 0))


def clip_seeds(seed: int, step: int, indices: Tensor, num_clips: int) -> ClipSeeds:
    """The draws of a step's clips: those of a clip depend on seed, step and clip alone.

    Args:
        seed: of the run.
        step: of the run.
        indices: [B] places in the dataset; one that comes up again in the batch (class-balanced
            sampling) gets other draws each time.
        num_clips: clips in the dataset.
    """
    return ClipSeeds(seed, step, clip_numbers(indices, num_clips))


def clip_numbers(indices: Tensor, num_clips: int) -> Tensor:  # [B] int64
    """The clips of a batch as numbers that all differ: other ones for a clip that comes up again."""
    earlier = (indices[:, None] == indices).tril(-1).sum(1)
    return indices + num_clips * earlier


def draw_partners(
    seeds: ClipSeeds, num_clips: int, probability: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """A mixup partner out of so many, and the weight of the clip itself: [B] int64 and float32.

    Args:
        seeds: of the clips; draws are made where they live and handed out on the CPU.
        num_clips: partners are drawn evenly from this many.
        probability: that a clip is mixed at all; its weight is 1 otherwise.
        alpha: weights follow Beta(alpha, alpha).
    """
    # 53 bits, so that each of millions is as likely as the others
    place = _shifted(seeds.bits("mixup partner")[:, 0].cpu(), 11).double() * 2.0**-53
    partners = (place * num_clips).long().clamp_(max=max(num_clips - 1, 0))
    weights = beta_quantile(seeds.uniform("mixup weight").cpu().double(), alpha)
    mixed = seeds.uniform("mixup chance").cpu().double() < probability
    return partners, torch.where(mixed, weights, torch.ones_like(weights)).float()


def stream_key(seed: int, stream: str) -> int:
    """What `counted_bits` needs to know of a seed and of the name of a use."""
    return _signed(_mixed_int(_mixed_int(seed + _GOLDEN) + zlib.crc32(stream.encode())))


def draw_numbers(count: int) -> Tensor:  # [count] int64
    """The table that `counted_bits` draws by; made once, because a compiler that folds these products
    into its loops meets a signed overflow there.
    """
    return torch.arange(1, count + 1) * _signed(_GOLDEN)


def counted_bits(key: int, counter: Tensor, numbers: Tensor) -> Tensor:  # as numbers, int64
    """Words of 64 random bits that belong to a number on the device, such as a step.

    Nothing waits for the device, so that a graph may hold the draw and a replay, or a compiled
    function, draw anew for the number it finds.

    Args:
        key: from `stream_key`.
        counter: [1] int64.
        numbers: the first ones of `draw_numbers`, on the counter's device.
    """
    return _mixed(_mixed(_mixed(counter * _signed(_GOLDEN)) ^ key) + numbers)
