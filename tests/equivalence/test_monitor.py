"""The monitor: agrees with a right fast path, stops a wrong one, and disturbs nothing."""

import logging

import pytest
import torch
import torch.nn.functional as F

import ast_fast
from ast_fast import ops
from ast_fast.config import LogMelConfig, ModelConfig, MonitorConfig
from ast_fast.equivalence import EquivalenceError, EquivalenceMonitor, whole

CONFIG = ModelConfig(
    label_dim=5, input_tdim=96, embed_dim=64, num_heads=2, depth=2, dead_heads=True
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ast_fast.ASTModel.from_config(CONFIG)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return 0.5 * torch.randn(6, 96, 128), torch.randint(5, (6,))


def loss_of(targets):
    return lambda logits: F.cross_entropy(logits, targets[: len(logits)])


def test_the_fast_model_agrees_in_float32(model, batch):
    x, y = batch
    monitor = EquivalenceMonitor(model)
    row = monitor.step(x, loss_of(y), step=40)
    assert row.ok and row.step == 40 and row.clips == 4 and row.precision == "float32"
    assert row.gradient is not None and row.loss_error < row.loss_budget
    assert 0 < row.seconds == monitor.seconds
    assert monitor.rows == [row]


@pytest.mark.parametrize("reference", ("float32", "float64"))
def test_the_fast_model_agrees_under_autocast(model, batch, reference):
    x, y = batch
    monitor = EquivalenceMonitor(model, MonitorConfig(dtype=reference))
    with torch.autocast("cpu", torch.bfloat16):
        row = monitor.step(x, loss_of(y))
    assert row.ok and row.precision == "bfloat16"
    assert row.logits[1] > 1e-4  # that is, autocast did reach the fast path
    named = EquivalenceMonitor(model, autocast_dtype=torch.bfloat16).step(x, loss_of(y))
    assert named.precision == "bfloat16" and named.logits[1] > 1e-4


def test_a_model_in_bfloat16_agrees(model, batch):
    x, y = batch
    row = EquivalenceMonitor(model.bfloat16()).step(x.bfloat16(), loss_of(y))
    assert row.ok and row.precision == "bfloat16"


def test_waveforms_and_lengths_are_checked_with_the_front_end():
    torch.manual_seed(0)
    front = LogMelConfig(num_frames=96)
    model = ast_fast.ASTModel.from_config(CONFIG, front)
    wave = 0.1 * torch.randn(3, 16000)
    lengths = torch.tensor([16000, 9000, 12345])
    monitor = EquivalenceMonitor(model)
    assert monitor.step((wave, lengths), loss_of(torch.tensor([0, 1, 2]))).ok
    assert monitor.step((wave * 32767).clamp(-32768, 32767).to(torch.int16)).ok


WRONG = {
    "mlp": lambda real: lambda *a, **k: real(*a, **k) * 1.0005,
    "attention_qkv": lambda real: (
        lambda qkv, *a, **k: real(qkv, qkv.shape[-1] ** -0.5 * 1.01, *a[1:], **k)
    ),
    "add_layer_norm": lambda real: lambda x, r, w, b, eps, *a: real(x, r, w, b, 1e-3, *a),
    "patch_embed": lambda real: lambda x, *a, **k: real(x.flip(1), *a, **k),
}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_op_stops_the_run(model, batch, monkeypatch, op):
    x, y = batch
    monkeypatch.setattr(ops, op, WRONG[op](getattr(ops, op)))
    monitor = EquivalenceMonitor(model)
    with pytest.raises(EquivalenceError, match=r"step 7: .*budget.*ast-fast verify"):
        monitor.step(x, loss_of(y), step=7)
    assert not monitor.rows[0].ok and monitor.rows[0].torch_ran


def test_a_wrong_gradient_alone_stops_the_run(model, batch, monkeypatch):
    x, y = batch
    real = ops.mlp

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 0.99

    monkeypatch.setattr(ops, "mlp", lambda *a: Halved.apply(real(*a)))
    with pytest.raises(EquivalenceError, match="gradient"):
        EquivalenceMonitor(model).step(x, loss_of(y))


def test_nan_in_the_fast_path_stops_the_run(model, batch, monkeypatch):
    x, y = batch
    real = ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda *a: real(*a) * float("nan"))
    with pytest.raises(EquivalenceError):
        EquivalenceMonitor(model).step(x, loss_of(y))


def test_stop_false_only_warns(model, batch, monkeypatch, caplog):
    x, y = batch
    real = ops.mlp
    monkeypatch.setattr(ops, "mlp", lambda *a: real(*a) * 1.01)
    monitor = EquivalenceMonitor(model, MonitorConfig(stop=False))
    with caplog.at_level(logging.WARNING, "ast_fast.equivalence"):
        row = monitor.step(x, loss_of(y))
    assert not row.ok and "use_backend('reference')" in caplog.text


def test_nothing_of_the_training_state_changes(model, batch):
    x, y = batch
    model.v.blocks[0].requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model.train()
    loss_of(y)(model(x)).backward()
    optimizer.step()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    EquivalenceMonitor(model).step(x, loss_of(y))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    for name, parameter in model.named_parameters():
        before = grads[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)


def test_training_with_the_monitor_gives_the_same_weights_bit_by_bit(batch):
    x, y = batch
    found = []
    for every in (0, 2):
        torch.manual_seed(0)
        model = ast_fast.ASTModel.from_config(CONFIG)
        monitor = EquivalenceMonitor(model, MonitorConfig(check_every=every, max_clips=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            if monitor.due(step):
                monitor.step(x, loss_of(y), step=step)
            optimizer.zero_grad()
            loss_of(y)(model(x + 0.01 * torch.randn_like(x))).backward()
            optimizer.step()
        found.append(model.state_dict())
        assert len(monitor.rows) == (2 if every else 0)
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_a_saturated_model_is_no_false_alarm(model, batch):
    x, y = batch
    with torch.no_grad():
        model.mlp_head[1].weight.mul_(200.0)
    y = model(x).argmax(-1)
    row = EquivalenceMonitor(model, autocast_dtype=torch.bfloat16).step(x, loss_of(y))
    assert row.loss < 0.1 and row.ok


def test_without_gradients_only_logits_and_loss_are_compared(model, batch):
    x, y = batch
    with torch.no_grad():
        row = EquivalenceMonitor(model.eval()).step(x, loss_of(y))
    assert row.ok and row.gradient is None and row.loss is not None
    frozen = EquivalenceMonitor(model.requires_grad_(False)).step(x)
    assert frozen.ok and frozen.gradient is None and frozen.loss is None


def test_inference_mode_works(model, batch):
    with torch.inference_mode():
        assert EquivalenceMonitor(model.eval()).step(batch[0], loss_of(batch[1])).ok


def test_compiled_and_parallel_wrappers_are_looked_through(model):
    compiled = torch.compile(model, backend="eager")
    assert whole.unwrap(compiled) is model
    assert whole.unwrap(torch.nn.DataParallel(model)) is model
    with pytest.raises(TypeError, match="expected an ast_fast"):
        EquivalenceMonitor(torch.nn.Linear(2, 2))


def test_gradient_checkpointing_agrees(model, batch):
    model.set_grad_checkpointing(True)
    assert EquivalenceMonitor(model.train()).step(batch[0], loss_of(batch[1])).ok


def test_due_follows_check_every(model):
    monitor = EquivalenceMonitor(model, MonitorConfig(check_every=3))
    assert [step for step in range(7) if monitor.due(step)] == [0, 3, 6]
    assert not EquivalenceMonitor(model).due(0)


def test_an_empty_batch_is_refused(model):
    with pytest.raises(ValueError, match="no clips"):
        EquivalenceMonitor(model).step(torch.zeros(0, 96, 128))


def test_rows_are_plain_values_for_a_log(model, batch):
    import json

    row = EquivalenceMonitor(model).step(batch[0], loss_of(batch[1]))
    assert json.loads(json.dumps(row.to_dict()))["ok"] is True
