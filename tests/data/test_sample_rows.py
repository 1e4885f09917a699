"""Rows at multiples of 16 samples: nothing that can be seen of a batch but its row stride changes."""

import numpy as np
import pytest
import torch

from ast_fast.audio_report import AudioReport
from ast_fast.config import LogMelConfig
from ast_fast.data import Clip, Collate
from ast_fast.data.buffers import SAMPLES
from ast_fast.frontend import log_mel_features
from ast_fast.inference.engine import collate_windows
from ast_fast.inference.reader import Window
from ast_fast.sample_rows import moved, sample_rows
from ast_fast.streaming import StreamingLogMel

TEN_SECONDS_AND_A_BIT = 160480  # 10.03 s at 16 kHz


def clips(sizes, dtype=torch.int16):
    draw = torch.Generator().manual_seed(3)
    waves = [torch.randint(-999, 999, (size,), generator=draw).to(dtype) for size in sizes]
    return [Clip(wave, (0,), index, AudioReport()) for index, wave in enumerate(waves)]


def dense(batch):
    """The same batch as it would be without gaps."""
    rows = torch.zeros(len(batch), max(clip.length for clip in batch), dtype=batch[0].dtype)
    for row, clip in zip(rows, batch, strict=True):
        row[: clip.length] = clip.wave
    return rows


MAKERS = {
    "feeder": lambda batch: Collate(2)(batch, SAMPLES.tensor).wave,
    "collate": lambda batch: Collate(2)(batch).wave,
    "inference": lambda batch: collate_windows([Window(0, clip, None) for clip in batch]).wave,
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [(TEN_SECONDS_AND_A_BIT,) * 3, (TEN_SECONDS_AND_A_BIT, 31999), (401, 7), (400,), (32, 16)],
)
def test_a_batch_holds_the_same_and_its_rows_begin_at_multiples_of_16(maker, dtype, sizes):
    batch = clips(sizes, dtype)
    wave, expected = MAKERS[maker](batch), dense(batch)
    assert wave.shape == expected.shape and wave.dtype == dtype and torch.equal(wave, expected)
    assert wave.stride(0) % 16 == 0 and wave.stride(1) == 1
    # the frames are those of the clips
    front = LogMelConfig(num_frames=None)
    assert torch.equal(log_mel_features(wave, front), log_mel_features(expected, front))


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [0, 1, 15, 16, 17])
def test_memory_between_the_rows_is_zero(rows, columns):
    whole = []

    def allocate(*shape):
        whole.append(torch.full(shape[:2], 7, dtype=shape[2]))
        return whole[0]

    wave = sample_rows(rows, columns, torch.int16, allocate)
    assert wave.shape == (rows, columns) and bool((wave == 7).all())
    assert not whole[0][:, columns:].any() and whole[0].shape[1] % 16 == 0


def test_a_batch_keeps_its_row_stride_on_another_device():
    made = Collate(2)(clips((401, 99, 5)))
    there = made.to("meta")
    assert there.wave.stride() == made.wave.stride() and there.wave.shape == made.wave.shape
    assert moved(made.wave[1:], "meta").stride() == made.wave.stride(), "partners of mixup, say"
    windows = collate_windows([Window(0, clip, None) for clip in clips((401, 99))])
    assert windows.to("meta").wave.stride(0) % 16 == 0


@pytest.mark.parametrize(
    "wave",
    [
        torch.arange(60.0).view(3, 20),
        torch.arange(60.0).view(3, 20)[:, :5],
        torch.arange(60.0).view(3, 20)[:, 5:],
        torch.arange(60.0).view(20, 3).t(),
        torch.arange(20.0).expand(3, 20),
        torch.arange(60.0).as_strided((3, 18), (20, 1), 2),  # no room behind the last row
        torch.arange(60.0)[:0].view(0, 20),
    ],
)
def test_moving_any_samples_moves_what_they_hold(wave):
    there = moved(wave, "cpu")
    assert torch.equal(there, wave) and moved(wave, "meta").shape == wave.shape
    wide = moved(wave.double(), torch.device("cpu"))
    assert torch.equal(wide, wave.double())


def test_the_feature_extractor_s_batch_too(monkeypatch):
    pytest.importorskip("transformers")
    from ast_fast.integrations import feature_extractor

    seen = []

    def features(wave, config, lengths):
        seen.append(wave)
        return log_mel_features(wave, config, lengths)

    monkeypatch.setattr(feature_extractor, "log_mel_features", features)
    draw = np.random.default_rng(0)
    waves = [draw.normal(size=size).astype(np.float32) for size in (4001, 3000)]
    extract = feature_extractor.ASTFeatureExtractor()
    extract(waves, sampling_rate=16000, return_tensors="pt")
    (wave,) = seen
    assert wave.shape == (2, 4001) and wave.stride() == (4016, 1)
    assert torch.equal(wave[0], torch.from_numpy(waves[0])) and not wave[1, 3000:].any()


def test_a_stream_s_samples_too(monkeypatch):
    import ast_fast.streaming.log_mel as module

    seen = []

    def features(wave, *args, **options):
        seen.append((tuple(wave.shape), wave.stride()))
        return log_mel_features(wave, *args, **options)

    whole = torch.randn(2, 1603, generator=torch.Generator().manual_seed(0))
    stream = StreamingLogMel()
    monkeypatch.setattr(module, "log_mel_features", features)
    parts = [stream.push(part) for part in whole.split(401, dim=1)]
    expected = log_mel_features(whole, stream.config.replace(num_frames=None))
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert len(seen) > 2 and all(stride[0] % 16 == 0 for _, stride in seen[1:])
