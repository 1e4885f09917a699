"""The compiled kernels called with wrong numbers and wrong tensors: ValueError, before any of them runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_fast import _C, ops, use_backend
from ast_fast.attention_mask import AttentionMask
from ast_fast.cpp import (
    add_layer_norm,
    attention,
    attention_biased,
    attention_masked,
    attention_varlen,
    flac,
    layer_norm,
    log_mel,
    mlp,
    packed,
    patch_embed,
)
from ast_fast.reference.mel import mel_tables
from ast_fast.testing import random_tensor

BINDINGS = (Path(__file__).resolve().parents[2] / "csrc" / "bindings.cpp").read_text()
# entries that take no address
HARMLESS = {"isa", "isas", "is_amd"}
# addresses that may be 0: there is no such tensor then
OPTIONAL = {"residual", "total", "dtotal", "lengths", "key_bias", "q_scale"}
MASK = AttentionMask.factorised(2, 3, prefix=0)


def rand(*shape, seed=0):
    return random_tensor(*shape, seed=seed)


def parameters(entry):
    """Type and name of each parameter of an entry, as the bindings declare them."""
    found = re.search(rf"^(?:void|bool|uint64_t) {entry}\(([^)]*)\)", BINDINGS, re.M)
    return [tuple(each.split()[-2:]) for each in found[1].replace("&", "").split(",")]


def wrong_numbers(kind, name, value):
    """Numbers that a parameter of this type and name must refuse."""
    if name == "threads":
        return
    if kind == "uintptr_t":
        if value and name not in OPTIONAL:
            yield 0
    elif kind == "int64_t":
        yield from (-1, 2**62)
    elif kind == "int" and (name == "dtype" or name.endswith("_type")):
        yield from (-1, 3, 7, 2**20)
    elif kind == "int":
        yield from (0, 255, -1)
    elif kind == "py::tuple" and name == "grid":
        yield value[:-1]
        yield from ((*value[:place], 0, *value[place + 1 :]) for place in range(6))
        yield from ((*value[:place], 2**40, *value[place + 1 :]) for place in range(4))
    elif kind == "py::tuple":
        yield from ((), value[:-1])
        if len(value) == 4:
            yield (0, *value[1:])
            yield from ((*value[:place], -1, *value[place + 1 :]) for place in (1, 2, 3))
    elif kind == "float":
        yield from (0.0, -1.0, float("nan"), float("inf"))


class Entries:
    """Stands before the compiled kernels: each right call is made with wrong numbers first."""

    def __init__(self, monkeypatch):
        self.refused = {}
        for entry in sorted(set(dir(_C)) - HARMLESS):
            real = getattr(_C, entry)
            if entry.startswith("_") or not callable(real) or isinstance(real, type):
                continue
            self.refused[entry] = 0
            monkeypatch.setattr(_C, entry, self._before(entry, real))

    def _before(self, entry, real):
        def call(*args):
            if entry != "fingerprint":
                self._try(entry, real, args)
            return real(*args)

        return call

    def _try(self, entry, real, args):
        declared = parameters(entry)
        assert len(declared) == len(args)
        for place, ((kind, name), value) in enumerate(zip(declared, args, strict=True)):
            if name in ("filters", "begin", "file", "owner"):
                continue
            for wrong in wrong_numbers(kind, name, value):
                if entry.startswith("patch_") and name == "grid" and wrong == value:
                    continue
                with pytest.raises((ValueError, TypeError, MemoryError), match=""):
                    real(*args[:place], wrong, *args[place + 1 :])
                self.refused[entry] += 1


def test_every_entry_refuses_numbers_that_no_kernel_can_use(monkeypatch):
    x = rand(20, 32)
    ones, zeros = torch.ones(32), torch.zeros(32)
    q, k, v, do = (rand(2, 6, 2, 32, seed=seed) for seed in range(4))
    grads = [torch.empty_like(q) for _ in range(3)]
    starts = torch.tensor([0, 6, 12], dtype=torch.int32)
    tables = mel_tables(num_mel_bins=32)
    wave = rand(2, 1600)
    entries = Entries(monkeypatch)

    _, _, mean, rstd = add_layer_norm.forward(x, x, ones, zeros, 1e-6, torch.float32)
    add_layer_norm.backward(x, x, x, ones, mean, rstd)
    mlp.gelu_backward(x, mlp.gelu_forward(x))
    mlp.column_sum(x)
    o, lse = attention.forward(q, k, v, 0.2, torch.tensor([3, 6]))
    attention.backward(do, q, k, v, o, lse, 0.2, torch.tensor([3, 6]), True, *grads)
    attention_biased.forward(q, k, v, rand(2, 6), 0.2)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    o, lse = attention_varlen.forward(*flat, starts, starts, 6, 6, 0.2)
    flat_grads = [t.flatten(0, 1) for t in grads]
    attention_varlen.backward(
        do.flatten(0, 1), *flat, o, lse, starts, starts, 6, 6, 0.2, True, *flat_grads
    )
    o, lse = attention_masked.forward(q, k, v, MASK.rectangles, 0.2)
    attention_masked.backward(do, q, k, v, o, lse, MASK.rectangles, 0.2, True, *grads)
    for width in (32, 8):  # with a product of its own, and without
        spectrogram, weight = rand(2, 36, 16), rand(width, 1, 16, 16)
        pos, prefix = rand(4, width), rand(1, width)
        patch_embed.forward(spectrogram, weight, rand(width), pos, prefix, 10, 10)
        patch_embed.backward(rand(2, 4, width), spectrogram, weight, 10, 10, 1, True)
    log_mel.forward(wave, None, tables, 5, 0.0, 1.0, torch.float32)
    log_mel.backward(rand(2, 5, 32), wave, None, tables, 0.0, 1.0)
    packed.int8_rows(x, torch.ones(20), zeros, residual=x, norm=(ones, zeros, 1e-6))
    # an entry that this test does not reach has no case
    own_gemm = {"patch_project", "patch_weight_gradient"}
    unreached = {name for name, count in entries.refused.items() if not count}
    unreached -= {"fingerprint", "flac_decode"} | (set() if patch_embed._OWN_GEMM else own_gemm)
    assert not unreached


def test_flac_and_fingerprints_refuse_wrong_sizes():
    out = np.empty(8, np.int16)
    for samples, most in ((-1, 8), (8, -1), (2**62, 8)):
        with pytest.raises(ValueError, match="samples, most_samples"):
            _C.flac_decode(b"x" * 64, 42, out.ctypes.data, out.ctypes.data, samples, most)
    with pytest.raises(ValueError, match="an address"):
        _C.flac_decode(b"x" * 64, 42, 0, 0, 8, 8)
    assert flac.decode(b"fLaC") is None
    with pytest.raises(ValueError, match="address"):
        _C.fingerprint([(0, 64)])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        _C.fingerprint([5])
    with pytest.raises(ValueError, match="address, bytes"):
        _C.fingerprint([(1,)])


def test_tables_of_a_log_mel_refuse_wrong_sizes():
    numbers = torch.zeros(4096, dtype=torch.float64)
    right = (400, 160, 512, 8, 0.97, True, 1e-7, False, 0.0)
    address = numbers.data_ptr()
    _C.LogMelTables(address, address, *right)
    for place, wrong in ((0, 0), (0, 513), (1, 0), (2, 7), (2, -4), (2, 2**50), (3, -1), (3, 0)):
        with pytest.raises(ValueError):
            _C.LogMelTables(address, address, *right[:place], wrong, *right[place + 1 :])
    for addresses in ((0, address), (address, 0)):
        with pytest.raises(ValueError, match="an address"):
            _C.LogMelTables(*addresses, *right)


def packed_calls():
    """Right calls of the adapters, by name: function and arguments."""
    q, k, v, do = (rand(2, 6, 2, 32, seed=seed) for seed in range(4))
    lse = torch.zeros(2, 2, 128)
    flat = [t.flatten(0, 1) for t in (q, k, v, do)]
    starts = torch.tensor([0, 6, 12], dtype=torch.int32)
    x, ones = rand(20, 32), torch.ones(32)
    rows = torch.ones(20)
    spectrogram, weight = rand(2, 36, 16), rand(32, 1, 16, 16)
    tables = mel_tables(num_mel_bins=32)
    grads = [torch.empty_like(q) for _ in range(3)]
    flat_grads = [g.flatten(0, 1) for g in grads]
    lengths = torch.tensor([3, 6])
    yield "attention", attention.forward, (q, k, v, 0.2, lengths)
    yield (
        "attention backward",
        attention.backward,
        (*(do, q, k, v, q, lse, 0.2, lengths, True, *grads),),
    )
    yield "attention_biased", attention_biased.forward, (q, k, v, rand(2, 6), 0.2)
    yield "attention_varlen", attention_varlen.forward, (*flat[:3], starts, starts, 6, 6, 0.2)
    yield (
        "attention_varlen backward",
        attention_varlen.backward,
        (
            *(flat[3], *flat[:3], flat[0], torch.zeros(2, 384)),
            *(starts, starts, 6, 6, 0.2, True, *flat_grads),
        ),
    )
    yield "attention_masked", attention_masked.forward, (q, k, v, MASK.rectangles, 0.2)
    yield (
        "attention_masked backward",
        attention_masked.backward,
        (*(do, q, k, v, q, lse, MASK.rectangles, 0.2, True, *grads),),
    )
    yield "layer_norm", layer_norm.forward, (x, ones, ones, 1e-6, torch.float32)
    yield "layer_norm backward", layer_norm.backward, (x, x, ones, rows, rows)
    yield "add_layer_norm", add_layer_norm.forward, (x, x, ones, ones, 1e-6, torch.float32)
    yield "add_layer_norm backward", add_layer_norm.backward, (x, x, x, ones, rows, rows)
    yield "gelu backward", mlp.gelu_backward, (x, x)
    yield (
        "patch_embed",
        patch_embed.forward,
        (*(spectrogram, weight, ones, rand(4, 32), rand(1, 32), 10, 10),),
    )
    yield (
        "patch_embed backward",
        patch_embed.backward,
        (*(rand(2, 4, 32), spectrogram, weight, 10, 10, 1, True),),
    )
    yield "log_mel", log_mel.forward, (rand(2, 1600), lengths, tables, 5, 0.0, 1.0, torch.float32)
    yield (
        "log_mel backward",
        log_mel.backward,
        (*(rand(2, 5, 32), rand(2, 1600), lengths, tables, 0.0, 1.0),),
    )


CALLS = {name: (function, args) for name, function, args in packed_calls()}
# arguments whose size nothing else fixes
FREE = {
    ("layer_norm", 0, "shorter"),  # rows
    ("log_mel", 0, "narrower"),  # samples
    ("log_mel backward", 1, "narrower"),
    ("patch_embed", 0, "shorter"),  # clips
    ("patch_embed", 1, "narrower"),  # frames of a patch: as many patches as before
    ("patch_embed backward", 2, "narrower"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_adapter_refuses_tensors_that_do_not_fit_together(name):
    function, args = CALLS[name]
    function(*args)
    for place, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            continue
        for what, wrong in (("narrower", value[..., :-1]), ("shorter", value[:-1])):
            if (name, place, what) not in FREE:
                with pytest.raises((ValueError, RuntimeError), match=r"C\+\+|do not fit|cu_"):
                    function(*args[:place], wrong, *args[place + 1 :])


@pytest.mark.parametrize("width", (33, 31, 0, 48, 160))
@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("attention")])
def test_head_widths_that_the_kernels_lack_are_refused(name, width):
    function, args = CALLS[name]
    resized = [
        a.new_zeros(*a.shape[:-1], width) if torch.is_tensor(a) and a.shape[-2:] == (2, 32) else a
        for a in args
    ]
    with pytest.raises(ValueError, match="head width"):
        function(*resized)
    q = torch.zeros(1, 5, 2, width)
    registry = torch.ops.ast_fast
    with pytest.raises(ValueError, match="head width"):
        registry.attention(q, q, q, None, 0.2, True, False, "cpp")
    with use_backend("cpp"), pytest.raises(RuntimeError, match="head width"):
        ops.attention(q, q, q, 0.2)


@pytest.mark.parametrize(
    "lengths", ([0, 7, 6, 12], [0, 6, 13], [0, 6, 11], [1, 6, 12], [0, -3, 12])
)
@pytest.mark.parametrize("place", (0, 1))
@pytest.mark.parametrize("name", ("attention_varlen", "attention_varlen backward"))
def test_starts_of_packed_clips_are_checked_by_the_bindings_too(name, place, lengths):
    function, args = CALLS[name]
    args = list(args)
    first = next(i for i, a in enumerate(args) if torch.is_tensor(a) and a.dtype == torch.int32)
    starts = [torch.tensor([0, *[12] * (len(lengths) - 1)], dtype=torch.int32) for _ in range(2)]
    starts[place] = torch.tensor(lengths, dtype=torch.int32)
    args[first : first + 2] = starts
    if "backward" in name:
        args[first - 1] = torch.zeros(2, (12 + (len(lengths) - 1) * 128 + 127) // 128 * 128)
    with pytest.raises(ValueError, match=f"cu_{'qk'[place]}: expected where each clip starts"):
        function(*args)
