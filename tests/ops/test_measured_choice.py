"""The key `use` of the tables: what it may say, how it is read and written."""

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ast_fast.kernels import _tuned, _use

TUNED = Path(_tuned.__file__).parent / "tuned"
CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of 132 multiprocessors whose tables can be changed; gives the family that is read."""
    tables = {}

    def table(op):
        return tables.setdefault(op, copy.deepcopy(_tuned.table(op)))

    def configs(op, capability):
        return table(op)["families"][_tuned.family(op, capability)]

    monkeypatch.setattr(_tuned, "configs", configs)
    monkeypatch.setattr(_tuned, "capability", lambda device: 90)
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 132)
    _use.forget()
    yield table
    _use.forget()


@pytest.mark.parametrize("path", sorted(TUNED.glob("*.json")), ids=lambda p: p.stem)
def test_every_committed_table_names_known_implementations_and_its_origin(path):
    table = json.loads(path.read_text())
    if "families" not in table:
        pytest.skip("figures, not a table")
    assert table["origin"]
    for name, family in table["families"].items():
        uses = family.get("use", {})
        assert not _use.problems(uses), name
        assert all(_use.TABLES[op] == path.stem for op in uses), "an op of another table"


def test_every_op_has_a_table_and_names_that_begin_with_triton():
    from ast_fast import backend

    assert set(backend.OPS) <= set(_use.TABLES) == set(_use.NAMES)
    assert all(names[0] == _use.DEFAULT for names in _use.NAMES.values())
    for table in set(_use.TABLES.values()):
        assert _tuned.table(table)["families"]


@pytest.mark.parametrize(
    ("uses", "said"),
    (
        ({"attention": {"forward": "cudnn"}}, "use.attention.forward is 'cudnn'"),
        ({"attention": {"sideways": "triton"}}, "sideways"),
        ({"atention": {"forward": "triton"}}, "atention"),
        ({"attention": {"forward": {"bf16": "triton"}}}, "bf16"),
        ({"attention": {"forward": {"16bit": {"wide": "triton"}}}}, "head width"),
        ({"attention": {"forward": {"16bit": {"64": {"big": "triton"}}}}}, "big"),
        ({"attention": {"forward": {"16bit": {"64": {"full": "torch"}}}}}, "16bit.64.full"),
        ({"layer_norm": {"forward": {"16bit": "triton"}}}, "use.layer_norm.forward"),
        ({"layer_norm": {"forward": "sdpa-cudnn"}}, "sdpa-cudnn"),
        ({"attention": "triton"}, "direction"),
        (["attention"], "use is"),
    ),
)
def test_a_wrong_use_is_named(uses, said):
    found = _use.problems(uses)
    assert len(found) == 1 and said in found[0]


def test_what_a_table_does_not_say_is_triton(hopper):
    for op in _use.TABLES:
        for direction in _use.DIRECTIONS:
            assert _use.implementation(op, direction, CPU, "16bit", 64, 10, 10) == "triton"


def test_a_choice_is_read_at_each_level(hopper):
    uses = hopper("attention")["families"]["sm_90"].setdefault("use", {})
    uses["attention"] = {
        "forward": {"16bit": {"64": {"full": "sdpa-cudnn"}, "32": "sdpa-flash"}, "f32": "triton"},
        "backward": "sdpa-efficient",
    }

    def read(direction, arithmetic="16bit", width=64, clips=64):
        return _use.implementation("attention", direction, CPU, arithmetic, width, 1214, 12 * clips)

    assert read("forward") == "sdpa-cudnn"
    assert read("forward", clips=1) == "triton"  # ten tiles of twelve heads: 120 of 132
    assert read("forward", width=32, clips=1) == "sdpa-flash"
    assert read("forward", width=128) == read("forward", "f32") == read("forward", "tf32")
    assert read("forward", width=128) == "triton"
    assert read("backward", "f32", 96, 1) == "sdpa-efficient"
    assert read("backward_any_order") == "triton"
    assert _use.implementation("attention_varlen", "forward", CPU, "16bit", 64, 9, 9) == "triton"


def test_a_gpu_older_than_the_table_takes_the_default(hopper, monkeypatch):
    monkeypatch.setattr(_tuned, "capability", lambda device: 70)
    assert _use.implementation("attention", "forward", CPU) == "triton"


def test_setting_a_choice_is_reading_it_and_leaves_the_others(hopper):
    table = hopper("attention")
    before = copy.deepcopy(table)
    _use.set_use(table, "sm_90", "attention", "forward", "sdpa-flash", "16bit", 64, "full")
    _use.set_use(table, "sm_90", "attention", "forward", "sdpa-cudnn", "16bit", 32)
    forward = table["families"]["sm_90"]["use"]["attention"]["forward"]
    assert forward == {"16bit": {"64": {"full": "sdpa-flash"}, "32": "sdpa-cudnn"}}
    _use.set_use(table, "sm_90", "attention", "forward", "triton", "16bit", 32, "small")
    assert forward["16bit"]["32"] == {"full": "sdpa-cudnn", "small": "triton"}
    _use.set_use(table, "sm_90", "attention", "backward", "sdpa-cudnn")
    _use.set_use(table, "sm_90", "attention", "backward", "triton", "f32", 64, "small")
    read = table["families"]["sm_90"]["use"]["attention"]["backward"]
    assert _use.look_up(read, "f32", 64, "small") == "triton"
    assert _use.look_up(read, "f32", 64, "full") == "sdpa-cudnn"
    assert _use.look_up(read, "f32", 128, "small") == "sdpa-cudnn"
    assert _use.look_up(read, "16bit", 64, "small") == "sdpa-cudnn"
    del table["families"]["sm_90"]["use"]
    assert table == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (("sm_91", "attention", "forward", "triton"), "sm_91"),
        (("sm_90", "attention", "forward", "cudnn"), "cudnn"),
        (("sm_90", "attention", "upward", "triton"), "upward"),
        (("sm_90", "attention", "forward", "triton", None, 64), "former"),
        (("sm_90", "attention", "forward", "triton", "bf16"), "bf16"),
    ),
)
def test_setting_a_wrong_choice_raises_and_says_what(hopper, arguments, said):
    with pytest.raises(ValueError, match=said):
        _use.set_use(hopper("attention"), *arguments)


def test_a_forced_choice_ends_with_its_block_and_goes_before_the_table(hopper):
    with _use.force({("attention", "backward"): "sdpa-cudnn"}):
        assert _use.implementation("attention", "backward", CPU, "f32", 64, 1, 1) == "sdpa-cudnn"
        assert _use.implementation("attention", "forward", CPU, "f32", 64, 1, 1) == "triton"
    assert _use.implementation("attention", "backward", CPU, "f32", 64, 1, 1) == "triton"
    with pytest.raises(ValueError, match="cudnn"), _use.force({("attention", "forward"): "cudnn"}):
        pass


def test_the_walk_over_configurations_passes_the_choice_by(monkeypatch):
    from benchmarks import tuned

    before = tuned.variants.__wrapped__(90)
    table = copy.deepcopy(_tuned.table("layer_norm"))
    _use.set_use(table, "memory_bound", "layer_norm", "forward", "torch")
    real = _tuned.configs

    def configs(op, capability):
        found = real(op, capability)
        return table["families"]["memory_bound"] if op == "layer_norm" else found

    monkeypatch.setattr(_tuned, "configs", configs)
    assert tuned.variants.__wrapped__(90) == before
