"""`optimize_for_inference`: the same numbers from packed weights, and the usual way wherever they do not fit."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch

import ast_fast
import ast_fast.cpp
from ast_fast import optimize_for_inference, optimized, reference
from ast_fast.equivalence.budgets import budget
from ast_fast.equivalence.measures import measure

if ast_fast.cpp.why_unavailable() is not None:
    pytest.skip("needs the C++ extension", allow_module_level=True)

from ast_fast.cpp import packed

PRECISIONS = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why)))
    for name, why in (
        ("exact", packed.unsupported()),
        ("bf16", packed.bfloat16_unsupported()),
        ("int8", packed.int8_unsupported()),
    )
]
BUDGETS = {"exact": "float32", "bf16": "bfloat16", "int8": "int8"}
needs_packing = pytest.mark.skipif(packed.unsupported() is not None, reason="no oneDNN weights")


def build(name="ast_tiny_p16_s10", **changes):
    torch.manual_seed(0)
    settings = {"num_classes": 7, "depth": 3, "input_tdim": 70, **changes}
    model = ast_fast.create_model(name, **settings).eval()
    with torch.no_grad():  # fresh norms and biases are 1 and 0, which hides mistakes in either
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_input(model, clips=2):
    config = model.config
    draw = torch.Generator().manual_seed(3)
    return torch.randn(clips, config.input_tdim, config.input_fdim, generator=draw) * 0.5


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "packed weights" in r.getMessage()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_prefix_tokens": 1},
        {"name": "ast_mini_p16_s10"},  # heads 32 wide
        {"embed_dim": 768, "num_heads": 12, "depth": 2},
        {"depth": 1},
    ],
    ids=["tiny", "one-prefix-token", "mini", "base-width", "one-block"],
)
def test_every_output_stays_within_the_budget_of_its_precision(changes, precision, caplog):
    model = build(**changes)
    x = make_input(model)
    twin = reference.ASTModel.from_model(model)
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "ast_fast"):
        oracle = twin(x.double())
        usual = model.forward_features(x), model.frame_logits(x), model.attention_maps(x, 0)
        optimize_for_inference(model, precision)
        allowed = budget("logits", BUDGETS[precision])
        assert allowed.admits(measure(model(x), oracle))
        assert measure(model.forward_features(x), usual[0].double()).rel_l2 < allowed.rel_l2 * 2
        assert measure(model.frame_logits(x), usual[1].double()).rel_l2 < allowed.rel_l2 * 2
        assert torch.equal(model.attention_maps(x, 0), usual[2])
    # the maps of the first block need no block run: there is nothing to compute
    assert [m for m in warnings_of(caplog) if "nothing to compute" not in m] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bfloat16_model_stays_in_its_budget(precision):
    model = build().bfloat16()
    x = make_input(model).bfloat16()
    with torch.inference_mode():
        oracle = reference.ASTModel.from_model(model)(x.double())
        simple = reference.ASTModel.from_model(model, torch.bfloat16)(x)
        made = optimize_for_inference(model, precision)(x)
    assert made.dtype == torch.bfloat16
    name = "int8" if precision == "int8" else "bfloat16"
    assert budget("logits", name, measure(simple, oracle)).admits(measure(made, oracle))


@needs_packing
def test_it_is_the_packed_chain_that_runs_and_precisions_differ(monkeypatch):
    model = build()
    x = make_input(model)
    with torch.inference_mode():
        usual = model(x)
        optimize_for_inference(model)
        calls = []
        run = optimized._Floats.attention
        monkeypatch.setattr(
            optimized._Floats,
            "attention",
            lambda self, *given: calls.append(given) or run(self, *given),
        )
        exact = model(x)
        assert len(calls) == 3
        assert measure(exact, usual.double()).rel_l2 < 2e-6
        if packed.int8_unsupported() is None:
            assert measure(optimize_for_inference(model, "int8")(x), usual.double()).rel_l2 > 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_clip_is_the_same_whatever_stands_beside_it(precision):
    model = optimize_for_inference(build(), precision)
    x = make_input(model, 5)
    with torch.inference_mode():
        together = model(x)
        alone = torch.cat([model(clip[None]) for clip in x])
    assert measure(alone, together.double()).rel_l2 < (2e-6 if precision == "exact" else 5e-3)


@needs_packing
@pytest.mark.parametrize(
    "change", ["in place", "load_state_dict", "replaced", "data", "through data"]
)
def test_weights_that_change_are_packed_again(change):
    model, other = build(), build(depth=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    x = make_input(model)
    optimize_for_inference(model)
    with torch.no_grad():
        model(x)
        if change == "in place":
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        elif change == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif change == "replaced":
            model.load_state_dict(other.state_dict(), assign=True)
        elif change == "through data":
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data.copy_(theirs.data)
        else:
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = theirs.data.clone()
        assert measure(model(x), other(x).double()).rel_l2 < 2e-6


@needs_packing
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("lr", [1e-2, 1e-7])
def test_weights_are_packed_again_after_a_fused_optimiser_which_raises_no_version(make, lr):
    model, x = build(), make_input(build())
    optimize_for_inference(model)
    optimizer = make(model.parameters(), lr=lr, fused=True)
    with torch.no_grad():
        model(x)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            made, packs = model(x), dict(model.v.runner._packs)
            usual = copy.deepcopy(model)
            usual.v.runner = None
            assert measure(made, usual(x).double()).rel_l2 < 2e-6
            model(x)  # nothing changed: nothing is packed again
            assert all(model.v.runner._packs[key] is pack for key, pack in packs.items())


@needs_packing
def test_inference_tensors_that_change_are_packed_again():
    with torch.inference_mode():
        model, other = build(), build()
        x = make_input(model)
        optimize_for_inference(model)(x)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        model.load_state_dict(other.state_dict())
        assert measure(model(x), other(x).double()).rel_l2 < 2e-6


@needs_packing
def test_setting_a_precision_takes_packed_weights_away_and_fp8_is_not_packed():
    model = optimize_for_inference(build())
    assert model.set_precision("exact").v.runner is None
    model.set_precision("fp8")
    with pytest.raises(ValueError, match=r"computes in FP8.*set_precision\('exact'\)"):
        optimize_for_inference(model)


@needs_packing
def test_a_model_can_go_on_training_and_its_gradients_are_the_usual_ones(caplog):
    model, twin = build(), build()
    x = make_input(model)
    optimize_for_inference(model).train()
    with caplog.at_level(logging.WARNING, "ast_fast"):
        for each in (model, twin):
            each(x).sum().backward()
            torch.optim.SGD(each.parameters(), lr=0.01).step()
        model(x)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert measure(model(x), twin(x).double()).rel_l2 < 2e-6
    said = warnings_of(caplog)
    assert len(said) == 1 and "gradients are recorded" in said[0]


def _hook(model, x):
    model.v.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    return model(x)


def _replace(model, x):
    model.v.blocks[1].mlp.act = torch.nn.ReLU()
    return model(x)


def _autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _reference(model, x):
    with ast_fast.use_backend("reference"):
        return model(x)


def _fp8(model, x):
    runner = model.v.runner
    model.set_precision("fp8").v.runner = runner  # setting it takes the packed weights away
    return model(x)


def _merging(model, x):
    model.set_token_merging(2)
    return model(x)


def _wide(model, x):
    return model.double()(x.double())


@needs_packing
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (_hook, "hooked"),
        (_replace, "replaced"),
        (_autocast, "autocast"),
        (_reference, "reference"),
        (_wide, "float64"),
        (_fp8, "FP8"),
        (_merging, "merged"),
    ],
)
def test_what_the_chain_does_not_cover_runs_the_usual_way_and_says_so_once(run, reason, caplog):
    model, twin = build(), build()
    x = make_input(model)
    optimize_for_inference(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "ast_fast"):
        want = run(twin, x)
        assert torch.equal(run(model, x), want)
        run(model, x.float())
    said = warnings_of(caplog)
    assert len(said) == 1 and reason in said[0]


@needs_packing
def test_compiled_and_exported_models_do_not_see_it():
    model = optimize_for_inference(build())
    x = make_input(model)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert measure(compiled(x), want.double()).rel_l2 < 2e-6
        program = torch.export.export(model, (x,))
        assert measure(program.module()(x), want.double()).rel_l2 < 2e-6


@needs_packing
def test_copies_pickles_and_state_dicts_carry_no_packed_weights():
    model = build()
    keys = list(model.state_dict())
    x = make_input(model)
    optimize_for_inference(model)
    with torch.no_grad():
        want = model(x)
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (twin, loaded):
            assert torch.equal(other(x), want)
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(x), want)
    assert file.getbuffer().nbytes < 1.2 * sum(p.numel() * 4 for p in model.parameters())


@needs_packing
def test_a_model_of_inference_tensors_and_a_wrapped_one_run():
    with torch.inference_mode():
        model = build()
        x = make_input(model)
        want = model(x)
        assert measure(optimize_for_inference(model)(x), want.double()).rel_l2 < 2e-6
    wrapped = torch.nn.Sequential(build())
    assert optimize_for_inference(wrapped.train()) is wrapped and not wrapped.training
    assert wrapped[0].v.runner is not None


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"precision='fp4'.*exact, bf16 or int8"):
        optimize_for_inference(build(), "fp4")
    with pytest.raises(ValueError, match="Linear holds no trunk"):
        optimize_for_inference(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on meta"):
        optimize_for_inference(build().to("meta"))
    monkeypatch.setattr(packed, "int8_unsupported", lambda: "this CPU has no VNNI")
    monkeypatch.setattr(packed, "unsupported", lambda: None)
    with pytest.raises(
        ValueError, match=r"precision='int8' is not to be had: this CPU has no VNNI"
    ):
        optimize_for_inference(build(), "int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_clip_with_nan_gives_nan_and_leaves_the_others_alone(precision):
    model = optimize_for_inference(build(), precision)
    x = make_input(model, 3)
    with torch.no_grad():
        want = model(x)
        x[1, 5, 7] = torch.nan
        made = model(x)
    assert made[1].isnan().all()
    assert torch.equal(made[[0, 2]], want[[0, 2]])
