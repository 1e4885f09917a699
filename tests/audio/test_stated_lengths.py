"""Files that state another length than they hold: every sample, a counted note or a named error, never less."""

import io

import numpy as np
import pytest
import soundfile as sf
import torch

from ast_fast import _mpeg, _ogg, audio
from ast_fast.audio_spans import read_span
from ast_fast.config import AudioConfig

RATE = 16000
RNG = np.random.default_rng(7)
QUIET_THEN_LOUD = np.concatenate([RNG.normal(0, 1e-5, 24000), RNG.normal(0, 0.1, 24000)]).astype(
    np.float32
)
NOISE = RNG.normal(0, 0.1, 48000).astype(np.float32)


def encoded(samples=NOISE, format="WAV", rate=RATE, **options):
    file = io.BytesIO()
    sf.write(file, samples, rate, format=format, **options)
    return file.getvalue()


def vbr(samples=QUIET_THEN_LOUD, **options):
    return encoded(samples, "MP3", bitrate_mode="VARIABLE", compression_level=0.5, **options)


def without_xing(mp3):
    header = int.from_bytes(mp3[:4], "big")
    return mp3[_mpeg._kind(header).length(header) :]


def with_flac_total(flac, total):
    packed = int.from_bytes(flac[18:26], "big") >> 36 << 36 | total
    return flac[:18] + packed.to_bytes(8, "big") + flac[26:]


def with_size(content, old, new, width, order):
    """The file with its size field of a value set to another."""
    at = content.index(old.to_bytes(width, order))
    return content[:at] + new.to_bytes(width, order) + content[at + width :]


def check_spans(content, tmp_path, count=9000, tolerance=1e-6, **settings):
    """A file read in spans gives what it gives whole."""
    path = tmp_path / "clip.bin"
    path.write_bytes(content)
    config = AudioConfig(sample_rate_hz=RATE, **settings)
    whole = audio.load(path, config).wave
    first = read_span(path, 0, count, config)
    parts, total = [first.wave], first.total
    while (start := sum(map(len, parts))) < total:
        part = read_span(path, start, count, config)
        assert part.total == total and len(part.wave)
        parts.append(part.wave)
    joined = torch.cat(parts)
    assert joined.shape == whole.shape
    assert float((joined - whole).abs().max()) <= tolerance
    return first.report


# ---- MP3


def test_an_mp3_of_varying_bit_rate_without_xing_frame_gives_all_its_samples(tmp_path):
    content = without_xing(vbr())
    clip = audio.load(content)
    # by libsndfile, under a frame that states the length; it cuts off delay and padding there
    known = audio.load(vbr()).wave
    assert clip.wave.shape[0] % 576 == 0 and clip.wave.shape[0] >= known.shape[0]
    assert float((clip.wave[1105 : 1105 + len(known)] - known).abs().max()) < 1e-6
    assert clip.report.summary() == "1 clips read"
    check_spans(content, tmp_path)


def test_an_mp3_of_one_bit_rate_without_info_frame_decodes_as_before():
    content = without_xing(encoded(NOISE, "MP3", bitrate_mode="CONSTANT", compression_level=0.5))
    own, _ = sf.read(io.BytesIO(content), dtype="float32")
    wave = audio.load(content).wave.numpy()
    assert wave.shape == own.shape and np.abs(wave - own).max() <= 1e-7


def test_mp3_spans_take_bits_from_frames_far_before_them(tmp_path):
    check_spans(vbr(), tmp_path)  # an intact file: small frames, a deep bit reservoir


def test_joined_mp3s_are_read_whole_and_counted(tmp_path):
    one, two = vbr(), vbr(NOISE)
    tag = b"ID3\3\0\0\0\0\0\x20" + bytes(32)
    for content in (one + two, one + tag + two):
        clip = audio.load(content)
        both = torch.cat([audio.load(one).wave, audio.load(two).wave])
        assert torch.equal(clip.wave, both)
        assert clip.report.restated == 1 and "2 MPEG streams" in clip.report.notes[0]
    assert check_spans(one + two, tmp_path).restated == 1


def test_mp3s_of_two_rates_or_channel_counts_in_one_file_are_refused_by_name(tmp_path):
    stereo = vbr(np.stack([NOISE, NOISE], 1))
    for other in (stereo, vbr(rate=22050)):
        with pytest.raises(audio.AudioDecodeError, match=r"come others.*split"):
            audio.load(vbr() + other)
        (tmp_path / "a.mp3").write_bytes(vbr() + other)
        with pytest.raises(audio.AudioDecodeError, match=r"come others.*split"):
            read_span(tmp_path / "a.mp3", 0, 1000, AudioConfig())


def test_an_mp3_that_is_cut_is_refused_or_kept_with_or_without_xing():
    for content in (vbr(), without_xing(vbr())):
        half = content[: len(content) // 2]
        with pytest.raises(audio.AudioTruncatedError, match=r"promises|last frame"):
            audio.load(half)
        kept = audio.load(half, truncated="keep")
        assert kept.report.truncated == 1
        assert torch.equal(kept.wave[:20000], audio.load(content).wave[:20000])


def test_what_is_no_frame_in_an_mp3_is_left_out_and_said_and_tags_are_not():
    content = without_xing(vbr())
    plain = audio.load(content).wave
    for tail in (b"TAG" + bytes(125), bytes(5000), b""):
        clip = audio.load(content + tail)
        assert torch.equal(clip.wave, plain) and not clip.report.restated
    cut = content.index(content[:2], 3000)
    clip = audio.load(content[:cut] + b"not a frame " * 20 + content[cut:])
    assert clip.wave.shape == plain.shape
    assert clip.report.restated == 1 and "240 bytes" in clip.report.notes[0]


def with_mp3_frames(mp3, more):
    """The file with another number of frames in its Xing frame."""
    at = mp3.index(b"Xing") + 8
    return (
        mp3[:at]
        + (int.from_bytes(mp3[at : at + 4], "big") + more).to_bytes(4, "big")
        + mp3[at + 4 :]
    )


def test_an_mp3_that_states_its_bytes_is_not_walked(monkeypatch):
    content, wave = vbr(), audio.load(vbr()).wave
    monkeypatch.setattr(_mpeg, "_run", lambda *_: pytest.fail("walked"))
    assert torch.equal(audio.load(content).wave, wave)
    assert torch.equal(audio.load(content + b"TAG" + bytes(125)).wave, wave)


def test_an_mp3_that_counts_its_info_frame_too_is_whole(tmp_path):
    content = with_mp3_frames(vbr(), 1)
    wave = audio.load(vbr()).wave
    for file, expected in ((content, wave), (content + content, torch.cat([wave, wave]))):
        clip = audio.load(file)
        assert clip.wave.shape == expected.shape and not clip.report.truncated
        assert float((clip.wave - expected).abs().max()) < 1e-6
        check_spans(file, tmp_path)
    for file in (with_mp3_frames(vbr(), 2), with_mp3_frames(vbr(), 2) + vbr()):
        with pytest.raises(
            audio.AudioTruncatedError, match="promises 88 MPEG frames, 86 are there"
        ):
            audio.load(file)


def test_an_mp3_with_a_broken_frame_that_states_its_bytes_is_refused_or_kept():
    content = bytearray(vbr())
    at = 0
    for _ in range(40):
        at += _mpeg._kind(int.from_bytes(content[at : at + 4], "big")).length(
            int.from_bytes(content[at : at + 4], "big")
        )
    content[at : at + 4] = b"\0\0\0\0"
    with pytest.raises(audio.AudioTruncatedError, match="promises 86 MPEG frames, 85 are there"):
        audio.load(bytes(content))
    kept = audio.load(bytes(content), truncated="keep").report
    assert kept.truncated == 1 and "no MPEG frame" in " ".join(kept.notes)


def test_frames_behind_those_that_xing_promises_are_read_and_said():
    clip = audio.load(vbr() + without_xing(vbr()))
    assert len(clip.wave) > 1.9 * len(audio.load(vbr()).wave)
    assert "promises 86 MPEG frames, 172 are there" in clip.report.notes[0]


# ---- Ogg


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_whole_and_counted(subtype, tmp_path):
    one, two = (encoded(x, "OGG", subtype=subtype) for x in (NOISE, QUIET_THEN_LOUD))
    clip = audio.load(one + two + one)
    parts = [audio.load(content).wave for content in (one, two, one)]
    assert torch.equal(clip.wave, torch.cat(parts))
    assert clip.report.restated == 1 and "3 Ogg streams" in clip.report.notes[0]
    report = check_spans(one + two + one, tmp_path)
    assert report.restated == 1
    with pytest.raises(audio.AudioTruncatedError, match="Ogg"):
        audio.load((one + two)[:-200])
    with pytest.raises(audio.AudioTruncatedError, match="Ogg"):
        audio.load(one[: one.rindex(b"OggS")] + two)  # the first has lost its end


def test_chained_ogg_of_two_rates_is_refused_by_name():
    with pytest.raises(audio.AudioDecodeError, match="number 2 has 24000 Hz"):
        audio.load(encoded(format="OGG") + encoded(format="OGG", rate=24000))


def test_spans_in_the_last_page_of_an_ogg_file_are_in_their_place(tmp_path):
    for subtype in ("VORBIS", "OPUS"):
        for count in (5000, 7000, 9000):
            check_spans(encoded(format="OGG", subtype=subtype), tmp_path, count)


def pages_of(ogg):
    """Where each page begins, and the end."""
    starts, place = [], 0
    while place < len(ogg):
        starts.append(place)
        table = ogg[place + 27 : place + 27 + ogg[place + 26]]
        place += 27 + len(table) + sum(table)
    return [*starts, len(ogg)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_page_of_ogg_that_is_damaged_or_missing_is_never_filled_in(subtype):
    whole = encoded(RNG.normal(0, 0.1, 160000).astype(np.float32), "OGG", subtype=subtype)
    starts = pages_of(whole)
    assert len(starts) >= 7 and audio.load(whole).report.summary() == "1 clips read"
    for page in range(3, len(starts) - 1):
        begin, end = starts[page : page + 2]
        for at in (begin + 30, (begin + end) // 2, end - 1, begin + 8, begin + 5, begin + 18):
            content = bytearray(whole)
            content[at] ^= 1
            with pytest.raises(audio.AudioTruncatedError, match=r"damaged Ogg page|last Ogg page"):
                audio.load(bytes(content))
            kept = audio.load(bytes(content), truncated="keep")
            assert kept.report.truncated == 1 and "Ogg page" in kept.report.notes[0]
        if page < len(starts) - 2:
            with pytest.raises(audio.AudioTruncatedError, match="missing between others: 1"):
                audio.load(whole[:begin] + whole[end:])
        # decoders play a page twice that is there twice
        twice = audio.load(whole[:end] + whole[begin:])
        assert torch.equal(twice.wave, audio.load(whole).wave)
        assert "there twice and are read once: 1" in twice.report.notes[0]
        if page < len(starts) - 3:
            after = starts[page + 2]
            with pytest.raises(audio.AudioTruncatedError, match="missing between others"):
                audio.load(whole[:begin] + whole[end:after] + whole[begin:end] + whole[after:])
    # what is cut out of the middle of a stream begins late
    late = audio.load(whole[: starts[2]] + whole[starts[3] :])
    assert (
        late.report.restated == 1 and "what came before is not in the file" in late.report.notes[0]
    )


def test_the_checksum_of_a_page_is_that_of_ogg():
    page = bytearray(b"OggS" + bytes(23) + b"\1\3abc")
    slow = 0
    for byte in page:
        slow ^= byte << 24
        for _ in range(8):
            slow = (slow << 1 ^ (0x04C11DB7 if slow >> 31 else 0)) & 0xFFFFFFFF
    assert _ogg.checksum(bytes(page)) == slow
    page[22:26] = b"used"
    assert _ogg.checksum(bytes(page)) == slow  # the field itself counts as zeros


# ---- FLAC


@pytest.mark.parametrize("channels", [1, 2])
def test_flac_is_read_by_its_frames(channels, tmp_path):
    samples = NOISE if channels == 1 else np.stack([NOISE, NOISE / 2], 1)
    content = encoded(samples, "FLAC")
    wave = audio.load(content).wave
    streamed = audio.load(with_flac_total(content, 0))
    assert torch.equal(streamed.wave, wave) and not streamed.report.restated
    check_spans(with_flac_total(content, 0), tmp_path, tolerance=0)
    few = audio.load(with_flac_total(content, 5000))
    assert torch.equal(few.wave, wave)
    assert few.report.restated == 1 and "promises 5000 samples" in few.report.notes[0]
    joined = audio.load(content + content)
    assert torch.equal(joined.wave, torch.cat([wave, wave])) and joined.report.restated == 1
    assert check_spans(content + content, tmp_path, tolerance=0).restated == 1
    for tail in (b"TAG" + bytes(125), bytes(100)):
        for head in (content, with_flac_total(content, 0)):
            tagged = audio.load(head + tail)
            assert torch.equal(tagged.wave, wave) and not tagged.report.restated


@pytest.mark.parametrize("total", [48000, 0, 90000])
@pytest.mark.parametrize("channels", [1, 2])
def test_cut_flac_is_refused_or_its_whole_frames_are_kept(channels, total):
    samples = NOISE if channels == 1 else np.stack([NOISE, NOISE / 2], 1)
    content = encoded(samples, "FLAC")
    wave = audio.load(content).wave
    cut = with_flac_total(content, total)[: len(content) * 2 // 3]
    with pytest.raises(audio.AudioTruncatedError, match=r"promises|not whole"):
        audio.load(cut)
    kept = audio.load(cut, truncated="keep")
    assert kept.report.truncated == 1 and len(kept.wave) > 24000
    assert torch.equal(kept.wave, wave[: len(kept.wave)])


def test_streamed_flac_behind_an_id3_tag_is_read():
    content = with_flac_total(encoded(format="FLAC"), 0)
    tag = b"ID3\3\0\0\0\0\0\x20" + bytes(32)
    assert torch.equal(audio.load(tag + content).wave, audio.load(content).wave)


# ---- chunks

# format, the size field of 96,000 bytes of audio, its width, byte order and what is added in it
FIELDS = [
    ("WAV", 96000, 4, "little", 0),
    ("WAVEX", 96000, 4, "little", 0),
    ("RF64", 96000, 8, "little", 0),
    ("W64", 96024, 8, "little", 24),
    ("AIFF", 96008, 4, "big", 8),
    ("AU", 96000, 4, "big", 0),
    ("CAF", 96004, 8, "big", 4),
    ("SVX", 96000, 4, "big", 0),
]


@pytest.mark.parametrize(("format", "field", "width", "order", "more"), FIELDS)
def test_size_fields_that_are_too_small_or_zero_lose_nothing(
    format, field, width, order, more, tmp_path
):
    content = encoded(format=format, subtype="PCM_16")
    wave = audio.load(content).wave
    assert len(wave) == 48000 and not audio.load(content).report.restated
    for size in (1000 + more, more, 0):
        wrong = with_size(content, field, size, width, order)
        clip = audio.load(wrong)
        assert torch.equal(clip.wave, wave)
        assert check_spans(wrong, tmp_path, tolerance=0).restated == clip.report.restated
    said = audio.load(with_size(content, field, 1000 + more, width, order)).report
    assert said.restated == 1 and "promises 1000 bytes" in said.notes[0]


@pytest.mark.parametrize(("format", "field", "width", "order", "more"), FIELDS)
def test_a_file_cut_in_half_is_refused_or_kept(format, field, width, order, more):
    content = encoded(format=format, subtype="PCM_16")
    half = content[: len(content) // 2]
    with pytest.raises(audio.AudioTruncatedError, match="promises 96000 bytes"):
        audio.load(half)
    kept = audio.load(half, truncated="keep")
    assert kept.report.truncated == 1
    assert torch.equal(kept.wave, audio.load(content).wave[: len(kept.wave)])
    assert len(kept.wave) > 22000


def test_a_nist_file_cut_in_half_is_refused():
    content = encoded(format="NIST", subtype="PCM_16")
    assert audio.load(content).wave.shape == (48000,)
    with pytest.raises(audio.AudioTruncatedError, match="promises 48000 samples"):
        audio.load(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("format", "field", "unknown", "width", "order"),
    [
        ("WAV", 96000, 0xFFFFFFFF, 4, "little"),
        ("WAV", 96000, 0x7FFFF000, 4, "little"),
        ("W64", 96024, (1 << 63) - 1, 8, "little"),
        ("RF64", 96000, (1 << 64) - 1, 8, "little"),
        ("AU", 96000, 0xFFFFFFFF, 4, "big"),
        ("CAF", 96004, (1 << 64) - 1, 8, "big"),
        ("AIFF", 96008, 0xFFFFFFFF, 4, "big"),
    ],
)
def test_the_sizes_of_writers_that_cannot_seek_back_are_no_truncation(
    format, field, unknown, width, order
):
    content = encoded(format=format, subtype="PCM_16")
    clip = audio.load(with_size(content, field, unknown, width, order))
    assert clip.wave.shape == (48000,) and not clip.report.truncated


def test_a_large_wav_cut_short_is_not_taken_for_a_streamed_one():
    content = with_size(encoded(subtype="PCM_16"), 96000, 3_000_000_000, 4, "little")
    with pytest.raises(audio.AudioTruncatedError, match="promises 3000000000"):
        audio.load(content)


def test_chunks_tags_and_zeros_behind_the_sound_are_no_sound():
    content = encoded(subtype="PCM_16")
    chunks = b"LIST\x04\0\0\0INFO" + b"abcd\x03\0\0\0xyz\0"
    for tail in (chunks, b"TAG" + bytes(125), bytes(4000), b"LIST\xff\0\0\0INFOcut", b"\0"):
        clip = audio.load(content + tail)
        assert clip.wave.shape == (48000,) and not clip.report.restated
    odd = encoded(NOISE[:999], subtype="PCM_U8")  # written without its padding
    assert audio.load(odd[:44] + odd[44:1043] + chunks).wave.shape == (999,)


def test_a_header_that_is_too_large_costs_no_memory():
    caf = encoded(format="CAF", subtype="PCM_16")
    at = caf.index(b"free") + 4
    huge = caf[:at] + (1 << 40).to_bytes(8, "big") + caf[at + 8 :]
    with pytest.raises(audio.AudioError):
        audio.load(huge)


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_sound_that_ends_within_a_sample_is_said(format, subtype):
    stereo = np.stack([NOISE[:4002], -NOISE[:4002]], 1)
    content = encoded(stereo, format, subtype=subtype)
    frame = 2 * {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}[subtype]
    size = 4002 * frame
    widths = {"RF64": (8, "little", 0), "W64": (8, "little", 24), "AIFF": (4, "big", 8)}
    width, order, more = widths.get(format, (4, "big" if format == "AU" else "little", 0))
    if format == "CAF":
        width, order, more = 8, "big", 4
    cut = with_size(content, size + more, size - 1 + more, width, order)
    end = cut.index(content[-1000:]) + 1000 if format in ("WAV", "WAVEX", "AU") else len(cut)
    clip = audio.load(cut[: end - 1])
    assert clip.wave.shape == (4001,)
    assert clip.report.restated == 1
    assert (
        f"holds {size - 1} bytes of audio, {frame - 1} more than whole samples of {frame}"
        in clip.report.notes[0]
    )
    assert audio.load(content).report.restated == 0
