"""Memory that is used again: never while anybody holds a part of it, in whatever thread or process."""

import gc
import multiprocessing
import threading

import numpy as np
import pytest
import torch

from ast_fast.data import (
    BatchSampler,
    Feeder,
    ShardSampler,
    ShardSet,
    WaveformDataset,
    write_shards,
)
from ast_fast.data.buffers import SAMPLES, Buffers

MIB = 1 << 20


def test_memory_comes_back_when_the_last_view_of_it_is_gone():
    buffers = Buffers()
    wave = buffers.tensor(4, 100_000, torch.int16)
    address, row = wave.data_ptr(), wave[2]
    del wave
    assert buffers.free_bytes == 0
    other = buffers.tensor(4, 100_000, torch.int16)
    assert other.data_ptr() != address
    flat = row.numpy()[5:9]
    del row
    assert buffers.free_bytes == 0  # a view of NumPy's holds it as well
    del flat
    assert buffers.free_bytes >= 800_000
    assert buffers.tensor(4, 100_000, torch.int16).data_ptr() == address
    other.zero_()  # writable, and as torch's own memory is aligned
    assert other.data_ptr() % 64 == 0


def test_what_is_kept_stays_within_its_limit_and_odd_sizes_are_left_to_malloc():
    buffers = Buffers(free_bytes=3 * MIB)
    held = [buffers.take(MIB) for _ in range(8)]
    del held
    assert 2 * MIB <= buffers.free_bytes <= 3 * MIB
    held = [buffers.take(2 * MIB)]
    del held
    assert 2 * MIB <= buffers.free_bytes <= 3 * MIB  # the size asked for last is kept
    buffers.clear()
    for count in (0, 1, 1000, 40 * MIB):
        assert buffers.take(count).shape == (count,)
    assert buffers.free_bytes == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 16000), (3, 0)])
def test_a_batch_of_no_samples_is_a_tensor_too(shape):
    wave = Buffers().tensor(*shape, torch.float32)
    assert wave.shape == shape and wave.dtype == torch.float32


def test_threads_never_share_memory():
    buffers, wrong = Buffers(), []

    def work(number):
        kept = []
        for turn in range(300):
            array = buffers.take(200_000 + 1000 * (turn % 3))
            array[:] = number
            kept.append(array)
            if any((one != number).any() for one in kept):
                wrong.append(number)
            kept = kept[-2:]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert buffers.free_bytes


def test_a_forked_process_begins_with_none():
    held = [SAMPLES.take(MIB)]
    del held
    assert SAMPLES.free_bytes
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(SAMPLES.free_bytes))
    process.start()
    assert queue.get(timeout=30) == 0
    process.join()
    assert SAMPLES.free_bytes


@pytest.mark.parametrize("shards", [False, True])
def test_batches_that_are_kept_keep_their_samples(tmp_path, shards):
    draw = np.random.default_rng(0)
    waves = [torch.from_numpy(draw.integers(-9, 9, 50_000, np.int16)) for _ in range(24)]
    source = WaveformDataset(waves, [(0,)] * 24, ("a",))
    if shards:
        write_shards(source, tmp_path)
        source = ShardSet(tmp_path)
    sampler = ShardSampler(source, 4, seed=1) if shards else BatchSampler(24, 4, seed=1)
    with Feeder(source, sampler) as feeder:
        batches = [batch for _ in range(3) for batch, _ in feeder]
    assert len(batches) == 18
    for batch in batches:
        for row, index in zip(batch.wave, batch.indices.tolist(), strict=True):
            assert torch.equal(row, waves[index])
