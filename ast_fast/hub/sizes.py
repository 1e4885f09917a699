"""Sizes of a model read off its weights, for checkpoints that carry no settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError

_HEAD_DIM = 64  # of every released size
_KNOWN_FRAMES = (1024, 512, 128, 256, 1000, 998, 100)  # recipes first: they decide ties
_STRIDES = (10, 12, 14, 16)
_NAME = re.compile(r"[A-Za-z]+(?:_[A-Za-z]+)*_(\d+)_(\d+)_\d\.\d+")  # audioset_10_10_0.4593


def _stride_of_name(file: Path) -> tuple[int, int] | None:
    match = _NAME.match(file.name)
    return (int(match[1]), int(match[2])) if match else None


def _recipe_frames(t: int, patch: int, stride: int) -> int | None:
    """The recipe length that gives `t` patches, if one does."""
    for frames in _KNOWN_FRAMES:
        if frames >= patch and (frames - patch) // stride + 1 == t:
            return frames
    return None


def sizes_of(
    state: Mapping[str, Tensor], file: str | Path, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of `ModelConfig` for weights in our key style.

    The number of patches does not say how they are laid out: strides come from `given`, then from a
    file name such as audioset_12_12_0.4467.pth, then from the first of 10, 12, 14, 16 that fits.

    Args:
        state: our keys.
        file: where it came from; its name may tell the strides.
        given: settings that are known (fstride, tstride, input_fdim, input_tdim, num_heads).

    Raises:
        CheckpointError: a tensor that tells a size is missing, or no layout fits.
    """
    given = dict(given or {})
    try:
        pos = state["v.pos_embed"]
        proj = state["v.patch_embed.proj.weight"]
        num_tokens, dim = int(pos.shape[1]), int(pos.shape[2])
        patch_f, patch_t = int(proj.shape[2]), int(proj.shape[3])
        hidden = int(state["v.blocks.0.mlp.fc1.weight"].shape[0])
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a whole AST: cannot read sizes from it ({error})"
        ) from error
    blocks = {int(key.split(".")[2]) for key in state if key.startswith("v.blocks.")}
    prefix = 2 if "v.dist_token" in state else 1
    head = state.get("mlp_head.1.weight")
    patches = num_tokens - prefix
    bins = int(given.get("input_fdim", 128))
    named = _stride_of_name(Path(file))
    if "fstride" in given or "tstride" in given:
        fstride = int(given.get("fstride", given.get("tstride", 10)))
        candidates = [(fstride, int(given.get("tstride", fstride)))]
    elif named:
        candidates = [named]
    else:
        candidates = [(patch_f, patch_t)] if patch_f != 16 else [(s, s) for s in _STRIDES]
    layouts = []
    for fstride, tstride in candidates:
        f = (bins - patch_f) // fstride + 1
        if f >= 1 and patches > 0 and patches % f == 0:
            frames = _recipe_frames(patches // f, patch_t, tstride)
            layouts.append(
                (frames is None, fstride, tstride, frames or (patches // f - 1) * tstride + patch_t)
            )
    if not layouts:
        raise CheckpointError(
            f"{str(file)!r} has {patches} patches: no layout with {bins} mel bins and strides "
            f"{', '.join(map(str, candidates))} gives that; say input_fdim=, fstride= and tstride="
        )
    # of several that fit, the first whose length is a recipe's
    _, fstride, tstride, frames = min(layouts, key=lambda layout: layout[0])
    sizes = {
        "label_dim": int(head.shape[0]) if head is not None else 527,
        "input_fdim": bins,
        "input_tdim": frames,
        "patch_fdim": patch_f,
        "patch_tdim": patch_t,
        "fstride": fstride,
        "tstride": tstride,
        "embed_dim": dim,
        "depth": len(blocks),
        "num_heads": max(dim // _HEAD_DIM, 1),
        "mlp_ratio": hidden / dim,
        "num_prefix_tokens": prefix,
        "dead_heads": "v.head.weight" in state,
    }
    sizes.update(given)
    return sizes
