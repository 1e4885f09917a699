"""How many frames a clip has: every length from 1 to 480,000 samples, seven sample rates, both framings."""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast import ops
from ast_fast.reference.mel import mel_sizes

LONGEST = 480_000
RATES = [8000, 11025, 16000, 22050, 32000, 44100, 48000]
LENGTHS = torch.arange(LONGEST + 1)


def edges(sizes):
    """Lengths around the first windows, and around the ends of some later ones."""
    window, hop = sizes.window_samples, sizes.hop_samples
    last = (LONGEST - window) // hop
    lengths = {1, 2, hop, LONGEST - 1, LONGEST}
    for frame in (0, 1, 2, 9, last // 2, last - 1, last):
        lengths |= {window + frame * hop + off for off in (-1, 0, 1)}
    return sorted(length for length in lengths if 1 <= length <= LONGEST)


@pytest.mark.parametrize("rate", RATES)
def test_every_length_has_the_whole_windows_that_fit(rate):
    sizes = mel_sizes(rate, 128, 25.0, 10.0)
    assert (sizes.window_samples, sizes.hop_samples) == (rate // 40, rate // 100)
    # counted: where each window ends, and how many ends lie within a clip
    ends = sizes.window_samples + sizes.hop_samples * torch.arange(LONGEST // sizes.hop_samples)
    counted = torch.searchsorted(ends, LENGTHS, right=True)
    assert torch.equal(sizes.frames_of(LENGTHS), counted)
    assert [sizes.num_frames(length) for length in range(LONGEST + 1)] == counted.tolist()
    assert not counted[: sizes.window_samples].any() and counted[sizes.window_samples] == 1


@pytest.mark.parametrize("rate", RATES)
def test_every_length_has_a_centred_frame_a_hop(rate):
    for padding, least in (("zeros", 0), ("reflect", 1024 // 2)):
        sizes = mel_sizes(rate, 64, 20.0, 10.0, 1024, padding=padding)
        centres = sizes.hop_samples * torch.arange(LONGEST // sizes.hop_samples + 2)
        # the last frame may lie on the end itself: one sample past the clip
        counted = torch.searchsorted(centres, LENGTHS, right=True)
        counted = counted.masked_fill(least >= LENGTHS, 0)
        assert torch.equal(sizes.frames_of(LENGTHS), counted)
        assert [sizes.num_frames(length) for length in range(LONGEST + 1)] == counted.tolist()


@pytest.mark.parametrize("rate", RATES)
def test_the_counts_are_torchaudios_and_kaldi_native_fbanks(rate):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    native = pytest.importorskip("kaldi_native_fbank")
    sizes = mel_sizes(rate, 128, 25.0, 10.0)
    wave = torch.zeros(LONGEST)
    options = native.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = rate, 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 16
    for length in edges(sizes):
        count = sizes.num_frames(length)
        # the framing step of torchaudio's fbank alone: all of it would take minutes
        framed = kaldi._get_strided(wave[:length], sizes.window_samples, sizes.hop_samples, True)
        assert framed.shape[0] == count
        if length < 100_000:
            extractor = native.OnlineFbank(options)
            extractor.accept_waveform(rate, wave[:length].numpy())
            extractor.input_finished()
            assert extractor.num_frames_ready == count


@pytest.mark.parametrize("rate", RATES)
def test_the_ops_write_so_many_frames_and_pad_the_rest(rate, backend):
    sizes = mel_sizes(rate, 4, 25.0, 10.0)
    lengths = torch.tensor([length for length in edges(sizes) if length < 8 * sizes.window_samples])
    wave = torch.full((1, int(lengths.max())), 0.25).expand(len(lengths), -1)
    with ast_fast.use_backend(backend):
        y = ops.log_mel(wave, lengths, sample_rate_hz=rate, num_mel_bins=4)
        alone = [ops.log_mel(wave[:1, :n], sample_rate_hz=rate, num_mel_bins=4) for n in lengths]
    # a constant is silence at the floor, padding is 0
    assert torch.equal((y < -15.0).all(2).sum(1), sizes.frames_of(lengths))
    assert torch.equal((y == 0.0).all(2).sum(1), y.shape[1] - sizes.frames_of(lengths))
    assert [one.shape[1] for one in alone] == sizes.frames_of(lengths).tolist()
