"""`accelerate` on real models of transformers: equal numbers, and everything around the model goes on."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ast_fast
from ast_fast.equivalence.budgets import budget, precision_of
from ast_fast.equivalence.measures import measure, measure_all

transformers = pytest.importorskip("transformers")

from ast_fast.integrations import _hf_attention, _hf_modules  # noqa: E402
from ast_fast.integrations import transformers as integration  # noqa: E402

MAJOR = int(transformers.__version__.split(".")[0])
needs_masks = pytest.mark.skipif(MAJOR < 5, reason="transformers 4's AST takes no attention_mask")


def layers_of(model):
    return [m for m in model.modules() if type(m).__name__ == "ASTLayer"]


def attention_of(layer):
    """The module that transformers records attentions of."""
    return layer.attention if MAJOR >= 5 else layer.attention.attention


def query_of(layer):
    return layer.attention.q_proj if MAJOR >= 5 else layer.attention.attention.query


def run(model, x, y, **kwargs):
    """Logits and all gradients of one step."""
    model.zero_grad()
    out = model(x, labels=y, **kwargs)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in model.parameters()]


def check(model, fast, x, y, dtype=torch.float32, **kwargs):
    """Both within the budget of one another's float64."""
    oracle = run(
        copy.deepcopy(ast_fast.restore(copy.deepcopy(model))).double(), x.double(), y, **kwargs
    )
    plain, ours = (run(m, x.to(dtype), y, **kwargs) for m in (model, fast))
    precision = precision_of(dtype)
    allowed = budget("logits", precision, measure(plain[0], oracle[0]))
    assert allowed.admits(measure(ours[0], oracle[0]))
    errors, angle = measure_all(plain[1], oracle[1])
    allowed = budget("whole gradient", precision, errors._replace(worst=angle))
    errors, angle = measure_all(ours[1], oracle[1])
    assert allowed.admits(errors._replace(worst=angle))


def fused(model, x):
    """Whether the trunk runs as one chain rather than layer by layer."""
    request = _hf_modules._read(model, _hf_modules._MODEL_NAMES, (x,), {})
    tokens = _hf_modules.fused_tokens(model.audio_spectrogram_transformer, request, 2)
    return tokens is not None and tokens.shape[1] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "layer_norm_eps": 1e-3, "num_labels": 3}]
)
def test_outputs_and_gradients_are_within_budget(make_ast, batch, dtype, changes):
    x, y = batch
    model = make_ast(**changes).to(dtype)
    fast = ast_fast.accelerate(copy.deepcopy(model))
    assert fused(fast, x.to(dtype))
    # the oracle sees what the model sees: weights and inputs already rounded
    check(model, fast, x.to(dtype).float(), y % changes.get("num_labels", 7), dtype)


def test_the_epsilon_of_the_config_counts(make_ast, batch):
    x, _ = batch
    small, large = (make_ast(layer_norm_eps=eps) for eps in (1e-12, 0.5))
    fast = ast_fast.accelerate(copy.deepcopy(large))
    with torch.no_grad():
        assert not torch.allclose(small(x).logits, large(x).logits, atol=1e-3)
        assert torch.allclose(fast(x).logits, large(x).logits, atol=1e-5)


def test_it_is_in_place_and_undone(make_ast, batch, tmp_path):
    x, _ = batch
    model = make_ast()
    before = {name: id(p) for name, p in model.named_parameters()}
    want = model(x).logits
    assert ast_fast.accelerate(model) is model
    assert ast_fast.accelerate(model) is model  # harmless
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert integration.is_accelerated(model)
    assert type(model).__name__ == "ASTForAudioClassification"
    model.save_pretrained(tmp_path / "fast")
    assert ast_fast.restore(model) is model
    assert not integration.is_accelerated(model)
    assert all(type(m).__module__.startswith(("transformers.", "torch.")) for m in model.modules())
    assert torch.equal(model(x).logits, want)
    again = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "fast")
    assert torch.equal(again(x).logits, want)
    assert again.config.architectures == ["ASTForAudioClassification"]


def test_a_bare_trunk_gives_all_its_outputs(make_ast, batch):
    x, _ = batch
    model = make_ast("ASTModel")
    want = model(x)
    got = ast_fast.accelerate(model)(x)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooler_output, want.pooler_output, atol=2e-5, rtol=1e-5)
    last, pooled = model(x, return_dict=False)[:2]
    assert torch.equal(last, got.last_hidden_state) and torch.equal(pooled, got.pooler_output)


def test_attentions_and_hidden_states_are_recorded_and_the_chain_returns(make_ast, batch):
    x, _ = batch
    model = make_ast(attention="eager")
    fast = ast_fast.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        want = model(x, output_attentions=True, output_hidden_states=True)
        got = fast(x, output_attentions=True, output_hidden_states=True)
        assert len(got.hidden_states) == 4 and len(got.attentions) == 3
        for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
        for ours, theirs in zip(got.attentions, want.attentions, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        # transformers leaves its recording hooks behind; they are idle now
        assert fused(fast, x)
        assert fast(x).hidden_states is None
        fast.config.output_hidden_states = True
        assert len(fast(x).hidden_states) == 4


def test_a_model_that_recorded_before_it_was_accelerated_runs_fast(make_ast, batch):
    x, _ = batch
    model = make_ast()
    model(x, output_hidden_states=True)
    fast = ast_fast.accelerate(model)
    assert fused(fast, x)
    assert not any("forward" in layer.__dict__ for layer in layers_of(fast))


def test_hooked_and_replaced_parts_keep_their_own_forward_said_once(make_ast, batch, caplog):
    x, _ = batch
    model = make_ast()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    seen = []
    layer = layers_of(fast)[1]
    handle = attention_of(layer).register_forward_hook(lambda m, a, out: seen.append(out[0]))
    _hf_attention._said.clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got = [fast(x).logits for _ in range(2)]
    torch.testing.assert_close(got[0], model(x).logits, atol=2e-5, rtol=1e-5)
    assert len(seen) == 2 and seen[0].shape[-1] == 128
    said = [r.getMessage() for r in caplog.records if "own forward" in r.getMessage()]
    assert len(said) == 1 and "is hooked" in said[0]
    handle.remove()
    outputs = []
    query_of(layer).register_forward_hook(lambda m, a, out: outputs.append(out))
    layers_of(fast)[2].layernorm_after = nn.Identity()
    layers_of(model)[2].layernorm_after = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, model(x).logits, atol=5e-5, rtol=1e-4)
    assert outputs[0].shape == (3, 47, 128)


def test_an_attention_of_another_kind_is_called(make_ast, batch):
    class Other(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            made = hidden_states.flip(1)
            return (made, None) if MAJOR >= 5 else made

    x, _ = batch
    model = make_ast()
    layers_of(model)[1].attention = Other()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, model(x).logits, atol=5e-5, rtol=1e-4)


def test_what_a_class_records_is_found_however_transformers_asks_for_it():
    """Since 5.23 the registry is given models and makes the text of their class itself."""
    from ast_fast.integrations._hf_parts import declare_recordable

    class ByModel(dict):
        def __setitem__(self, model, outputs):
            super().__setitem__(str(model.__class__), outputs)

        def get(self, model):
            return super().get(str(model.__class__)) or {}

    class Model:
        pass

    new, old = ByModel(), {}
    for registry in (new, old):
        declare_recordable(registry, Model, {"hidden_states": Model})
    assert new.get(Model()) == old[str(Model)] == {"hidden_states": Model}


def test_a_hook_on_the_last_layer_sees_every_token(make_ast, batch):
    x, _ = batch
    fast = ast_fast.accelerate(make_ast())
    shapes = []
    layers_of(fast)[-1].register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    query_of(layers_of(fast)[-1]).register_forward_hook(lambda m, a, o: shapes.append(o.shape[1]))
    fast(x)
    assert shapes == [47, (3, 47, 128)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make_ast, batch, reentrant):
    x, y = batch
    model = make_ast().train()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    query_of(layers_of(fast)[0]).register_forward_hook(lambda m, a, out: calls.append(out.shape))
    want, got = run(model, x, y), run(fast, x, y)
    assert len(calls) == 2  # once more in backward
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_dropout_of_hidden_states_draws_alike_and_of_probabilities_is_kept(make_ast, batch):
    x, _ = batch
    model = make_ast(hidden_dropout_prob=0.2).train()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    torch.manual_seed(0)
    want = model(x).logits
    # every token of the last layer draws in transformers: compare the layers before it
    torch.manual_seed(0)
    got = fast(x, output_hidden_states=True).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    noisy = ast_fast.accelerate(make_ast(attention_probs_dropout_prob=0.5).train())
    assert not torch.equal(noisy(x).logits, noisy(x).logits)
    assert torch.equal(noisy.eval()(x).logits, noisy(x).logits)


@needs_masks
@pytest.mark.parametrize("kind", ["last", "gaps", "none", "four"])
def test_attention_masks(make_ast, batch, kind):
    x, y = batch
    model = make_ast()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    mask = torch.ones(3, 47)
    if kind != "none":
        mask[0, 30:] = 0
    if kind == "gaps":
        mask[1, 5:9] = 0
    if kind == "four":
        mask = torch.rand(3, 1, 47, 47) > 0.3
        mask[..., 0] = True
    check(model, fast, x, y, attention_mask=mask)
    with torch.no_grad():
        want, got = (m(x, attention_mask=mask).logits for m in (model, fast))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    if kind in ("last", "gaps"):
        assert not torch.allclose(got, fast(x).logits, atol=1e-4)


def test_other_lengths_get_transformers_own_error(make_ast):
    model = make_ast()
    with pytest.raises(RuntimeError) as theirs:
        model(torch.zeros(1, 128, 64))
    with pytest.raises(RuntimeError) as ours:
        ast_fast.accelerate(model)(torch.zeros(1, 128, 64))
    assert str(ours.value) == str(theirs.value)


def test_autocast(make_ast, batch):
    x, y = batch
    model = make_ast()
    fast = ast_fast.accelerate(copy.deepcopy(model))
    want = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(x, labels=y)
        theirs = model(x).logits
    assert out.logits.dtype == theirs.dtype
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fast.parameters())
    allowed = budget("logits", "bfloat16", measure(theirs.float(), want))
    assert allowed.admits(measure(out.logits.float(), want))


def test_copies_and_pickles_stay_fast(make_ast, batch):
    x, _ = batch
    fast = ast_fast.accelerate(make_ast())
    want = fast(x).logits
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert integration.is_accelerated(other) and torch.equal(other(x).logits, want)
        assert next(other.parameters()) is not next(fast.parameters())


def test_replicas_use_their_own_parameters(make_ast, batch):
    """What DataParallel makes: shallow copies whose parameters are plain tensors."""
    x, _ = batch
    fast = ast_fast.accelerate(make_ast())
    modules = list(fast.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    where = {id(module): replica for module, replica in zip(modules, replicas, strict=True)}
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            replica._modules[name] = where[id(child)]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.detach() * 1.25)
    scaled = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.25)
        want, got = scaled(x).logits, replicas[0](x).logits
    torch.testing.assert_close(got, want)


def test_torch_compile_in_one_graph(make_ast, batch):
    x, y = batch
    fast = ast_fast.accelerate(make_ast())
    want = fast(x).logits
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).logits, want, atol=1e-5, rtol=1e-5)
    loss = compiled(x, labels=y).loss
    loss.backward()
    got = [p.grad for p in fast.parameters()]
    fast.zero_grad()
    fast(x, labels=y).loss.backward()
    for ours, eager in zip(got, fast.parameters(), strict=True):
        torch.testing.assert_close(ours, eager.grad, atol=1e-5, rtol=1e-3)
    if MAJOR >= 5:
        mask = torch.ones(3, 47)
        mask[0, 30:] = 0
        masked = fast(x, attention_mask=mask).logits
        got = compiled(x, attention_mask=mask).logits
        torch.testing.assert_close(got, masked, atol=1e-5, rtol=1e-4)


def test_a_layer_compiled_by_itself_is_called(make_ast, batch):
    x, _ = batch
    fast = ast_fast.accelerate(make_ast())
    want = fast(x).logits
    traced = []
    layer = layers_of(fast)[1]
    layer.compile(backend=lambda graph, inputs: traced.append(graph) or graph)
    torch.testing.assert_close(fast(x).logits, want, atol=1e-5, rtol=1e-5)
    assert traced


def test_lora_trains_and_merges(make_ast, batch):
    peft = pytest.importorskip("peft")
    x, y = batch
    names = ["q_proj", "v_proj", "fc1"] if MAJOR >= 5 else ["query", "value", "intermediate.dense"]
    settings = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)

    def build():
        torch.manual_seed(0)
        return peft.get_peft_model(make_ast(), settings)

    model, fast = build(), ast_fast.accelerate(build())
    want, got = (m(x, labels=y) for m in (model, fast))
    torch.testing.assert_close(got.logits, want.logits, atol=5e-5, rtol=1e-4)
    got.loss.backward()
    want.loss.backward()
    trained = [p for p in fast.parameters() if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 18
    for ours, theirs in zip(trained, others, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    merged = fast.merge_and_unload()
    assert integration.is_accelerated(merged) and fused(merged, x)
    torch.testing.assert_close(merged(x).logits, want.logits, atol=1e-4, rtol=1e-4)


def test_a_pipeline_gives_the_same_scores(make_ast):
    model = make_ast(max_length=96, num_mel_bins=128)
    wave = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
    theirs = transformers.ASTFeatureExtractor(max_length=96)
    ours = ast_fast.ASTFeatureExtractor(max_length=96)
    want = transformers.pipeline("audio-classification", model, feature_extractor=theirs)(wave)
    fast = ast_fast.accelerate(copy.deepcopy(model))
    classify = transformers.pipeline("audio-classification", fast, feature_extractor=ours)
    got = classify(wave)
    assert [row["label"] for row in got] == [row["label"] for row in want]
    for a, b in zip(got, want, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
    with pytest.raises(TypeError, match=r"pipeline\.model"):
        ast_fast.accelerate(classify)


def test_the_trainer_trains_alike(make_ast, tmp_path):
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_values": torch.randn(96, 64, generator=generator), "labels": index % 7}
        for index in range(12)
    ]
    model = make_ast()

    def train(network, folder):
        settings = transformers.TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-3,
            report_to=[], save_strategy="no", use_cpu=True, seed=0, logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(network, settings, train_dataset=rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        trainer.save_model(str(folder / "model"))
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    fast = ast_fast.accelerate(copy.deepcopy(model))
    want, got = train(model, tmp_path / "theirs"), train(fast, tmp_path / "ours")
    assert len(got) == 3 and got == pytest.approx(want, rel=1e-3)
    again = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "ours" / "model")
    x = torch.stack([row["input_values"] for row in rows])
    fast.eval()
    torch.testing.assert_close(again(x).logits, fast(x).logits, atol=1e-4, rtol=1e-3)


def test_wrong_models_get_a_clear_error():
    for model, said in (
        (nn.Linear(2, 2), "holds no AST of transformers"),
        (ast_fast.create_model("ast_mini_p16_s10"), "by itself"),
        ("MIT/ast", "is a str"),
    ):
        with pytest.raises(TypeError, match=said):
            ast_fast.accelerate(model)
    linear = nn.Linear(2, 2)
    assert ast_fast.restore(linear) is linear


def test_an_old_transformers_is_refused(monkeypatch):
    # the module that importing gives now: transformers replaces itself while it is imported
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.1")
    integration.register.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"4\.57 or newer"):
            integration.register()
    finally:
        monkeypatch.undo()
        integration.register()
