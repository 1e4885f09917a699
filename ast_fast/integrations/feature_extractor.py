"""`ASTFeatureExtractor` of transformers, a whole batch at a time and on any device, by `ops.log_mel`.

Same constructor, same `preprocessor_config.json`, same outputs within the log-mel budget.
Dimensions: B clips, N samples, S frames, F mel bins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._optional import require_package
from ..audio_memory import check_finite_clip
from ..config import LogMelConfig
from ..frontend import log_mel_features
from ..reference.mel import mel_sizes
from ..sample_rows import moved, sample_rows

_transformers = require_package("transformers", "ast_fast.ASTFeatureExtractor", "hf")
_Theirs: Any = _transformers.ASTFeatureExtractor
_log = logging.getLogger("ast_fast.integrations")

_SERIES = (list, tuple, np.ndarray, Tensor)


class ASTFeatureExtractor(_Theirs):  # type: ignore[misc]
    """Waveforms to the normalised log-mel that AST takes, batched, on the CPU or a GPU.

    Beside what transformers' class takes: tensors on any device, batches as one array or tensor [B, N], and
    `device`. Samples are floats in [-1, 1]; integers are refused, since transformers would take them unscaled, and NaN,
    of which it would make NaN.

    Args:
        feature_size: 1, as in transformers.
        sampling_rate: of the waveforms, in Hz.
        num_mel_bins: F.
        max_length: S; shorter clips are padded with raw zeros before normalisation, longer ones cut.
        padding_value: kept for the file alone: AST pads with 0.
        do_normalize: subtract `mean` and divide by twice `std`.
        mean: of the log-mel energies.
        std: of the log-mel energies.
        return_attention_mask: kept for the file alone: AST has none.
        device: where features are made; that of the waveforms by default. Not saved.
        kwargs: as in transformers.

    >>> extractor = ASTFeatureExtractor(max_length=128)
    >>> waves = [torch.zeros(16000), torch.zeros(8000)]
    >>> extractor(waves, sampling_rate=16000, return_tensors="pt")["input_values"].shape
    torch.Size([2, 128, 128])
    """

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = False,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        # not the parent's, which computes filters for its path without torchaudio
        super(_Theirs, self).__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        self.num_mel_bins, self.max_length = num_mel_bins, max_length
        self.do_normalize, self.mean, self.std = do_normalize, mean, std
        self.return_attention_mask = return_attention_mask
        self._device = None if device is None else torch.device(device)

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: transformers' settings alone."""
        values: dict[str, Any] = super().to_dict()
        values.pop("_device", None)
        return values

    @property
    def frontend_config(self) -> LogMelConfig:
        """The settings as our front end takes them."""
        return LogMelConfig(
            sample_rate_hz=self.sampling_rate,
            num_mel_bins=self.num_mel_bins,
            num_frames=self.max_length,
            mean=self.mean if self.do_normalize else 0.0,
            std=self.std if self.do_normalize else 0.5,
        )

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of one waveform or of a batch.

        Args:
            raw_speech: samples [N], a batch [B, N], or a list of waveforms of any lengths; lists of numbers,
                arrays or tensors.
            sampling_rate: of the waveforms; checked against the extractor's.
            return_tensors: "pt" for a tensor [B, S, F] on the device, "np" for an array; by default a list
                of B arrays [S, F].
            device: where features are made, for this call.
            kwargs: ignored, as in transformers.

        Returns:
            A `BatchFeature` with `input_values`.

        Raises:
            ValueError: the rate differs, a clip is shorter than one window, or the input is no mono audio.
            TypeError: samples are integers.
            AudioNonFiniteError: samples are NaN or infinite.
        """
        if sampling_rate is None:
            _log.warning(
                "sampling_rate was not passed to ASTFeatureExtractor: a waveform of another rate than "
                "%d Hz would go unnoticed",
                self.sampling_rate,
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}: expected {self.sampling_rate}, this extractor's rate; "
                "resample first (ast_fast.Resample)"
            )
        if str(getattr(return_tensors, "value", return_tensors)) not in ("None", "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        clips = _clips(raw_speech)
        target = torch.device(device) if device is not None else self._device
        wave, lengths = self._padded(clips, target)
        with torch.no_grad():
            features = log_mel_features(wave, self.frontend_config, lengths)
        kind = getattr(return_tensors, "value", return_tensors)
        made: Any = features
        if kind is None:
            made = list(features.cpu().numpy())
        elif kind == "np":
            made = features.cpu().numpy()
        return _transformers.BatchFeature({"input_values": made})

    def _padded(
        self, clips: Sequence[Tensor], device: torch.device | None
    ) -> tuple[Tensor, Tensor]:  # [B, N], [B]
        """Clips as one float32 batch, cut to what the frames reach, and their lengths."""
        framing = self.frontend_config.framing
        sizes = mel_sizes(**framing)
        window = sizes.window_samples
        most = window + (self.max_length - 1) * sizes.hop_samples
        lengths = [min(clip.shape[0], most) for clip in clips]
        for index, clip in enumerate(clips):
            if clip.shape[0] < window:
                raise ValueError(
                    f"clip {index} has {clip.shape[0]} samples: expected at least {window}, one window of "
                    f"{framing['window_ms']:g} ms; leave it out or pad it"
                )
        home = clips[0].device if device is None else device
        # filled where the clips are, moved at once
        near = clips[0].device
        wave = sample_rows(
            *(len(clips), max(lengths), torch.float32),
            lambda rows, columns, dtype: torch.zeros(rows, columns, dtype=dtype, device=near),
        )
        for row, clip, length in zip(wave, clips, lengths, strict=True):
            row[:length] = clip[:length]
        return moved(wave, home), torch.tensor(lengths, device=home)


def _clips(raw: Any) -> list[Tensor]:
    """The waveforms of a call, each [N] and floating."""
    if not isinstance(raw, _SERIES):
        raise TypeError(
            f"raw_speech is a {type(raw).__name__}: expected samples, an array or tensor [N] or [B, N], "
            "or a list of waveforms"
        )
    if len(raw) == 0:
        raise ValueError("raw_speech is empty: expected at least one waveform")
    if isinstance(raw, (np.ndarray, Tensor)):
        if raw.ndim > 2:
            raise ValueError(
                f"raw_speech has shape {tuple(raw.shape)}: expected [N] or [B, N], mono; average the "
                "channels first"
            )
        return [_wave(raw, 0)] if raw.ndim == 1 else [_wave(row, i) for i, row in enumerate(raw)]
    if isinstance(raw[0], _SERIES):
        return [_wave(each, index) for index, each in enumerate(raw)]
    return [_wave(raw, 0)]


def _wave(samples: Any, index: int) -> Tensor:
    whole = isinstance(samples, np.ndarray) and samples.dtype.kind != "f"
    if not isinstance(samples, Tensor) and not whole:
        # lists of numbers, of which some may be whole; all whole and large are samples of 16 bits
        given = np.asarray(samples)
        whole = given.dtype.kind in "iu" and given.size > 0 and int(abs(given).max()) > 1
        samples = given if whole else np.array(samples, dtype=np.float32)
    wave = torch.from_numpy(samples) if isinstance(samples, np.ndarray) else samples
    if wave.dim() != 1:
        raise ValueError(
            f"clip {index} has shape {tuple(wave.shape)}: expected [N], mono; average the channels first"
        )
    if not wave.is_floating_point():
        raise TypeError(
            f"clip {index} is {wave.dtype}: expected floats in [-1, 1]; divide 16-bit samples by 32768"
        )
    check_finite_clip(wave, f"clip {index}")
    return wave
