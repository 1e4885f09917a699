"""Attention under the masks of the family: factorised, and windows in time. Forward and backward.

The unmasked op on the same tokens is a candidate too: what a mask saves is measured in the same rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_fast.ops import AttentionMask

from ..case import (
    DTYPES,
    Candidate,
    Case,
    Inputs,
    Kind,
    Run,
    Settings,
    Skipped,
    candidate,
    generator,
    oracle,
)
from ..peers import compiled, need

MODES = ("forward", "backward")
WRT = ("q", "k", "v")
KINDS: dict[str, tuple[Kind, ...]] = {
    "forward": ("attention",),
    "backward": ("attention gradient",) * 3,
}
PREFIX = 2
RADIUS = 5  # columns of 100 ms to either side

Function = Callable[..., Sequence[Tensor]]
# of query and key index tensors: whether the pair is visible
Visible = Callable[[Tensor, Tensor], Tensor]


def _grids(settings: Settings) -> list[tuple[int, int, int, int, int]]:
    """B, f, t, H, D."""
    if settings.tiny:
        return [(1, 3, 5, 2, 32)]
    if settings.cuda:
        return [(64, 12, 101, 12, 64), (1, 12, 101, 12, 64)][: 1 if settings.quick else 2]
    return [(1, 12, 101, 12, 64)] if not settings.quick else [(1, 12, 12, 6, 64)]


def _factorised(t: int, q: Tensor, k: Tensor) -> Tensor:
    special = (q < PREFIX) | (k < PREFIX)
    a, b = q - PREFIX, k - PREFIX
    return special | (a // t == b // t) | (a % t == b % t)


def _near(t: int, q: Tensor, k: Tensor) -> Tensor:
    special = (q < PREFIX) | (k < PREFIX)
    return special | (((q - PREFIX) % t - (k - PREFIX) % t).abs() <= RADIUS)


def _inputs(dtype: str, device: str, b: int, n: int, h: int, d: int) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        draw = generator(seed, device)
        qkv = torch.randn(b, n, 3, h, d, device=device, generator=draw).to(DTYPES[dtype])
        do = torch.randn(b, n, h, d, device=device, generator=draw).to(DTYPES[dtype])
        q, k, v = qkv.unbind(2)
        return {"q": q, "k": k, "v": v, "do": do}

    return make


def _ours(mask: AttentionMask) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (need("ast_fast.ops").attention_masked(q, k, v, mask),)

    return run


def _unmasked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (need("ast_fast.ops").attention(q, k, v),)


def _sdpa(pairs: Tensor) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs.to(q.device))
        return (o.transpose(1, 2),)

    return run


def _plain(pairs: Tensor) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        p = scores.masked_fill(~pairs.to(q.device), -torch.inf).softmax(-1)
        return (torch.einsum("bhqk,bkhd->bqhd", p, v),)

    return run


@functools.cache
def _flex_parts(visible: Visible, tokens: int, device: str) -> tuple[Any, Any]:
    module = need("torch.nn.attention.flex_attention")

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(q, k)

    mask = module.create_block_mask(mask_mod, None, None, tokens, tokens, device=device)
    return compiled(module.flex_attention), mask


def _flex(visible: Visible, tokens: int, mode: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        if mode == "backward" and not q.is_cuda:
            raise Skipped("FlexAttention has no backward on a CPU")
        attend, mask = _flex_parts(visible, tokens, q.device.type)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return (attend(q, k, v, block_mask=mask).transpose(1, 2),)

    return run


def _first_clips(compute: Callable[[Inputs], Sequence[Tensor]]) -> Callable[[Inputs], Any]:
    """The oracle on two clips: the scores of more would not fit."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        return compute({name: tensor[:2] for name, tensor in inputs.items()})

    return run


def _case(
    settings: Settings,
    dtype: str,
    mode: str,
    name: str,
    mask: AttentionMask,
    visible: Visible,
    sizes: tuple[int, int, int, int, int],
) -> Case:
    b, f, t, h, d = sizes
    n = mask.queries
    pairs = mask.dense()
    make = functools.partial(candidate, mode=mode, wrt=WRT, upstream=("do",))
    plain = make("plain", _sdpa(pairs))

    def gate(inputs: Inputs) -> Run:
        # the unmasked op gives other numbers, which its own case checks
        return plain.prepare([inputs])

    whole = make("unmasked", _unmasked)
    return Case(
        suite="attention",
        name=name,
        mode=mode,
        shape={"B": b, "f": f, "t": t, "H": h, "D": d},
        dtype=dtype,
        outputs=("o",) if mode == "forward" else ("dq", "dk", "dv"),
        make_inputs=_inputs(dtype, settings.device, b, n, h, d),
        oracle=_first_clips(oracle(_plain(pairs), mode, WRT, ("do",))),
        candidates=(
            make(settings.ours, _ours(mask)),
            Candidate("unmasked", whole.prepare, prepare_gate=gate),
            make("sdpa-mask", _sdpa(pairs), yardstick=True),
            make("flex", _flex(visible, n, mode)),
        ),
        kinds=KINDS[mode],
        clips=b,
        flops=(4.0 if mode == "forward" else 10.0) * b * h * mask.pairs * d,
    )


def factorised_case(
    settings: Settings, dtype: str, mode: str, sizes: tuple[int, int, int, int, int]
) -> Case:
    """Factorised attention over a grid; sizes are B, f, t, H, D."""
    f, t = sizes[1:3]
    mask = AttentionMask.factorised(f, t, PREFIX)
    visible = functools.partial(_factorised, t)
    return _case(settings, dtype, mode, "attention_factorised", mask, visible, sizes)


def _window_case(
    settings: Settings, dtype: str, mode: str, sizes: tuple[int, int, int, int, int]
) -> Case:
    f, t = sizes[1:3]
    mask = AttentionMask.time_window(f, t, RADIUS, PREFIX)
    visible = functools.partial(_near, t)
    return _case(settings, dtype, mode, "attention_window", mask, visible, sizes)


def cases(settings: Settings) -> Iterator[Case]:
    """Factorised attention and a window in time, at the token grid of 10 s."""
    for dtype in (each for each in settings.dtypes if each in DTYPES):
        for sizes in _grids(settings):
            for make in (factorised_case, _window_case):
                for mode in MODES:
                    yield make(settings, dtype, mode, sizes)
