"""The front end: waveform to normalised log-mel or cepstra.

The augmentations of `augment` go by their names here, too.
Dimensions: B clips, N samples, S frames, F mel bins.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .augment import (
    add_noise,
    add_noise_at_snr,
    draw_mixup,
    mask_value,
    mixup_targets,
    mixup_waveforms,
    random_gain,
    roll_frames,
    roll_waveforms,
    spec_augment,
)
from .backend import constant_when_compiled
from .config import LogMelConfig, MfccConfig
from .ops._common import without_autocast

__all__ = [
    "MFCC",
    "LogMel",
    "add_noise",
    "add_noise_at_snr",
    "draw_mixup",
    "log_mel_features",
    "mask_value",
    "mfcc_features",
    "mixup_targets",
    "mixup_waveforms",
    "random_gain",
    "roll_frames",
    "roll_waveforms",
    "spec_augment",
]


def log_mel_features(
    wave: Tensor,  # [B, N]
    config: LogMelConfig,
    lengths: Tensor | None = None,  # [B]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, S, F]
    """Normalised log-mel of waveforms as `config` says; see `ops.log_mel` for the arguments."""
    return ops.log_mel(
        wave,
        lengths,
        sample_rate_hz=config.sample_rate_hz,
        num_mel_bins=config.num_mel_bins,
        num_frames=config.num_frames,
        window_ms=config.window_ms,
        hop_ms=config.hop_ms,
        low_freq_hz=config.low_freq_hz,
        high_freq_hz=config.high_freq_hz,
        preemphasis=config.preemphasis,
        remove_dc=config.remove_dc,
        log_floor=config.log_floor,
        mean=config.mean,
        std=config.std,
        out_dtype=out_dtype,
        n_fft=config.n_fft,
        window_samples=config.window_samples,
        hop_samples=config.hop_samples,
        window=config.window,
        mel_scale=config.mel_scale,
        mel_norm=config.mel_norm,
        power=config.power,
        padding=config.padding,
        output=config.output,
        log_offset=config.log_offset,
        top_db=config.top_db,
    )


class LogMel(nn.Module):
    """Waveforms [B, N] to normalised log-mel [B, S, F], on whatever device they are.

    Args:
        config: settings; AudioSet's by default.
        overrides: settings to change, by name.

    >>> LogMel(num_frames=100)(torch.zeros(2, 16000)).shape
    torch.Size([2, 100, 128])
    """

    def __init__(self, config: LogMelConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = (config or LogMelConfig()).replace(**overrides)

    def forward(
        self, wave: Tensor, lengths: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Features [B, S, F] of waveforms [B, N]; samples from `lengths` on are ignored."""
        return log_mel_features(wave, self.config, lengths, out_dtype)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        c = self.config
        return f"{c.sample_rate_hz} Hz, {c.num_mel_bins} mel bins, {c.num_frames} frames"


def cosine_transform(num_mel_bins: int, num_ceps: int, lifter: float) -> Tensor:  # [F, num_ceps]
    """DCT-II, orthonormal, with Kaldi's lifter 1 + (lifter / 2) sin(pi i / lifter) in it; float64."""
    mel = torch.arange(num_mel_bins, dtype=torch.float64)[:, None]
    cepstrum = torch.arange(num_ceps, dtype=torch.float64)
    matrix = torch.cos(math.pi / num_mel_bins * (mel + 0.5) * cepstrum)
    matrix *= math.sqrt(2.0 / num_mel_bins)
    matrix[:, 0] *= math.sqrt(0.5)
    if lifter:
        matrix *= 1.0 + 0.5 * lifter * torch.sin(math.pi * cepstrum / lifter)
    return matrix


@functools.lru_cache(maxsize=16)
def _placed_transform(
    num_mel_bins: int, num_ceps: int, lifter: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    # not an inference tensor, which no later gradient could use
    with torch.inference_mode(False):
        return cosine_transform(num_mel_bins, num_ceps, lifter).to(device, dtype)


# compiled graphs hold the matrix as a constant: traced, it would be made anew in every call
@constant_when_compiled
def _constant_transform(*sizes: Any) -> Tensor:
    return _placed_transform(*sizes)


def mfcc_features(
    wave: Tensor,  # [B, N]
    config: MfccConfig,
    lengths: Tensor | None = None,  # [B]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, S, num_ceps]
    """Normalised cepstra as `config` says: a small product after log-mel, never cast by autocast.

    Frames of padding are raw 0 before normalisation, as in log-mel.
    """
    wide = torch.float64 if wave.dtype == torch.float64 else torch.float32
    energies = log_mel_features(wave, config.log_mel, lengths, wide)
    sizes = (config.log_mel.num_mel_bins, config.num_ceps, config.lifter)
    matrix = _constant_transform(*sizes, energies.device, energies.dtype)
    cepstra = without_autocast(torch.matmul, energies, matrix)
    return ((cepstra - config.mean) * (0.5 / config.std)).to(out_dtype or wide)


class MFCC(nn.Module):
    """Waveforms [B, N] to cepstra [B, S, num_ceps]: Kaldi's by default, or torchaudio's.

    Args:
        config: settings; `MfccConfig()` is `torchaudio.compliance.kaldi.mfcc`, `MfccConfig.torchaudio()`
            is `torchaudio.transforms.MFCC`.
        overrides: settings to change, by name.

    >>> MFCC(num_ceps=20)(torch.zeros(2, 16000)).shape
    torch.Size([2, 98, 20])
    """

    def __init__(self, config: MfccConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = (config or MfccConfig()).replace(**overrides)

    def forward(
        self, wave: Tensor, lengths: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Cepstra [B, S, num_ceps] of waveforms [B, N]; samples from `lengths` on are ignored."""
        return mfcc_features(wave, self.config, lengths, out_dtype)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        mel = self.config.log_mel
        return (
            f"{mel.sample_rate_hz} Hz, {mel.num_mel_bins} mel bins, {self.config.num_ceps} cepstra"
        )
