"""The list of configurations that a tuning run is to try, and how one of them is put in place."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton

from ast_fast.kernels import _aot, _candidates, _tuned, attention_launch

pytestmark = pytest.mark.aot

LISTED = [(op, each) for op in _candidates.ops(90) for each in _candidates.candidates(op, 90)]


def test_hopper_has_candidates_and_a_gpu_without_a_list_has_none():
    assert {"attention", "attention_masked"} <= set(_candidates.ops(90))
    assert _candidates.ops(86) == [] and _candidates.candidates("attention", 86) == []


@pytest.mark.parametrize(("op", "candidate"), LISTED, ids=[f"{o}-{c.label}" for o, c in LISTED])
def test_a_candidate_says_why_and_is_not_what_the_table_holds_already(op, candidate):
    node = _tuned.configs(op, 90)
    for key in candidate.path:
        node = node[int(key)] if isinstance(node, list) else node[key]
    assert candidate.entry not in (node if isinstance(node, list) else [node])
    assert candidate.reason
    # what the table says of a place the candidate says too, so that it can be written there
    if not isinstance(node, list):
        assert set(node) - {"use"} <= set(candidate.entry)


def test_no_candidate_is_listed_twice():
    labels = [f"{op} {each.label}" for op, each in LISTED]
    assert len(set(labels)) == len(labels)


def test_a_candidate_in_place_is_what_a_launch_chooses_and_is_gone_afterwards():
    candidate = _candidates.candidates("attention", 90)[0]
    kernel, arithmetic, width = candidate.path
    place = (90, kernel, arithmetic, int(width))
    before = attention_launch.table_configs(*place)
    with _candidates.in_place("attention", 90, candidate.path, candidate.entry):
        (found,) = attention_launch.table_configs(*place)
        assert found == attention_launch.Config(**candidate.entry)
        assert attention_launch.table_configs(80, *place[1:])[0].block_m
    assert attention_launch.table_configs(*place) == before


def test_one_place_of_a_list_is_replaced_and_the_others_stay():
    family = {"forward": [{"rows": 1}, {"rows": 2}], "lists": {"64": [{"a": 1}, {"a": 2}]}}
    changed = _candidates.with_entry(family, ("forward", "1"), {"rows": 8})
    assert changed["forward"] == [{"rows": 1}, {"rows": 8}]
    changed = _candidates.with_entry(family, ("lists", "64"), {"a": 3})
    assert changed["lists"]["64"] == [{"a": 3}]
    assert family["forward"][1] == {"rows": 2} and len(family["lists"]["64"]) == 2


def test_the_gate_compiles_a_case_for_every_candidate():
    names = [case.name for case in _candidates.aot_cases(90)]
    assert len(set(names)) == len(names)
    for op, candidate in LISTED:
        assert any(name.startswith(op) and name.endswith(candidate.label) for name in names)


def limited_case():
    """The candidate with a limit on registers, which only Triton 3.6 compiles without spills."""
    cases = _candidates.aot_cases(90)
    (index,) = [i for i, case in enumerate(cases) if case.maxnreg and not case.twin]
    return index, cases[index]


def test_a_register_limit_reaches_the_compiler():
    _, case = limited_case()
    assert case.maxnreg == 128 and "maxnreg=128" in case.name
    config = attention_launch.Config(32, 128, 8, 3, tma=True, maxnreg=128)
    assert attention_launch.options(config, 64, "16bit")["maxnreg"] == 128
    unlimited = attention_launch.options(config._replace(maxnreg=None), 64, "16bit")
    assert "maxnreg" not in unlimited


def test_a_candidate_of_another_triton_is_left_out(monkeypatch):
    index, case = limited_case()
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    label = case.name.rpartition("-dkv/")[2]
    assert not any(c.label.endswith(label) for c in _candidates.candidates("attention", 90))
    found = _aot.describe("_candidates", 90, index)
    assert found["problems"] == [] and "3.6" in found["left_out"]
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert any(c.label.endswith(label) for c in _candidates.candidates("attention", 90))
