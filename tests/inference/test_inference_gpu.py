"""On a GPU the same numbers, whatever is recorded and however far ahead it runs."""

import copy

import pytest
import torch

from ast_fast.inference import Engine, Failure, Wanted
from ast_fast.inference.sources import units_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_outputs_equal_those_on_the_cpu(tiny_model, clips, voice, num_workers, batch_size):
    wanted = Wanted(scores=True, windows=True, frames=True, embedding=True)
    outputs = []
    for device in ("cpu", "cuda"):
        engine = Engine(
            copy.deepcopy(tiny_model).to(device),
            "softmax",
            wanted,
            batch_size=batch_size,
            num_workers=num_workers,
            span_seconds=5.0,
        )
        outputs.append(list(engine.run(units_of([clips, voice]))))
    for mine, other in zip(*outputs, strict=True):
        assert isinstance(mine, Failure) == isinstance(other, Failure)
        if isinstance(mine, Failure):
            continue
        assert mine.spans_s == other.spans_s
        for name in ("scores", "window_scores", "embedding", "frame_scores"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(other, name), rtol=1e-3, atol=1e-4
            )
