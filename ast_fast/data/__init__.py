"""Data: manifests, datasets that skip and count bad files, resumable sampling, the demo set."""

from .dataset import AudioDataset, Batch, Clip, ClipSet, Collate, Skip, WaveformDataset
from .feeder import Feeder, FeedStats
from .manifest import (
    Manifest,
    ManifestError,
    audio_files,
    read_folder,
    read_manifest,
)
from .sampler import BatchSampler, balanced_weights, class_counts
from .shard_index import is_shards
from .shard_sampler import ShardSampler, sampler_for
from .shard_writer import write_shards
from .shards import ShardSet
from .syllables import tone_datasets
from .tar import ShardError
from .transfer import Fed
from .workers import LoaderError

__all__ = [
    "AudioDataset",
    "Batch",
    "BatchSampler",
    "Clip",
    "ClipSet",
    "Collate",
    "Fed",
    "FeedStats",
    "Feeder",
    "LoaderError",
    "Manifest",
    "ManifestError",
    "ShardError",
    "ShardSampler",
    "ShardSet",
    "Skip",
    "WaveformDataset",
    "audio_files",
    "balanced_weights",
    "class_counts",
    "is_shards",
    "read_folder",
    "read_manifest",
    "sampler_for",
    "tone_datasets",
    "write_shards",
]
