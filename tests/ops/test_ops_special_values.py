"""NaN, Inf and extreme scales: what is affected is exact, and nothing else changes."""

import math

import pytest
import torch
import torch.nn.functional as F

from ast_fast import backend as backends
from ast_fast import ops, reference
from ast_fast.testing import available_backends, measure, random_tensor

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.parametrize("backend", available_backends())


def test_nan_in_a_row_of_layer_norm_stays_in_the_row(backend):
    x = random_tensor(5, 40, seed=0)
    clean = x.clone()
    x[2, 7] = NAN
    weight, bias = random_tensor(40, seed=1), random_tensor(40, seed=2)
    with backends.use_backend(backend):
        y, want = ops.layer_norm(x, weight, bias), ops.layer_norm(clean, weight, bias)
    assert y[2].isnan().all()
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(y[keep], want[keep])


def test_nan_in_a_clip_of_attention_stays_in_the_clip(backend):
    q, k, v = (random_tensor(3, 20, 2, 32, seed=s) for s in range(3))
    bad = k.clone()
    bad[1, 4, 0, 3] = NAN
    leaves = [t.clone().requires_grad_() for t in (q, bad, v)]
    with backends.use_backend(backend):
        want, o = ops.attention(q, k, v), ops.attention(*leaves)
        o.sum().backward()
    assert o[1, :, 0].isnan().all()
    assert torch.equal(o[[0, 2]], want[[0, 2]])
    assert torch.equal(o[1, :, 1], want[1, :, 1])
    assert all(t.grad[[0, 2]].isfinite().all() for t in leaves)


@pytest.mark.parametrize("poison", (NAN, INF, -INF))
def test_masked_keys_leak_nothing(poison, backend):
    q, k, v = (random_tensor(3, 20, 2, 32, seed=s) for s in range(3))
    do = random_tensor(3, 20, 2, 32, seed=4)
    lengths = torch.tensor([20, 7, 0], dtype=torch.int32)
    for clip, length in enumerate(lengths.tolist()):
        k[clip, length:] = poison
        v[clip, length:] = poison
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with backends.use_backend(backend):
        o, lse = ops.attention(*leaves, key_lengths=lengths, return_lse=True)
        o.backward(do)
        alone = ops.attention(q[1:2], k[1:2, :7], v[1:2, :7])
    assert o.isfinite().all()
    assert measure(o[1:2], alone).rel_l2 < 1e-6
    assert torch.equal(o[2], torch.zeros_like(o[2])) and (lse[2] == INF).all()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    for clip, length in enumerate(lengths.tolist()):
        assert not k.grad[clip, length:].any() and not v.grad[clip, length:].any()
    assert not q.grad[2].any()


def test_nan_in_a_packed_clip_stays_in_the_clip(backend):
    q, k, v = (random_tensor(30, 2, 32, seed=s) for s in range(3))
    v[12] = NAN
    starts = torch.tensor([0, 10, 17, 30], dtype=torch.int32)
    with backends.use_backend(backend):
        o = ops.attention_varlen(q, k, v, starts, starts, 13, 13)
    assert o[10:17].isnan().all()
    assert o[:10].isfinite().all() and o[17:].isfinite().all()


def test_nan_in_a_spectrogram_stays_in_its_patches(backend):
    x = random_tensor(2, 48, 32, seed=0)
    x[1, 20, 5] = NAN
    weight = random_tensor(8, 1, 16, 16, seed=1)
    pos, prefix = random_tensor(2 + 2 * 3, 8, seed=2), random_tensor(2, 8, seed=3)
    with backends.use_backend(backend):
        y = ops.patch_embed(x, weight, random_tensor(8, seed=4), pos, prefix, 16, 16)
    hit = y.isnan().any(-1)
    want = torch.zeros(2, 8, dtype=torch.bool)
    want[1, 2 + 0 * 3 + 1] = (
        True  # mel bin 5 is in the first row of patches, frame 20 in the second
    )
    assert torch.equal(hit, want)
    assert y[1, 3].isnan().all()


def test_nan_sample_reaches_exactly_the_frames_that_hold_it(backend):
    wave = random_tensor(2, 3200, seed=0, scale=0.1)
    wave[1, 1000] = NAN
    with backends.use_backend(backend):
        y = ops.log_mel(wave)
    held = [160 * s <= 1000 < 160 * s + 400 for s in range(y.shape[1])]
    # an empty filter looks at nothing: its floor or NaN are both right
    filled = y[1][:, reference.mel.mel_tables().filters.sum(1) > 0]
    assert torch.equal(filled.isnan().all(-1), torch.tensor(held))
    assert torch.equal(y[1].isnan().any(-1), torch.tensor(held))
    assert y[0].isfinite().all()


@pytest.mark.parametrize("poison", (NAN, INF))
def test_samples_beyond_the_length_are_ignored_even_if_not_finite(poison, backend):
    wave = random_tensor(2, 3200, seed=0, scale=0.1)
    wave[1, 1500:] = poison
    wave.requires_grad_()
    lengths = torch.tensor([3200, 1500])
    with backends.use_backend(backend):
        y = ops.log_mel(wave, lengths, num_frames=20, mean=-4.0, std=2.0)
        y.sum().backward()
        alone = ops.log_mel(wave[1:, :1500].detach(), num_frames=20, mean=-4.0, std=2.0)
    assert measure(y[1:], alone).max_abs < 1e-3
    assert wave.grad.isfinite().all()
    assert not wave.grad[1, 1500:].any()


def test_gelu_has_its_limits_at_the_infinities(backend):
    x = torch.tensor([[INF], [-INF], [NAN], [30.0], [-30.0], [0.0]])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    leaf = x.clone().requires_grad_()
    with backends.use_backend(backend):
        y = ops.mlp(leaf, one, zero, one, zero)
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert y[0] == INF and y[1] == 0 and y[2].isnan()
    assert torch.equal(y[3:], torch.tensor([[30.0], [0.0], [0.0]]))
    assert slope[0] == 1 and slope[1] == 0 and slope[2].isnan()
    assert torch.equal(slope[3:], torch.tensor([[1.0], [0.0], [0.5]]))


def test_layer_norm_of_a_constant_row_is_its_bias(backend):
    x = torch.full((3, 64), 7.25)
    weight, bias = random_tensor(64, seed=1), random_tensor(64, seed=2)
    with backends.use_backend(backend):
        assert torch.equal(ops.layer_norm(x, weight, bias), bias.expand(3, 64))


@pytest.mark.parametrize("scale", (1e-20, 1e-3, 1e4, 1e10))
def test_layer_norm_at_extreme_scales(scale, backend):
    x = random_tensor(6, 96, seed=0, scale=scale).requires_grad_()
    weight, bias = random_tensor(96, seed=1), random_tensor(96, seed=2)
    dy = random_tensor(6, 96, seed=3)
    wide = x.detach().double().requires_grad_()
    want = F.layer_norm(wide, (96,), weight.double(), bias.double(), 1e-6)
    with backends.use_backend(backend):
        y = ops.layer_norm(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    (want_dx,) = torch.autograd.grad(want, wide, dy.double())
    assert measure(y, want).rel_l2 < 2e-6
    assert measure(dx, want_dx).rel_l2 < 5e-6


def test_layer_norm_keeps_its_accuracy_far_from_zero(backend):
    # variance by E[x^2] - E[x]^2 would lose every digit here
    x = random_tensor(6, 768, seed=0) + 3000.0
    weight, bias = torch.ones(768), torch.zeros(768)
    want = F.layer_norm(x.double(), (768,), weight.double(), bias.double(), 1e-6)
    with backends.use_backend(backend):
        assert measure(ops.layer_norm(x, weight, bias), want).rel_l2 < 2e-4


@pytest.mark.parametrize("scale", (1e-4, 30.0, 100.0))
def test_attention_at_extreme_scores(scale, backend):
    q = random_tensor(1, 40, 2, 64, seed=0, scale=scale).requires_grad_()
    k, v = random_tensor(1, 40, 2, 64, seed=1, scale=scale), random_tensor(1, 40, 2, 64, seed=2)
    want = reference.ops.attention(q.detach().double(), k.double(), v.double(), 0.125)[0]
    plain = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    with backends.use_backend(backend):
        o = ops.attention(q, k, v)
    o.sum().backward()
    assert measure(o, want).rel_l2 < max(1e-6, 2 * measure(plain, want).rel_l2)
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("lift", (1e4, -1e4))
def test_a_constant_added_to_all_scores_changes_nothing(lift, backend):
    q, k, v = (random_tensor(1, 30, 1, 32, seed=s) for s in range(3))
    # one more coordinate, equal in all keys, lifts every score of a query alike
    q[..., 0], k[..., 0] = 1.0, lift
    base = k.clone()
    base[..., 0] = 0.0
    with backends.use_backend(backend):
        assert measure(ops.attention(q, k, v), ops.attention(q, base, v)).max_abs < 5e-3


def test_log_mel_of_silence_is_the_logarithm_of_the_floor(backend):
    wave = torch.zeros(1, 1600, requires_grad=True)
    with backends.use_backend(backend):
        y = ops.log_mel(wave)
        y.sum().backward()
    assert (y - math.log(1.1920928955078125e-07)).abs().max() < 2e-6
    assert torch.equal(wave.grad, torch.zeros_like(wave))


def test_the_empty_mel_filter_gives_the_floor_and_no_gradient(backend):
    wave = random_tensor(1, 1600, seed=0, scale=0.1).requires_grad_()
    empty = (reference.mel.mel_tables().filters.sum(1) == 0).nonzero().flatten().tolist()
    assert empty == [3]
    with backends.use_backend(backend):
        y = ops.log_mel(wave)
        (slope,) = torch.autograd.grad(y[:, :, 3].sum(), wave)
    assert (y[:, :, 3] - math.log(1.1920928955078125e-07)).abs().max() < 2e-6
    assert torch.equal(slope, torch.zeros_like(wave))


@pytest.mark.parametrize("scale", (1e-20, 1.0, 1e4))
def test_log_mel_at_extreme_scales_is_finite(scale, backend):
    wave = random_tensor(1, 1600, seed=0, scale=scale).requires_grad_()
    with backends.use_backend(backend):
        y = ops.log_mel(wave)
    y.sum().backward()
    assert y.isfinite().all() and wave.grad.isfinite().all()


def test_int16_waveforms_are_the_same_as_their_scaled_floats(backend):
    ints = (
        (random_tensor(2, 1600, seed=0, scale=5000.0)).round().clamp(-32768, 32767).to(torch.int16)
    )
    with backends.use_backend(backend):
        assert torch.equal(ops.log_mel(ints), ops.log_mel(ints.float() / 32768.0))


def test_statistics_are_float32_for_16_bit_inputs(backend):
    x, weight, bias = (
        random_tensor(4, 32, seed=0, dtype=torch.bfloat16),
        torch.ones(32),
        torch.zeros(32),
    )
    op = torch.ops.ast_fast.layer_norm
    _, mean, rstd = op(x, weight, bias, 1e-6, torch.bfloat16, backend)
    assert mean.dtype == rstd.dtype == torch.float32
    q = random_tensor(1, 4, 1, 32, seed=0, dtype=torch.bfloat16)
    with backends.use_backend(backend):
        _, lse = ops.attention(q, q, q, return_lse=True)
    assert lse.dtype == torch.float32
