"""Packed weights that are out of date: what a call cannot see, `refresh_packed` mends, and checks catch."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

import ast_fast
import ast_fast.cpp
from ast_fast.config import MonitorConfig
from ast_fast.data import WaveformDataset
from ast_fast.equivalence import EquivalenceMonitor
from ast_fast.equivalence.monitor import EquivalenceError
from ast_fast.optimized import _content_of, stale_packs
from ast_fast.training import evaluate

if ast_fast.cpp.why_unavailable() is not None:
    pytest.skip("needs the C++ extension", allow_module_level=True)

from ast_fast.cpp import packed

pytestmark = pytest.mark.skipif(packed.unsupported() is not None, reason="no oneDNN weights")
WEIGHT = "v.blocks.1.mlp.fc1.weight"
PLACE = (5, 7)  # none of the places that a call looks at


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "input_fdim": 64, "input_tdim": 64}
    made = ast_fast.create_model("ast_tiny_p16_s10", num_classes=3, **sizes).eval()
    made = ast_fast.optimize_for_inference(made)
    with torch.inference_mode():
        made(features())
    return made


def features():
    return torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))


def write(model, how):
    weight = model.get_parameter(WEIGHT)
    if how == "data":
        weight.data[PLACE] = 3.0
    elif how == "numpy":
        weight.detach().numpy()[PLACE] = 3.0
    else:
        np.frombuffer(memoryview(weight.detach().numpy()).cast("B"), np.float32)
        torch.frombuffer(memoryview(weight.detach().numpy()).cast("B"), dtype=torch.float32)[
            PLACE[0] * weight.shape[1] + PLACE[1]
        ] = 3.0


def usual(model):
    plain = copy.deepcopy(model)
    plain.v.runner = None
    return plain


WAYS = ["data", "numpy", "pointer"]


@pytest.mark.parametrize("how", WAYS)
def test_a_write_that_no_call_sees_is_found_and_mended_by_refresh(model, how):
    assert stale_packs(model) == []
    write(model, how)
    assert stale_packs(model) == ["v.blocks.1"]
    with torch.inference_mode():
        want = usual(model)(features())
        assert not torch.allclose(model(features()), want, atol=1e-5)  # what the docs warn of
        assert ast_fast.refresh_packed(model) is model
        torch.testing.assert_close(model(features()), want, atol=1e-5, rtol=1e-5)
    assert stale_packs(model) == []


@pytest.mark.parametrize("how", WAYS)
def test_evaluation_packs_again_and_says_so(model, how, caplog):
    waves = [(torch.randn(9000) * 3000).to(torch.int16) for _ in range(6)]
    data = WaveformDataset(waves, [(0,), (1,), (2,)] * 2, ("a", "b", "c"), 16000)
    evaluate(model, data)
    assert "out of date" not in caplog.text
    write(model, how)
    with caplog.at_level(logging.WARNING):
        found = evaluate(model, data)
    assert "packed weights of 1 blocks (v.blocks.1, ...) were out of date" in caplog.text
    want = evaluate(usual(model), data)
    got, expected = (each.metrics.gathered()[0] for each in (found, want))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_the_monitor_stops_on_a_stale_pack_whose_error_would_be_small(model, how, caplog):
    monitor = EquivalenceMonitor(model)
    assert monitor.step(features(), gradients=False).ok
    weight = model.get_parameter(WEIGHT)
    before = float(weight.detach()[PLACE])
    write(model, how)
    weight.detach().numpy()[PLACE] = np.nextafter(np.float32(before), np.float32(9))
    with pytest.raises(
        EquivalenceError, match=r"1 blocks \(v.blocks.1\) are out of date.*refresh_packed"
    ):
        monitor.step(features(), gradients=False)
    assert EquivalenceMonitor(model, MonitorConfig(stop=False)).step(features(), gradients=False)
    assert "out of date" in caplog.text
    ast_fast.refresh_packed(model)
    assert monitor.step(features(), gradients=False).ok


def test_writes_that_calls_see_are_not_reported(model):
    with torch.no_grad():
        model.get_parameter(WEIGHT)[PLACE] = 3.0
    assert stale_packs(model) == []
    assert stale_packs(usual(model)) == []


def test_the_checksum_sees_every_element_and_swaps_of_two():
    values = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    base = _content_of([values])
    for index in range(0, values.numel(), 11):
        changed = values.clone().view(-1)
        changed[index] += 1.0
        assert _content_of([changed.view(37, 53)]) != base, index
    swapped = values.clone()
    swapped[[0, 30]] = swapped[[30, 0]]
    assert _content_of([swapped]) != base
    assert _content_of([values.to(torch.bfloat16)[:3, :3]]) == _content_of(
        [values.to(torch.bfloat16)[:3, :3].clone()]
    )
