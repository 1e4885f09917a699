"""Weights in and out: files, directories and the key styles of four dialects.

Knows files and names of tensors, not model classes. Reading never runs code from a file: pickles
go through `torch.load(weights_only=True)` alone. Writing is atomic: whatever happens, the old or
the new weights can be loaded.
"""

from .errors import CheckpointError, require_match
from .keys import dialect_of, to_ours, to_transformers
from .publishing import model_card, upload, write_card
from .reading import locate, read_weights
from .sizes import blocks_of
from .writing import write_pretrained, write_transformers

__all__ = [
    "CheckpointError",
    "blocks_of",
    "dialect_of",
    "locate",
    "model_card",
    "read_weights",
    "require_match",
    "to_ours",
    "to_transformers",
    "upload",
    "write_card",
    "write_pretrained",
    "write_transformers",
]
