"""What the model offers beyond logits, on every path: hooks, compile, export, dtypes, wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ast_fast
from ast_fast import reference
from ast_fast.equivalence.budgets import budget
from ast_fast.equivalence.measures import measure
from ast_fast.graphs import GraphedForward
from ast_fast.optimized import optimize_for_inference


def build(**changes):
    torch.manual_seed(0)
    settings = {"num_classes": 7, "depth": 3, "input_tdim": 70, **changes}
    return ast_fast.create_model("ast_mini_p16_s10", **settings)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, x):
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum().backward()
    return y.detach(), gradients(model)


def require_same(got, want):
    assert measure(got[0], want[0]).rel_l2 < 2e-6
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert measure(got[1][name], want[1][name]).rel_l2 < 1e-5, name


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 70, 64, generator=torch.Generator().manual_seed(3))


def test_logits_agree_with_the_reference_twin(x):
    model = build()
    with torch.no_grad():
        oracle = reference.ASTModel.from_model(model)(x.double())
        plain = reference.ASTModel.from_model(model, torch.float32)(x)
        assert budget("logits", "float32", measure(plain, oracle)).admits(measure(model(x), oracle))


def test_twin_has_the_same_keys_and_needs_every_setting():
    for name in ("ast_mini_p16_s10", "ast_tiny_p16_s10"):
        model = ast_fast.create_model(name, num_classes=3, depth=1)
        assert list(reference.ASTModel.from_model(model).state_dict()) == list(model.state_dict())
    with pytest.raises(TypeError, match="head_eps"):
        settings = model.config.to_dict()
        absent = ("head_eps", "labels", "problem_type")
        reference.ASTModel(**{k: v for k, v in settings.items() if k not in absent})


def test_logits_are_the_head_on_the_mean_of_the_two_tokens(x):
    model = build()
    tokens = model.forward_features(x)
    assert tokens.shape == (3, 2 + 5 * 6, 128)
    want = model.mlp_head((tokens[:, 0] + tokens[:, 1]) / 2)
    assert measure(model(x), want).rel_l2 < 2e-6


def test_one_token_model_uses_the_class_token(x):
    model = build(num_prefix_tokens=1)
    assert "v.dist_token" not in model.state_dict()
    want = model.mlp_head(model.forward_features(x)[:, 0])
    assert measure(model(x), want).rel_l2 < 2e-6
    oracle = reference.ASTModel.from_model(model)(x.double())
    assert measure(model(x), oracle).rel_l2 < 2e-6


def test_attention_maps_are_the_probabilities_of_a_block(x):
    model = build()
    twin = reference.ASTModel.from_model(model)
    seen = []
    attn = twin.v.blocks[1].attn
    attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    twin(x.double())
    q, k, _ = seen[0].unflatten(2, (3, 4, 32)).unbind(2)
    want = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5).softmax(-1)
    for layer in (1, -2):
        got = model.attention_maps(x, layer)
        assert got.shape == (3, 4, 32, 32)
        assert torch.allclose(got.double(), want, atol=1e-6)
    assert model.attention_maps(x).sum(-1).sub(1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="layer=3: expected -3 to 2"):
        model.attention_maps(x, 3)


def test_frame_logits_follow_time(x):
    model = build()
    got = model.frame_logits(x)
    assert got.shape == (3, 6, 7)
    tokens = model.forward_features(x)[:, 2:].reshape(3, 5, 6, 128)
    assert measure(got[:, 4], model.mlp_head(tokens[:, :, 4].mean(1))).rel_l2 < 2e-6


def test_waveform_goes_through_the_front_end():
    model = build()
    wave = torch.randn(2, 12000) * 0.1
    lengths = torch.tensor([12000, 5000])
    features = ast_fast.LogMel(model.frontend_config)(wave, lengths)
    assert features.shape == (2, 70, 64)
    assert torch.equal(model.forward_waveform(wave, lengths), model(features))
    assert not torch.equal(model.forward_waveform(wave), model(features))


@pytest.mark.parametrize("where", ["v.blocks.1", "v.blocks.2.attn", "v.blocks.0.norm1", "v.norm",
                                   "v.blocks.1.mlp.fc1", "v.patch_embed", "v.patch_embed.proj",
                                   "v.blocks.2.attn.qkv", "v.blocks.1.norm2"])  # fmt: skip
def test_hooks_fire_and_change_nothing(x, where):
    model = build()
    want = run(model, x)
    seen = []
    module = model.get_submodule(where)
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    require_same(run(model, x), want)
    assert len(seen) == 1 and seen[0][0] == 3
    if where.startswith("v.blocks") or where == "v.norm":
        assert seen[0][1] == 32  # all tokens, as in the original
    handle.remove()
    require_same(run(model, x), want)
    assert len(seen) == 1


def test_a_hook_may_replace_what_a_block_gives(x):
    model = build()
    model.v.blocks[0].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    first = model(x)
    assert torch.allclose(first[0], first[1])


def test_a_replaced_projection_is_called(x):
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.delta = inner, nn.Parameter(torch.zeros(inner.out_features))

        def forward(self, value):
            return self.inner(value) + self.delta

    model = build()
    want = run(model, x)
    for block in model.v.blocks:
        block.attn.qkv, block.mlp.fc2 = Adapter(block.attn.qkv), Adapter(block.mlp.fc2)
    got = run(model, x)
    assert measure(got[0], want[0]).rel_l2 < 2e-6
    assert all(block.mlp.fc2.delta.grad.abs().sum() > 0 for block in model.v.blocks)


def test_a_replaced_forward_is_called(x):
    model = build(depth=2)
    want = model(x)
    calls = []
    for name in ("v.blocks.1.norm2", "v.blocks.0.norm1", "v.norm", "v.patch_embed"):
        module = model.get_submodule(name)
        # as offloading and quantisation wrappers do it
        module.forward = lambda *args, inner=module.forward, name=name: (
            calls.append(name),
            inner(*args),
        )[1]
    assert measure(model(x), want).rel_l2 < 2e-6
    assert sorted(calls) == ["v.blocks.0.norm1", "v.blocks.1.norm2", "v.norm", "v.patch_embed"]


def test_gradient_checkpointing_gives_the_same(x):
    model = build()
    want = run(model, x)
    model.set_grad_checkpointing(True)
    require_same(run(model, x), want)
    calls = []
    model.v.blocks[0].attn.qkv.register_forward_hook(lambda *args: calls.append(1))
    run(model, x)
    assert len(calls) == 2  # once forward, once recomputed
    model.set_grad_checkpointing(False)
    run(model, x)
    assert len(calls) == 3


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole_and_exports_with_a_free_batch(x, backend):
    model = build(depth=2)
    with ast_fast.use_backend(backend):
        want = run(model, x)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        require_same(run(model, x), want)
        model.zero_grad()
        y = compiled(x)
        assert measure(y, want[0]).rel_l2 < 2e-6
        (y * torch.linspace(-1, 1, 7)).sum().backward()
        require_same((y, gradients(model)), want)
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=1, max=512)
            program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
            more = torch.randn(5, 70, 64)
            assert measure(program.module()(more), model(more)).rel_l2 < 2e-6


@pytest.mark.slow
def test_compiles_with_inductor(x):
    model = build(depth=2)
    want = run(model, x)
    model.zero_grad()
    y = torch.compile(model, fullgraph=True)(x)
    (y * torch.linspace(-1, 1, 7)).sum().backward()
    require_same((y, gradients(model)), want)


def test_float64_runs_on_the_reference(x):
    model = build().double()
    oracle = reference.ASTModel.from_model(model)(x.double())
    assert measure(model(x.double()), oracle).rel_l2 < 1e-13


def test_bfloat16_model_and_autocast_stay_within_their_budgets(x):
    model = build()
    twin = reference.ASTModel.from_model(model)
    oracle = twin(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        features = model.forward_features(x)
        plain = reference.ASTModel.from_model(model, torch.float32)(x)
    # as PyTorch's autocast: matrix products are narrow, the final norm is not
    assert y.dtype == torch.bfloat16 and features.dtype == torch.float32
    assert budget("logits", "bfloat16", measure(plain, oracle)).admits(measure(y, oracle))
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = build().bfloat16()
    rounded = reference.ASTModel.from_model(half)(x.bfloat16().double())
    plain = reference.ASTModel.from_model(half, torch.bfloat16)(x.bfloat16())
    allowed = budget("logits", "bfloat16", measure(plain, rounded))
    assert allowed.admits(measure(half(x.bfloat16()), rounded))


def test_autocast_keeps_the_residual_stream_wide(x):
    model = build()
    seen = []
    model.v.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [torch.float32]


def test_no_graph_is_kept_without_gradients(x):
    model = build()
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        assert model(x).is_inference()


def test_clips_do_not_influence_each_other(x):
    model = build()
    poisoned = x.clone()
    poisoned[1] = float("nan")
    y = model(poisoned)
    assert y[1].isnan().all()
    assert measure(y[[0, 2]], model(x)[[0, 2]]).rel_l2 < 2e-6


def test_empty_batch(x):
    model = build()
    y = model(x[:0])
    assert y.shape == (0, 7)
    y.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in model.parameters() if p.grad is not None)


def test_frames_that_fill_no_patch_are_ignored(x):
    model = build()
    longer = torch.cat((x, torch.full((3, 5, 64), float("nan"))), dim=1)  # 75 frames: 6 patches too
    assert measure(model(longer), model(x)).rel_l2 < 2e-6


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(64, 70), ValueError, r"x has shape \(64, 70\): expected \[B, 70, 64\]"),
        (torch.zeros(2, 1, 70, 64), ValueError, "add or drop dimensions"),
        (torch.zeros(2, 64, 70), ValueError, r"looks transposed: pass x.transpose\(1, 2\)"),
        (torch.zeros(2, 100, 64), ValueError, "build the model with input_tdim=100"),
        (torch.zeros(2, 70, 63), ValueError, r"\(2, 70, 63\): .*features with num_mel_bins=64"),
        (torch.zeros(2, 70, 65), ValueError, r"\(2, 70, 65\): .*features with num_mel_bins=64"),
        (torch.zeros(2, 5, 64), ValueError, r"\(2, 5, 64\): expected \[B, 70, 64\]"),
        (torch.zeros(2, 70, 64, dtype=torch.int64), TypeError, "expected torch.float32; convert"),
        (torch.zeros(2, 70, 64, dtype=torch.float64), ValueError, r"x is torch.float64 and the model"),
        (torch.zeros(2, 70, 64, device="meta"), ValueError, "x is on meta and the model on cpu: move"),
    ],
)  # fmt: skip
def test_wrong_input_names_what_was_got_what_is_expected_and_the_fix(bad, error, message):
    with pytest.raises(error, match=message):
        build(depth=1)(bad)


def test_every_entrance_refuses_other_mel_bins():
    """63 bins give the grid of 64, and would be read as other bands of frequency."""
    model = build(depth=1)
    assert model.get_shape(10, 10, 63, 70) == model.config.grid
    x, wave = torch.zeros(2, 70, 63), torch.zeros(2, 16000)
    for call in (
        model.forward_features,
        model.frame_logits,
        model.attention_maps,
        GraphedForward(model),
        optimize_for_inference(build(depth=1)),
    ):
        with pytest.raises(ValueError, match="num_mel_bins=64"):
            call(x)
    model.frontend_config = model.frontend_config.replace(num_mel_bins=63)
    with pytest.raises(ValueError, match="num_mel_bins=64"):
        model.forward_waveform(wave)
