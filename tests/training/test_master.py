"""Float32 masters of bfloat16 weights: exact bookkeeping, exact checkpoints, the reference's curve."""

import copy
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ast_fast import create_model, use_backend
from ast_fast.config import AugmentConfig, MonitorConfig
from ast_fast.training import MasterWeights, NonFiniteLossError, TrainingStep
from ast_fast.training.logs import read_log

_spec = importlib.util.spec_from_file_location("loop_tests", Path(__file__).parent / "test_loop.py")
loop = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)
ROOT = Path(__file__).resolve().parents[2]
MASTER = loop.CONFIG.replace(precision="bfloat16-master", epochs=2)

pytestmark = pytest.mark.usefixtures("one_thread")


def adamw(masters):
    return torch.optim.AdamW(masters.values(), lr=1e-3, weight_decay=0.1, fused=True)


def two_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def learn(model, masters, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 6, generator=draw).bfloat16()
        model(x).float().square().mean().backward()
        masters.step()
        masters.zero_grad()


def test_the_model_is_narrow_and_its_state_is_wide_under_the_same_names():
    model = two_layers()
    wide = {name: value.clone() for name, value in model.state_dict().items()}
    masters = MasterWeights(model, adamw)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state = masters.model_state_dict()
    assert list(state) == list(wide) and all(torch.equal(state[n], wide[n]) for n in wide)
    # not a bit of the weights as they were is lost, although the model rounds them
    assert any(not torch.equal(model.state_dict()[n].float(), wide[n]) for n in wide)


def test_updates_too_small_for_bfloat16_add_up():
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    masters = MasterWeights(model, lambda p: torch.optim.SGD(p.values(), lr=1e-4))
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        masters.step()
        masters.zero_grad()
    # one step is a fortieth of bfloat16's spacing at 1; a hundred are two and a half
    torch.testing.assert_close(
        masters.model_state_dict()["weight"], torch.full((4, 4), 0.99), rtol=0, atol=1e-5
    )
    assert torch.equal(model.weight, torch.full((4, 4), 0.99).bfloat16())


def test_the_update_is_adamw_s_on_the_widened_gradients():
    model = two_layers()
    plain = copy.deepcopy(model)
    masters = MasterWeights(model, adamw)
    optimizer = adamw(dict(plain.named_parameters()))
    draw = torch.Generator().manual_seed(3)
    for _ in range(4):
        for narrow, wide in zip(model.parameters(), plain.parameters(), strict=True):
            narrow.grad = torch.randn(narrow.shape, generator=draw).bfloat16()
            wide.grad = narrow.grad.float()
        masters.step()
        masters.zero_grad()
        optimizer.step()
    for name, value in masters.model_state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
        assert torch.equal(model.state_dict()[name], value.bfloat16())


def test_norm_and_clipping_are_float32_s():
    model = nn.Linear(2000, 1, bias=False)
    masters = MasterWeights(model, adamw)
    model.weight.grad = torch.full_like(model.weight, 1.0) / 3
    grads = model.weight.grad.double()
    norm = masters.clip_grad_norm_(1.0)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), grads.norm(), rtol=1e-6, atol=0)
    clipped = masters.trainable["weight"].grad
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_frozen_parameters_keep_every_bit_and_are_not_updated():
    model = two_layers()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masters = MasterWeights(model, adamw)
    assert set(masters.trainable) == {"2.weight", "2.bias"}
    learn(model, masters, 2)
    after = masters.model_state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])


def test_a_parameter_without_a_gradient_is_left_alone():
    model = two_layers()
    masters = MasterWeights(model, adamw)
    before = masters.model_state_dict()["2.weight"].clone()
    model[0](torch.randn(2, 6).bfloat16()).float().sum().backward()
    masters.step()
    assert torch.equal(masters.model_state_dict()["2.weight"], before)


def test_tied_weights_have_one_master_and_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    masters = MasterWeights(model, adamw)
    state = masters.model_state_dict()
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    assert state["0.weight"].dtype == torch.float32


def test_a_gradient_left_behind_is_an_error():
    model = two_layers()
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight holds a gradient.*zero_grad"):
        MasterWeights(model, adamw)


def test_state_goes_on_to_the_bit():
    model = two_layers()
    masters = MasterWeights(model, adamw)
    learn(model, masters, 3)
    saved = copy.deepcopy(masters.state_dict())
    other = two_layers(seed=9)
    resumed = MasterWeights(other, adamw)
    resumed.load_state_dict(saved)
    learn(model, masters, 3, seed=1)
    learn(other, resumed, 3, seed=1)
    for name, value in masters.model_state_dict().items():
        assert torch.equal(value, resumed.model_state_dict()[name])
        assert torch.equal(model.state_dict()[name], other.state_dict()[name])
    masters.widen()
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, resumed.model_state_dict()["0.weight"])


def test_a_step_that_is_not_finite_changes_neither_masters_nor_moments():
    model = two_layers()
    masters = MasterWeights(model, adamw)
    step = TrainingStep(
        model,
        lambda logits, targets: (logits * targets).mean(),
        masters.optimizer,
        masters=masters,
        max_norm=1.0,
    )
    step.set_lr(1e-3)
    x = torch.randn(4, 6).bfloat16()
    assert step(x, torch.ones(4, 3)).isfinite().all()
    before = copy.deepcopy(masters.state_dict())
    values = step(x, torch.full((4, 3), float("nan")))
    assert values.isnan().all()
    for name, value in masters.model_state_dict().items():
        assert torch.equal(value, before["model"][name])
    for index, state in masters.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["optimizer"]["state"][index][key]), key


# ---- in the loop


def masters_of(run):
    return {n: v.clone() for n, v in run.weights.here().items()}


def test_a_run_s_checkpoints_hold_float32_masters_and_resume_to_the_bit(tmp_path):
    whole = loop.trainer(tmp_path / "whole", MASTER, eval_set=loop.tones(12, 1))
    whole.fit()
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    first = loop.trainer(tmp_path / "parts", MASTER, eval_set=loop.tones(12, 1))
    inner = first._train_step

    def stopping(fed, log):
        values = inner(fed, log)
        first._stop = first.step + 1 == 7
        return values

    first._train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = loop.trainer(
        tmp_path / "parts", MASTER, loop.model(seed=99), eval_set=loop.tones(12, 1), resume=True
    )
    assert second.step == 7
    second.fit()
    assert loop.same(masters_of(whole), masters_of(second))
    assert loop.same(loop.weights(whole), loop.weights(second))
    latest = (tmp_path / "whole/checkpoints/latest").read_text().strip()
    found = load_file(tmp_path / "whole/checkpoints" / latest / "model/model.safetensors")
    assert list(found) and {v.dtype for v in found.values()} == {torch.float32}
    assert loop.same(found, masters_of(whole))
    shapes = {name: value.shape for name, value in loop.model().state_dict().items()}
    assert {name: value.shape for name, value in found.items()} == shapes


def test_the_monitor_holds_the_narrow_model_to_bfloat16_s_budgets(tmp_path):
    config = MASTER.replace(monitor=MonitorConfig(check_every=5), epochs=1)
    run = loop.trainer(tmp_path, config)
    run.fit()
    rows = [row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "check"]
    assert [row["precision"] for row in rows] == ["bfloat16", "bfloat16"]
    assert all(row["ok"] for row in rows)


def test_a_nan_in_one_clip_stops_the_run_with_the_masters_unchanged(tmp_path):
    data = loop.tones()
    data.waves[13][100] = float("nan")
    run = loop.trainer(tmp_path, MASTER.replace(augment=AugmentConfig()), data=data)
    inner, kept = run._train_step, {}

    def remembering(fed, log):
        kept.clear()
        kept.update(masters_of(run))
        return inner(fed, log)

    run._train_step = remembering
    with pytest.raises(NonFiniteLossError):
        run.fit()
    assert loop.same(kept, masters_of(run))


def curve(precision, backend, steps=200):
    """Losses of a small AST that learns to tell noisy patterns apart; the same batches for all."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 2, "input_fdim": 32, "input_tdim": 32}
    model = create_model("ast_mini_p16_s10", num_classes=8, **sizes)
    draw = torch.Generator().manual_seed(1)
    patterns = torch.randn(8, 32, 32, generator=draw)
    masters = None
    if precision == "bfloat16-master":
        masters = MasterWeights(model, adamw)
        optimizer = masters.optimizer
    else:
        optimizer = adamw({n: p for n, p in model.named_parameters() if p.requires_grad})
    step = TrainingStep(
        model, nn.functional.cross_entropy, optimizer, masters=masters, max_norm=1.0
    )
    step.set_lr(1e-3)
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            labels = torch.randint(8, (16,), generator=draw)
            noise = torch.randn(16, 32, 32, generator=draw)
            x = (0.2 * patterns[labels] + noise).to(next(model.parameters()).dtype)
            losses.append(step(x, labels)[0].item())
    return torch.tensor(losses)


@pytest.mark.slow
def test_200_steps_track_the_float32_reference_curve():
    reference, ours = curve("float32", "reference"), curve("bfloat16-master", "auto")
    assert reference[-20:].mean() < 0.6 * reference[:20].mean()
    smooth = [c.unfold(0, 20, 10).mean(1) for c in (reference, ours)]
    worst = ((smooth[0] - smooth[1]).abs() / smooth[0].mean()).max()
    assert worst < 0.01, f"windows of 20 steps differ by up to {worst:.3f} of the mean loss"


TWO = """
    import importlib.util, sys, torch
    spec = importlib.util.spec_from_file_location("loop_tests", {tests!r})
    tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
    torch.set_num_threads(1)
    config = tests.CONFIG.replace(
        devices=2, accelerator="cpu", epochs=1, augment=tests.BY_CLIP, precision="bfloat16-master"
    )
    # each process starts from other weights: the first one's count
    import os
    network = tests.model(seed=1 + int(os.environ.get("LOCAL_RANK", 0)))
    run = tests.trainer({folder!r}, config, network=network, data=tests.tones(40))
    run.fit()
    state = run.weights.here()
    torch.save(state, {folder!r} + "/" + str(run.fabric.global_rank) + ".pt")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_masters_and_train_as_one(tmp_path):
    script, folder = tmp_path / "two.py", tmp_path / "two"
    tests = str(Path(__file__).parent / "test_loop.py")
    script.write_text(textwrap.dedent(TWO).format(tests=tests, folder=str(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    states = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert loop.same(*states)
    config = MASTER.replace(epochs=1, augment=loop.BY_CLIP)
    loop.trainer(tmp_path / "one", config, data=loop.tones(40)).fit()

    def losses(name):
        return torch.tensor(
            [r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "step"]
        )

    torch.testing.assert_close(losses("two"), losses("one"), rtol=2e-2, atol=1e-3)
