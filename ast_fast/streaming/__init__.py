"""Live audio in chunks of any size: `StreamingLogMel` gives features, `StreamingTagger` labels."""

from __future__ import annotations

from .log_mel import StreamingLogMel
from .tagger import StreamingTagger, StreamPrediction

__all__ = ["StreamPrediction", "StreamingLogMel", "StreamingTagger"]
