"""The front end: waveform to normalised log-mel, and the augmentations of the original recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import LogMelConfig


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
        mean=config.mean,
        std=config.std,
        out_dtype=out_dtype,
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
