"""torchaudio's own error on any clip, short ones too: what one run of it makes there is chance.

The worst entry of a log-mel is that of the emptiest bin, where the energy is what roundings left. Two correct float32
programs round there like two draws of one distribution, so on a clip of few frames one of them may by luck be five
times closer than the other, and a minute later the other. How far torchaudio may be off is therefore taken over the
same clip at eight gains, which change nothing but the roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import plain
from .measures import Errors, measure

# none a power of two: such a gain rounds nothing anew
GAINS = (1.0, *(0.5 + (2 * k + 1) / 28 for k in range(7)))
FEW_FRAMES = (
    16  # below, the mean over a clip is as much a matter of chance, and is taken over many clips
)


def exact_log_mel(wave: Tensor, sample_rate_hz: int, num_mel_bins: int) -> Tensor:  # [S, F]
    """Raw energies of one clip [N] in float64."""
    tables = reference.mel.mel_tables(sample_rate_hz, num_mel_bins)
    frames = tables.num_frames(wave.shape[0])
    return reference.ops.log_mel(wave.double()[None], None, tables, frames, 0.0, 0.5)[0]


def torchaudio_errors(wave: Tensor, sample_rate_hz: int, num_mel_bins: int) -> Errors | None:
    """The largest errors of torchaudio against float64 over the gains; None where it is not installed.

    Args:
        wave: [N] float32.
        sample_rate_hz: its rate.
        num_mel_bins: F.
    """
    found = []
    for gain in GAINS:
        clip = wave * torch.tensor(gain, dtype=torch.float32)
        theirs = plain.kaldi_fbank(
            clip[None],
            sample_rate_hz=sample_rate_hz,
            num_mel_bins=num_mel_bins,
            mean=0.0,
            std=0.5,
        )
        if theirs is None:
            return None
        found.append(measure(theirs[0], exact_log_mel(clip, sample_rate_hz, num_mel_bins)))
    return Errors(*(max(column) for column in zip(*found, strict=True)))
