"""Attention, dense, packed and masked, forward and backward, on q, k and v that are views of one QKV buffer.

Gradients go to separate leaves, so that no candidate pays for joining them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
from ..peers import need, sdpa
from . import attention_masks

MODES = ("forward", "backward")
WRT = ("q", "k", "v")
KINDS: dict[str, tuple[Kind, ...]] = {
    "forward": ("attention",),
    "backward": ("attention gradient",) * 3,
}

Function = Callable[..., Sequence[Tensor]]
Oracle = Callable[[Inputs], Sequence[Tensor]]


def _shapes(settings: Settings) -> list[tuple[int, int, int, int]]:
    """B, T, H, D: 10 s clips at several batches, other lengths, and the other head widths once."""
    if settings.tiny:
        return [(1, 20, 2, 32)]
    if settings.cuda:
        batches = [(64, 1214, 12, 64), (1, 1214, 12, 64)]
        if settings.quick:
            return batches
        batches += [(b, 1214, 12, 64) for b in (16, 4)]
        lengths = [(128, 602, 12, 64), (512, 146, 12, 64), (32, 2402, 12, 64), (16, 4802, 12, 64)]
        return [*batches, *lengths, (32, 1214, 6, 128), (64, 1214, 12, 32)]
    full = [(1, 1214, 12, 64), (4, 602, 6, 64), (4, 146, 12, 64)]
    return full[2:] if settings.quick else full


def _inputs(dtype: str, device: str, b: int, t: int, h: int, d: int) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        draw = generator(seed, device)
        qkv = torch.randn(b, t, 3, h, d, device=device, generator=draw).to(DTYPES[dtype])
        do = torch.randn(b, t, h, d, device=device, generator=draw).to(DTYPES[dtype])
        q, k, v = qkv.unbind(2)
        return {"q": q, "k": k, "v": v, "do": do}

    return make


def _ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (need("ast_fast.ops").attention(q, k, v),)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """Attention as a formula, scores and all."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return (torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v),)


def one_pass(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """Ours, free to add gradients up in any order: only so is the one-pass backward taken."""
    return (need("ast_fast.ops").attention(q, k, v, deterministic=False),)


def _deterministic(candidate: Candidate) -> Candidate:
    """The same with PyTorch asked for deterministic algorithms, while it runs."""

    def prepare(inputs: list[Inputs]) -> Run:
        run = candidate.prepare(inputs)

        def held(index: int) -> Sequence[Tensor]:
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)
            try:
                return run(index)
            finally:
                torch.use_deterministic_algorithms(before)

        return held

    return dataclasses.replace(candidate, prepare=prepare)


def first_clips(compute: Oracle, clips: int) -> Oracle:
    """The oracle on the first clips only: the others are checked by their shape, not their values."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        return compute({name: tensor[:clips] for name, tensor in inputs.items()})

    return run


def dense_case(settings: Settings, dtype: str, b: int, t: int, h: int, d: int, mode: str) -> Case:
    """One shape of dense attention."""
    make = functools.partial(_candidate, mode)
    names = ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient"] if settings.cuda else []
    special = []
    if settings.cuda and mode == "backward":
        cudnn = make("sdpa-cudnn-deterministic", sdpa("sdpa-cudnn"))
        special = [make("one pass", one_pass), _deterministic(cudnn)]
    large = b * h * t * t > 2**28
    products = 4 if mode == "forward" else 10
    return Case(
        suite="attention",
        name="attention",
        mode=mode,
        shape={"B": b, "T": t, "H": h, "D": d},
        dtype=dtype,
        outputs=("o",) if mode == "forward" else ("dq", "dk", "dv"),
        make_inputs=_inputs(dtype, settings.device, b, t, h, d),
        oracle=first_clips(oracle(plain, mode, WRT, ("do",)), 2),
        candidates=(
            make(settings.ours, _ours),
            make("sdpa", sdpa("sdpa"), yardstick=True),
            *special,
            *(make(name, sdpa(name)) for name in names),
            # the unfused scores of the largest cases do not fit in memory
            *([] if large else [make("sdpa-math", sdpa("sdpa-math"))]),
        ),
        kinds=KINDS[mode],
        clips=b,
        flops=float(products) * b * h * t * t * d,
        graph=b == 1,
    )


def _dense(settings: Settings) -> Iterator[Case]:
    for dtype in (d for d in settings.dtypes if d in DTYPES):
        for b, t, h, d in _shapes(settings):
            for mode in MODES:
                yield dense_case(settings, dtype, b, t, h, d, mode)


def _lengths(settings: Settings) -> list[int]:
    """Tokens a clip: lengths of real clips vary; seeded, so that every run packs the same."""
    if settings.tiny:
        return [5, 18, 1]
    count = (8 if settings.quick else 64) if settings.cuda else 4
    top = 1214 if settings.cuda else 602
    draws = torch.randint(100, top + 1, (count,), generator=generator(7, "cpu")).tolist()
    return [top, *draws[1:]]


def _packed_inputs(
    dtype: str, device: str, lengths: list[int], h: int, d: int
) -> Callable[[int], Inputs]:
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)

    def make(seed: int) -> Inputs:
        draw = generator(seed, device)
        n = sum(lengths)
        qkv = torch.randn(n, 3, h, d, device=device, generator=draw).to(DTYPES[dtype])
        do = torch.randn(n, h, d, device=device, generator=draw).to(DTYPES[dtype])
        q, k, v = qkv.unbind(1)
        return {"q": q, "k": k, "v": v, "do": do, "starts": starts.to(device)}

    return make


def _packed_ours(longest: int) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor]:
        return (need("ast_fast.ops").attention_varlen(q, k, v, starts, starts, longest, longest),)

    return run


def _packed_torch(longest: int) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor]:
        module = need("torch.nn.attention.varlen")
        if not q.is_cuda:
            raise Skipped("torch.nn.attention.varlen needs a GPU")
        return (module.varlen_attn(q, k, v, starts, starts, longest, longest),)

    return run


def _loop(lengths: list[int], attend: Function) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor]:
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        clips = [attend(*(part[None] for part in clip))[0][0] for clip in parts]
        return (torch.cat(clips),)

    return run


def _padded(lengths: list[int]) -> Function:
    """Pad to the longest clip, mask, pack again: what a user without packed attention does."""
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [B, T]

    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor]:
        mask = valid.to(q.device)

        def pad(tensor: Tensor) -> Tensor:
            out = tensor.new_zeros((len(lengths), longest, *tensor.shape[1:]))
            out[mask] = tensor
            return out.transpose(1, 2)

        o = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask[:, None, None, :])
        return (o.transpose(1, 2)[mask],)

    return run


def _candidate(mode: str, name: str, function: Function, yardstick: bool = False) -> Candidate:
    return candidate(name, function, mode, WRT, ("do",), yardstick)


def _packed(settings: Settings) -> Iterator[Case]:
    lengths = _lengths(settings)
    h, d = (2, 32) if settings.tiny else (12, 64) if settings.cuda else (6, 64)
    squares = sum(length * length for length in lengths)
    for dtype in (d for d in settings.dtypes if d in DTYPES):
        for mode in MODES:
            make = functools.partial(_candidate, mode)

            yield Case(
                suite="attention",
                name="attention_varlen",
                mode=mode,
                shape={
                    "B": len(lengths),
                    "N": sum(lengths),
                    "longest": max(lengths),
                    "H": h,
                    "D": d,
                },
                dtype=dtype,
                outputs=("o",) if mode == "forward" else ("dq", "dk", "dv"),
                make_inputs=_packed_inputs(dtype, settings.device, lengths, h, d),
                oracle=oracle(_loop(lengths, plain), mode, WRT, ("do",)),
                candidates=(
                    make(settings.ours, _packed_ours(max(lengths))),
                    make("varlen", _packed_torch(max(lengths))),
                    make("sdpa-padded", _padded(lengths)),
                    make("loop", _loop(lengths, sdpa("sdpa")), yardstick=True),
                ),
                kinds=KINDS[mode],
                clips=len(lengths),
                flops=(4.0 if mode == "forward" else 10.0) * h * squares * d,
            )


def cases(settings: Settings) -> Iterator[Case]:
    """16-bit first where there is a GPU: that is what models run in."""
    yield from _dense(settings)
    yield from _packed(settings)
    yield from attention_masks.cases(settings)
