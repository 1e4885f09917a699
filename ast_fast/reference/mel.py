"""Framing, windows and mel filters of a log-mel setting, built in float64.

The defaults follow `torchaudio.compliance.kaldi.fbank` as the original AST calls it: Hann window that
is symmetric (first sample 0), FFT length rounded up to a power of two, HTK mel scale
1127 ln(1 + f/700), triangles drawn on the mel axis without area normalisation, Nyquist bin unused.
The other windows are Kaldi's (and torch's periodic Hann), the other filters those of
`torchaudio.functional.melscale_fbanks`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

WINDOWS = ("hann", "hann_periodic", "povey", "hamming", "blackman", "rectangular")
MEL_SCALES = ("kaldi", "htk", "slaney")
MEL_NORMS = ("none", "slaney")
PADDINGS = ("none", "reflect", "zeros")
LOG_FLOOR = 1.1920928955078125e-07  # float32 epsilon: ln of it is -15.942385


@dataclasses.dataclass(frozen=True, eq=False)
class MelTables:
    """Everything a log-mel backend needs; hashed by identity, so backends can cache per table.

    Attributes:
        sample_rate_hz: samples a second.
        window_samples: samples a frame (25 ms in AST).
        hop_samples: samples between frame starts (10 ms in AST).
        n_fft: FFT length, at or above the window; by default the next power of two.
        num_mel_bins: number of mel filters F.
        preemphasis: coefficient a of x[i] - a x[i-1], applied within a frame.
        remove_dc: whether each frame's mean is subtracted first.
        log_floor: energies below this are raised to it before the logarithm.
        window: [window_samples] float64.
        filters: [F, n_fft // 2 + 1] float64; rows may be empty.
        magnitude: filters weigh |spectrum| rather than its square.
        log_offset: added to every energy before floor and logarithm.
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
    magnitude: bool = False
    log_offset: float = 0.0

    @property
    def sizes(self) -> MelSizes:
        """The sizes alone; frames are whole ones, since backends see waveforms already padded."""
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
    padding: str = "none"

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of `num_samples` samples.

        Without padding the whole frames: 0 below one window. With it one frame a hop, centred on
        the hop's first sample, as `torch.stft(center=True)` counts them; 0 where nothing is left to
        reflect (n_fft / 2 samples or fewer: `torch.stft` raises) or for no samples at all.
        """
        if self.padding != "none":
            if num_samples <= (self.n_fft // 2 if self.padding == "reflect" else 0):
                return 0
            return 1 + num_samples // self.hop_samples
        if num_samples < self.window_samples:
            return 0
        return 1 + (num_samples - self.window_samples) // self.hop_samples

    def frames_of(self, lengths: Tensor) -> Tensor:
        """`num_frames` of every entry of an integer tensor."""
        if self.padding == "none":
            steps = torch.div(
                lengths - self.window_samples, self.hop_samples, rounding_mode="floor"
            )
            return (1 + steps).clamp(min=0)
        least = self.n_fft // 2 if self.padding == "reflect" else 0
        steps = torch.div(lengths, self.hop_samples, rounding_mode="floor")
        return torch.where(lengths > least, 1 + steps, torch.zeros_like(lengths))


# sizes beyond these are a mistake or an attack, and tables of them would be made before anybody could tell
MAX_WINDOW_SAMPLES = 1 << 20  # of a window, a hop or an FFT: a second at the highest rate
MAX_MEL_BINS = 1 << 14


def mel_sizes(
    sample_rate_hz: int,
    num_mel_bins: int,
    window_ms: float,
    hop_ms: float,
    n_fft: int | None = None,
    window_samples: int | None = None,
    hop_samples: int | None = None,
    padding: str = "none",
) -> MelSizes:
    """Sizes in samples of a setting in milliseconds, rounded down as Kaldi does.

    Args:
        sample_rate_hz: rate of the waveform.
        num_mel_bins: F.
        window_ms: frame length, unless `window_samples` is given.
        hop_ms: frame shift, unless `hop_samples` is given.
        n_fft: FFT length, even; None or 0 for the power of two at or above the window.
        window_samples: frame length in samples.
        hop_samples: frame shift in samples.
        padding: "none", "reflect" or "zeros": what lies before and after the clip.

    Raises:
        ValueError: a size is not positive, or the FFT does not hold the window.
    """
    if sample_rate_hz <= 0:
        raise ValueError(f"sample_rate_hz={sample_rate_hz}: expected a positive rate in Hz")
    if num_mel_bins < 4:
        raise ValueError(f"num_mel_bins={num_mel_bins}: expected at least 4 (as Kaldi)")
    for name, samples in (
        ("window_ms", window_samples or sample_rate_hz * window_ms * 0.001),
        ("hop_ms", hop_samples or sample_rate_hz * hop_ms * 0.001),
        ("n_fft", n_fft or 0),
    ):
        if not samples <= MAX_WINDOW_SAMPLES:  # NaN, too
            raise ValueError(
                f"{name}: {samples:g} samples at {sample_rate_hz} Hz: expected at most {MAX_WINDOW_SAMPLES}"
            )
    if num_mel_bins > MAX_MEL_BINS:
        raise ValueError(f"num_mel_bins={num_mel_bins}: expected at most {MAX_MEL_BINS}")
    window = window_samples or int(sample_rate_hz * window_ms * 0.001)
    hop = hop_samples or int(sample_rate_hz * hop_ms * 0.001)
    if window < 2 or hop < 1:
        raise ValueError(
            f"window_ms={window_ms:g} and hop_ms={hop_ms:g} at {sample_rate_hz} Hz give "
            f"{window} and {hop} samples: expected at least 2 and 1"
        )
    length = n_fft or 1 << (window - 1).bit_length()
    if length < window or length % 2:
        raise ValueError(
            f"n_fft={length}: expected an even number of at least {window}, the window's samples"
        )
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}: expected one of {', '.join(PADDINGS)}")
    return MelSizes(window, hop, length, num_mel_bins, padding)


def window_function(name: str, window_samples: int) -> Tensor:  # [window_samples]
    """A window in float64: Kaldi's by their Kaldi names (`hann` is its "hanning"), or torch's Hann.

    Source: `torchaudio.compliance.kaldi._feature_window_function`; all are symmetric but
    `hann_periodic`, which is `torch.hann_window`.

    Raises:
        ValueError: there is no such window.
    """
    if name not in WINDOWS:
        raise ValueError(f"window={name!r}: expected one of {', '.join(WINDOWS)}")
    steps = window_samples if name == "hann_periodic" else window_samples - 1
    phase = torch.arange(window_samples, dtype=torch.float64) * (2 * math.pi / steps)
    if name == "rectangular":
        return torch.ones_like(phase)
    if name == "hamming":
        return 0.54 - 0.46 * torch.cos(phase)
    if name == "blackman":
        return 0.42 - 0.5 * torch.cos(phase) + 0.08 * torch.cos(2.0 * phase)
    window = 0.5 - 0.5 * torch.cos(phase)
    return window.pow(0.85) if name == "povey" else window


def mel_scale(frequency_hz: float) -> float:
    """Frequency in Hz on the HTK mel scale."""
    return 1127.0 * math.log1p(frequency_hz / 700.0)


def _checked_high(low_hz: float, high_hz: float, nyquist_hz: float, sample_rate_hz: int) -> float:
    high_hz = high_hz if high_hz > 0.0 else nyquist_hz + high_hz
    if not (0.0 <= low_hz < high_hz <= nyquist_hz):
        raise ValueError(
            f"low_freq_hz={low_hz:g} and high_freq_hz={high_hz:g} do not fit a sample rate of "
            f"{sample_rate_hz} Hz: expected 0 <= low < high <= {nyquist_hz:g}; "
            "lower high_freq_hz (0 means Nyquist) or resample"
        )
    return high_hz


def mel_filters(
    num_mel_bins: int, n_fft: int, sample_rate_hz: int, low_hz: float, high_hz: float
) -> Tensor:
    """Triangular mel filters [num_mel_bins, n_fft // 2 + 1] in float64, Nyquist column zero."""
    high_hz = _checked_high(low_hz, high_hz, 0.5 * sample_rate_hz, sample_rate_hz)
    low_mel, high_mel = mel_scale(low_hz), mel_scale(high_hz)
    step = (high_mel - low_mel) / (num_mel_bins + 1)
    left = low_mel + step * torch.arange(num_mel_bins, dtype=torch.float64)[:, None]
    bins = torch.arange(n_fft // 2, dtype=torch.float64) * (sample_rate_hz / n_fft)
    mel = 1127.0 * torch.log1p(bins / 700.0)[None, :]
    rising = (mel - left) / step
    falling = (left + 2 * step - mel) / step
    filters = torch.clamp(torch.minimum(rising, falling), min=0.0)
    return torch.nn.functional.pad(filters, (0, 1))


# Slaney's scale: linear to 1 kHz at 200/3 Hz a mel, then logarithmic, 6.4-fold in 27 mel
_SLANEY_STEP_HZ = 200.0 / 3.0
_SLANEY_LOG_STEP = math.log(6.4) / 27.0


def _to_mel(frequency_hz: float, scale: str) -> float:
    if scale == "htk":
        return mel_scale(frequency_hz)
    if frequency_hz < 1000.0:
        return frequency_hz / _SLANEY_STEP_HZ
    return 15.0 + math.log(frequency_hz / 1000.0) / _SLANEY_LOG_STEP


def _to_hz(mel: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 700.0 * torch.expm1(mel / 1127.0)
    high = 1000.0 * torch.exp(_SLANEY_LOG_STEP * (mel - 15.0))
    return torch.where(mel < 15.0, mel * _SLANEY_STEP_HZ, high)


def mel_filters_in_hz(
    num_mel_bins: int,
    n_fft: int,
    sample_rate_hz: int,
    low_hz: float,
    high_hz: float,
    scale: str = "htk",
    norm: str = "none",
) -> Tensor:
    """Mel filters [num_mel_bins, n_fft // 2 + 1] in float64 whose triangles are drawn on the Hz axis.

    As `torchaudio.functional.melscale_fbanks`, which rounds Nyquist down to whole Hz at odd rates.

    Args:
        num_mel_bins: F.
        n_fft: FFT length.
        sample_rate_hz: rate of the waveform.
        low_hz: lower edge of the first filter.
        high_hz: upper edge of the last; 0 or below counts from Nyquist.
        scale: "htk" or "slaney": where the triangles' corners lie.
        norm: "slaney" divides each by half its width in Hz, so that all have the same area.
    """
    nyquist_hz = float(sample_rate_hz // 2)
    high_hz = _checked_high(low_hz, high_hz, nyquist_hz, sample_rate_hz)
    edges = (_to_mel(low_hz, scale), _to_mel(high_hz, scale))
    corners = _to_hz(torch.linspace(*edges, num_mel_bins + 2, dtype=torch.float64), scale)
    bins = torch.linspace(0.0, nyquist_hz, n_fft // 2 + 1, dtype=torch.float64)
    left, peak, right = (corners[i : i + num_mel_bins, None] for i in range(3))
    rising = (bins - left) / (peak - left)
    falling = (right - bins) / (right - peak)
    filters = torch.clamp(torch.minimum(rising, falling), min=0.0)
    return filters * (2.0 / (right - left)) if norm == "slaney" else filters


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
    n_fft: int | None = None,
    window_samples: int | None = None,
    hop_samples: int | None = None,
    window: str = "hann",
    mel_scale: str = "kaldi",
    mel_norm: str = "none",
    power: int = 2,
    log_offset: float = 0.0,
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
        n_fft: FFT length; None or 0 for the power of two at or above the window.
        window_samples: frame length in samples, instead of `window_ms`.
        hop_samples: frame shift in samples, instead of `hop_ms`.
        window: one of `WINDOWS`.
        mel_scale: "kaldi" draws triangles on the mel axis, "htk" and "slaney" on the Hz axis.
        mel_norm: "slaney" gives filters of "htk" and "slaney" equal areas.
        power: filters weigh |spectrum| to this power, 1 or 2.
        log_offset: added to every energy before floor and logarithm.

    Raises:
        ValueError: a size is not positive, the filters do not fit the rate, or a name is unknown.
    """
    sizes = mel_sizes(
        *(sample_rate_hz, num_mel_bins, window_ms, hop_ms, n_fft, window_samples, hop_samples)
    )
    if mel_scale not in MEL_SCALES or mel_norm not in MEL_NORMS:
        raise ValueError(
            f"mel_scale={mel_scale!r} and mel_norm={mel_norm!r}: expected one of "
            f"{', '.join(MEL_SCALES)} and one of {', '.join(MEL_NORMS)}"
        )
    if mel_scale == "kaldi" and mel_norm != "none":
        raise ValueError("mel_norm='slaney' needs mel_scale 'htk' or 'slaney': Kaldi has no norm")
    if power not in (1, 2):
        raise ValueError(f"power={power}: expected 1 (magnitude) or 2 (power)")
    shape = (num_mel_bins, sizes.n_fft, sample_rate_hz, low_freq_hz, high_freq_hz)
    # the cache outlives inference mode, whose tensors no later gradient could use
    with torch.inference_mode(False):
        if mel_scale == "kaldi":
            filters = mel_filters(*shape)
        else:
            filters = mel_filters_in_hz(*shape, mel_scale, mel_norm)
        shaping = window_function(window, sizes.window_samples)
    return MelTables(
        sample_rate_hz,
        sizes.window_samples,
        sizes.hop_samples,
        sizes.n_fft,
        num_mel_bins,
        preemphasis,
        remove_dc,
        log_floor,
        shaping,
        filters,
        power == 1,
        log_offset,
    )
