"""Direct calls of every registered op, as the tests of registration and of hostile arguments make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers them)
from .attention_mask import AttentionMask
from .testing import random_tensor

Call = tuple[str, Any, tuple[Any, ...]]  # op and number, the op, arguments

_MEL = [16000.0, 32.0, 25.0, 10.0, 20.0, 0.0, 0.97, 1.0, 1.1920928955078125e-07]


def registered_ops() -> set[str]:
    """Names of all ops in the registry."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("ast_fast::") for name in names if name.startswith("ast_fast::")}


def _rand(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True
) -> Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype).requires_grad_(grad)


def op_calls(backend: str, dtype: torch.dtype) -> Iterator[Call]:
    """Direct calls of every registered op: name to (op, arguments), three inputs each."""
    registry = torch.ops.ast_fast
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for variant, rows in enumerate((1, 5, 64)):
        x, r = _rand(rows, 24, dtype=dtype), _rand(rows, 24, seed=1, dtype=dtype)
        w, b = _rand(24, seed=2, dtype=dtype), _rand(24, seed=3, dtype=dtype)
        stats = _rand(rows, seed=4, dtype=wide, grad=False)
        yield f"layer_norm {variant}", registry.layer_norm, (x, w, b, 1e-6, dtype, backend)
        yield (
            f"layer_norm_backward {variant}",
            registry.layer_norm_backward,
            (x.detach(), r.detach(), w.detach(), stats, stats.abs(), backend),
        )
        yield (
            f"add_layer_norm {variant}",
            registry.add_layer_norm,
            (x, r, w, b, 1e-6, dtype, backend),
        )
        total = None if variant == 0 else x.detach()
        yield (
            f"add_layer_norm_backward {variant}",
            registry.add_layer_norm_backward,
            (x.detach(), total, r.detach(), w.detach(), stats, stats.abs(), backend),
        )
        w1, b1 = _rand(32, 24, seed=5, dtype=dtype), _rand(32, seed=6, dtype=dtype)
        w2, b2 = _rand(24, 32, seed=7, dtype=dtype), _rand(24, seed=8, dtype=dtype)
        yield f"mlp {variant}", registry.mlp, (x, w1, b1, w2, b2, True, backend)
        h = _rand(rows, 32, seed=9, dtype=dtype, grad=False)
        needs = [True, variant > 0, True, variant > 1, True]
        yield (
            f"mlp_backward {variant}",
            registry.mlp_backward,
            (r.detach(), x.detach(), h, w1.detach(), w2.detach(), needs, backend),
        )
    yield from _fp8_calls(backend, dtype)
    for variant, (clips, tokens) in enumerate(((1, 3), (2, 128), (2, 17))):
        shape = (clips, tokens, 2, 32)
        q, k, v, do = (_rand(*shape, seed=s, dtype=dtype) for s in range(4))
        lengths = None if variant == 0 else torch.tensor([tokens, 2][:clips], dtype=torch.int32)
        options: tuple[Any, ...] = (lengths, 0.2, True, False, backend)
        yield f"attention {variant}", registry.attention, (q, k, v, *options)
        qkv = _rand(clips, tokens, 3, 2, 32, seed=5, dtype=dtype)
        yield f"attention_qkv {variant}", registry.attention_qkv, (qkv, *options)
        o, lse = registry.attention(q.detach(), k.detach(), v.detach(), *options)
        yield (
            f"attention_backward {variant}",
            registry.attention_backward,
            (do.detach(), q.detach(), k.detach(), v.detach(), o, lse, *options),
        )
        o, lse = registry.attention_qkv(qkv.detach(), *options)
        yield (
            f"attention_qkv_backward {variant}",
            registry.attention_qkv_backward,
            (do.detach(), qkv.detach(), o, lse, *options),
        )
        starts = torch.tensor([0, tokens - 1, clips * tokens], dtype=torch.int32)
        packed = [t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v)]
        longest = (clips * tokens, clips * tokens)
        options = (starts, starts, *longest, 0.2, True, False, backend)
        yield f"attention_varlen {variant}", registry.attention_varlen, (*packed, *options)
        packed = [t.detach() for t in packed]
        o, lse = registry.attention_varlen(*packed, *options)
        yield (
            f"attention_varlen_backward {variant}",
            registry.attention_varlen_backward,
            (do.detach().flatten(0, 1), *packed, o, lse, *options),
        )
        seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(variant)) < 0.6
        rectangles = AttentionMask.from_dense(seen).rectangles
        options = (rectangles, 0.2, True, False, backend)
        yield f"attention_masked {variant}", registry.attention_masked, (q, k, v, *options)
        saved = [t.detach() for t in (q, k, v)]
        o, lse = registry.attention_masked(*saved, *options)
        yield (
            f"attention_masked_backward {variant}",
            registry.attention_masked_backward,
            (do.detach(), *saved, o, lse, *options),
        )
        bias = _rand(*saved[1].shape[:2], dtype=torch.float32).detach()
        args = (*saved, bias, 0.2, False, backend)
        yield f"attention_biased {variant}", registry.attention_biased, args
    for variant in range(3):
        prefix = variant
        x, w = _rand(2, 36, 16, dtype=dtype), _rand(8, 1, 16, 16, seed=1, dtype=dtype)
        pos = _rand(prefix + 3, 8, seed=2, dtype=dtype)
        prefix_tokens = _rand(prefix, 8, seed=3, dtype=dtype)
        bias = _rand(8, seed=4, dtype=dtype)
        args = (x, w, bias, pos, prefix_tokens, 10, 10, False, backend)
        yield f"patch_embed {variant}", registry.patch_embed, args
        dy = _rand(2, prefix + 3, 8, seed=5, dtype=dtype, grad=False)
        args = (dy, x.detach(), w.detach(), 10, 10, prefix, variant > 0, False, backend)
        yield f"patch_embed_backward {variant}", registry.patch_embed_backward, args
    if dtype != torch.bfloat16:  # waveforms are float32 or wider
        for variant, samples in enumerate((900, 399, 1600)):
            wave = _rand(2, samples, dtype=dtype)
            lengths = None if variant == 0 else torch.tensor([samples, 600])
            args = (wave, lengths, _MEL, 5, -4.0, 2.0, dtype, backend)
            yield f"log_mel {variant}", registry.log_mel, args
            dy = _rand(2, 5, 32, seed=1, dtype=dtype, grad=False)
            args = (dy, wave.detach(), lengths, _MEL, -4.0, 2.0, backend)
            yield f"log_mel_backward {variant}", registry.log_mel_backward, args


def _fp8_calls(backend: str, dtype: torch.dtype) -> Iterator[Call]:
    """Direct calls of the FP8 layers, with and without a norm in front."""
    backend = "reference" if backend == "cpp" else backend  # which has no FP8, and says so
    registry = torch.ops.ast_fast
    for variant, rows in enumerate((1, 5, 64)):
        x, dy = _rand(rows, 32, dtype=dtype), _rand(rows, 32, seed=1, dtype=dtype, grad=False)
        w1, b1 = _rand(48, 32, seed=2, dtype=dtype), _rand(48, seed=3, dtype=dtype)
        w2, b2 = _rand(32, 48, seed=4, dtype=dtype), _rand(32, seed=5, dtype=dtype)
        norm: tuple[Any, ...] = (None, None, None, 0.0)
        if variant:
            ones, zeros = _rand(32, seed=7, dtype=dtype), _rand(32, seed=8, dtype=dtype)
            norm = (_rand(rows, 32, seed=6, dtype=dtype), ones, zeros, 1e-6)
        bias = b1 if variant else None
        args: tuple[Any, ...] = (x, *norm, w1, bias, True, backend)
        yield f"linear_fp8 {variant}", registry.linear_fp8, args
        made = registry.linear_fp8(*(t.detach() if torch.is_tensor(t) else t for t in args))
        needs = [True, variant > 0, variant > 1]
        args = (made[0], *made[4:], w1.detach(), needs, backend)
        yield f"linear_fp8_backward {variant}", registry.linear_fp8_backward, args
        args = (x, *norm, w1, b1, w2, b2, True, backend)
        yield f"mlp_fp8 {variant}", registry.mlp_fp8, args
        made = registry.mlp_fp8(*(t.detach() if torch.is_tensor(t) else t for t in args))
        args = (dy, list(made[4:]), w1.detach(), w2.detach(), [True, *needs, True], backend)
        yield f"mlp_fp8_backward {variant}", registry.mlp_fp8_backward, args
