"""Where the time of a whole pass goes: names, predictions, and rows that sum up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import ast_fast.cpp
from benchmarks import components, record, suites
from benchmarks.case import Settings
from benchmarks.models import forward_flops
from benchmarks.run import default_backend


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "products"),
        ("ast_fast::attention_qkv_backward", "attention"),
        ("_attention_forward_kernel", "attention"),
        ("ast_fast::add_layer_norm", "norms"),
        ("_gelu_backward_kernel", "GELU"),
        ("ast_fast::patch_embed", "embedding"),
        ("_log_mel_kernel", "front end"),
        ("aten::_fused_adamw_", "optimiser"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::mul", components.OTHER),
    ],
)
def test_operators_and_kernels_belong_to_components(name, component):
    assert components.component_of(name) == component


def settings(**changes):
    return Settings(
        device="cpu", backend=default_backend("cpu"), tiny=True, peers=("none",), **changes
    )


def case_of(suite, dtype):
    cases = suites.load(suite, settings(dtypes=("f32", "bf16")))
    return next(case for case in cases if case.dtype == dtype)


def test_least_work_counts_the_operations_of_the_forward():
    case = case_of("inference", "f32")
    work = components.least_work(case, depth=2)
    counted = work["products"].flops + work["attention"].flops
    whole = case.clips * forward_flops("tiny", case.shape["S"], 2)
    assert 0.9 * whole < counted <= whole  # the rest is patches and head
    step = components.least_work(case_of("training", "f32"), depth=2)
    assert step["optimiser"].bytes > 0 and step["GELU"].bytes > 0


def test_predictions_take_the_slower_of_products_and_copies():
    tops = {"gemm_f32_tflops": 1.0, "gemm_bf16_tflops": 2.0, "copy_gbps": 100.0}
    assert components.predicted_ms(components.Work(1e12, 1e9), tops, "f32") == pytest.approx(1000.0)
    assert components.predicted_ms(components.Work(1e9, 1e11), tops, "f32") == pytest.approx(1000.0)
    assert components.predicted_ms(components.Work(4e12, 0), tops, "int8") == pytest.approx(1000.0)
    assert components.predicted_ms(components.Work(1e12, 0), {}, "f32") == 0.0


@pytest.mark.parametrize(("suite", "dtype"), [("inference", "f32"), ("training", "f32")])
def test_components_make_up_the_whole_and_their_rows_are_results(suite, dtype, monkeypatch):
    if ast_fast.cpp.why_unavailable() is not None:
        pytest.skip("needs the C++ extension")
    monkeypatch.setitem(components.ROUNDS, "cpu", 3)
    case = case_of(suite, dtype)
    tops = {"gemm_f32_tflops": 0.1, "copy_gbps": 10.0}
    rows = components.split(case, settings(), tops, depth=2)
    by_name = {row.provider: row for row in rows}
    assert {"products", "attention", "norms", components.WHOLE} <= set(by_name)
    assert by_name["products"].share > 0 and by_name["attention"].tflops > 0
    parts = sum(row.ms["p50"] for row in rows if row.provider != components.WHOLE)
    # a profiler's own cost lies on operators; clocks are almost free
    assert parts > 0.2 * by_name[components.WHOLE].ms["p50"]
    said = components.text(rows)
    assert said.splitlines()[0].split()[0] == components.WHOLE and "100%" in said
    content = record.ResultFile(
        suite="components",
        environment=dict.fromkeys(record.ENVIRONMENT_KEYS, "x") | {"date": "2026-01-31T12:00:00Z"},
        settings={},
        rows=rows,
    ).to_dict()
    assert record.problems(content) == []


def test_a_wrong_result_is_not_taken_apart(monkeypatch):
    case = case_of("inference", "f32")
    ours = case.candidates[0]
    from dataclasses import replace

    wrong = replace(
        ours, prepare_gate=lambda given: lambda index: (torch.zeros(len(given["x"]), 527),)
    )
    rows = components.split(replace(case, candidates=(wrong, *case.candidates[1:])), settings(), {})
    assert [row.status for row in rows] == ["wrong"]
    assert "wrong" in components.text(rows)


def test_the_command_prints_and_writes_nothing_in_a_dry_run(capsys, tmp_path):
    status = components.main(
        ["--tiny", "--suite", "inference", "--dtype", "f32", "--out", str(tmp_path)]
    )
    assert status == 0 and "products" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_on_a_gpu_is_counted_once():
    """A profile lists it by itself, in its operator's time, and in that of a named range."""
    kinds = torch.autograd.DeviceType

    def event(key, device_type, milliseconds, **more):
        spent = 1e3 * milliseconds
        return SimpleNamespace(
            key=key,
            device_type=device_type,
            self_device_time_total=spent,
            self_cpu_time_total=0.25 * spent,
            **more,
        )

    events = [
        event("aten::mm", kinds.CPU, 2.0, is_user_annotation=False),
        event("nvjet_hsh_128x256", kinds.CUDA, 2.0, is_user_annotation=False),
        event("Optimizer.step#AdamW.step", kinds.CUDA, 3.0, is_user_annotation=True),
        event("ProfilerStep*", kinds.CUDA, 6.0),
        event("multi_tensor_apply_kernel adam", kinds.CUDA, 1.0),
    ]
    assert components._summed(events, cuda=True) == {"products": 2.0, "optimiser": 1.0}
    on_cpu = [each for each in events if each.device_type == kinds.CPU]
    assert components._summed(on_cpu, cuda=False) == {"products": 0.5}
