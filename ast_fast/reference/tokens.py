"""Merging of similar tokens in plain PyTorch, any dtype: the oracle of token merging.

Bolya et al. 2023 (ToMe), as FastAST (Behera et al. 2024) applies it to the AST. Written clip by clip and
token by token where that is plainest. Dimensions: B clips, T tokens, P prefix tokens, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MergePlan(NamedTuple):
    """Who is merged with whom: even tokens (A) into odd ones (B), prefix tokens in neither.

    Attributes:
        unmerged: [B, |A| - r] numbers within A that stay, rising.
        sources: [B, r] numbers within A that are merged, most similar first.
        destinations: [B, r] numbers within B that they are merged into.
    """

    unmerged: Tensor
    sources: Tensor
    destinations: Tensor


def halves(num_tokens: int, num_prefix: int) -> tuple[range, range]:
    """Numbers of the tokens of A (even) and of B (odd), without the prefix."""
    return (
        range(num_prefix + num_prefix % 2, num_tokens, 2),
        range(num_prefix + 1 - num_prefix % 2, num_tokens, 2),
    )


def match(keys: Tensor, r: int, num_prefix: int) -> MergePlan:
    """The r tokens of A whose best match in B by cosine similarity is best, and that match.

    Args:
        keys: [B, T, D] keys, the mean over heads.
        r: tokens to merge.
        num_prefix: P.
    """
    a, b = (list(half) for half in halves(keys.shape[1], num_prefix))
    unmerged, sources, destinations = [], [], []
    for clip in keys:
        lengths = clip.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit = clip / lengths
        best, where = (unit[a] @ unit[b].T).max(dim=1)
        order = sorted(range(len(a)), key=lambda i: (-best[i].item(), i))
        sources.append(torch.tensor(order[:r], dtype=torch.int64))
        unmerged.append(torch.tensor(sorted(order[r:]), dtype=torch.int64))
        destinations.append(where[order[:r]])
    device = keys.device
    return MergePlan(
        torch.stack(unmerged).to(device),
        torch.stack(sources).to(device),
        torch.stack(destinations).to(device),
    )


def merge(x: Tensor, sizes: Tensor, plan: MergePlan, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Average of what is merged, weighted by size: prefix, then the rest of A, then B.

    Args:
        x: [B, T, C].
        sizes: [B, T] how many patches each token stands for.
        plan: who is merged with whom.
        num_prefix: P.

    Returns:
        tokens [B, T - r, C] and their sizes [B, T - r].
    """
    a, b = (list(half) for half in halves(x.shape[1], num_prefix))
    tokens, counts = [], []
    for clip, size, unmerged, sources, destinations in zip(x, sizes, *plan, strict=True):
        total, weight = list((clip * size[:, None])[b]), list(size[b])
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
            total[destination] = total[destination] + clip[a[source]] * size[a[source]]
            weight[destination] = weight[destination] + size[a[source]]
        kept = [*range(num_prefix), *(a[i] for i in unmerged.tolist())]
        means = [t / w for t, w in zip(total, weight, strict=True)]
        tokens.append(torch.cat((clip[kept], torch.stack(means))))
        counts.append(torch.cat((size[kept], torch.stack(weight))))
    return torch.stack(tokens), torch.stack(counts)
