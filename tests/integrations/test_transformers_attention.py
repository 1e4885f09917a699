"""`attn_implementation="ast_fast"` in models of transformers, and the attention behind it alone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from ast_fast.integrations import _hf_attention  # noqa: E402
from ast_fast.integrations import transformers as integration  # noqa: E402
from ast_fast.integrations._hf_attention import Keys, attend, attention_forward, keys_of  # noqa: E402

MAJOR = int(transformers.__version__.split(".")[0])


@pytest.fixture(autouse=True)
def unsaid():
    _hf_attention._said.clear()


def operands(gradient=False):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 29, 2, 64, generator=generator) for _ in range(3))
    return [each.requires_grad_(gradient) for each in (q, k, v)]


def plain(q, k, v, mask=None, scale=None):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def visible(kind):
    keep = torch.ones(3, 29, dtype=torch.bool)
    keep[0, 20:] = False
    if kind == "gaps":
        keep[1, 3:8] = False
    return keep


def test_a_model_is_loaded_with_it_by_name(make_ast, batch, tmp_path):
    integration.register()
    x, y = batch
    make_ast().save_pretrained(tmp_path)
    load = transformers.ASTForAudioClassification.from_pretrained
    theirs, ours = load(tmp_path), load(tmp_path, attn_implementation="ast_fast")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = _hf_attention.ops.attention
        patch.setattr(
            _hf_attention.ops, "attention", lambda *a, **k: calls.append(1) or real(*a, **k)
        )
        got, want = ours(x, labels=y), theirs(x, labels=y)
    assert len(calls) == 3
    torch.testing.assert_close(got.logits, want.logits, atol=2e-5, rtol=1e-4)
    got.loss.backward()
    want.loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
    switched = copy.deepcopy(theirs)
    switched.set_attn_implementation("ast_fast")
    torch.testing.assert_close(switched(x).logits, got.logits, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4's AST takes no attention_mask")
@pytest.mark.parametrize("kind", ["last", "gaps"])
def test_token_masks_reach_it_as_keys(make_ast, batch, kind, caplog):
    x, y = batch
    theirs, ours = make_ast(attention="sdpa"), make_ast(attention="ast_fast")
    mask = torch.ones(3, 47, dtype=torch.long)
    mask[0, 30:] = 0
    if kind == "gaps":
        mask[2, 4] = 0
    with caplog.at_level(logging.WARNING):
        with torch.no_grad():
            got, want = (m(x, attention_mask=mask).logits for m in (ours, theirs))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert not caplog.records
        grads = []
        for model in (ours, theirs):
            model(x, attention_mask=mask, labels=y).loss.backward()
            grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert [("gaps" in r.getMessage()) for r in caplog.records] == [True] * (kind == "gaps")


@pytest.mark.parametrize("kind", ["last", "gaps"])
@pytest.mark.parametrize("form", ["2d", "bool", "additive", "expanded"])
@pytest.mark.parametrize("gradient", [False, True])
def test_every_form_of_a_key_mask_gives_the_same(kind, form, gradient):
    keep = visible(kind)
    mask = keep.long() if form == "2d" else keep[:, None, None, :]
    if form == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if form == "expanded":
        mask = mask.expand(3, 2, 29, 29)
    q, k, v = operands(gradient)
    with torch.no_grad():
        k[0, 25] = float("inf") if kind == "last" and gradient else 1e3  # behind the mask
    safe = [each.detach().clone() for each in (q, k, v)]
    safe[1][0, 25] = 0.0
    got = attend(q, k, v, mask, 0.2)
    want = plain(*safe, mask=keep[:, None, None, :], scale=0.2)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    found = keys_of(mask)
    assert isinstance(found, Keys) and (found.lengths is None) == (kind == "gaps")
    if gradient:
        got.sum().backward()
        assert torch.equal(k.grad[0, 20:], torch.zeros_like(k.grad[0, 20:]))


def test_masks_that_hide_nothing_are_no_masks():
    ones = torch.ones(3, 29)
    assert keys_of(ones) is None and keys_of(torch.zeros(3, 1, 1, 29)) is None
    ones[1, 28] = 0  # what was read is not kept beyond a change
    assert keys_of(ones).lengths.tolist() == [29, 28, 29]


@pytest.mark.parametrize("gradient", [False, True])
def test_additive_biases_of_keys_are_added(gradient):
    bias = torch.randn(3, 29, generator=torch.Generator().manual_seed(2))
    q, k, v = operands(gradient)
    got = attend(q, k, v, bias[:, None, None, :], 0.125)
    want = plain(q, k, v, bias[:, None, None, :], 0.125)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_other_masks_are_left_to_pytorch_and_said_once(caplog):
    pairs = torch.rand(3, 1, 29, 29, generator=torch.Generator().manual_seed(3)) > 0.4
    q, k, v = operands()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = attend(q, k, v, pairs, 0.125)
    torch.testing.assert_close(got, plain(q, k, v, pairs, 0.125))
    assert [("differs between queries" in r.getMessage()) for r in caplog.records] == [True]


def test_dropout_of_probabilities_is_pytorchs(caplog):
    q, k, v = operands()
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        got = attend(q, k, v, None, 0.125, dropout=0.5)
        torch.manual_seed(0)
        heads = (each.transpose(1, 2) for each in (q, k, v))
        want = F.scaled_dot_product_attention(*heads, dropout_p=0.5, scale=0.125)
    assert torch.equal(got, want.transpose(1, 2))
    assert len(caplog.records) == 1 and "dropout" in caplog.text


def test_what_it_does_not_compute_is_refused():
    q, k, v = (each.transpose(1, 2) for each in operands())
    module = nn.Module()
    module.is_causal = False
    out, weights = attention_forward(module, q, k, v, None, scaling=0.3)
    assert out.shape == (3, 29, 2, 64) and out.is_contiguous() and weights is None
    with pytest.raises(ValueError, match=r"2 query heads and 1 key heads.*sdpa"):
        attention_forward(module, q, k[:, :1], v[:, :1], None)
    with pytest.raises(ValueError, match="is causal"):
        attention_forward(module, q, k, v, None, is_causal=True)
    with pytest.raises(ValueError, match="does not compute softcap"):
        attention_forward(module, q, k, v, None, softcap=30.0)


def test_a_causal_model_is_refused_and_an_encoder_runs():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 50}
    tokens = torch.arange(12).view(2, 6)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    config._attn_implementation = "ast_fast"
    with pytest.raises(ValueError, match="is causal"):
        transformers.LlamaForCausalLM(config)(tokens)
    config = transformers.ViTConfig(
        **{k: v for k, v in sizes.items() if k != "vocab_size"}, image_size=32, patch_size=16
    )
    config._attn_implementation = "ast_fast"
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = model(image).last_hidden_state
        model.set_attn_implementation("eager")
        torch.testing.assert_close(got, model(image).last_hidden_state, atol=1e-5, rtol=1e-4)
