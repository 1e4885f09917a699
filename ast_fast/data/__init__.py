"""Data: readers of many layouts, datasets that skip and count bad files, resumable sampling."""

from .audioset import read_segments
from .dataset import AudioDataset, Batch, Clip, ClipSet, Collate, Mix, Skip, WaveformDataset
from .deam import read_deam
from .esc50 import read_esc50
from .feeder import Feeder, FeedStats
from .folders import read_folder, read_speech_commands
from .huggingface import HuggingFaceSet
from .layouts import (
    Data,
    dataset_of,
    detect_layout,
    hold_out,
    missing_classes,
    read_data,
    read_parts,
    reading_notes,
)
from .manifest import Manifest, ManifestError, audio_files
from .manifest_files import read_manifest
from .mixing import WholeSetMixup
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
    "Data",
    "Fed",
    "FeedStats",
    "Feeder",
    "HuggingFaceSet",
    "LoaderError",
    "Manifest",
    "ManifestError",
    "Mix",
    "ShardError",
    "ShardSampler",
    "ShardSet",
    "Skip",
    "WaveformDataset",
    "WholeSetMixup",
    "audio_files",
    "balanced_weights",
    "class_counts",
    "dataset_of",
    "detect_layout",
    "hold_out",
    "is_shards",
    "missing_classes",
    "read_data",
    "read_deam",
    "read_esc50",
    "read_folder",
    "read_manifest",
    "read_parts",
    "read_segments",
    "read_speech_commands",
    "reading_notes",
    "sampler_for",
    "tone_datasets",
    "write_shards",
]
