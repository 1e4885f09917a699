"""Patchout: which tokens a training step runs on, that nothing else changes, and who draws."""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast import reference
from ast_fast.equivalence import EquivalenceError, EquivalenceMonitor
from ast_fast.equivalence.budgets import budget
from ast_fast.equivalence.measures import measure, measure_all
from ast_fast.patchout import Patchout


def build(name="ast_mini_p16_s10", **changes):
    torch.manual_seed(0)
    settings = {"num_classes": 7, "depth": 2, "input_tdim": 96, **changes}
    return ast_fast.create_model(name, **settings)


def spectrogram(model, clips=2):
    size = (clips, model.config.input_tdim, model.config.input_fdim)
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def test_passts_setting_leaves_its_474_tokens():
    grid = ast_fast.ops.patch_grid(128, 998, (16, 16), (10, 10))
    assert grid == (12, 99)
    assert 2 + Patchout(grid, 2, time=40, frequency=4).num_kept == 474
    grid = ast_fast.ops.patch_grid(128, 1024, (16, 16), (10, 10))
    assert 2 + Patchout(grid, 2, time=40, frequency=4).num_kept == 490


def test_structured_patchout_keeps_whole_rows_and_columns_in_order():
    patchout = Patchout((5, 9), 2, time=4, frequency=2)
    kept = patchout.kept()
    rows, columns = (kept // 9).unique(), (kept % 9).unique()
    assert len(rows) == 3 and len(columns) == 5
    assert torch.equal(kept, (rows[:, None] * 9 + columns).flatten())


def test_unstructured_patchout_drops_from_what_is_left():
    whole, some = Patchout((5, 9), 2, time=4), Patchout((5, 9), 2, time=4, patches=7)
    kept = some.kept()
    assert len(kept) == 25 - 7 == some.num_kept
    assert torch.equal(kept, kept.unique()) and set(kept.tolist()) < set(whole.kept().tolist())


def test_every_patch_is_kept_as_often():
    patchout = Patchout((6, 10), 2, time=4, frequency=2, patches=6)
    counts = torch.zeros(60)
    for step in range(2000):
        patchout.seek(step)
        counts[patchout.kept()] += 1
    expected = 2000 * patchout.num_kept / 60
    # five standard deviations of a binomial number
    assert (counts - expected).abs().max() < 5 * (expected * (1 - patchout.num_kept / 60)) ** 0.5


def test_draws_follow_from_seed_and_call():
    tokens = torch.arange(47.0)[None, :, None]
    one, two, other = (Patchout((5, 9), 2, time=4, seed=seed) for seed in (1, 1, 2))
    first = [one(tokens) for _ in range(4)]
    two.seek(2)
    assert torch.equal(two(tokens), first[2]) and torch.equal(two(tokens), first[3])
    assert not torch.equal(first[0], first[1])
    assert any(not torch.equal(other(tokens), each) for each in first)
    assert [each[0, :2, 0].tolist() for each in first] == [[0.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("name", "changes", "dropped"),
    [
        ("ast_mini_p16_s10", {}, (3, 2, 0)),
        ("ast_mini_p16_s10", {"num_prefix_tokens": 1}, (8, 4, 0)),
        ("ast_tiny_p16_s10", {"fstride": 12, "tstride": 12}, (2, 1, 5)),
        ("ast_tiny_p16_s10", {"fstride": 16, "tstride": 16}, (0, 7, 0)),
        ("ast_tiny_p16_s10", {"patch_fdim": 128, "fstride": 128, "patch_tdim": 2}, (4, 0, 1)),
    ],
)
def test_logits_and_gradients_are_the_references_on_the_same_tokens(name, changes, dropped):
    model = build(name, **changes).train()
    model.set_patchout(*dropped, seed=5)
    x = spectrogram(model)
    results = {}
    for label, dtype in (("oracle", torch.float64), ("plain", torch.float32), ("ours", None)):
        network = model if dtype is None else reference.ASTModel.from_model(model, dtype)
        if dtype is not None:
            network.kept_patches = model.patchout.kept()
        logits = network(x.to(dtype or torch.float32))
        (logits * torch.linspace(-1, 1, 7, dtype=logits.dtype)).sum().backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results[label] = logits.detach(), grads
    oracle, plain, ours = (results[each] for each in ("oracle", "plain", "ours"))
    allowed = budget("logits", "float32", measure(plain[0], oracle[0]))
    assert allowed.admits(measure(ours[0], oracle[0]))
    names = [n for n in oracle[1] if n in ours[1]]
    assert set(names) == set(ours[1])
    errors, sine = measure_all((ours[1][n] for n in names), [oracle[1][n] for n in names])
    assert budget("whole gradient", "float32").admits(errors._replace(worst=sine))
    # positions of patches that were left out get no gradient
    model.patchout.seek(0)
    kept = set((model.patchout.kept() + model.config.num_prefix_tokens).tolist())
    for token, grad in enumerate(ours[1]["v.pos_embed"][0]):
        if token >= model.config.num_prefix_tokens:
            assert bool(grad.any()) == (token in kept)


def test_evaluation_and_features_see_all_patches():
    model = build().eval()
    x = spectrogram(model)
    with torch.no_grad():
        want = [model(x), model.forward_features(x), model.frame_logits(x), model.attention_maps(x)]
        model.set_patchout(time=3, frequency=2)
        got = [model(x), model.forward_features(x), model.frame_logits(x), model.attention_maps(x)]
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        model.train()
        assert torch.equal(model.frame_logits(x), want[2])
        assert not torch.equal(model(x), want[0])
        model.set_patchout()
        assert model.patchout is None and torch.equal(model(x), want[0])


def test_it_is_no_part_of_a_checkpoint(tmp_path):
    model = build()
    keys = list(model.state_dict())
    model.set_patchout(time=3)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert ast_fast.ASTModel.from_pretrained(tmp_path).patchout is None


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ({"time": 9}, "time=9: expected 0 to 8.* 9 columns"),
        ({"frequency": 5}, "frequency=5: expected 0 to 4"),
        ({"time": -1}, "time=-1"),
        ({"time": 8, "frequency": 4, "patches": 1}, "patches=1: expected 0 to 0"),
    ],
)
def test_dropping_everything_is_refused(dropped, message):
    with pytest.raises(ValueError, match=message):
        build().set_patchout(**dropped)


def test_gradient_checkpointing_uses_one_draw():
    model = build().train()
    model.set_patchout(time=3, frequency=2, seed=1)
    x, found = spectrogram(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.patchout.seek(4)
        model.zero_grad()
        model(x).square().sum().backward()
        assert int(model.patchout.step) == 5
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert measure(a, b).rel_l2 < 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_draws_anew_each_call(backend):
    torch.compiler.reset()
    model = build(depth=1).train()
    model.set_patchout(time=3, frequency=2, patches=2, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = spectrogram(model)
    want = [model(x).detach() for _ in range(3)]
    model.patchout.seek(0)
    for each in want:
        torch.testing.assert_close(compiled(x).detach(), each, rtol=1e-5, atol=1e-6)
    assert int(model.patchout.step) == 3 and not torch.equal(want[0], want[1])


def test_the_monitor_compares_on_the_same_tokens_and_leaves_the_draw_alone():
    model = build().train()
    model.set_patchout(time=3, frequency=2, seed=1)
    monitor = EquivalenceMonitor(model)
    model.patchout.seek(7)
    assert monitor.step(spectrogram(model), lambda logits: logits.logsumexp(-1).mean()).ok
    assert int(model.patchout.step) == 7
    # a fast path that keeps other tokens is found out
    model.patchout.forward = lambda tokens: tokens[:, : 2 + model.patchout.num_kept]
    with pytest.raises(EquivalenceError, match="logits"):
        monitor.step(spectrogram(model))
