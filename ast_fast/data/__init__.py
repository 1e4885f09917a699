"""Data: manifests, datasets that skip and count bad files, resumable sampling, the demo set."""

from .dataset import AudioDataset, Batch, Clip, ClipSet, Collate, Skip, WaveformDataset, make_loader
from .manifest import (
    Manifest,
    ManifestError,
    audio_files,
    read_folder,
    read_manifest,
)
from .sampler import BatchSampler, balanced_weights
from .syllables import tone_datasets

__all__ = [
    "AudioDataset",
    "Batch",
    "BatchSampler",
    "Clip",
    "ClipSet",
    "Collate",
    "Manifest",
    "ManifestError",
    "Skip",
    "WaveformDataset",
    "audio_files",
    "balanced_weights",
    "make_loader",
    "read_folder",
    "read_manifest",
    "tone_datasets",
]
