"""Token merging: what is merged, what it leaves alone, and that the fast path computes the reference's."""

from __future__ import annotations

import pytest
import torch

import ast_fast
from ast_fast import reference, token_merging
from ast_fast.equivalence import EquivalenceMonitor, check_equivalence, plain
from ast_fast.equivalence.budgets import budget
from ast_fast.equivalence.measures import measure
from ast_fast.reference import tokens as plain_tokens

# name, changes, r: sizes and strides, one prefix token, and more than can be merged
MODELS = [
    ("ast_mini_p16_s10", {}, 4),
    ("ast_mini_p16_s10", {"num_prefix_tokens": 1}, 5),
    ("ast_mini_p16_s10", {"num_prefix_tokens": 1, "input_tdim": 25, "input_fdim": 40}, 3),
    ("ast_tiny_p16_s10", {"fstride": 12, "tstride": 12}, 7),
    ("ast_tiny_p16_s10", {"fstride": 14, "tstride": 14}, 10**6),
    ("ast_small_p16_s10", {"fstride": 16, "tstride": 16}, [3, 0]),
    ("ast_tiny_p16_s10", {"patch_fdim": 128, "fstride": 128, "patch_tdim": 2}, [0, 20]),
]


def build(name="ast_mini_p16_s10", **changes):
    torch.manual_seed(0)
    settings = {"num_classes": 7, "depth": 3, "input_tdim": 96, **changes}
    model = ast_fast.create_model(name, **settings).eval()
    with torch.no_grad():
        for block in model.v.blocks:  # keys that differ, as trained ones do
            block.attn.qkv.weight.mul_(8.0)
    return model


def spectrogram(model, clips=2):
    size = (clips, model.config.input_tdim, model.config.input_fdim)
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(("tokens", "r"), [(4, 1), (5, 1), (9, 3), (10, 4), (27, 12)])
def test_matching_and_merging_are_the_references(tokens, r, prefix):
    draw = torch.Generator().manual_seed(tokens)
    keys = torch.randn(3, tokens, 2, 8, generator=draw, dtype=torch.float64)
    x = torch.randn(3, tokens, 5, generator=draw, dtype=torch.float64)
    sizes = torch.randint(1, 6, (3, tokens), generator=draw).double()
    r = min(r, (tokens - prefix) // 2)
    plan = token_merging.match(keys, r, prefix)
    want = plain_tokens.match(keys.mean(2), r, prefix)
    assert all(torch.equal(a, b) for a, b in zip(plan, want, strict=True))
    got, got_sizes = token_merging.merge(x, sizes, plan, prefix)
    want, want_sizes = plain_tokens.merge(x, sizes, plan, prefix)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(got_sizes, want_sizes)
    assert got.shape[1] == tokens - r and torch.equal(got_sizes.sum(1), sizes.sum(1))
    assert torch.equal(got[:, :prefix], x[:, :prefix])


def test_the_published_example_of_bipartite_matching():
    # tokens 2 and 4 (even) point along 5 and 3 (odd); 6 along 3 too, but less
    unit = torch.eye(3, dtype=torch.float64)
    keys = torch.stack([unit[0], unit[0], unit[1], unit[2], unit[2], unit[1], unit[2] + unit[0]])
    plan = token_merging.match(keys[None, :, None], 2, 2)
    assert plan.sources.tolist() == [[0, 1]]  # tokens 2 and 4; ties in order
    assert plan.destinations.tolist() == [[1, 0]]  # tokens 5 and 3
    assert plan.unmerged.tolist() == [[2]]


def test_equal_keys_merge_in_order():
    plan = token_merging.match(torch.ones(1, 12, 2, 4), 3, 2)
    assert plan.sources.tolist() == [[0, 1, 2]] and plan.unmerged.tolist() == [[3, 4]]


@pytest.mark.parametrize(("name", "changes", "r"), MODELS)
def test_logits_and_tokens_are_the_references_with_the_same_merges(name, changes, r):
    model = build(name, **changes)
    x = spectrogram(model)
    model.set_token_merging(r)
    with torch.no_grad():
        merged, logits = model.merged_tokens(x), model(x)
        twins = []
        for dtype in (torch.float64, torch.float32):
            twin = reference.ASTModel.from_model(model, dtype)
            twin.merging, twin.merge_plans = model.v.merging, merged.plans
            twins.append((twin(x.to(dtype)), twin.forward_features(x.to(dtype))))
    (oracle, features), (plain, plain_features) = twins
    assert budget("logits", "float32", measure(plain, oracle)).admits(measure(logits, oracle))
    allowed = budget("logits", "float32", measure(plain_features, features))
    assert allowed.admits(measure(merged.tokens, features))
    counts = model.token_counts()
    assert merged.tokens.shape[1] == counts[-1] == counts[-2]
    assert torch.equal(merged.sizes.sum(1), torch.full((2,), float(model.config.num_tokens)))
    assert torch.equal(merged.sizes[:, : model.config.num_prefix_tokens].unique(), torch.ones(1))


@pytest.mark.parametrize("changes", [{}, {"num_prefix_tokens": 1}])
def test_in_float64_it_chooses_the_references_own_merges(changes):
    model = build(**changes).double()
    model.set_token_merging(6)
    x = spectrogram(model).double()
    twin = reference.ASTModel.from_model(model)
    twin.merging = model.v.merging
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-10)


def test_sources_say_where_each_patch_has_gone():
    model = build()
    model.set_token_merging(6)
    x = spectrogram(model)
    with torch.no_grad():
        merged, features = model.merged_tokens(x), model.forward_features(x)
    p = model.config.num_prefix_tokens
    assert merged.source.shape == (2, model.config.num_tokens)
    assert torch.equal(merged.source[:, :p], torch.arange(p).repeat(2, 1))
    for clip in range(2):
        counts = torch.bincount(merged.source[clip], minlength=merged.tokens.shape[1])
        assert torch.equal(counts.float(), merged.sizes[clip])
        assert torch.equal(features[clip], merged.tokens[clip][merged.source[clip]])


def test_features_keep_their_shape_and_frame_logits_follow_them():
    model = build()
    x = spectrogram(model)
    with torch.no_grad():
        shapes = model.forward_features(x).shape, model.frame_logits(x).shape
        maps = model.attention_maps(x)
        model.set_token_merging(5)
        features = model.forward_features(x)
        assert (features.shape, model.frame_logits(x).shape) == shapes
        pooled = features[:, 2:].unflatten(1, model.config.grid).mean(1)
        assert torch.equal(model.frame_logits(x), model.mlp_head(pooled))
        torch.testing.assert_close(model.mlp_head(features[:, :2].mean(1)), model(x))
        assert torch.equal(model.attention_maps(x), maps), "maps are those of all tokens"


def test_it_is_off_by_default_in_training_and_with_zero():
    model = build()
    x = spectrogram(model)
    with torch.no_grad():
        want = model(x)
        model.set_token_merging(6)
        assert not torch.equal(model(x), want)
        assert torch.equal(model.train()(x), want)
        model.eval().set_token_merging(0)
        assert torch.equal(model(x), want) and model.v.merging is None
        with pytest.raises(ValueError, match="set_token_merging"):
            model.merged_tokens(x)


def test_tokens_that_stand_for_many_count_so_often():
    # copies of one token, merged, must give what they gave apart: that is what log size is for
    model = build(depth=2, embed_dim=64, num_heads=2)
    with torch.no_grad():
        model.v.pos_embed.zero_()
        x = torch.ones(1, 96, 64)
        x[:, 40:] = -1.0
        want = model(x)
        model.set_token_merging(8)
        plan = model.merged_tokens(x).plans[0]
        a, b = plain_tokens.halves(model.config.num_tokens, 2)
        stream = model.v.embed(x)[0]
        for source, destination in zip(
            plan.sources[0].tolist(), plan.destinations[0].tolist(), strict=True
        ):
            torch.testing.assert_close(stream[a[source]], stream[b[destination]])
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_a_block_merges_at_most_half_of_its_patches():
    model = build(depth=5)
    model.set_token_merging(10**6)
    patches = model.config.num_tokens - 2
    want = []
    for _ in range(4):
        patches -= patches // 2
        want.append(2 + patches)
    assert model.token_counts() == [*want, want[-1]]
    with torch.no_grad():
        assert model.merged_tokens(spectrogram(model)).tokens.shape[1] == want[-1]


@pytest.mark.parametrize(
    ("r", "message"),
    [(-1, "r=-1"), ([1], "1 numbers: expected 2"), ([1, -2], "r=-2"), ([1.5, 0], "r=1.5")],
)
def test_wrong_schedules_are_refused(r, message):
    with pytest.raises(ValueError, match=message):
        build().set_token_merging(r)


@pytest.mark.parametrize("where", ["", ".attn"])
def test_a_hook_on_what_merging_replaces_is_an_error(where):
    model = build()
    model.set_token_merging(2)
    name = f"v.blocks.1{where}"
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"block 1.*set_token_merging"):
            model(spectrogram(model))
        handle.remove()
        model(spectrogram(model))


@pytest.mark.parametrize("where", ["attn.qkv", "attn.proj", "mlp", "mlp.fc1"])
def test_hooks_on_other_parts_fire(where):
    model = build()
    x, calls = spectrogram(model), []
    model.set_token_merging(2)
    with torch.no_grad():
        want = model(x)
        for block in model.v.blocks:
            block.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(x), want)
    assert len(calls) == 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_whole_and_exports(backend):
    torch.compiler.reset()
    model = build()
    model.set_token_merging(4)
    x = spectrogram(model)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), want, rtol=1e-5, atol=1e-6)


def test_it_repeats_bitwise_and_clips_do_not_meet():
    model = build()
    model.set_token_merging(6)
    x = spectrogram(model, 4)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(model(x), want)
        torch.testing.assert_close(model(x[2:3]), want[2:3], rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_the_input_on_the_reference_path():
    model = build().double()
    model.set_token_merging(3)
    x = spectrogram(model, 1).double().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0, 0], x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (float(model(x + s * 1e-6 * step)[0, 0]) for s in (1, -1))
    assert (ahead - behind) / 2e-6 == pytest.approx(float((grad * step).sum()), rel=1e-4)


@pytest.mark.parametrize("narrow", ["autocast", "pure"])
def test_bfloat16_stays_within_its_budget_on_its_own_merges(narrow):
    model = build()
    x = spectrogram(model)
    model.set_token_merging(4)
    autocast = torch.bfloat16 if narrow == "autocast" else None
    if narrow == "pure":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad():
        assert EquivalenceMonitor(model, autocast_dtype=autocast).step(x).ok


def test_the_yardstick_rounds_neither_sizes_nor_their_logarithms(monkeypatch):
    bias = torch.tensor([[257.0, 1.0, 93.0, 1.0]]).log()
    q, k = torch.zeros(1, 1, 1, 32).bfloat16(), torch.zeros(1, 4, 1, 32).bfloat16()
    v = torch.tensor([0.0, 0.0, 1.0, 0.0])[None, :, None, None].expand(1, 4, 1, 32).bfloat16()
    o = plain.attention(q, k, v, key_bias=bias)
    # bfloat16's own rounding is 0.4 %, that of the logarithms would be 1.2 %
    torch.testing.assert_close(
        o.double(), torch.full_like(o, 93 / 352, dtype=torch.float64), rtol=5e-3, atol=0
    )

    model = build().to(torch.bfloat16)
    model.set_token_merging(4)
    x, sizes = spectrogram(model).bfloat16(), []
    merge = plain.merge

    def watched(tokens, counts, *args):
        sizes.append((tokens.dtype, counts.dtype))
        return merge(tokens, counts, *args)

    monkeypatch.setattr(plain, "merge", watched)
    config = model.config
    with torch.no_grad():
        logits = plain.ast_logits(
            model.state_dict(),
            x,
            num_heads=config.num_heads,
            strides=(config.fstride, config.tstride),
            plans=model.merged_tokens(x).plans,
        )
    assert logits.dtype == torch.bfloat16
    assert sizes == [(torch.bfloat16, torch.float32)] * 2


def test_the_checks_take_the_models_own_merges():
    model = build()
    model.set_token_merging(4)
    assert EquivalenceMonitor(model).step(spectrogram(model), lambda y: y.logsumexp(-1).mean()).ok
    report = check_equivalence(model, dtype=torch.float32)
    assert report.ok, report.table()


def test_it_is_no_part_of_a_checkpoint(tmp_path):
    model = build()
    model.set_token_merging(4)
    model.save_pretrained(tmp_path)
    assert ast_fast.ASTModel.from_pretrained(tmp_path).v.merging is None
