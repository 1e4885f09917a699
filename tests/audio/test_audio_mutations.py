"""Two thousand damaged files: an AudioError or audio, in bounded time and memory, never a crash."""

import contextlib
import io
import random
import resource
import time

import numpy as np
import soundfile as sf
import torch

from ast_fast import audio

MUTANTS_PER_FORMAT = 167  # twelve kinds of file: 2004

LIMIT_S = 0.05  # of the processor, a file


def least_seconds(content):
    """What reading takes at its best of five."""
    taken = []
    for _ in range(5):
        start = time.process_time()
        with contextlib.suppress(audio.AudioError):
            audio.load(content)
        taken.append(time.process_time() - start)
    return min(taken)


def originals():
    noise = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    for format in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64"):
        file = io.BytesIO()
        sf.write(file, noise, 16000, format=format)
        yield format, file.getvalue()
        if format in ("FLAC", "OGG", "MP3"):  # joined to one file
            yield f"two {format}", file.getvalue() * 2


def mutate(content, rng):
    data = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 64))):
        kind = rng.random()
        # headers decide more than samples do: half of the damage goes there
        at = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))
        if kind < 0.6:
            data[at] = rng.randrange(256)
        elif kind < 0.8:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.9:
            del data[at : at + rng.randrange(1, 400)]
            if not data:
                return b""
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(data)


def test_damaged_files_raise_audio_errors_only_and_leak_nothing():
    rng = random.Random(20261121)
    mutants = [
        mutate(content, rng) for _, content in originals() for _ in range(MUTANTS_PER_FORMAT)
    ]
    assert len(mutants) >= 2000
    outcomes = {"read": 0, "refused": 0}
    slow = []

    def read_all(rounds):
        for mutant in mutants[:: 1 if rounds == 1 else 4]:
            start = time.process_time()
            try:
                clip = audio.load(mutant)
                assert torch.isfinite(clip.wave).all() and clip.sample_rate_hz == 16000
                outcomes["read"] += 1
            except audio.AudioError as error:
                assert error.reason
                outcomes["refused"] += 1
            if time.process_time() - start > LIMIT_S:
                slow.append(mutant)

    read_all(2)  # warm-up: libraries and allocator
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_all(1)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert outcomes["read"] > 50 and outcomes["refused"] > 50, outcomes
    assert grown_mib < 64
    # what else the process did in the meantime, such as collecting garbage, does not come again
    assert all(least_seconds(mutant) < LIMIT_S for mutant in slow)
