"""Streams through Triton's log-mel in its interpreter: chunks of any size, none without frames.

NumPy's matrix product, which stands for the tensor core here, rounds the last rows of a tile by itself:
that a frame has the same bits wherever it stands is tested on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is chosen when kernels are decorated: set TRITON_INTERPRET=1 and run these "
        "tests in a process of their own",
        allow_module_level=True,
    )

from ast_fast import LogMel, StreamingLogMel, use_backend
from ast_fast.config import LogMelConfig

pytestmark = pytest.mark.interpret

# a small setting: 100 samples a window, 40 a hop, 128 in the transform
SMALL = LogMelConfig(sample_rate_hz=4000, num_mel_bins=20, num_frames=None)


def test_chunks_give_the_offline_frames():
    wave = 0.2 * torch.randn(2, 700, generator=torch.Generator().manual_seed(0))
    with use_backend("triton"):
        whole = LogMel(SMALL)(wave)
        live = StreamingLogMel(SMALL)
        sizes = [99, 0, 1, 39, 1, 373, 187]
        parts = [live.push(chunk) for chunk in wave.split(sizes, 1)]
    assert [part.shape[1] for part in parts] == [0, 0, 1, 0, 1, 9, 5]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2.0**-21)
