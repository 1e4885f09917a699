"""Packed weights in equivalence runs: rows for what ran, and for nothing else."""

import pytest
import torch

from ast_fast import optimize_for_inference
from ast_fast.config import ModelConfig, MonitorConfig
from ast_fast.equivalence import EquivalenceMonitor
from ast_fast.equivalence.run_models import build
from ast_fast.equivalence.run_packed import packed_precisions, packed_rows

SIZES = ModelConfig(label_dim=5, input_tdim=64, embed_dim=64, num_heads=2, depth=2)

if not packed_precisions():
    pytest.skip("nothing can be packed here", allow_module_level=True)


@pytest.mark.parametrize("precision", packed_precisions())
def test_rows_pass_where_packed_weights_ran_and_fail_where_they_did_not(precision):
    (row,) = packed_rows("small", build(SIZES), precision)
    assert row.ok and row.dtype == f"packed {precision}"
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        (row,) = packed_rows("small", build(SIZES), precision)
    finally:
        hook.remove()
    assert not row.ok and "not used" in row.note


def test_the_monitor_holds_what_ran_to_its_own_budget():
    if "int8" not in packed_precisions():
        pytest.skip("no bytes here")
    model = optimize_for_inference(build(SIZES), "int8")
    x = torch.randn(2, 64, 128)
    monitor = EquivalenceMonitor(model, MonitorConfig())
    assert monitor.step(x, gradients=False).precision == "int8"
    assert monitor.step(x, gradients=True).precision == "float32"
    model.v.blocks[0].register_forward_hook(lambda *_: None)
    assert monitor.step(x, gradients=False).precision == "float32"
