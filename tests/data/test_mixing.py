"""Mixup partners from the whole set: drawn by clip alone, read by workers, mixed as the original mixes."""

import numpy as np
import pytest
import torch

from ast_fast import augment
from ast_fast.audio import AudioDecodeError, AudioReport
from ast_fast.data import (
    BatchSampler,
    Feeder,
    ShardSampler,
    ShardSet,
    Skip,
    WaveformDataset,
    WholeSetMixup,
    balanced_weights,
    write_shards,
)
from ast_fast.seeding import clip_seeds, draw_partners


def waves(count=40, dtype=torch.int16):
    draw = torch.Generator().manual_seed(1)
    made = [
        torch.randint(-9000, 9000, (600 + 41 * (i % 7),), dtype=torch.int16, generator=draw)
        for i in range(count)
    ]
    return made if dtype == torch.int16 else [wave / 32768.0 for wave in made]


def dataset(count=40, dtype=torch.int16, several=False):
    labels = [(i % 5, 5) if several else (i % 5,) for i in range(count)]
    return WaveformDataset(waves(count, dtype), labels, tuple("abcdef"))


def fed(source, sampler, mixup, epochs=2, **options):
    batches = []
    with Feeder(source, sampler, mixup=mixup, **options) as feeder:
        for _ in range(epochs):
            for batch, _ in feeder:
                batches.append(batch)
                sampler.step()
    return batches


def by_hand(batch, source, classes):
    """What the original computes, clip by clip, in float64."""
    plans = dict(zip(batch.mix.rows.tolist(), range(len(batch.mix.rows)), strict=True))
    for row, index in enumerate(batch.indices.tolist()):
        one = source.waves[index].double()
        one = one / (32768.0 if source.waves[index].dtype == torch.int16 else 1.0)
        target = np.zeros(classes)
        share = 1.0
        one = one - one.mean()
        if row in plans:
            place = plans[row]
            partner = int(batch.mix.indices[place])
            share = float(batch.mix.weights[place])
            two = source.waves[partner].double()
            two = two / (32768.0 if source.waves[partner].dtype == torch.int16 else 1.0)
            two = two - two.mean()
            two = torch.nn.functional.pad(two, (0, len(one) - len(two)))
            one = share * one + (1 - share) * two
            for label in source.labels[partner]:
                target[label] += 1 - share
        for label in source.labels[index]:
            target[label] += share
        yield one - one.mean(), target


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize("several", [False, True])
def test_mixed_clips_are_those_of_the_original(dtype, several):
    source = dataset(dtype=dtype, several=several)
    mixup = WholeSetMixup(3, 0.6, len(source))
    mixed = 0
    for batch in fed(source, BatchSampler(40, 16, seed=1), mixup, multi_label=several):
        assert batch.wave.dtype == batch.mix.wave.dtype == dtype
        wave = batch.wave / 32768.0 if dtype == torch.int16 else batch.wave
        targets = batch.targets
        if not several:
            targets = torch.nn.functional.one_hot(targets, 6).float()
        found, vectors = augment.mixup_pairs(wave, batch.lengths, targets, batch.mix)
        for row, (expected, target) in enumerate(by_hand(batch, source, 6)):
            length = len(expected)
            assert torch.allclose(found[row, :length].double(), expected, atol=1e-6)
            assert not found[row, length:].any()
            assert vectors[row].numpy() == pytest.approx(target, abs=1e-6)
        mixed += len(batch.mix.rows)
    assert 0.4 < mixed / 80 < 0.8


def test_whole_batches_are_mixed_as_partners_in_the_batch_are():
    source = dataset(16, torch.float32)
    (batch,) = fed(source, BatchSampler(16, 16, shuffle=False), WholeSetMixup(0, 1.0, 16), epochs=1)
    targets = torch.nn.functional.one_hot(batch.targets, 6).float()
    wave, vectors = augment.mixup_pairs(batch.wave, batch.lengths, targets, batch.mix)
    partners = batch.mix.indices  # unshuffled: places in the batch too
    expected = augment.mixup_waveforms(batch.wave, batch.lengths, partners, batch.mix.weights)
    assert torch.allclose(wave, expected, atol=1e-7)
    assert torch.allclose(vectors, augment.mixup_targets(targets, partners, batch.mix.weights))


def test_draws_belong_to_seed_step_and_clip():
    mixup = WholeSetMixup(7, 0.5, 1000)

    def drawn(step, indices):
        plan = mixup.plan(step, indices)
        return {indices[row]: rest for row, *rest in zip(*plan, strict=True)}

    whole = drawn(4, list(range(200)))
    assert drawn(4, list(range(199, -1, -1))) == whole
    assert drawn(4, [5, 7, 9]) == {clip: whole[clip] for clip in (5, 7, 9) if clip in whole}
    assert drawn(5, list(range(200))) != whole
    assert WholeSetMixup(8, 0.5, 1000).plan(4, [1, 2, 3]) != mixup.plan(4, [1, 2, 3])
    # one clip twice in a batch (drawn by weight) is mixed with two others
    twice = WholeSetMixup(7, 1.0, 1000).plan(4, [3, 3])
    assert twice.partners[0] != twice.partners[1]


def test_plans_drawn_together_are_those_of_each_step_and_of_the_seeds():
    draw = torch.Generator().manual_seed(0)
    mixup = WholeSetMixup(9, 0.6, 30, alpha=0.7)
    steps = [(3 * n, torch.randint(30, (n % 7 + 1,), generator=draw).tolist()) for n in range(40)]
    steps.append((2, [4, 4, 1, 4]))
    for (step, indices), plan in zip(steps, mixup.plans(steps), strict=True):
        assert plan == mixup.plan(step, indices)
        seeds = clip_seeds(9, step, torch.tensor(indices), 30)
        partners, weights = draw_partners(seeds, 30, 0.6, 0.7)
        rows = [row for row, weight in enumerate(weights.tolist()) if weight < 1]
        assert plan.rows == rows and plan.partners == partners[rows].tolist()
        assert plan.weights == weights[rows].tolist()
    assert list(mixup.plans([])) == []


def test_partners_are_even_over_millions_and_weights_follow_beta():
    count = 3_000_001
    mixup = WholeSetMixup(1, 0.3, count)
    plans = [mixup.plan(2, list(range(n, n + 500))) for n in range(0, 200_000, 500)]
    partners = np.asarray([partner for plan in plans for partner in plan.partners])
    assert abs(len(partners) / 200_000 - 0.3) < 4 * 0.46 / 447
    assert partners.min() >= 0 and partners.max() < count
    tenths = np.histogram(partners, bins=10, range=(0, count))[0] / len(partners)
    assert np.abs(tenths - 0.1).max() < 4 * 0.3 / len(partners) ** 0.5
    assert len(set((partners % 7).tolist())) == 7 and len(set(partners.tolist())) > 0.98 * len(
        partners
    )
    weights = np.asarray([weight for plan in plans for weight in plan.weights])
    assert weights.mean() == pytest.approx(0.5, abs=2e-3)
    assert weights.var() == pytest.approx(0.25 / 21, rel=0.03)


@pytest.mark.parametrize(("workers", "kind"), [(2, "processes"), (2, "threads")])
@pytest.mark.parametrize("shards", [False, True])
def test_workers_and_shards_change_nothing(tmp_path, workers, kind, shards):
    source = dataset()
    mixup = WholeSetMixup(3, 0.5, 40)
    if shards:
        write_shards(source, tmp_path, shard_bytes=20_000)
        source = ShardSet(tmp_path, block_bytes=8000)

    def run(**options):
        sampler = ShardSampler(source, 8, seed=4) if shards else BatchSampler(40, 8, seed=4)
        return fed(source, sampler, mixup, **options)

    plain, parallel = run(), run(num_workers=workers, workers=kind)
    assert len(plain) == len(parallel) == 10
    for step, (one, two) in enumerate(zip(plain, parallel, strict=True)):
        for name in ("rows", "wave", "lengths", "targets", "weights", "indices"):
            assert torch.equal(getattr(one.mix, name), getattr(two.mix, name))
        assert torch.equal(one.wave, two.wave) and torch.equal(one.targets, two.targets)
        # the step is that of the run, over epochs
        plan = mixup.plan(step, one.indices.tolist())
        assert plan.partners == one.mix.indices.tolist() and plan.rows == one.mix.rows.tolist()
        for row, partner in enumerate(plan.partners):
            length = int(one.mix.lengths[row])
            assert torch.equal(one.mix.wave[row, :length], waves()[partner])


def test_a_resumed_epoch_mixes_as_an_uninterrupted_one():
    source, mixup = dataset(), WholeSetMixup(3, 0.5, 40)
    whole = fed(source, BatchSampler(40, 8, seed=4), mixup)
    sampler = BatchSampler(40, 8, seed=4)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 1, "batch": 2})
    rest = fed(source, sampler, mixup, epochs=1)
    for one, two in zip(whole[7:], rest, strict=True):
        assert torch.equal(one.mix.wave, two.mix.wave) and torch.equal(
            one.mix.weights, two.mix.weights
        )


class Damaged(WaveformDataset):
    """Some clips cannot be read."""

    bad = frozenset(range(0, 40, 3))

    def __getitem__(self, index):
        if index in self.bad:
            report = AudioReport()
            report.skip(AudioDecodeError(f"clip {index}", "is damaged"))
            return Skip(index, report)
        return super().__getitem__(index)


def test_unreadable_clips_and_partners_leave_the_others_mixed_right():
    plain = dataset()
    source = Damaged(plain.waves, plain.labels, plain.classes)
    mixup = WholeSetMixup(3, 1.0, 40)
    for batch in fed(source, BatchSampler(40, 10, seed=2), mixup, epochs=1):
        plan = mixup.plan(0, batch.indices.tolist())
        assert not set(batch.indices.tolist()) & source.bad
        assert not set(batch.mix.indices.tolist()) & source.bad
        assert len(batch.mix.rows) < len(plan.rows) or not set(plan.partners) & source.bad
        wave = batch.wave / 32768.0
        targets = torch.nn.functional.one_hot(batch.targets, 6).float()
        found, _ = augment.mixup_pairs(wave, batch.lengths, targets, batch.mix)
        for row, (expected, _) in enumerate(by_hand(batch, source, 6)):
            assert torch.allclose(found[row, : len(expected)].double(), expected, atol=1e-6)
        assert batch.report.num_skipped and batch.report.clips == len(batch)


def test_impossible_settings_are_refused():
    for settings in ((0, 1.5, 10), (0, 0.5, 0), (0, 0.5, 10, 0.0)):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            WholeSetMixup(*settings)
    with pytest.raises(ValueError, match="draws from 10 clips: expected the dataset's 40"):
        Feeder(dataset(), BatchSampler(40, 8), mixup=WholeSetMixup(0, 0.5, 10))
    batch = fed(dataset(), BatchSampler(40, 8), WholeSetMixup(0, 1.0, 40), epochs=1)[0]
    with pytest.raises(TypeError, match=r"targets are torch\.int64"):
        augment.mixup_pairs(batch.wave.float(), batch.lengths, batch.targets, batch.mix)


# ---- the class-balanced draw


def test_the_balanced_draw_is_pytorchs_weighted_sampler_in_distribution():
    rng = np.random.default_rng(0)
    labels = [
        tuple(np.flatnonzero(rng.random(6) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.9])) for _ in range(300)
    ]
    labels = [label or (0,) for label in labels]
    weights = balanced_weights(labels, 6)
    torch.manual_seed(0)
    theirs = torch.utils.data.WeightedRandomSampler(weights, 120_000, replacement=True)
    expected = np.bincount(list(theirs), minlength=300) / 120_000
    sampler, counts = BatchSampler(300, 50, seed=3, weights=weights), np.zeros(300)
    for _ in range(400):
        for batch in sampler:
            np.add.at(counts, batch, 1)
            sampler.step()
    share = np.asarray(weights) / np.sum(weights)
    assert counts.sum() == 120_000
    for found in (counts / 120_000, expected):
        # chi-square of 299 degrees of freedom: mean 299, standard deviation 24.5
        assert ((found - share) ** 2 / share).sum() * 120_000 < 299 + 5 * 24.5


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_draw_one_balanced_epoch_together_and_resume_it(world_size):
    weights = np.arange(1.0, 65.0)

    def sampler(rank, size):
        return BatchSampler(64, 16, seed=9, weights=weights, rank=rank, world_size=size)

    whole = list(sampler(0, 1))
    parts = [list(sampler(rank, world_size)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            assert parts[rank][step] == batch[rank::world_size]
    later = sampler(1, world_size)
    later.load_state_dict({**sampler(0, 1).state_dict(), "batch": 2})
    assert list(later) == parts[1][2:]
