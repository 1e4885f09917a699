"""The feeder: one order whatever the workers, memory in bounds, deaths survived, nothing left behind."""

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ast_fast.audio import AudioReport, AudioTruncatedError
from ast_fast.config import LogMelConfig
from ast_fast.data import (
    AudioDataset,
    BatchSampler,
    Clip,
    Collate,
    Feeder,
    LoaderError,
    ShardSampler,
    ShardSet,
    Skip,
    WaveformDataset,
    read_folder,
    write_shards,
)
from ast_fast.data.reading import _MAX_TASKS_AHEAD
from ast_fast.frontend import log_mel_features

ROOT = Path(__file__).resolve().parents[2]
WAYS = [(0, "processes"), (1, "processes"), (2, "processes"), (2, "threads")]


def wave_of(index):
    """Every clip has samples, length and dtype of its own."""
    draw = torch.Generator().manual_seed(index)
    length = 500 + 91 * (index % 13)
    if index % 11 == 3:
        return torch.rand(length, generator=draw) - 0.5
    return torch.randint(-9000, 9000, (length,), dtype=torch.int16, generator=draw)


class Odd(WaveformDataset):
    """Clips made on demand; some cannot be read, some take long."""

    bad_every = 17

    def __init__(self, count=60):
        super().__init__(
            [torch.zeros(1)] * count, [(i % 3,) for i in range(count)], ("a", "b", "c")
        )

    def __getitem__(self, index):
        if index % self.bad_every == 5:
            report = AudioReport()
            report.skip(AudioTruncatedError(f"clip {index}", "is truncated"))
            return Skip(index, report)
        if index % 7 == 0:
            time.sleep(0.003)
        return Clip(wave_of(index), self.labels[index], index, AudioReport(clips=1))


def epoch(feeder):
    """All batches of the sampler's epoch as plain values."""
    found = []
    for fed in feeder:
        batch = fed.batch
        found.append(
            (batch.indices.tolist(), batch.wave, batch.lengths, batch.targets, batch.report)
        )
    return found


def equal(left, right):
    return len(left) == len(right) and all(
        a[0] == b[0]
        and a[1].dtype == b[1].dtype
        and all(torch.equal(x, y) for x, y in zip(a[1:4], b[1:4], strict=True))
        and a[4] == b[4]
        for a, b in zip(left, right, strict=True)
    )


def children():
    return [
        int(pid)
        for pid in Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
        .read_text()
        .split()
    ]


def open_files():
    gc.collect()  # files that an earlier test dropped
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize(("workers", "kind"), WAYS)
def test_every_way_of_reading_gives_what_pytorchs_loader_gives(workers, kind):
    sampler = BatchSampler(60, 8, seed=3)
    expected = [
        (b.indices.tolist(), b.wave, b.lengths, b.targets, b.report)
        for b in DataLoader(Odd(), batch_sampler=sampler, collate_fn=Collate(3))
    ]
    assert sum(len(b[0]) for b in expected) == 60 - 4
    assert {b[1].dtype for b in expected} == {torch.float32, torch.int16} or len(expected) == 8
    with Feeder(Odd(), sampler, num_workers=workers, workers=kind) as feeder:
        assert equal(epoch(feeder), expected)
        assert feeder.stats.batches == 8 and feeder.stats.clips == 56
        for _ in range(len(sampler)):
            sampler.step()
        second = epoch(feeder)
        assert not equal(second, expected) and sorted(i for b in second for i in b[0]) == sorted(
            i for b in expected for i in b[0]
        )


@pytest.mark.parametrize(("workers", "kind"), WAYS)
def test_shards_are_fed_the_same_by_every_number_of_workers(tmp_path, workers, kind):
    source = WaveformDataset(
        [wave_of(i) for i in range(50) if i % 11 != 3],
        [(i % 3,) for i in range(45)],
        ("a", "b", "c"),
    )
    write_shards(source, tmp_path, shard_bytes=20_000)
    shards = ShardSet(tmp_path, block_bytes=5000)
    sampler = ShardSampler(shards, 7, seed=1, window_bytes=20_000)
    with Feeder(shards, sampler, num_workers=workers, workers=kind, max_bytes=60_000) as feeder:
        found = epoch(feeder)
    assert [b[0] for b in found] == list(sampler)
    for indices, wave, lengths, targets, _ in found:
        for index, row, length, target in zip(indices, wave, lengths, targets, strict=True):
            assert torch.equal(row[:length], source.waves[index]) and not row[length:].any()
            assert (int(target),) == source.labels[index]
    sampler.load_state_dict(sampler.state_dict() | {"batch": 3})
    with Feeder(shards, sampler, num_workers=workers, workers=kind) as feeder:
        assert equal(epoch(feeder), found[3:])


def test_the_transform_runs_in_order_and_its_features_do_not_depend_on_workers():
    front = LogMelConfig(num_frames=8, num_mel_bins=16)
    sampler = BatchSampler(60, 8, seed=3)
    results = []
    for workers in (0, 2):
        steps = []

        def transform(batch, steps=steps):
            steps.append(batch.indices.tolist())
            return log_mel_features(batch.wave, front, batch.lengths)

        with Feeder(Odd(), sampler, num_workers=workers, transform=transform) as feeder:
            features = [fed.features for fed in feeder]
        assert len(steps) == 8
        results.append((steps, features))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


class Heavy(WaveformDataset):
    """Clips of one size, and a count of those read."""

    def __init__(self, count, samples):
        super().__init__([torch.zeros(1)] * count, [(0,)] * count, ("a",))
        self.samples = samples
        self.started = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __getitem__(self, index):
        self.started += 1
        wave = torch.full((self.samples,), index, dtype=torch.int16)
        return Clip(wave, (0,), index, AudioReport(clips=1))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_reading_ahead_stops_at_the_stated_memory(kind):
    dataset = Heavy(400, 25_000)  # a batch of 4 is 200 kB
    with Feeder(
        dataset, BatchSampler(400, 4), num_workers=2, workers=kind, max_bytes=1_000_000
    ) as feeder:
        batches = iter(feeder)
        for _ in range(5):
            next(batches)
            time.sleep(0.1)
        # five taken; besides at most five ahead, and one more a worker that was in work
        assert int(dataset.started) <= 4 * (5 + 5 + 2)
        assert 200_000 <= feeder.stats.peak_bytes <= 1_400_000
        assert sum(1 for _ in batches) == 95


def test_a_batch_larger_than_the_memory_is_fed_all_the_same():
    dataset = Heavy(12, 25_000)
    with Feeder(dataset, BatchSampler(12, 4), num_workers=2, max_bytes=1000) as feeder:
        assert len(epoch(feeder)) == 3


class Uneven(Heavy):
    """Every eighth clip is twelve times as long as the others; some take long, and the rest waits."""

    def __getitem__(self, index):
        if index % 50 == 0:
            time.sleep(0.1)
        wave = torch.full((self.samples * (12 if index % 8 == 0 else 1),), index, dtype=torch.int16)
        return Clip(wave, (0,), index, AudioReport(clips=1))


def test_memory_does_not_add_up_where_clips_are_uneven():
    dataset = Uneven(400, 5000)  # 10 kB and 120 kB
    with Feeder(dataset, BatchSampler(400, 1), num_workers=2, max_bytes=1_000_000) as feeder:
        assert len(epoch(feeder)) == 400
        # the bound, and what two workers had in work
        assert feeder.stats.peak_bytes <= 1_000_000 + 4 * 120_000


def test_a_worker_killed_in_work_is_replaced_and_its_clips_come_once():
    sampler = BatchSampler(120, 4, seed=1)
    expected = epoch(Feeder(Odd(120), sampler))
    before = open_files()
    # little is read ahead, so that there is work left when the last one is killed
    with Feeder(Odd(120), sampler, num_workers=2, max_bytes=40_000) as feeder:
        found = []
        for number, fed in enumerate(feeder):
            batch = fed.batch
            found.append(
                (batch.indices.tolist(), batch.wave, batch.lengths, batch.targets, batch.report)
            )
            if number in (0, 8, 15, 22):
                os.kill(feeder.worker_ids[number % 2], signal.SIGKILL)
        assert feeder.stats.workers_restarted == 4
    assert equal(found, expected)
    assert not children() and open_files() == before


class Crash(Odd):
    """One clip ends the process that reads it."""

    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_clip_that_ends_its_process_every_time_is_skipped_and_counted():
    with Feeder(Crash(), BatchSampler(60, 8, shuffle=False), num_workers=2) as feeder:
        found = epoch(feeder)
        assert feeder.stats.workers_restarted == 3
    report = AudioReport()
    for batch in found:
        report.merge(batch[4])
    assert report.skipped == {"AudioTruncatedError": 4, "AudioCrashError": 1}
    assert any("clip 20" in note for note in report.notes)
    assert sorted(i for b in found for i in b[0]) == [
        i for i in range(60) if i % 17 != 5 and i != 20
    ]


class Doomed(Odd):
    """No clip can be read without dying."""

    def __getitem__(self, index):
        os._exit(3)


def test_workers_that_keep_dying_end_the_iteration_with_a_named_error():
    with Feeder(Doomed(), BatchSampler(60, 8), num_workers=2, max_restarts=4) as feeder:
        with pytest.raises(LoaderError, match=r"died 5 times.*exit 3.*max_restarts=4"):
            epoch(feeder)
        assert not children()


class Broken(Odd):
    """A mistake of the program, not of a file."""

    def __getitem__(self, index):
        if index == 30:
            raise KeyError("a mistake")
        return super().__getitem__(index)


@pytest.mark.parametrize(("workers", "kind"), WAYS)
def test_a_mistake_in_a_dataset_is_raised_and_nothing_is_left(workers, kind):
    before = open_files()
    feeder = Feeder(Broken(), BatchSampler(60, 8, shuffle=False), num_workers=workers, workers=kind)
    with pytest.raises(KeyError, match="a mistake") as caught:
        epoch(feeder)
    if kind == "processes" and workers:
        assert "loader worker" in caught.value.__notes__[0]
    feeder.close()
    assert not children() and open_files() == before


@pytest.mark.parametrize(("workers", "kind"), WAYS)
def test_an_epoch_left_early_leaves_nothing_and_the_next_one_is_whole(workers, kind):
    before = open_files()
    threads = threading.active_count()
    sampler = BatchSampler(60, 4, seed=2)
    whole = epoch(Feeder(Odd(), sampler))
    with Feeder(Odd(), sampler, num_workers=workers, workers=kind) as feeder:
        for _ in range(3):
            for number, _ in enumerate(feeder):
                if number == 2:
                    break
        with pytest.raises(ZeroDivisionError):
            for _ in feeder:
                _ = 1 / 0
        assert equal(epoch(feeder), whole)
        ids = feeder.worker_ids
    assert not children() and open_files() == before and threading.active_count() == threads
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids)
    feeder.close()
    assert equal(epoch(feeder), whole)  # begins anew
    feeder.close()


def test_a_feeder_that_is_dropped_ends_its_workers():
    feeder = Feeder(Odd(), BatchSampler(60, 4), num_workers=2)
    batches = iter(feeder)
    next(batches)
    assert len(children()) == 2
    del feeder, batches
    until(lambda: not children())


SCRIPT = """
    import os, signal, sys, time
    sys.path.insert(0, {tests!r})
    from test_feeder_workers import Odd
    from ast_fast.data import BatchSampler, Feeder
    feeder = Feeder(Odd(), BatchSampler(60, 4), num_workers=2)
    batches = iter(feeder)
    next(batches)
    print(*feeder.worker_ids, flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_main_process(number):
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    ids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(ids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in ids)
    # Ctrl-C reaches every process of the terminal
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=30)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ids))


def test_waiting_is_measured():
    class Slow(Odd):
        def __getitem__(self, index):
            time.sleep(0.03)
            return super().__getitem__(index)

    with Feeder(Slow(20), BatchSampler(20, 4), num_workers=0) as feeder:
        epoch(feeder)
        # 0.6 s asleep; the rest is what a busy machine adds
        assert feeder.stats.wait_share > 0.3 and 0.6 <= feeder.stats.wait_s <= feeder.stats.total_s
    with Feeder(Slow(20), BatchSampler(20, 4), num_workers=2) as feeder:
        for _ in feeder:
            time.sleep(0.15)
        assert feeder.stats.wait_share < 0.5


@pytest.mark.parametrize(
    "options", [{"num_workers": -1}, {"max_bytes": 0}, {"prefetch": 0}, {"workers": "x"}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Feeder(Odd(), BatchSampler(60, 4), **options)


def soak(folder, clips, seconds, kill_every, deaths=0):
    """Epochs over files, 1 % corrupt, with workers killed at random; returns deaths and epochs.

    On a busy machine a worker takes seconds to start: goes on until so many died, for a minute at most.
    """
    rng = random.Random(0)
    import soundfile as sf

    bad = set(rng.sample(range(clips), max(1, clips // 100)))
    for index in range(clips):
        path = folder / "ab"[index % 2] / f"{index:05d}.flac"
        path.parent.mkdir(exist_ok=True)
        wave = wave_of(index) if index % 11 != 3 else wave_of(0)
        sf.write(path, wave.numpy(), 16000, subtype="PCM_16")
        if index in bad:
            content = bytearray(path.read_bytes())
            path.write_bytes(content[: len(content) // 2] if index % 2 else b"junk" * 30)
    dataset = AudioDataset(read_folder(folder))
    expected = epoch(Feeder(dataset, BatchSampler(clips, 16, seed=0)))
    assert sum(b[4].num_skipped for b in expected) == len(bad)
    epochs, held = 0, []
    started = killed = time.monotonic()
    with Feeder(
        dataset, BatchSampler(clips, 16, seed=0), num_workers=2, max_restarts=10**6
    ) as feeder:
        while (lasted := time.monotonic() - started) < seconds or (
            feeder.stats.workers_restarted < deaths and lasted < 60
        ):
            found = []
            for fed in feeder:
                batch = fed.batch
                found.append(
                    (batch.indices.tolist(), batch.wave, batch.lengths, batch.targets, batch.report)
                )
                if time.monotonic() - killed > kill_every:
                    killed = time.monotonic()
                    os.kill(rng.choice(feeder.worker_ids), signal.SIGKILL)
            assert equal(found, expected)
            epochs += 1
            del found
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            # memory files come and go with what is read ahead, which has a bound of its own
            lent = len(feeder._pool._slots)
            assert lent <= _MAX_TASKS_AHEAD + 1
            shared = len(list(Path("/dev/shm").iterdir()))
            held.append((open_files() - lent, len(children()), shared, pages))
        deaths = feeder.stats.workers_restarted
    assert not children()
    return deaths, epochs, held


def test_a_short_soak_with_killed_workers_and_corrupt_files_loses_nothing(tmp_path):
    before = open_files()
    deaths, epochs, held = soak(tmp_path, 400, 4.0, 0.15, deaths=5)
    assert deaths >= 5 and epochs >= 2
    assert {entry[1] for entry in held} == {2}
    assert open_files() == before


@pytest.mark.slow
def test_a_long_soak_leaks_nothing(tmp_path):
    before, shared = open_files(), len(list(Path("/dev/shm").iterdir()))
    deaths, epochs, held = soak(tmp_path, 3000, 120.0, 0.3)
    assert deaths >= 100 and epochs >= 10
    files, workers, memory, pages = zip(*held[2:], strict=True)
    assert max(files) - min(files) <= 16 and set(workers) == {2} and set(memory) == {shared}
    assert (max(pages) - pages[0]) * 4096 < 64 << 20
    assert open_files() == before
