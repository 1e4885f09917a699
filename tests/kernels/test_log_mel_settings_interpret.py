"""The settings beyond AST's own in the Triton interpreter: windows, transforms, filters, magnitudes."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast.kernels import _tuned, log_mel, log_mel_tables
from ast_fast.reference import ops as reference
from ast_fast.reference.mel import WINDOWS, mel_tables
from ast_fast.testing import assert_within, measure, random_tensor

pytestmark = pytest.mark.interpret

SMALL = {"sample_rate_hz": 4000, "num_mel_bins": 20, "window_samples": 100, "hop_samples": 40}
SETTINGS = {
    "magnitude": {"power": 1},
    "offset": {"log_offset": 1e-3, "preemphasis": 0.0},
    "odd transform": {"n_fft": 150, "mel_scale": "htk", "remove_dc": False, "preemphasis": 0.0},
    "long transform": {"n_fft": 434, "mel_scale": "slaney", "mel_norm": "slaney", "power": 1},
    "all at once": {"n_fft": 100, "window": "povey", "mel_scale": "htk", "log_offset": 1e-6},
}
SETTINGS |= {name: {"window": name} for name in WINDOWS}


@pytest.fixture(params=["float16", "float32"])
def pieces(request, monkeypatch):
    """Both forms of the operator, in tiles that the interpreter is quick with."""
    real = _tuned.configs("log_mel", 80)
    tile = {"frames": 8, "samples": 32, "bins": 64, "pieces": request.param}
    patched = real | {name: real[name] | tile for name in ("power", "spectrum")}
    monkeypatch.setattr(_tuned, "configs", lambda op, capability: patched)


def run(wave, lengths, tables, frames):
    return log_mel.forward(wave, lengths, tables, frames, -4.0, 4.0, torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting(arena, pieces, name):
    tables = mel_tables(**(SMALL | SETTINGS[name]))
    wave, lengths = 0.1 * random_tensor(3, 400, seed=1), torch.tensor([400, 227, 99])
    exact = reference.log_mel(wave.double(), lengths, tables, 9, -4.0, 4.0)
    plain = measure(reference.log_mel(wave, lengths, tables, 9, -4.0, 4.0), exact)
    ours = measure(run(arena.put(wave), lengths, tables, 9), exact)
    assert ours.max_abs <= max(2 * plain.max_abs, 5e-7)
    assert ours.mean_abs <= max(plain.mean_abs, 6e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_every_setting(arena, pieces, name):
    tables = mel_tables(**(SMALL | SETTINGS[name]))
    wave, lengths = 0.1 * random_tensor(3, 400, seed=1), torch.tensor([400, 227, 99])
    dy = random_tensor(3, 9, 20, seed=2)
    wants = []
    for dtype in (torch.float64, torch.float32):
        leaf = wave.to(dtype).requires_grad_()
        y = reference.log_mel(leaf, lengths, tables, 9, -4.0, 4.0)
        wants.extend(torch.autograd.grad(y, leaf, dy.to(dtype)))
    got = log_mel.backward(arena.put(dy), arena.put(wave), lengths, tables, -4.0, 4.0)
    assert_within(got, wants[0], "waveform gradient", wants[1])


def test_silence_has_no_gradient_of_its_magnitude(arena, pieces):
    tables = mel_tables(**SMALL, power=1, log_floor=1e-30, log_offset=1e-6)
    dy = arena.put(random_tensor(1, 8, 20, seed=3))
    wave = arena.put(torch.zeros(1, 400))
    assert not log_mel.backward(dy, wave, None, tables, 0.0, 0.5).any()
    assert torch.allclose(run(wave, None, tables, 8), (torch.tensor(1e-6).log() + 4.0) / 8.0)


@pytest.mark.parametrize("window", WINDOWS)
def test_coarse_sums_stay_exact_for_long_windows_of_every_shape(window):
    for samples in (400, 1100, 2048):
        setting = {"window_samples": samples, "mel_scale": "htk", "low_freq_hz": 0.0}
        tables = mel_tables(remove_dc=False, preemphasis=0.0, window=window, **setting)
        op = log_mel_tables.build_operator(tables)
        steps = op.half_pieces[0].double() / 32
        # the largest coarse sample is 2^7 steps of 2^8
        assert float(steps.abs().sum(0).max()) * 2**7 <= 2**24 and steps.abs().max() <= 256
        assert torch.equal(steps, steps.round())
        whole = op.half_pieces.double().sum(0) * op.unscale
        assert float((whole - op.dense.double()).abs().max()) < 2.0**-24
