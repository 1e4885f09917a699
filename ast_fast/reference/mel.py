"""Kaldi-compatible framing, window and mel filters, built in float64.

Follows `torchaudio.compliance.kaldi.fbank` as the original AST calls it: Hann window that is
symmetric (first sample 0), FFT length rounded up to a power of two, HTK mel scale
1127 ln(1 + f/700), triangles drawn on the mel axis without area normalisation, Nyquist bin unused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR = 1.1920928955078125e-07  # float32 epsilon: ln of it is -15.942385


@dataclasses.dataclass(frozen=True, eq=False)
class MelTables:
    """Everything a log-mel backend needs; hashed by identity, so backends can cache per table.

    Attributes:
        sample_rate_hz: samples a second.
        window_samples: samples a frame (25 ms in AST).
        hop_samples: samples between frame starts (10 ms in AST).
        n_fft: FFT length, the power of two at or above the window.
        num_mel_bins: number of mel filters F.
        preemphasis: coefficient a of x[i] - a x[i-1], applied within a frame.
        remove_dc: whether each frame's mean is subtracted first.
        log_floor: energies below this are raised to it before the logarithm.
        window: [window_samples] float64.
        filters: [F, n_fft // 2 + 1] float64; rows may be empty.
    """

    sample_rate_hz: int
    window_samples: int
    hop_samples: int
    n_fft: int
    num_mel_bins: int
    preemphasis: float
    remove_dc: bool
    log_floor: float
    window: Tensor
    filters: Tensor

    @property
    def sizes(self) -> MelSizes:
        """The sizes alone."""
        return MelSizes(self.window_samples, self.hop_samples, self.n_fft, self.num_mel_bins)

    def num_frames(self, num_samples: int) -> int:
        """Whole frames in `num_samples` samples; 0 below one window."""
        return self.sizes.num_frames(num_samples)


class MelSizes(NamedTuple):
    """The sizes of a log-mel setting, known without building its tables."""

    window_samples: int
    hop_samples: int
    n_fft: int
    num_mel_bins: int

    def num_frames(self, num_samples: int) -> int:
        """Whole frames in `num_samples` samples; 0 below one window."""
        if num_samples < self.window_samples:
            return 0
        return 1 + (num_samples - self.window_samples) // self.hop_samples


def mel_sizes(sample_rate_hz: int, num_mel_bins: int, window_ms: float, hop_ms: float) -> MelSizes:
    """Sizes in samples of a setting in milliseconds, rounded down as Kaldi does.

    Raises:
        ValueError: a size is not positive.
    """
    if sample_rate_hz <= 0:
        raise ValueError(f"sample_rate_hz={sample_rate_hz}: expected a positive rate in Hz")
    if num_mel_bins < 4:
        raise ValueError(f"num_mel_bins={num_mel_bins}: expected at least 4 (as Kaldi)")
    window_samples = int(sample_rate_hz * window_ms * 0.001)
    hop_samples = int(sample_rate_hz * hop_ms * 0.001)
    if window_samples < 2 or hop_samples < 1:
        raise ValueError(
            f"window_ms={window_ms:g} and hop_ms={hop_ms:g} at {sample_rate_hz} Hz give "
            f"{window_samples} and {hop_samples} samples: expected at least 2 and 1"
        )
    return MelSizes(
        window_samples, hop_samples, 1 << (window_samples - 1).bit_length(), num_mel_bins
    )


def mel_scale(frequency_hz: float) -> float:
    """Frequency in Hz on the HTK mel scale."""
    return 1127.0 * math.log1p(frequency_hz / 700.0)


def mel_filters(
    num_mel_bins: int, n_fft: int, sample_rate_hz: int, low_hz: float, high_hz: float
) -> Tensor:
    """Triangular mel filters [num_mel_bins, n_fft // 2 + 1] in float64, Nyquist column zero."""
    nyquist_hz = 0.5 * sample_rate_hz
    high_hz = high_hz if high_hz > 0.0 else nyquist_hz + high_hz
    if not (0.0 <= low_hz < high_hz <= nyquist_hz):
        raise ValueError(
            f"low_freq_hz={low_hz:g} and high_freq_hz={high_hz:g} do not fit a sample rate of "
            f"{sample_rate_hz} Hz: expected 0 <= low < high <= {nyquist_hz:g}; "
            "lower high_freq_hz (0 means Nyquist) or resample"
        )
    low_mel, high_mel = mel_scale(low_hz), mel_scale(high_hz)
    step = (high_mel - low_mel) / (num_mel_bins + 1)
    left = low_mel + step * torch.arange(num_mel_bins, dtype=torch.float64)[:, None]
    bins = torch.arange(n_fft // 2, dtype=torch.float64) * (sample_rate_hz / n_fft)
    mel = 1127.0 * torch.log1p(bins / 700.0)[None, :]
    rising = (mel - left) / step
    falling = (left + 2 * step - mel) / step
    filters = torch.clamp(torch.minimum(rising, falling), min=0.0)
    return torch.nn.functional.pad(filters, (0, 1))


@functools.lru_cache(maxsize=64)
def mel_tables(
    sample_rate_hz: int = 16000,
    num_mel_bins: int = 128,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    low_freq_hz: float = 20.0,
    high_freq_hz: float = 0.0,
    preemphasis: float = 0.97,
    remove_dc: bool = True,
    log_floor: float = LOG_FLOOR,
) -> MelTables:
    """Window, filters and sizes for one log-mel setting (cached: equal settings share a table).

    Args:
        sample_rate_hz: rate of the waveform; sizes in samples follow from it, rounded down.
        num_mel_bins: mel filters F.
        window_ms: frame length in milliseconds.
        hop_ms: frame shift in milliseconds.
        low_freq_hz: lower edge of the first filter.
        high_freq_hz: upper edge of the last; 0 or below counts from Nyquist.
        preemphasis: 0 switches it off.
        remove_dc: subtract each frame's mean.
        log_floor: smallest energy that reaches the logarithm.

    Raises:
        ValueError: a size is not positive or the filters do not fit the rate.
    """
    sizes = mel_sizes(sample_rate_hz, num_mel_bins, window_ms, hop_ms)
    window_samples, hop_samples, n_fft, _ = sizes
    phase = torch.arange(window_samples, dtype=torch.float64) * (2 * math.pi / (window_samples - 1))
    window = 0.5 - 0.5 * torch.cos(phase)
    filters = mel_filters(num_mel_bins, n_fft, sample_rate_hz, low_freq_hz, high_freq_hz)
    return MelTables(
        sample_rate_hz,
        window_samples,
        hop_samples,
        n_fft,
        num_mel_bins,
        preemphasis,
        remove_dc,
        log_floor,
        window,
        filters,
    )
