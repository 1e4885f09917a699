"""The FLAC decoder: libsndfile's samples to the bit or a refusal, whatever is done to a file."""

import io
import random

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import _C, audio
from ast_fast.cpp import flac

LEVELS = (0.0, 0.3, 0.6, 1.0)  # fixed predictors to long linear ones


def sounds():
    """Name and int16 samples: every kind of subframe, and lengths around those of blocks."""
    draw = np.random.default_rng(0)
    time = np.arange(30_000)
    yield "silence", np.zeros(30_000)
    yield "constant", np.full(5000, -32768)
    yield "full-scale noise", draw.integers(-32768, 32768, 20_000)
    yield "square wave", 32767 * np.sign(np.sin(0.05 * time))
    yield "tone", 30_000 * np.sin(0.01 * time)
    yield "wasted bits", 256 * draw.integers(-100, 100, 9000)
    yield "walk", np.cumsum(draw.normal(0, 30, 30_000)).clip(-32768, 32767)
    yield "clicks", np.where(draw.random(30_000) < 1e-3, 32767, draw.integers(-2, 2, 30_000))
    for length in (1, 2, 15, 16, 17, 4095, 4096, 4097, 8192):
        yield f"{length} samples", draw.normal(0, 3000, length)


def encoded(samples, level=0.5, **options):
    file = io.BytesIO()
    given = {"format": "FLAC", "subtype": "PCM_16", "compression_level": level, **options}
    sf.write(file, samples, 16000, **given)
    return file.getvalue()


SOUNDS = {name: np.asarray(samples).astype(np.int16) for name, samples in sounds()}


@pytest.mark.parametrize("name", SOUNDS)
def test_samples_come_back_to_the_bit_at_every_level(name):
    for level in LEVELS:
        file = encoded(SOUNDS[name], level)
        found = flac.decode(file)
        assert found is not None and np.array_equal(found, SOUNDS[name])
        assert flac.stream_info(file)[:2] == (16000, len(SOUNDS[name]))


def test_files_of_other_kinds_are_left_to_libsndfile():
    walk = SOUNDS["walk"]
    assert flac.decode(encoded(np.stack([walk, walk], 1))) is None
    assert flac.decode(encoded(walk / 32768.0, subtype="PCM_24")) is None
    assert flac.decode(b"ID3" + encoded(walk)) is None
    assert flac.decode(b"") is None and flac.decode(b"fLaC") is None
    stereo = audio.load(encoded(np.stack([walk, walk], 1)), dtype="auto")
    assert stereo.report.downmixed == 1 and len(stereo.wave) == len(walk)


@pytest.mark.parametrize("dtype", ["auto", "int16", "float32"])
def test_loading_gives_what_libsndfile_gives(dtype, monkeypatch):
    file = encoded(SOUNDS["walk"])
    ours = audio.load(file, dtype=dtype)
    monkeypatch.setattr(flac, "decode", lambda _: None)
    theirs = audio.load(file, dtype=dtype)
    assert ours.wave.dtype == theirs.wave.dtype and torch.equal(ours.wave, theirs.wave)
    assert ours.report == theirs.report


def crc(polynomial, width, content):
    value, top = 0, 1 << (width - 1)
    for byte in content:
        value ^= byte << (width - 8)
        for _ in range(8):
            value = (value << 1) ^ polynomial if value & top else value << 1
            value &= (1 << width) - 1
    return value


def damaged(file, rng, checksums):
    """A file with some bytes changed, cut or put in; its one frame's checksum made to fit again if asked."""
    data = bytearray(file)
    begin = flac._after_metadata(file)
    for _ in range(rng.choice((1, 2, 8, 40))):
        at = rng.randrange(begin + 7 if checksums else 4, len(data))
        kind = rng.random()
        if kind < 0.7:
            data[at] = rng.randrange(256)
        elif kind < 0.85:
            del data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        if len(data) < begin + 10:
            return bytes(data)
    if checksums:
        data[-2:] = crc(0x8005, 16, data[begin:-2]).to_bytes(2, "big")
    return bytes(data)


def test_what_is_damaged_is_refused_or_decodes_as_libsndfile_does():
    rng = random.Random(0)
    decoded = 0
    for number in range(400):
        whole = SOUNDS[rng.choice(["walk", "tone", "clicks", "wasted bits"])]
        file = damaged(encoded(whole[:9000], rng.choice(LEVELS)), rng, checksums=False)
        found = flac.decode(file)
        if found is not None:
            decoded += 1
            theirs, _ = sf.read(io.BytesIO(file), dtype="int16")
            assert np.array_equal(found, theirs), number
    assert decoded < 40  # only where the damage lies in what no sample depends on


def test_streams_with_true_checksums_and_nonsense_inside_stay_within_their_memory():
    """Reaches the subframes, which a checksum guards otherwise; the guards stand around both buffers."""
    rng = random.Random(1)
    guard, taken = 4096, 0
    for _ in range(1500):
        whole = SOUNDS[rng.choice(["walk", "full-scale noise", "clicks", "wasted bits"])][:600]
        file = damaged(encoded(whole, rng.choice(LEVELS)), rng, checksums=True)
        _, samples, most = flac.stream_info(file)
        out = np.full(samples + 2 * guard, 12345, np.int16)
        scratch = np.full(most + 2 * guard, 1234567, np.int32)
        taken += _C.flac_decode(
            file,
            flac._after_metadata(file),
            out.ctypes.data + 2 * guard,
            scratch.ctypes.data + 4 * guard,
            samples,
            most,
        )
        for buffer, value in ((out, 12345), (scratch, 1234567)):
            assert (buffer[:guard] == value).all() and (buffer[-guard:] == value).all()
    assert taken > 20


def test_a_file_cut_off_anywhere_is_refused_and_named_by_the_loader():
    file = encoded(SOUNDS["walk"])
    for end in range(0, len(file), 997):
        assert flac.decode(file[:end]) is None
    with pytest.raises(audio.AudioError):
        audio.load(file[: len(file) // 2])


def test_a_header_that_lies_about_the_length_costs_no_memory():
    file = bytearray(encoded(SOUNDS["tone"]))
    file[21] |= 0x0F  # 36 bits of samples: 64 G of them
    file[22:26] = b"\xff" * 4
    with pytest.raises(audio.AudioError):
        audio.load(bytes(file))


class Stream:
    """A stream of one frame, written bit by bit: what encoders never write may be read all the same."""

    def __init__(self, samples):
        self.samples, self.bits = samples, []

    def put(self, value, width):
        self.bits += [value >> bit & 1 for bit in reversed(range(width))]
        return self

    def residuals(self, values, parameter=14):
        self.put(0, 2).put(0, 4).put(parameter, 4)  # one partition of Rice codes
        for value in values:
            folded = 2 * value if value >= 0 else -2 * value - 1
            self.put(1, (folded >> parameter) + 1).put(folded & (1 << parameter) - 1, parameter)
        return self

    def file(self):
        count = self.samples
        info = count.to_bytes(2, "big") * 2 + bytes(6)
        info += (16000 << 44 | 15 << 36 | count).to_bytes(8, "big") + bytes(16)
        head = Stream(0).put(0x7FFC, 15).put(0, 1).put(7, 4).put(0, 4).put(0, 4).put(4, 3).put(0, 1)
        head = head.put(0, 8).put(count - 1, 16).packed()
        frame = head + bytes([crc(0x07, 8, head)]) + self.packed()
        frame += crc(0x8005, 16, frame).to_bytes(2, "big")
        return b"fLaC\x80\0\0\x22" + info + frame

    def packed(self):
        bits = self.bits + [0] * (-len(self.bits) % 8)
        return bytes(int("".join(map(str, bits[i : i + 8])), 2) for i in range(0, len(bits), 8))


def predicted(first, residuals, weights, shift):
    x = list(first)
    for residual in residuals:
        newest = x[::-1][: len(weights)]
        x.append(residual + (sum(w * v for w, v in zip(weights, newest, strict=True)) >> shift))
    return np.array(x)


def test_the_fixed_predictor_of_the_highest_order():
    first, rest = [100, 120, 150, 190], [3, -2, 5, 0, -7, 1, 0, 4]
    stream = Stream(12).put(12 << 1, 8)
    for value in first:
        stream.put(value & 0xFFFF, 16)
    file = stream.residuals(rest, 2).file()
    want = predicted(first, rest, (4, -6, 4, -1), 0)
    assert np.array_equal(flac.decode(file), want)
    assert np.array_equal(sf.read(io.BytesIO(file), dtype="int16")[0], want)


@pytest.mark.parametrize("shift", [15, -1])
def test_linear_sums_beyond_32_bits_and_shifts_that_are_none(shift):
    order, weight = 5, 16383
    first = [32000 + index for index in range(order)]
    # the prediction overshoots by far, and the residual brings it back; a shift that is none predicts nothing
    rest = [32000 - (sum(first) * weight >> 15) if shift > 0 else 0]
    stream = Stream(order + 1).put((31 + order) << 1, 8)
    for value in first:
        stream.put(value, 16)
    stream.put(14, 4).put(shift & 31, 5)
    for _ in range(order):
        stream.put(weight, 15)
    file = stream.residuals(rest).file()
    if shift < 0:
        assert flac.decode(file) is None
        return
    assert sum(first) * weight > 2**31
    want = predicted(first, rest, (weight,) * order, shift)
    assert np.array_equal(flac.decode(file), want)
    assert np.array_equal(sf.read(io.BytesIO(file), dtype="int16")[0], want)


def test_samples_that_16_bits_do_not_hold_are_refused():
    stream = Stream(4).put(8 << 1, 8).residuals([1, 2, 40_000, 3])
    assert flac.decode(stream.file()) is None
    assert flac.decode(Stream(4).put(8 << 1, 8).residuals([1, 2, 30_000, 3]).file()) is not None
