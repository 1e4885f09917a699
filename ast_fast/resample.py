"""Resampling on the device: batches, ragged lengths, gradients, float or int16 samples.

A windowed sinc is evaluated where output samples fall between input samples; the pattern repeats, so
resampling is a strided convolution with one filter for each output of a period
(`torchaudio.functional.resample` does the same). Periods are taken in blocks about as long as the
filter, so that the convolution is one matrix product of overlapping pieces with few wasted products.
A product, since cuDNN's convolutions round float32 to TF32 unless told otherwise, which would leave
60 dB of stop band.

The default filter, measured in float64 (`Resample.response_db`): within 0.0001 dB up to 0.9 of the
lower rate's Nyquist frequency, -6 dB at 0.95, below -110 dB from Nyquist on; delay compensated.
`soxr` on the CPU (`audio.load`) stays the way for files.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backend import constant_when_compiled
from .ops._common import require, without_autocast

Window = Literal["kaiser", "hann"]
FILTER_WIDTH, ROLLOFF, KAISER_BETA = 70, 0.95, 11.4
# entries of the filter matrix: 256 MB in float64 while it is made
_MOST_ENTRIES = 1 << 25


def _prototype(
    time: Tensor,  # in zero crossings of the sinc
    filter_width: int,
    window: str,
    beta: float,
) -> Tensor:
    inside = time.abs() < filter_width
    part = torch.where(inside, time / filter_width, torch.zeros_like(time))
    if window == "hann":
        shape = torch.cos(0.5 * math.pi * part).square()
    else:
        whole = torch.special.i0(torch.tensor(beta, dtype=torch.float64))
        shape = torch.special.i0(beta * torch.sqrt(1.0 - part.square())) / whole
    return torch.where(inside, torch.sinc(time) * shape, torch.zeros_like(time))


@functools.lru_cache(maxsize=8)
def _filters(
    layout: tuple[int, int, int, int, int],
    filter_width: int,
    rolloff: float,
    window: str,
    beta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # [taps, outputs]
    """The filter at every distance between an input and an output of a block, made in float64."""
    source, target, reach, step, outputs = layout
    base = min(source, target) * rolloff
    # not an inference tensor, which no later gradient could use
    with torch.inference_mode(False):
        inputs = torch.arange(-reach, step + reach, dtype=torch.float64)[:, None] / source
        at = torch.arange(outputs, dtype=torch.float64) / target
        matrix = _prototype((inputs - at) * base, filter_width, window, beta) * (base / source)
        return matrix.to(device, dtype)


# compiled graphs hold the matrix as a constant: traced, it would be made anew in every call
@constant_when_compiled
def _constant_filters(*design: Any) -> Tensor:
    return _filters(*design)


class Resample(nn.Module):
    """Waveforms [B, N] at one rate to waveforms [B, ceil(N to_hz / from_hz)] at another.

    Args:
        from_hz: rate of the input.
        to_hz: rate of the result.
        window: "kaiser" or "hann", over the sinc.
        filter_width: zero crossings of the sinc on either side: more is steeper and slower.
        rolloff: where the filter has lost 6 dB, in Nyquist frequencies of the lower rate.
        kaiser_beta: more damps the stop band and widens the transition.

    Raises:
        ValueError: a setting is out of range, or the rates' ratio needs too large a filter.

    `Resample(a, b, "hann", 6, 0.99)` is `torchaudio.functional.resample` as it comes.

    >>> Resample(48000, 16000)(torch.zeros(2, 48001)).shape
    torch.Size([2, 16001])
    """

    def __init__(
        self,
        from_hz: int,
        to_hz: int,
        window: Window = "kaiser",
        filter_width: int = FILTER_WIDTH,
        rolloff: float = ROLLOFF,
        kaiser_beta: float = KAISER_BETA,
    ) -> None:
        super().__init__()
        for name, rate in (("from_hz", from_hz), ("to_hz", to_hz)):
            require(
                rate > 0 and int(rate) == rate,
                f"{name}={rate}: expected a positive whole rate in Hz",
            )
        require(window in ("kaiser", "hann"), f"window={window!r}: expected 'kaiser' or 'hann'")
        require(filter_width >= 1, f"filter_width={filter_width}: expected at least 1")
        require(0.0 < rolloff <= 1.0, f"rolloff={rolloff:g}: expected above 0, at most 1")
        divisor = math.gcd(int(from_hz), int(to_hz))
        self.from_hz, self.to_hz = int(from_hz), int(to_hz)
        self.source, self.target = self.from_hz // divisor, self.to_hz // divisor
        self.design = (int(filter_width), float(rolloff), str(window), float(kaiser_beta))
        # inputs the filter reaches to either side; inputs and outputs a block: as many periods as
        # make it about as long as the filter
        self._reach = math.ceil(
            filter_width * self.source / (min(self.source, self.target) * rolloff)
        )
        periods = math.ceil(2 * self._reach / self.source)
        self._step, self._outputs = self.source * periods, self.target * periods
        taps = 2 * self._reach + self._step
        require(
            taps * self._outputs <= _MOST_ENTRIES,
            f"rates in the ratio {self.source}:{self.target} need {taps} x {self._outputs} filter "
            "taps: expected a ratio of smaller numbers; resample on the CPU with soxr "
            "(ast_fast.audio) or round a rate",
        )

    def output_length(self, samples: int) -> int:
        """Samples of the result: the input's duration, rounded up to a whole sample."""
        return -(-samples * self.target // self.source)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """`output_length` of every entry of an integer tensor."""
        return -torch.div(-lengths * self.target, self.source, rounding_mode="floor")

    def forward(
        self,
        wave: Tensor,  # [B, N]
        lengths: Tensor | None = None,  # [B]
    ) -> Tensor:  # [B, M]
        """Resampled waveforms, float32 (float64 for float64).

        Args:
            wave: [B, N] floating, or int16 (scaled by 1/32768).
            lengths: [B] valid samples; what lies behind counts as zeros, whatever it holds, and the
                result is zero from `output_lengths(lengths)` on.

        Raises:
            ValueError: wave is not [B, N].
            TypeError: wave is neither int16 nor floating.
        """
        require(wave.dim() == 2, f"wave has shape {tuple(wave.shape)}: expected [B, N]")
        if wave.dtype == torch.int16:
            wave = wave.to(torch.float32) / 32768.0
        elif not wave.is_floating_point():
            raise TypeError(f"wave is {wave.dtype}: expected float32 in [-1, 1] or int16")
        elif wave.dtype != torch.float64:
            wave = wave.to(torch.float32)
        samples = wave.shape[1]
        if lengths is not None:
            lengths = lengths.to(wave.device).clamp(0, samples)
            inside = torch.arange(samples, device=wave.device) < lengths[:, None]
            wave = torch.where(inside, wave, torch.zeros_like(wave))
        if self.source == self.target or not wave.numel():
            return wave if self.source == self.target else wave[:, :0]
        wanted = self.output_length(samples)
        result = without_autocast(self._product, wave)[:, :wanted]
        if lengths is None:
            return result
        ends = self.output_lengths(lengths)[:, None]
        kept = torch.arange(wanted, device=wave.device) < ends
        return torch.where(kept, result, torch.zeros_like(result))

    def _product(self, wave: Tensor) -> Tensor:
        layout = (self.source, self.target, self._reach, self._step, self._outputs)
        filters = _constant_filters(layout, *self.design, wave.device, wave.dtype)
        taps = 2 * self._reach + self._step
        blocks = -(-self.output_length(wave.shape[1]) // self._outputs)
        behind = (blocks - 1) * self._step + taps - self._reach - wave.shape[1]
        padded = nn.functional.pad(wave, (self._reach, behind))
        return (padded.unfold(1, taps, self._step) @ filters).flatten(1)

    def response_db(self, frequencies_hz: Tensor) -> Tensor:
        """Gain in decibels of the filter at frequencies in Hz, in float64.

        Above half of `from_hz` it is the gain of images, above half of `to_hz` that of what aliases.
        """
        width, rolloff, window, beta = self.design
        base_hz = min(self.from_hz, self.to_hz) * rolloff
        fine = 64  # points a zero crossing: the sum stands for an integral
        time = torch.arange(-width * fine, width * fine + 1, dtype=torch.float64) / fine
        taps = _prototype(time, width, window, beta) / fine
        angles = 2.0 * math.pi * frequencies_hz.to(torch.float64)[:, None] / base_hz * time
        return 20.0 * torch.log10((torch.cos(angles) @ taps).abs())

    def extra_repr(self) -> str:
        """The rates, for printing."""
        width, rolloff, window, _ = self.design
        return f"{self.from_hz} to {self.to_hz} Hz, {window}, width {width}, rolloff {rolloff:g}"
