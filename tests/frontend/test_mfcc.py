"""Cepstra against torchaudio's two kinds, with torchaudio's own error against float64 as yardstick."""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast.config import LogMelConfig, MfccConfig
from ast_fast.frontend import MFCC, cosine_transform, mfcc_features
from ast_fast.testing import random_tensor

WAVE = random_tensor(2, 8000, seed=1) * 0.1


def hold(config, theirs):
    exact, ours = MFCC(config)(WAVE.double()), MFCC(config)(WAVE)
    assert exact.shape == ours.shape == theirs.shape
    error, budget = (ours - exact).abs(), (theirs - exact).abs()
    assert error.max() <= 2 * budget.max() and error.mean() <= budget.mean()


@pytest.mark.parametrize(
    "changes", [{}, {"num_ceps": 23, "lifter": 0.0}, {"num_ceps": 20, "bins": 64}]
)
def test_kaldis_cepstra(changes):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    bins = changes.pop("bins", 23)
    mel = MfccConfig().log_mel.replace(num_mel_bins=bins)
    names = {"num_ceps": "num_ceps", "lifter": "cepstral_lifter"}
    theirs = {names[name]: value for name, value in changes.items()}
    want = torch.stack([kaldi.mfcc(clip[None], num_mel_bins=bins, **theirs) for clip in WAVE])
    hold(MfccConfig(log_mel=mel, **changes), want)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
@pytest.mark.parametrize("log_mels", [False, True])
def test_torchaudios_cepstra(log_mels):
    transforms = pytest.importorskip("torchaudio.transforms")
    mel = {"n_fft": 400, "hop_length": 160, "n_mels": 64}
    theirs = transforms.MFCC(n_mfcc=40, log_mels=log_mels, melkwargs=mel)
    natural = {"output": "log", "log_floor": 1e-30, "log_offset": 1e-6, "top_db": None}
    config = MfccConfig.torchaudio(40, **mel, **(natural if log_mels else {}))
    hold(config, torch.stack([theirs(clip[None])[0].T for clip in WAVE]))


def test_defaults_of_torchaudio_with_128_cepstra():
    transforms = pytest.importorskip("torchaudio.transforms")
    with pytest.warns(UserWarning, match="mel filterbank"):
        theirs = transforms.MFCC(n_mfcc=128)
    hold(MfccConfig.torchaudio(128), torch.stack([theirs(clip[None])[0].T for clip in WAVE]))


def test_the_transform_is_orthonormal_without_its_lifter():
    matrix = cosine_transform(40, 40, 0.0)
    assert torch.allclose(matrix.T @ matrix, torch.eye(40, dtype=torch.float64), atol=1e-12)
    lifted = cosine_transform(40, 13, 22.0) / cosine_transform(40, 13, 0.0)
    assert torch.allclose(lifted[:, 0], torch.ones(40, dtype=torch.float64))
    assert lifted[0, 11].item() == pytest.approx(12.0)


def test_gradients_padding_and_normalisation():
    mel = LogMelConfig(sample_rate_hz=2000, num_mel_bins=6, num_frames=8, mean=0.0, std=0.5)
    config = MfccConfig(log_mel=mel, num_ceps=4, mean=1.0, std=2.0)
    lengths = torch.tensor([150, 90])
    wave = random_tensor(2, 150, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: mfcc_features(w, config, lengths), (wave,), atol=1e-5)
    cepstra = mfcc_features(wave, config, lengths)
    assert torch.allclose(cepstra[1, 4:], torch.tensor(-0.25).double())
    alone = mfcc_features(wave[1:, :90], config)
    assert torch.allclose(cepstra[1], alone[0], atol=1e-12)


@pytest.mark.filterwarnings("error:Dynamo detected:UserWarning")
def test_autocast_and_half_precision_do_not_round_the_product():
    module = MFCC(num_ceps=20)
    want = module(WAVE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(WAVE), want)
    assert torch.equal(module.bfloat16()(WAVE), want) and not list(module.state_dict())
    assert torch.equal(module(WAVE, None, torch.bfloat16), want.bfloat16())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(WAVE), want, atol=1e-5)
    assert ast_fast.MFCC is MFCC and "20 cepstra" in repr(module)


def test_settings_are_checked():
    config = MfccConfig.torchaudio(20, n_mels=40)
    assert MfccConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="num_ceps=30: expected 1 to 23"):
        MfccConfig(num_ceps=30)
    with pytest.raises(ValueError, match=r"log_mel\.mean"):
        MfccConfig(log_mel=LogMelConfig())
