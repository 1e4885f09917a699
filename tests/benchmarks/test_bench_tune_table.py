"""What a table may be told: libraries that may stand for ours, and a family for one GPU that leaves the others alone."""

import pytest

pytest.importorskip("triton")

from ast_fast.kernels import _use
from benchmarks import tune_slots, tune_table
from benchmarks.tune_slots import OPS
from benchmarks.tune_use import ALLOWED, Against, choose, fused_is_faster


def against(time, spread=0.005):
    return Against(time * (1 - spread), time, time * (1 + spread))


def test_a_library_must_be_faster_than_noise():
    def chosen(direction="forward", ours=1.0, **libraries):
        named = {name.replace("_", "-"): each for name, each in libraries.items()}
        return choose("attention", direction, ours, named)[0]

    assert chosen(sdpa_cudnn=against(0.9)) == "sdpa-cudnn"
    assert chosen(sdpa_cudnn=against(0.9), sdpa_flash=against(0.8)) == "sdpa-flash"
    assert chosen(sdpa_cudnn=against(1.1)) == "triton"
    assert chosen(sdpa_cudnn=against(0.98)) == "triton"
    assert chosen(sdpa_cudnn=against(0.9, spread=0.2)) == "triton", "not faster in every round"
    assert chosen(ours=0.85, sdpa_cudnn=against(0.9)) == "triton", "our pick is faster still"
    assert chosen() == "triton"
    assert chosen("backward_any_order", sdpa_cudnn=against(0.5)) == "sdpa-cudnn"
    assert chosen("backward", sdpa_cudnn=against(0.5)) == "triton", "its bits are not repeatable"


def test_our_product_must_beat_the_library_by_more_than_noise():
    assert fused_is_faster(1.0, against(1.1))
    assert fused_is_faster(0.9, against(0.95))
    assert not fused_is_faster(1.0, against(1.02))
    assert not fused_is_faster(1.0, against(1.1, spread=0.2))
    assert not fused_is_faster(1.0, against(0.9))


def test_only_names_that_a_table_takes_are_allowed():
    for (op, direction), names in ALLOWED.items():
        assert set(names) <= set(tune_slots.LIBRARIES[op])
        if op != "gemm":
            assert set(names.values()) <= set(_use.NAMES[op]) and direction in _use.DIRECTIONS


@pytest.mark.parametrize("op", OPS)
def test_a_written_table_differs_only_where_it_changed(op):
    text = tune_table.path_of(op).read_text()
    assert tune_table.text(tune_table.read(op), text) == text


def test_a_gpu_that_shared_a_family_gets_its_own():
    table = tune_table.read("attention")
    assert table["architectures"]["89"] == table["architectures"]["86"] == "sm_86"
    changed, name = tune_table.own_family(table, 89)
    assert changed["architectures"]["89"] == name == "sm_89"
    assert changed["architectures"]["86"] == "sm_86"
    assert changed["families"]["sm_89"] == changed["families"]["sm_86"]
    # the one whose name the family has keeps it; the others keep what they had
    changed, name = tune_table.own_family(table, 86)
    assert changed["architectures"]["86"] == name == "sm_86"
    assert changed["families"][changed["architectures"]["89"]] == table["families"]["sm_86"]
    # one that has a family alone keeps it
    assert tune_table.own_family(table, 90) == (table, "sm_90")


def test_newer_gpus_do_not_take_what_was_measured_on_an_older_one():
    table = tune_table.read("layer_norm")
    assert table["architectures"] == {"75": "memory_bound"}
    changed, name = tune_table.own_family(table, 90)
    assert name == "sm_90" and tune_table.family_of(changed, 100) == "memory_bound"
    assert tune_table.family_of(changed, 120) == tune_table.family_of(changed, 80) == "memory_bound"


def test_an_unknown_gpu_starts_from_the_newest_older_family():
    table = tune_table.read("attention")
    changed, name = tune_table.own_family(table, 103)
    assert changed["architectures"]["103"] == name == "sm_103"
    assert changed["families"]["sm_103"] == table["families"]["sm_100"]
    with pytest.raises(ValueError, match=r"compute capability 7\.0 is older"):
        tune_table.own_family(table, 70)
