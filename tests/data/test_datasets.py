"""Datasets, batches, samplers and the demo set."""

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast.audio import AudioDecodeError
from ast_fast.config import AudioConfig
from ast_fast.data import (
    AudioDataset,
    BatchSampler,
    Feeder,
    WaveformDataset,
    balanced_weights,
    read_folder,
    tone_datasets,
)


@pytest.fixture
def folder(tmp_path):
    """Six clips of two classes, one of them broken, one 8 kHz."""
    rng = np.random.default_rng(0)
    for name, length in (("a/0", 1600), ("a/1", 800), ("a/2", 2000), ("b/3", 1200), ("b/4", 900)):
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        sf.write(path, rng.normal(0, 0.1, length), 8000 if name == "b/4" else 16000)
    (tmp_path / "b" / "5.wav").write_bytes(b"RIFF nonsense")
    return tmp_path


def batches(dataset, sampler, **options):
    with Feeder(dataset, sampler, **options) as feeder:
        return [fed.batch for fed in feeder]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_and_counted_in_the_middle_of_an_epoch(folder, workers):
    dataset = AudioDataset(read_folder(folder))
    found = batches(dataset, BatchSampler(6, 4, shuffle=False), num_workers=workers)
    assert [batch.indices.tolist() for batch in found] == [[0, 1, 2, 3], [4]]
    assert found[1].report.skipped == {"AudioDecodeError": 1}
    assert found[1].report.resampled == 1
    first = found[0]
    assert first.wave.shape == (4, 2000) and first.lengths.tolist() == [1600, 800, 2000, 1200]
    assert first.targets.tolist() == [0, 0, 0, 1]
    assert not first.wave[1, 800:].any()
    assert torch.equal(first.wave[1, :800], dataset[1].wave)


def test_a_batch_of_bad_files_only_is_empty_not_an_error(folder):
    dataset = AudioDataset(read_folder(folder).select([5, 5]))
    (batch,) = batches(dataset, BatchSampler(2, 2, shuffle=False))
    assert len(batch) == 0 and batch.report.num_skipped == 2


def test_strict_datasets_raise(folder):
    dataset = AudioDataset(read_folder(folder), strict=True)
    with pytest.raises(AudioDecodeError, match=r"5\.wav"):
        dataset[5]


def test_cached_clips_stay_equal_and_int16_is_kept(folder):
    dataset = AudioDataset(read_folder(folder), AudioConfig(dtype="int16"), cache=True)
    first, second = dataset[0], dataset[0]
    assert first.wave is second.wave and first.wave.dtype == torch.int16
    (batch,) = batches(dataset, BatchSampler(6, 6, shuffle=False))
    assert batch.wave.dtype == torch.int16


def test_multi_label_targets_are_vectors_and_single_label_training_refuses_them():
    waves = [torch.zeros(400)] * 2
    dataset = WaveformDataset(waves, [(0, 2), (1,)], ("a", "b", "c"))
    (batch,) = batches(dataset, BatchSampler(2, 2, shuffle=False), multi_label=True)
    assert batch.targets.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="binary_cross_entropy"):
        batches(dataset, BatchSampler(2, 2, shuffle=False))


def test_every_epoch_holds_every_clip_once_in_an_order_of_its_own():
    sampler = BatchSampler(103, 10, seed=7)
    epochs = []
    for _ in range(3):
        order = []
        for batch in sampler:
            order += batch
            sampler.step()
        assert sorted(order) == list(range(103))
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.epoch == 3 and len(sampler) == 11
    assert [i for batch in BatchSampler(103, 10, seed=7) for i in batch] == epochs[0]
    assert [i for batch in BatchSampler(103, 10, seed=8) for i in batch] != epochs[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("done", [0, 1, 5, 10, 11, 25])
def test_a_resumed_sampler_gives_exactly_the_next_eight_batches(done, weighted):
    def new():
        weights = np.arange(1, 104) if weighted else None
        return BatchSampler(103, 10, seed=3, weights=weights)

    def take(sampler, count):
        taken = []
        while len(taken) < count:
            for batch in sampler:
                taken.append(batch)
                sampler.step()
                if len(taken) == count:
                    break
        return taken

    whole = take(new(), done + 8)
    first = new()
    assert take(first, done) == whole[:done]
    resumed = new()
    resumed.load_state_dict(first.state_dict())
    assert take(resumed, 8) == whole[done:]


def test_a_sampler_of_another_set_cannot_be_resumed():
    with pytest.raises(ValueError, match="num_clips=103, this one 104"):
        BatchSampler(104, 10).load_state_dict(BatchSampler(103, 10).state_dict())


def test_ranks_share_each_batch_and_take_the_same_number_of_steps():
    def run(rank):
        return list(BatchSampler(21, 8, seed=1, rank=rank, world_size=2))

    whole = list(BatchSampler(21, 8, seed=1))
    left, right = run(0), run(1)
    assert len(left) == len(right) == len(whole)
    for a, b, both in zip(left[:2], right[:2], whole[:2], strict=True):
        assert sorted(a + b) == sorted(both)
    assert len(left[2]) == len(right[2]) == 3  # 5 clips: one is repeated
    assert set(left[2] + right[2]) >= set(whole[2])


def test_balanced_sampling_draws_rare_classes_as_often():
    labels = [(0,)] * 900 + [(1,)] * 100
    weights = balanced_weights(labels, 2)
    assert weights[0] == pytest.approx(1000 / 900.01) and weights[-1] == pytest.approx(
        1000 / 100.01
    )
    drawn = [i for batch in BatchSampler(1000, 50, weights=weights) for i in batch]
    share = sum(i >= 900 for i in drawn) / 1000
    assert abs(share - 0.5) < 4 * 0.5 / 1000**0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_clips": 0}, "num_clips=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"weights": [1.0]}, "expected 5 finite"),
        ({"weights": [0.0] * 5}, "at least one above 0"),
        ({"weights": [float("nan")] * 5}, "finite"),
        ({"world_size": 3}, "does not split over 3"),
        ({"batch_size": 8, "drop_last": True}, "leaves nothing"),
    ],
)
def test_impossible_samplers_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BatchSampler(**{"num_clips": 5, "batch_size": 2, **options})


def test_the_demo_set_is_whole_and_its_halves_share_no_syllable():
    train, test, everything = tone_datasets(seed=0)
    assert len(everything.waves) == 1147 == len(train) + len(test)
    assert [everything.tones.count(tone) for tone in (1, 2, 3, 4)] == [303, 236, 288, 320]
    where = {
        id(wave): name for wave, name in zip(everything.waves, everything.syllables, strict=True)
    }
    seen = {where[id(wave)] for wave in train.waves}
    unseen = {where[id(wave)] for wave in test.waves}
    assert not seen & unseen and len(unseen) == round(0.25 * 386) and len(seen | unseen) == 386
    lengths = [wave.shape[0] / 16000 for wave in everything.waves]
    assert min(lengths) > 0.12 and max(lengths) < 0.65
    assert all(wave.dtype == torch.int16 for wave in everything.waves)
    assert tone_datasets(seed=1)[1].waves[0] is not test.waves[0]
