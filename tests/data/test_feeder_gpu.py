"""The feeder's side stream on a GPU: the CPU's batches and features, in order, and nothing left behind."""

import threading

import pytest
import torch

from ast_fast import augment
from ast_fast.config import LogMelConfig
from ast_fast.data import BatchSampler, Feeder, WaveformDataset, WholeSetMixup
from ast_fast.frontend import log_mel_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FRONT = LogMelConfig(num_frames=64)
SAMPLER = BatchSampler(100, 8, seed=2)


def dataset():
    draw = torch.Generator().manual_seed(0)
    waves = [
        torch.randint(-9000, 9000, (4000 + 91 * (i % 13),), dtype=torch.int16, generator=draw)
        for i in range(100)
    ]
    return WaveformDataset(waves, [(i % 3,) for i in range(100)], ("a", "b", "c"))


def features(batch):
    return log_mel_features(batch.wave, FRONT, batch.lengths), batch.targets


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_made_on_the_side_stream_are_those_of_the_cpu(workers, prefetch):
    data = dataset()
    expected = list(Feeder(data, SAMPLER, transform=features))
    busy = torch.randn(2048, 2048, device="cuda")
    options = {"device": "cuda", "num_workers": workers, "prefetch": prefetch}
    with Feeder(data, SAMPLER, transform=features, **options) as feeder:
        for _ in range(3):
            kept = []
            for fed in feeder:
                for _ in range(20):  # the consumer's stream lags behind the copies
                    busy = (busy @ busy).clamp(-1, 1)
                kept.append((fed.batch.indices.clone(), fed.batch.wave.clone(), *fed.features))
            assert len(kept) == len(expected)
            for (indices, wave, mel, targets), fed in zip(kept, expected, strict=True):
                assert torch.equal(indices, fed.batch.indices)
                assert torch.equal(wave.cpu(), fed.batch.wave)
                assert torch.equal(targets.cpu(), fed.features[1])
                torch.testing.assert_close(mel.cpu(), fed.features[0], rtol=1e-3, atol=1e-3)


def test_partners_of_the_whole_set_come_along_and_mix_alike():
    data, mixup = dataset(), WholeSetMixup(5, 0.5, 100)

    def mixed(batch):
        wave = batch.wave / 32768.0
        targets = torch.nn.functional.one_hot(batch.targets, 3).float()
        return augment.mixup_pairs(wave, batch.lengths, targets, batch.mix)

    expected = list(Feeder(data, SAMPLER, transform=mixed, mixup=mixup))
    options = {"device": "cuda", "num_workers": 2, "mixup": mixup}
    with Feeder(data, SAMPLER, transform=mixed, **options) as feeder:
        for fed, cpu in zip(feeder, expected, strict=True):
            for name in ("rows", "wave", "lengths", "targets", "weights", "indices"):
                found = getattr(fed.batch.mix, name)
                assert found.is_cuda == (name != "indices")
                assert torch.equal(found.cpu(), getattr(cpu.batch.mix, name))
            for found, wanted in zip(fed.features, cpu.features, strict=True):
                torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_mistakes_and_an_early_end_leave_no_thread():
    before = threading.active_count()

    def broken(batch):
        raise KeyError("a mistake")

    with (
        Feeder(dataset(), SAMPLER, device="cuda", transform=broken) as feeder,
        pytest.raises(KeyError, match="a mistake"),
    ):
        list(feeder)
    with Feeder(dataset(), SAMPLER, device="cuda", transform=features) as feeder:
        for number, _ in enumerate(feeder):
            if number == 2:
                break
    assert threading.active_count() == before
