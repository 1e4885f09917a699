"""The batched feature extractor beside transformers' own, clip by clip."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ast_fast
from ast_fast.equivalence.budgets import log_mel_budget
from ast_fast.equivalence.measures import measure
from ast_fast.reference import mel as reference_mel
from ast_fast.reference import ops as reference_ops

transformers = pytest.importorskip("transformers")


def waves(*lengths):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=n) * 0.1).astype(np.float32) for n in lengths]


def oracle(clip, extractor):
    """Features in float64."""
    tables = reference_mel.mel_tables(extractor.sampling_rate, extractor.num_mel_bins)
    wave = torch.from_numpy(clip).double()[None]
    std = extractor.std if extractor.do_normalize else 0.5
    mean = extractor.mean if extractor.do_normalize else 0.0
    return reference_ops.log_mel(wave, None, tables, extractor.max_length, mean, std)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 128, "mean": -6.8, "std": 5.5},
        {"do_normalize": False, "num_mel_bins": 64, "max_length": 300},
        {"sampling_rate": 8000, "max_length": 200, "num_mel_bins": 40},
    ],
)
def test_outputs_are_transformers_within_the_budget(settings):
    pytest.importorskip("torchaudio")
    theirs, ours = (
        transformers.ASTFeatureExtractor(**settings),
        ast_fast.ASTFeatureExtractor(**settings),
    )
    rate = settings.get("sampling_rate", 16000)
    clips = waves(rate, 401, 3 * rate, 12 * rate)
    want = theirs(clips, sampling_rate=rate)["input_values"]
    got = ours(clips, sampling_rate=rate)["input_values"]
    assert len(got) == 4 and isinstance(got[0], np.ndarray) and got[0].dtype == np.float32
    scale = 0.5 / ours.std if ours.do_normalize else 1.0
    for clip, a, b in zip(clips, got, want, strict=True):
        exact = oracle(clip, ours)
        plain = measure(torch.from_numpy(b), exact)
        raw = plain._replace(max_abs=plain.max_abs / scale, mean_abs=plain.mean_abs / scale)
        worst, mean = log_mel_budget(raw, float(exact.abs().max()), scale, torch.float32)
        errors = measure(torch.from_numpy(a), exact)
        assert errors.max_abs <= worst and errors.mean_abs <= mean


def test_every_form_of_input_gives_the_same():
    extractor = ast_fast.ASTFeatureExtractor(max_length=64)
    (wave,) = waves(9000)
    want = extractor([wave], sampling_rate=16000, return_tensors="pt")["input_values"]
    assert want.shape == (1, 64, 128) and want.dtype == torch.float32
    readonly = wave.copy()
    readonly.setflags(write=False)
    for form in (
        wave,
        readonly,
        wave.astype(np.float64),
        wave.astype(">f4"),
        wave[::-1].copy()[::-1],
        wave.tolist(),
        [wave.tolist()],
        (wave,),
        wave[None],
        torch.from_numpy(wave),
        torch.from_numpy(wave)[None],
        [torch.from_numpy(wave).double()],
    ):
        got = extractor(form, sampling_rate=16000, return_tensors="pt")["input_values"]
        assert torch.equal(got, want)
    as_numpy = extractor(wave, sampling_rate=16000, return_tensors="np")["input_values"]
    assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, want.numpy())


def test_the_batch_and_its_order_do_not_matter():
    extractor = ast_fast.ASTFeatureExtractor(max_length=64)
    clips = waves(16000, 500, 8000)
    alone = [extractor(clip, sampling_rate=16000)["input_values"][0] for clip in clips]
    together = extractor(clips, sampling_rate=16000)["input_values"]
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


def test_files_are_transformers(tmp_path):
    settings = {"max_length": 128, "mean": -6.8, "std": 5.5, "return_attention_mask": True}
    ours = ast_fast.ASTFeatureExtractor(**settings, device="cpu")
    theirs = transformers.ASTFeatureExtractor(**settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    name = "preprocessor_config.json"
    a, b = (json.loads((tmp_path / who / name).read_text()) for who in ("ours", "theirs"))
    assert a == b
    loaded = ast_fast.ASTFeatureExtractor.from_pretrained(tmp_path / "theirs")
    assert type(loaded) is ast_fast.ASTFeatureExtractor and loaded.to_dict() == ours.to_dict()
    back = transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert back.max_length == 128 and back.std == 5.5


def test_bad_input_is_named(caplog):
    extractor = ast_fast.ASTFeatureExtractor(max_length=64)
    (wave,) = waves(8000)
    for form, error, said in (
        ([wave, wave[:399]], ValueError, "clip 1 has 399 samples.*at least 400"),
        (np.zeros((1, 2, 800), np.float32), ValueError, "mono"),
        ([np.zeros((2, 800), np.float32)], ValueError, "clip 0 has shape"),
        ([], ValueError, "empty"),
        ([wave, np.zeros(800, np.int16)], TypeError, "clip 1 is torch.int16.*32768"),
        (torch.zeros(800, dtype=torch.int32), TypeError, "clip 0 is torch.int32"),
        ("clip.wav", TypeError, "is a str"),
    ):
        with pytest.raises(error, match=said):
            extractor(form, sampling_rate=16000)
    with pytest.raises(ValueError, match="sampling_rate=8000: expected 16000"):
        extractor(wave, sampling_rate=8000)
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        extractor(wave, sampling_rate=16000, return_tensors="tf")
    extractor(wave)
    assert "sampling_rate was not passed" in caplog.text


@pytest.mark.gpu
def test_features_are_made_where_they_are_wanted():
    extractor = ast_fast.ASTFeatureExtractor(max_length=64, device="cuda")
    clips = waves(8000, 9000)
    want = ast_fast.ASTFeatureExtractor(max_length=64)(clips, 16000, "pt")["input_values"]
    got = extractor(clips, 16000, "pt")["input_values"]
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
    on_device = torch.from_numpy(np.stack(waves(8000, 8000))).cuda()
    assert ast_fast.ASTFeatureExtractor(max_length=64)(on_device, 16000, "pt")[
        "input_values"
    ].is_cuda
