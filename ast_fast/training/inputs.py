"""From a batch of clips to what a step learns from: augmented features and targets on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..augment import mixup_pairs
from ..config import TrainConfig
from ..data.dataset import Batch
from ..frontend import log_mel_features
from .augment import (
    as_float,
    as_vectors,
    augment_features,
    augment_waveforms,
    clip_seeds,
    mixup,
)


class BatchFeatures:
    """Augmented log-mel features and targets of one batch after the other.

    Batches may be asked for ahead of the steps that use them, but always in their order. Every draw
    belongs to a clip and a step: the same on every device and over any number of processes.

    Args:
        model: with `frontend_config`; features come in the dtype of its parameters.
        config: augmentation and seed.
        num_clips: of the training set.
        num_classes: of the targets.
        device: where features are made.
        alone: no other process takes part in a step: one without clips may be left out.

    Attributes:
        step: of the run, of the next batch.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        num_clips: int,
        num_classes: int,
        device: torch.device,
        *,
        alone: bool = True,
    ) -> None:
        self._alone = alone
        self._model, self._config, self._device = model, config, device
        self._num_clips, self._num_classes = num_clips, num_classes
        self.step = 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Features [B, S, F] and targets of a batch; None: there is nothing to do in its step."""
        config = self._config
        step, self.step = self.step, self.step + 1
        if not len(batch) and self._alone:
            return None
        seeds = clip_seeds(config.seed, step, batch.indices, self._num_clips)
        placed, settings = seeds.to(self._device), config.augment
        wave = augment_waveforms(batch.wave, batch.lengths, settings, placed)
        targets = batch.targets
        if batch.mix is not None:
            targets = as_vectors(targets, self._num_classes)
            wave, targets = mixup_pairs(as_float(wave), batch.lengths, targets, batch.mix)
        elif settings.mixup:
            wave, targets = mixup(
                wave, batch.lengths, targets, settings.mixup, self._num_classes, seeds
            )
        front = self._model.frontend_config
        features = log_mel_features(wave, front, batch.lengths)
        features = augment_features(features, settings, front, placed, batch.lengths)
        return features.to(next(self._model.parameters()).dtype), targets
