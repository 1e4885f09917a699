"""Launches of a model's sizes on a GPU that is not there: which of them a warmed cache would not serve.

    python tests/aot/launches.py ARCH keys      one JSON line: kernels asked for, and those without a case
    python tests/aot/launches.py ARCH names     one JSON line: name of each case's cache entry
    python tests/aot/launches.py ARCH backwards the same, last case first
    python tests/aot/launches.py ARCH binaries  one JSON line: kernels that came from a warmed cache

A process of its own, so that it runs under whichever Triton PYTHONPATH puts first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction, get_cache_invalidating_env_vars

from ast_fast.kernels import (
    _aot,
    _tuned,
    add_layer_norm,
    attention,
    attention_varlen,
    fp8,
    gemm,
    layer_norm,
    log_mel,
    mlp,
    patch_embed,
)
from ast_fast.reference.mel import mel_tables

BF16 = torch.bfloat16
TOKENS = 1214


class PretendDriver:
    """As much of a driver as a launch asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def pretend(arch: int, on_request) -> None:
    """From now on launches call `on_request(fn, source, options, target)` where they would compile."""

    def request(self, key, signature, device, constexprs, options, attrs, warmup):
        source = ASTSource(self, signature, constexprs, attrs)
        on_request(self, source, options.__dict__, GPUTarget("cuda", arch, 32))

    triton.runtime.driver._active = PretendDriver(arch)
    _tuned.capability = lambda device: arch
    _tuned.sm_count = lambda device: 132
    JITFunction._do_compile = request


def cache_key(source: ASTSource, options: dict, target: GPUTarget) -> str:
    """Name of the folder that `triton.compile` would look in."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    key = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def attention_launches(clips: int) -> None:
    q, k, v = torch.empty(clips, TOKENS, 3, 12, 64, dtype=BF16).unbind(2)
    o, lse = attention.forward(q, k, v, 0.125, None)
    for deterministic in (True, False):
        grads = [torch.empty_like(x) for x in (q, k, v)]
        attention.backward(o, q, k, v, o, lse, 0.125, None, deterministic, *grads)
    packed = [x.reshape(-1, 12, 64) for x in (q, k, v)]
    starts = torch.arange(clips + 1, dtype=torch.int32) * TOKENS
    attention_varlen.forward(*packed, starts, starts, TOKENS, TOKENS, 0.125)


def row_launches(rows: int) -> None:
    x, update = (torch.empty(rows, 768, dtype=BF16) for _ in range(2))
    for dtype in (BF16, torch.float32):
        weight, bias = torch.empty(2, 768, dtype=dtype)
        _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, BF16)
        layer_norm.backward(x, x, weight, mean, rstd)
        stream = x.to(dtype)
        add_layer_norm.forward(update, stream, weight, bias, 1e-6, BF16)
        add_layer_norm.backward(update, stream, stream, weight, mean, rstd)
    h = torch.empty(rows, 3072, dtype=BF16)
    mlp.gelu_forward(h)
    mlp.gelu_backward_with_sums(h, h)


def product_launches(rows: int) -> None:
    x, h = torch.empty(rows, 768, dtype=BF16), torch.empty(rows, 3072, dtype=BF16)
    w1, w2 = torch.empty(3072, 768, dtype=BF16), torch.empty(768, 3072, dtype=BF16)
    b1, b2 = torch.empty(3072, dtype=BF16), torch.empty(768, dtype=BF16)
    gemm.linear(x, w1, b1)
    gemm.linear_residual(h, w2, b2, x)
    for save in (False, True):
        gemm.linear_gelu(x, w1, b1, save)
    gemm.gelu_backward(x, w2, h)


def fp8_launches(rows: int) -> None:
    x, h = torch.empty(rows, 768, dtype=BF16), torch.empty(rows, 3072, dtype=BF16)
    partials = torch.empty(64)
    one = fp8.bound(partials, partials, 1.0, torch.empty(768, dtype=BF16))
    fp8.bound(partials, one, 1.0)
    fp8.facts(x)
    fp8.quantise(x, partials)
    fp8.quantise(x, partials, columns=True)
    fp8.quantise(h, one, gelu=True)
    fp8.quantise(x, partials, gradient=True, columns=True, sums=True)
    fp8.gelu_backward_quantise(h, h, one, one)
    weight, bias = torch.empty(2, 768, dtype=BF16)
    for columns in (False, True):
        fp8.norm_quantise(x, x, weight, bias, 1e-6, columns)


def front_end_launches(clips: int) -> None:
    tables = mel_tables()
    lengths = torch.full((clips,), 160_000)
    for dtype in (torch.int16, torch.float32):
        wave = torch.zeros(clips, 160_000, dtype=dtype)
        for given in (None, lengths):
            log_mel.forward(wave, given, tables, 1024, -4.27, 4.57, BF16)
    x = torch.empty(clips, 1024, 128, dtype=BF16)
    weight, bias = torch.empty(768, 1, 16, 16, dtype=BF16), torch.empty(768, dtype=BF16)
    pos, prefix = torch.empty(TOKENS, 768, dtype=BF16), torch.empty(2, 768, dtype=BF16)
    y = patch_embed.forward(x, weight, bias, pos, prefix, 10, 10)
    patch_embed.backward(y, x, weight, 10, 10, 2, False)


def compare_keys(arch: int) -> dict:
    """Launches of all kinds and sizes, by the names of their cache entries alone."""
    warmed = warmed_cases(arch)
    asked: dict[str, str] = {}

    def note(fn, source, options, target) -> None:
        names = [fn.arg_names[place[0]] for place, found in source.attrs.items() if found]
        types = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
        key = cache_key(source, options, target)
        asked[key] = f"{fn.fn.__module__}.{fn.fn.__name__} {types}, divisible {names}"

    pretend(arch, note)
    for clips in (1, 3, 8):
        attention_launches(clips)
        row_launches(clips * TOKENS)
        product_launches(clips * TOKENS)
        front_end_launches(clips)
        if arch >= fp8.OLDEST:
            fp8_launches(clips * TOKENS)
    return {"asked": len(asked), "missing": [t for key, t in asked.items() if key not in warmed]}


def take_binaries(arch: int) -> dict:
    """A few launches whose binaries are built from the cases first and must then be found."""
    warmed = warmed_cases(arch)
    served = []

    def take(fn, source, options, target) -> None:
        built = _aot.build(warmed[cache_key(source, options, target)], arch)

        def refuse(*_args, **_options) -> None:
            raise AssertionError(f"{fn.fn.__name__} was compiled again")

        backend = type(make_backend(target))
        stages = backend.add_stages
        backend.add_stages = refuse
        try:
            found = triton.compile(source, target=target, options=options)
        finally:
            backend.add_stages = stages
        assert found.hash == built.hash and found.asm["cubin"] == built.asm["cubin"]
        served.append(fn.fn.__name__)

    pretend(arch, take)
    x = torch.empty(32, 768, dtype=BF16)
    weight, bias = torch.empty(2, 768, dtype=BF16)
    layer_norm.forward(x, weight, bias, 1e-6, BF16)
    gemm.linear(x, torch.empty(768, 768, dtype=BF16), bias)
    q, k, v = torch.empty(1, TOKENS, 3, 12, 64, dtype=BF16).unbind(2)
    attention.forward(q, k, v, 0.125, None)
    wave = torch.zeros(1, 16_000, dtype=torch.int16)
    log_mel.forward(wave, None, mel_tables(), 98, -4.27, 4.57, BF16)
    return {"served": served}


def warmed_cases(arch: int) -> dict:
    """The cases that a warm-up compiles, by the names of their cache entries."""
    target = GPUTarget("cuda", arch, 32)
    return {
        cache_key(_aot.source(case), _aot.options(case), target): case
        for module in _aot.WARM_ORDER
        for case in _aot.cases_of(module, arch)
        if not case.twin
    }


def entry_names(arch: int, backwards: bool = False) -> dict:
    """Names of the cases' cache entries, found out in one order or the other."""
    target = GPUTarget("cuda", arch, 32)
    cases = [case for module in _aot.WARM_ORDER for case in _aot.cases_of(module, arch)]
    if backwards:
        cases.reverse()
    names = [f"{case.fn.fn.__module__} {case.name}" for case in cases]
    keys = [cache_key(_aot.source(case), _aot.options(case), target) for case in cases]
    return {"names": dict(zip(names, keys, strict=True))}


def main() -> None:
    jobs = {
        "keys": compare_keys,
        "names": entry_names,
        "backwards": functools.partial(entry_names, backwards=True),
        "binaries": take_binaries,
    }
    answer = jobs[sys.argv[2]](int(sys.argv[1]))
    print(json.dumps({"triton": triton.__version__, **answer}))


if __name__ == "__main__":
    main()
