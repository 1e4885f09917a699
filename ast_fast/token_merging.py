"""Token merging at inference: similar patches become one token, block by block (ToMe).

Bolya et al. 2023; Behera et al. 2024 (FastAST) apply it to the AST. After a block's attention the even
tokens are matched with the odd ones by the cosine of their keys (mean over heads), the r closest pairs
are averaged by size, and from there on attention is proportional: a token that stands for n patches
counts n times, by log n on its scores. Prefix tokens are never merged. The last block merges nothing:
the prefix, which the logits come from, would not notice.

All shapes follow from the number of tokens and r, nothing waits for the device, and sums have a fixed
order: graphs and compilers can hold it, and it gives the same bits on every run.
Dimensions: B clips, T tokens, P prefix tokens, H heads, D head width, C width, r merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops._common import statistics_dtype
from .reference.tokens import MergePlan


class MergedTokens(NamedTuple):
    """Tokens of a model that merges.

    Attributes:
        tokens: [B, T', C] after the final norm: prefix, then merged patches.
        sizes: [B, T'] how many patches each stands for; 1 for the prefix.
        source: [B, P + f*t] for each token of the unmerged model, where its content is now.
        plans: one for each block that merged, by the block's number.
    """

    tokens: Tensor
    sizes: Tensor
    source: Tensor
    plans: dict[int, MergePlan]

    def unmerged(self) -> Tensor:
        """[B, P + f*t, C]: every patch gets a copy of the token that it was merged into."""
        index = self.source[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return self.tokens.gather(1, index)


def check_schedule(r: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Tokens to merge in each block.

    Args:
        r: the same number for every block but the last, or one number for each of these.
        depth: number of blocks.

    Raises:
        ValueError: a number is negative, or there are not as many as blocks.
    """
    numbers = (r,) * (depth - 1) if isinstance(r, int) else tuple(r)
    if len(numbers) != depth - 1:
        raise ValueError(
            f"token merging got {len(numbers)} numbers: expected {depth - 1}, one for each of "
            f"{depth} blocks but the last"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"token merging r={number!r}: expected 0 (off) or more, an integer")
    return (*numbers, 0)


def token_counts(schedule: Sequence[int], num_tokens: int, num_prefix: int) -> list[int]:
    """Tokens after each block's merging. A block merges at most half of its patches, as ToMe's."""
    counts = []
    for r in schedule:
        num_tokens -= min(r, (num_tokens - num_prefix) // 2)
        counts.append(num_tokens)
    return counts


def _halves(num_prefix: int) -> tuple[slice, slice]:
    # even and odd tokens of the whole sequence, so that two prefix tokens start an A and one a B
    even = num_prefix + num_prefix % 2
    odd = num_prefix + 1 - num_prefix % 2
    return slice(even, None, 2), slice(odd, None, 2)


def match(keys: Tensor, r: int, num_prefix: int) -> MergePlan:
    """Bipartite soft matching of the keys [B, T, H, D] of a block."""
    a, b = _halves(num_prefix)
    unit = keys.mean(2, dtype=statistics_dtype(keys.dtype))
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    best, where = torch.matmul(unit[:, a], unit[:, b].transpose(1, 2)).max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    sources = order[:, :r]
    return MergePlan(order[:, r:].sort(dim=1).values, sources, where.gather(1, sources))


def merge(
    x: Tensor,  # [B, T, C]
    sizes: Tensor,  # [B, T]
    plan: MergePlan,
    num_prefix: int,
) -> tuple[Tensor, Tensor]:  # [B, T - r, C], [B, T - r]
    """Averages by size: prefix, then what stays of the even tokens, then the odd ones."""
    a, b = _halves(num_prefix)
    x_a, x_b, sizes_a, sizes_b = x[:, a], x[:, b], sizes[:, a], sizes[:, b]
    sources = plan.sources[:, :, None].expand(-1, -1, x.shape[2])
    unmerged = plan.unmerged[:, :, None].expand(-1, -1, x.shape[2])
    # as a product rather than a scatter, whose order of adding differs from run to run on a GPU
    odd = torch.arange(x_b.shape[1], device=x.device)
    moved_sizes = sizes_a.gather(1, plan.sources)
    shares = (plan.destinations[:, None, :] == odd[:, None]) * moved_sizes[:, None, :]
    totals = sizes_b + shares.sum(2)
    shares, own = shares / totals[:, :, None], (sizes_b / totals)[:, :, None]
    moved = x_a.gather(1, sources).to(sizes.dtype)
    means = torch.baddbmm(x_b * own, shares, moved).to(x.dtype)
    return (
        torch.cat((x[:, :num_prefix], x_a.gather(1, unmerged), means), dim=1),
        torch.cat((sizes[:, :num_prefix], sizes_a.gather(1, plan.unmerged), totals), dim=1),
    )


def moved_to(source: Tensor, plan: MergePlan, num_tokens: int, num_prefix: int) -> Tensor:
    """`source` [B, P + f*t] after another merge of `num_tokens` tokens."""
    a, b = _halves(num_prefix)
    stay, odd = plan.unmerged.shape[1], len(range(num_tokens)[b])
    first_odd = num_prefix + stay
    new = torch.arange(num_tokens, device=source.device).repeat(len(source), 1)
    kept = torch.arange(num_prefix, first_odd, device=source.device).expand_as(plan.unmerged)
    even = new[:, a].scatter(1, plan.unmerged, kept)
    new[:, a] = even.scatter(1, plan.sources, plan.destinations + first_odd)
    new[:, b] = torch.arange(first_odd, first_odd + odd, device=source.device)
    return new.gather(1, source)


def run(
    trunk: Any,  # a layers.Trunk
    stream: Tensor,  # [B, P + f*t, C]
    schedule: Sequence[int],
    keep: int | None = None,
    plans: dict[int, MergePlan] | None = None,
) -> MergedTokens:
    """The trunk's blocks and final norm, merging tokens on the way.

    Args:
        trunk: its blocks, norms and prefix.
        stream: tokens with positions.
        schedule: tokens to merge in each block; a block merges at most half of its patches.
        keep: only the first tokens are asked for; `source` then stays what it is before any merge
            (token i at i), and `plans` empty.
        plans: merge by these instead of matching.

    Raises:
        RuntimeError: a block, or its attention, carries a hook or was replaced.
    """
    blocks, prefix = list(trunk.blocks), trunk.num_prefix_tokens
    sizes = stream.new_ones(stream.shape[:2], dtype=statistics_dtype(stream.dtype))
    source = torch.arange(stream.shape[1], device=stream.device).repeat(len(stream), 1)
    used: dict[int, MergePlan] = {}
    merged = False
    normed = blocks[0].norm1(stream)
    for index, block in enumerate(blocks):
        if not block.can_merge:
            raise RuntimeError(
                f"block {index} or its attention carries a hook or was replaced: token merging runs "
                "their parts by itself; take the hook off or switch merging off with "
                "set_token_merging(0)"
            )
        attn, tokens = block.attn, stream.shape[1]
        last = index + 1 == len(blocks)
        bias = sizes.log() if merged else None
        r = min(schedule[index], (tokens - prefix) // 2)
        qkv = None
        if last and keep is not None and block.can_keep_first:
            update, stream = attn.first(normed, keep, bias), stream[:, :keep]
        else:
            qkv = attn.split(normed)
            update = attn.mixed(qkv, bias)
        if r and qkv is not None:
            with torch.autocast(stream.device.type, enabled=False):
                plan = match(qkv[:, :, 1], r, prefix) if plans is None else plans[index]
                stream, sizes = merge(stream + update, sizes, plan, prefix)
            merged = True
            if keep is None:
                source = moved_to(source, plan, tokens, prefix)
                used[index] = plan
            normed = block.norm2(stream)
        else:
            normed, stream = block.norm2.after_add(update, stream)
        update = block.mlp(normed)
        if not last:
            normed, stream = blocks[index + 1].norm1.after_add(update, stream)
    return MergedTokens(trunk.norm(stream + update), sizes, source, used)
