"""Sizes of a model read off its weights, for checkpoints that carry no settings.

Weights do not tell how their patches are laid out, how wide a head is, or what they were trained on. What is
neither said nor known from a published name is guessed where one recipe alone fits, and told; else asked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .errors import CheckpointError
from .published import published

_HEAD_DIM = 64  # of every released size
_RELEASED_WIDTHS = (192, 384, 768)
_BINS = 128  # of every recipe
_KNOWN_FRAMES = (1024, 512, 128, 256, 1000, 998, 100)  # recipes first: they decide ties
_STRIDES = (10, 12, 14, 16)
_NAME = re.compile(r"[A-Za-z]+(?:_[A-Za-z]+)*_(\d+)_(\d+)_\d\.\d+")  # audioset_10_10_0.4593
_LAYOUT = ("input_fdim", "input_tdim", "fstride", "tstride")
_ASK = (
    "say how it was trained: strides=(10, 10), frames=1024 and, unless they are 128, mel_bins= "
    "(--strides 10 10 --input-frames 1024 --mel-bins 128 on the command line; ast-fast convert writes a "
    "directory that tells it to every command)"
)


class Sizes(NamedTuple):
    """Settings for `ModelConfig`, and what of them nothing but habit speaks for.

    Attributes:
        model: the settings.
        guesses: in words.
        statistics: mean and std of a published file; None if they are not known.
    """

    model: dict[str, Any]
    guesses: tuple[str, ...]
    statistics: tuple[float, float] | None


class _Layout(NamedTuple):
    fstride: int
    tstride: int
    frames: int
    of_recipe: bool


def _stride_of_name(file: Path) -> tuple[int, int] | None:
    match = _NAME.match(file.name)
    return (int(match[1]), int(match[2])) if match else None


def _layouts(
    patches: int,
    bins: int,
    patch: tuple[int, int],
    strides: Iterable[tuple[int, int]],
    frames: int | None = None,
) -> list[_Layout]:
    """Every way to lay out so many patches; with `frames` None each once, at a recipe's length if one fits."""
    found = []
    for fstride, tstride in strides:
        if min(fstride, tstride) < 1 or bins < patch[0]:
            continue
        f = (bins - patch[0]) // fstride + 1
        if patches % f:
            continue
        t = patches // f
        lengths = _KNOWN_FRAMES if frames is None else (frames,)
        fitting = (n for n in lengths if n >= patch[1] and (n - patch[1]) // tstride + 1 == t)
        length = next(fitting, None)
        if length is not None:
            found.append(_Layout(fstride, tstride, length, True))
        elif frames is None:
            found.append(_Layout(fstride, tstride, (t - 1) * tstride + patch[1], False))
    return found


def _candidates(
    said: Mapping[str, Any], named: tuple[int, int] | None, patch: tuple[int, int]
) -> list[tuple[int, int]]:
    """Pairs of strides that may be: those said, those of the file's name, or the recipes'."""
    rows, columns = said.get("fstride"), said.get("tstride")
    if rows is not None and columns is not None:
        return [(rows, columns)]
    if rows is not None or columns is not None:
        return list(itertools.product(*(_STRIDES if s is None else (s,) for s in (rows, columns))))
    if named is not None:
        return [named]
    return [patch] if patch != (16, 16) else list(itertools.product(_STRIDES, _STRIDES))


def _choose(
    patches: int,
    patch: tuple[int, int],
    said: Mapping[str, Any],
    wanted: Mapping[str, Any],
    named: tuple[int, int] | None,
) -> tuple[_Layout, bool, tuple[_Layout, ...]]:
    """The layout that fits, whether what was said decides it, and what would fit too; see `sizes_of`.

    Raises:
        CheckpointError: none does, or several of a kind; says what is known.
    """
    bins, frames = int(said.get("input_fdim", _BINS)), said.get("input_tdim")
    pairs = _candidates(said, named, patch)
    # sizes that the model shall have may well be those that it has
    whole = {**wanted, **said}
    if any(name in wanted for name in _LAYOUT) and (
        "input_tdim" in whole or ("fstride" in whole and "tstride" in whole)
    ):
        exact = _layouts(
            patches,
            int(whole.get("input_fdim", _BINS)),
            patch,
            _candidates(whole, named, patch),
            whole.get("input_tdim"),
        )
        if len(exact) == 1 and (exact[0].of_recipe or "input_tdim" not in whole):
            return exact[0], True, ()
    found = _layouts(patches, bins, patch, pairs, frames)
    if len(pairs) > 1:
        found = [layout for layout in found if layout.of_recipe]
    asked = len(pairs) == 1 or frames is not None
    square = [layout for layout in found if layout.fstride == layout.tstride]
    # strides that differ were never published: one pair alone is a guess only where more is known
    chosen = found if len(found) == 1 and asked else square
    if len(chosen) == 1:
        others = tuple(layout for layout in found if layout is not chosen[0])
        told = frames is not None and "fstride" in said and "tstride" in said
        return chosen[0], told, others
    length = "a recipe's length" if frames is None else f"{frames} frames"
    tried = ", ".join(f"{f} x {t}" for f, t in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
    what = f"no layout with {bins} mel bins, {length} and strides {tried} gives that"
    if found:
        fit = ", ".join(
            f"{each.fstride} x {each.tstride} at {each.frames} frames" for each in found
        )
        what = f"at {bins} mel bins that may be strides {fit}, among others"
    raise CheckpointError(f"has {patches} patches: {what}; {_ASK}")


def sizes_of(
    state: Mapping[str, Tensor],
    file: str | Path,
    said: Mapping[str, Any] | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Sizes:
    """Settings of `ModelConfig` for weights in our key style.

    What is said counts; then a published name with the published sizes; then strides in a name such as
    my_12_12_0.4467.pth; then the one of 10, 12, 14 and 16 that gives, in both directions, the number of patches at a
    recipe's length.

    Args:
        state: our keys.
        file: where it came from.
        said: settings that are known (fstride, tstride, input_fdim, input_tdim, num_heads).
        wanted: sizes that the model shall have once it is loaded: they count as said where they alone
            give the number of patches.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or not just one layout fits.
    """
    file, said, wanted = Path(file), dict(said or {}), dict(wanted or {})
    try:
        pos = state["v.pos_embed"]
        proj = state["v.patch_embed.proj.weight"]
        num_tokens, dim = int(pos.shape[1]), int(pos.shape[2])
        patch = int(proj.shape[2]), int(proj.shape[3])
        hidden = int(state["v.blocks.0.mlp.fc1.weight"].shape[0])
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a whole AST: cannot read sizes from it ({error})"
        ) from error
    prefix = 2 if "v.dist_token" in state else 1
    head = state.get("mlp_head.1.weight")
    sizes: dict[str, Any] = {
        "label_dim": int(head.shape[0]) if head is not None and head.dim() else 527,
        "patch_fdim": patch[0],
        "patch_tdim": patch[1],
        "embed_dim": dim,
        "depth": len(blocks_of(state)),
        "mlp_ratio": hidden / max(dim, 1),
        "num_prefix_tokens": prefix,
        "dead_heads": "v.head.weight" in state,
    }
    if min(dim, *patch, num_tokens - prefix) < 1:
        raise CheckpointError(f"{str(file)!r} is not a whole AST: it has no patches or no width")
    known = published(file, state)
    if known is not None:
        for name, value in said.items():
            if known.model.get(name, value) != value:
                raise CheckpointError(
                    f"{str(file)!r} is a published checkpoint with {name}={known.model[name]}, and "
                    f"{name}={value} was said of it: leave that out, or rename the file"
                )
        return Sizes({**sizes, **known.model}, (), (known.mean, known.std))
    guesses = []
    if "num_heads" not in said:
        if dim % _HEAD_DIM and dim > _HEAD_DIM:
            raise CheckpointError(
                f"{str(file)!r} has width {dim}, which does not tell the number of heads: say heads= "
                "(--heads on the command line)"
            )
        sizes["num_heads"] = max(dim // _HEAD_DIM, 1)
        if dim not in _RELEASED_WIDTHS:
            guesses.append(f"{sizes['num_heads']} heads (of width {dim // sizes['num_heads']})")
    named = _stride_of_name(file)
    try:
        layout, sure, others = _choose(num_tokens - prefix, patch, said, wanted, named)
    except CheckpointError as error:
        raise CheckpointError(f"{str(file)!r} {error}") from error
    bins = said.get("input_fdim", wanted.get("input_fdim", _BINS) if sure else _BINS)
    sizes.update(
        fstride=layout.fstride, tstride=layout.tstride, input_tdim=layout.frames, input_fdim=bins
    )
    if not sure:
        if "input_fdim" not in said:
            guesses.append(f"{bins} mel bins")
        if "fstride" not in said or "tstride" not in said:
            source = " (of its name)" if named and not {"fstride", "tstride"} & set(said) else ""
            if others:
                fit = ", ".join(f"{each.fstride} x {each.tstride}" for each in others)
                source = f" ({fit} would fit too)"
            guesses.append(f"strides {layout.fstride} x {layout.tstride}{source}")
        if "input_tdim" not in said:
            guesses.append(f"{layout.frames} frames")
    sizes.update(said)
    return Sizes(sizes, tuple(guesses), None)


def blocks_of(state: Mapping[str, Tensor]) -> set[int]:
    """Numbers of the blocks that a state has."""
    return {
        int(parts[2])
        for parts in (key.split(".", 3) for key in state if key.startswith("v.blocks."))
        if len(parts) > 2 and parts[2].isdecimal() and len(parts[2]) < 10
    }
