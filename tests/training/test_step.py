"""The training step: recorded or not the same bits, never waiting for the device, whole or not at all."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ast_fast import create_model, ops, optimized
from ast_fast.config import TrainConfig
from ast_fast.graphs import CudaGraphs
from ast_fast.training import (
    GraphedStep,
    MasterWeights,
    StepOutOfMemoryError,
    TrainingError,
    TrainingStep,
    modes,
    run_step,
)
from ast_fast.training.modes import chosen_mode, compile_blocks, prepared_step

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}
PRECISIONS = ("float32", "bfloat16", "bfloat16-master")


class NoWaiting(TorchDispatchMode):
    """Nothing may bring a value to the host."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        name = func.name()
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::equal",
            "aten::nonzero",
            "aten::is_nonzero",
        ), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class FakeGraphs:
    """Replays the recorded Python function; what recording changed is put back, as if nothing had run."""

    def __init__(self, state=lambda: []):
        self.state, self.error = state, None
        self.warmed = self.captured = self.replayed = 0

    def warm_up(self, function):
        self.warmed += 1
        return function()

    def capture(self, function):
        if self.error is not None:
            raise self.error
        self.captured += 1
        kept = [(tensor, tensor.detach().clone()) for tensor in self.state()]
        with NoWaiting():
            result = function()
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)

        def replay():
            self.replayed += 1
            result.copy_(function())

        result.fill_(float("nan"))
        return result, replay


class Rig:
    """A small AST with everything a step of it needs."""

    def __init__(self, precision="float32", graphs=False, seed=0, device="cpu"):
        torch.manual_seed(seed)
        self.model = create_model("ast_mini_p16_s10", num_classes=4, **SIZES).to(device)
        self.device = device
        make = lambda named: torch.optim.AdamW(  # noqa: E731
            [
                {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
            ],
            fused=True,
            capturable=device == "cuda",
        )
        self.masters, self.precision = None, precision
        if precision == "bfloat16-master":
            self.masters = MasterWeights(self.model, make)
            optimizer = self.masters.optimizer
        else:
            optimizer = make({n: p for n, p in self.model.named_parameters() if p.requires_grad})
        self.step = TrainingStep(
            self.call, nn.functional.cross_entropy, optimizer, masters=self.masters, max_norm=0.5
        )
        self.graphs = FakeGraphs(self.tensors)
        self.run = GraphedStep(self.step, self.graphs, self.model) if graphs else self.step

    def call(self, x):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model(x)

    def tensors(self):
        weights = self.step.weights
        moments = [v for w in weights for v in self.step.optimizer.state[w].values()]
        return [*self.model.parameters(), *weights, *moments]

    def state(self):
        return [tensor.detach().clone() for tensor in self.tensors()]

    def batch(self, index, clips=3):
        draw = torch.Generator().manual_seed(index)
        x = torch.randn(clips, 32, 32, generator=draw).to(self.model.v.pos_embed.dtype)
        return x.to(self.device), torch.randint(4, (clips,), generator=draw).to(self.device)

    def train(self, count, clips=3, first=0):
        values = []
        for index in range(first, first + count):
            self.run.set_lr(1e-3 * (1 + index % 4))
            values.append(self.run(*self.batch(index, clips)))
        return values


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_replayed_step_is_the_eager_one_to_the_bit(precision):
    eager, graphed = Rig(precision), Rig(precision, graphs=True)
    assert same(eager.train(8), graphed.train(8))
    assert same(eager.state(), graphed.state())
    graphs = graphed.graphs
    assert (graphs.warmed, graphs.captured, graphs.replayed) == (3, 1, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cuda_graph_replays_the_eager_step_to_the_bit(precision):
    eager, graphed = Rig(precision, device="cuda"), Rig(precision, graphs=True, device="cuda")
    for rig in (eager, graphed):
        rig.train(8)
        rig.train(1, clips=2, first=8)
        rig.train(2, first=9)
    assert same(eager.state(), graphed.state())
    assert graphed.run._recording is not None


def test_a_short_batch_runs_unrecorded_and_is_said_once(caplog):
    eager, graphed = Rig(), Rig(graphs=True)
    for rig in (eager, graphed):
        rig.train(5)
        rig.train(1, clips=2, first=5)
        rig.train(2, first=6)
        rig.train(1, clips=2, first=8)
    assert same(eager.state(), graphed.state())
    assert (graphed.graphs.captured, graphed.graphs.replayed) == (1, 4)
    said = [r.message for r in caplog.records if "not replayed" in r.message]
    assert len(said) == 1 and "(2, 32, 32)" in said[0]


def test_weights_that_moved_are_recorded_anew():
    eager, graphed = Rig(), Rig(graphs=True)
    for rig in (eager, graphed):
        rig.train(5)
        for parameter in rig.model.parameters():
            parameter.data = parameter.data.clone()
        rig.train(5, first=5)
    assert same(eager.state(), graphed.state())
    assert graphed.graphs.captured == 2


def test_hooks_run_and_a_recording_without_them_is_not_replayed(caplog):
    rig = Rig(graphs=True)
    rig.train(5)
    calls = []
    handle = rig.model.v.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    rig.train(2, first=5)
    assert len(calls) == 2 and rig.graphs.replayed == 2
    handle.remove()
    rig.train(1, first=7)
    assert rig.graphs.replayed == 3
    said = [r.message for r in caplog.records if "carries hooks" in r.message]
    assert len(said) == 1 and "v.blocks.0.attn" in said[0]


def test_packed_weights_elsewhere_do_not_keep_a_step_from_being_recorded():
    optimized._count_steps()
    before = optimized._steps
    assert modes._hooked_optimizer(torch.optim.AdamW([torch.zeros(1)], fused=True)) is None
    optimized.note_step()
    assert optimized._steps == before + 1


def test_hooks_on_the_optimizer_run_too():
    rig, calls = Rig(graphs=True), []
    rig.train(4)
    handle = rig.step.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    rig.train(2, first=4)
    groups = len(rig.step.optimizer.param_groups)
    assert len(calls) == 2 * groups and rig.graphs.replayed == 1
    handle.remove()
    rig.train(1, first=6)
    assert rig.graphs.replayed == 2


def test_settings_of_the_optimizer_that_change_are_recorded_anew():
    rig = Rig(graphs=True)
    rig.train(5)
    for setting in ("weight_decay", "lr"):
        before = rig.graphs.warmed
        rig.step.optimizer.param_groups[0][setting] = 0.25
        rig.run(*rig.batch(5))
        assert rig.graphs.warmed == before + 1 and rig.run._recording is None
        for index in range(4):
            rig.run(*rig.batch(6 + index))
        assert rig.run._recording is not None


def test_memory_running_out_while_a_step_is_recorded_runs_on_unrecorded(caplog):
    eager, graphed = Rig(), Rig(graphs=True)
    graphed.graphs.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert same(eager.train(6), graphed.train(6))
    assert same(eager.state(), graphed.state())
    assert sum("could not be recorded" in r.message for r in caplog.records) == 1


def test_a_step_tried_again_leaves_out_the_same_patches(monkeypatch):
    plain, rig = Rig(), Rig(graphs=True)
    for each in (plain, rig):
        each.model.set_patchout(time=1, patches=1)
    inner = rig.graphs.state
    rig.graphs.state = lambda: [*inner(), *rig.model.buffers()]
    for each in (plain, rig):
        each.train(5)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "mlp", failing(1)(ops.mlp))
        rig.train(1, clips=2, first=5)
    plain.train(1, clips=2, first=5)
    assert int(rig.model.patchout.step) == 6
    assert same(plain.state(), rig.state())


def test_graphs_of_another_device_are_refused(monkeypatch):
    rig = Rig()
    with pytest.raises(ValueError, match="weights are on cpu and CUDA graphs on cuda:1"):
        GraphedStep(rig.step, CudaGraphs(torch.device("cuda:1")), rig.model)
    asked = []
    monkeypatch.setattr("ast_fast.training.modes.CudaGraphs", asked.append)
    prepared_step(rig.step, "graph", rig.model)
    assert asked == [torch.device("cpu")]


def test_hooks_on_a_parameter_run_too():
    rig, calls = Rig(graphs=True), []
    rig.train(4)
    rig.model.mlp_head[1].bias.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    rig.train(2, first=4)
    assert len(calls) == 2 and rig.graphs.replayed == 1


def test_draws_on_the_host_are_not_recorded(caplog):
    """A replay would leave out the same patches in every step."""
    rigs = [Rig(), Rig(graphs=True)]
    for rig in rigs:
        inner = rig.model.v.embed
        rig.model.v.embed = lambda x, inner=inner: inner(x) * (torch.rand(()) + 0.5)
        torch.manual_seed(7)
        rig.train(6)
    assert same(rigs[0].state(), rigs[1].state())
    assert rigs[1].graphs.replayed == 0
    assert "draws random numbers on the host" in caplog.text


def test_a_short_batch_that_finds_no_room_beside_the_recording_drops_it(monkeypatch, caplog):
    plain, rig = Rig(), Rig(graphs=True)
    for each in (plain, rig):
        each.train(5)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "mlp", failing(1)(ops.mlp))
        rig.train(1, clips=2, first=5)
    plain.train(1, clips=2, first=5)
    assert same(plain.state(), rig.state()) and "dropped" in caplog.text
    assert same(plain.train(5, first=6), rig.train(5, first=6))
    assert rig.graphs.captured == 2


def test_what_cannot_be_recorded_runs_unrecorded(caplog):
    eager, graphed = Rig(), Rig(graphs=True)
    graphed.graphs.error = RuntimeError("operation not permitted when stream is capturing")
    assert same(eager.train(6), graphed.train(6))
    assert same(eager.state(), graphed.state())
    assert sum("could not be recorded" in r.message for r in caplog.records) == 1


def test_values_of_a_replay_outlive_the_next():
    values = Rig(graphs=True).train(6)
    assert len({tuple(v.tolist()) for v in values}) == 6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(precision, graphs):
    rig = Rig(precision, graphs)
    rig.train(5)
    before = rig.state()
    x, y = rig.batch(9)
    x[1, 3] = float("nan")
    values = rig.run(x, y)
    assert values.isnan().all() and same(before, rig.state())
    assert rig.train(1, first=10)[0].isfinite().all() and not same(before, rig.state())


def test_clipping_is_pytorch_s():
    ours, plain = Rig(), Rig()
    optimizer, model = plain.step.optimizer, plain.model
    for index in range(3):
        x, y = ours.batch(index)
        ours.step.set_lr(1e-3)
        value = ours.step(x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        torch.testing.assert_close(value[1], norm)
    for a, b in zip(ours.model.parameters(), model.parameters(), strict=True):
        # the gradient of the keys' bias is rounding alone, and Adam blows it up
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_optimizer_that_cannot_skip_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="fused=True"):
        TrainingStep(model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), 0.1))
    sgd = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    with pytest.raises(TypeError, match="SGD, which counts no steps"):
        TrainingStep(model, nn.functional.cross_entropy, sgd)


def test_a_run_in_the_loop_is_the_same_recorded_and_not(tmp_path, monkeypatch):
    import importlib.util

    place = Path(__file__).parent / "test_loop.py"
    spec = importlib.util.spec_from_file_location("loop_tests", place)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    config = loop.CONFIG.replace(epochs=1, precision="bfloat16-master")
    plain = loop.trainer(tmp_path / "plain", config)
    plain.fit()
    made = FakeGraphs()
    monkeypatch.setattr("ast_fast.training.loop.chosen_mode", lambda *_: "graph")
    monkeypatch.setattr("ast_fast.training.modes.CudaGraphs", lambda device: made)
    graphed = loop.trainer(tmp_path / "graphed", config)
    weights, state = graphed.parameters.values(), graphed.optimizer.state
    made.state = lambda: [
        *graphed.model.parameters(),
        *weights,
        *(value for weight in weights for value in state[weight].values()),
    ]
    graphed.fit()
    # 44 clips by 8: five whole batches and a short one
    assert (made.warmed, made.captured, made.replayed) == (3, 1, 2)
    assert loop.same(plain.weights.here(), graphed.weights.here())


def test_modes_by_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    auto = TrainConfig()
    assert auto.compile == "auto"
    assert chosen_mode(auto, cpu) == "off" and chosen_mode(auto, cuda) == "off"
    assert chosen_mode(auto.replace(compile="graph"), cuda) == "graph"
    assert chosen_mode(auto.replace(devices=2), cuda) == "off"
    assert chosen_mode(auto.replace(compile="regional"), cpu) == "regional"
    with pytest.raises(TrainingError, match=r"compile='graph' on a cpu device.*auto"):
        chosen_mode(auto.replace(compile="graph"), cpu)
    with pytest.raises(TrainingError, match="2 devices"):
        chosen_mode(auto.replace(compile="graph", devices=2), cuda)
    with pytest.raises(TrainingError, match="Linear has no blocks"):
        prepared_step(Rig().step, "regional", nn.Linear(1, 1))


# ---- compiled blocks


@pytest.mark.parametrize("activation_memory", ["fast", "less"])
def test_compiled_blocks_are_compiled_once_and_compute_the_same(activation_memory):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    eager, regional = Rig(), Rig()
    for rig in (eager, regional):
        rig.model.set_activation_memory(activation_memory)
    keys = list(regional.model.state_dict())
    assert compile_blocks(regional.model.v.blocks, backend) == 2
    assert compile_blocks(regional.model.v.blocks, backend) == 0  # once is enough
    ours, theirs = regional.train(3), eager.train(3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # all tokens in the first block, the prefix alone in the last
    assert len(compiled) == 2
    assert list(regional.model.state_dict()) == keys
    with torch.no_grad():  # evaluation, with batches of its own size, is left as it is
        regional.model(torch.randn(7, 32, 32))
    assert len(compiled) == 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_compiled_blocks_computes_with_its_own_weights(way):
    torch._dynamo.reset()
    model = Rig().model
    compile_blocks(model.v.blocks, "eager")
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 32, 32)
    with torch.no_grad():
        for parameter in twin.v.blocks.parameters():
            parameter.mul_(0.5)
        expected = twin(x)  # evaluation runs the method itself
    assert not torch.allclose(model(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)


# ---- memory runs out


def failing(times, after=0):
    """Raise as PyTorch does when memory runs out, a number of times."""
    left = {"after": after, "times": times}

    def wrap(function):
        def call(*args, **kwargs):
            if left["after"]:
                left["after"] -= 1
            elif left["times"]:
                left["times"] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return function(*args, **kwargs)

        return call

    return wrap


class FailsInBackward(torch.autograd.Function):
    fail: bool

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if FailsInBackward.fail:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return dy


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("where", ["forward", "backward", "norm"])
def test_memory_running_out_leaves_the_weights_and_a_step_that_works(
    where, precision, graphs, monkeypatch
):
    rig, plain = Rig(precision, graphs), Rig(precision)
    rig.train(5)
    plain.train(5)
    before = rig.state()
    batch = rig.batch(5)
    rig.run.set_lr(1e-3)
    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(ops, "mlp", failing(1)(ops.mlp))
        elif where == "norm":
            patch.setattr(nn.utils, "get_total_norm", failing(1)(nn.utils.get_total_norm))
        else:
            FailsInBackward.fail = True
            inner = ops.attention_qkv
            patch.setattr(
                ops, "attention_qkv", lambda *a, **k: FailsInBackward.apply(inner(*a, **k))
            )
        with pytest.raises(
            StepOutOfMemoryError, match=r"batch_size=3.*unchanged.*activation_memory"
        ):
            run_step(rig.run, *batch, batch_size=3)
    assert same(before, rig.state())
    assert all(p.grad is None for p in rig.model.parameters())
    again, expected = rig.train(5, first=5), plain.train(5, first=5)
    assert same(again, expected) and same(rig.state(), plain.state())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_memory_running_out_in_the_update_completes_the_step(
    precision, group, late, monkeypatch, caplog
):
    """`late`: after the moments' step counters were counted up; early: before anything happened."""
    rig, plain = Rig(precision), Rig(precision)
    rig.train(2)
    plain.train(2)
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(torch, "_fused_adamw_", failing(1, group)(torch._fused_adamw_))
        else:
            patch.setattr(torch, "_foreach_add_", failing(1, group)(torch._foreach_add_))
        assert same(rig.train(1, first=2), plain.train(1, first=2)[:1])
    assert same(rig.state(), plain.state())
    assert "trying once more" in caplog.text
    assert same(rig.train(2, first=3), plain.train(2, first=3))


def test_memory_running_out_while_masters_are_rounded_completes_the_step(monkeypatch):
    rig, plain = Rig("bfloat16-master"), Rig("bfloat16-master")
    with monkeypatch.context() as patch:
        # the first copy widens the gradients, the second rounds the masters
        patch.setattr(torch, "_foreach_copy_", failing(1, 1)(torch._foreach_copy_))
        values = [run_step(rig.run, *rig.batch(0), batch_size=3)]
    assert same(values, [plain.run(*plain.batch(0))]) and same(rig.state(), plain.state())


def test_memory_running_out_twice_in_the_update_says_that_weights_may_have_changed(monkeypatch):
    rig = Rig()
    rig.train(2)
    monkeypatch.setattr(torch, "_fused_adamw_", failing(2, 1)(torch._fused_adamw_))
    with pytest.raises(TrainingError, match="last checkpoint") as caught:
        run_step(rig.run, *rig.batch(3), batch_size=3)
    assert not isinstance(caught.value, StepOutOfMemoryError)


def test_memory_running_out_between_two_groups_is_not_called_harmless(monkeypatch):
    """What an update allocates for its own safety comes before the first weight changes."""
    rig = Rig()
    rig.train(2)
    before, inner = rig.state(), rig.step._update_groups

    def update():
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "clone", failing(1, 1)(Tensor.clone))
            inner()

    monkeypatch.setattr(rig.step, "_update_groups", update)
    with pytest.raises(StepOutOfMemoryError, match="unchanged"):
        run_step(rig.run, *rig.batch(2), batch_size=3)
    assert same(before, rig.state())


def test_memory_running_out_while_an_update_is_looked_at_says_so(monkeypatch):
    rig = Rig()
    rig.train(2)
    monkeypatch.setattr(torch, "_fused_adamw_", failing(1, 1)(torch._fused_adamw_))
    monkeypatch.setattr(torch, "equal", failing(1)(torch.equal))
    with pytest.raises(TrainingError, match="last checkpoint") as caught:
        run_step(rig.run, *rig.batch(3), batch_size=3)
    assert not isinstance(caught.value, StepOutOfMemoryError)


def test_memory_running_out_twice_while_masters_are_rounded_says_so(monkeypatch):
    rig = Rig("bfloat16-master")
    monkeypatch.setattr(torch, "_foreach_copy_", failing(2, 1)(torch._foreach_copy_))
    with pytest.raises(TrainingError, match="last checkpoint") as caught:
        run_step(rig.run, *rig.batch(0), batch_size=3)
    assert not isinstance(caught.value, StepOutOfMemoryError)


def test_moments_that_a_checkpoint_lacks_are_made():
    rig, plain = Rig(), Rig()
    for weight in rig.step.weights[::3]:
        rig.step.optimizer.state[weight] = {}
    assert same(rig.train(3), plain.train(3)) and same(rig.state(), plain.state())


def test_an_error_of_another_kind_is_left_alone(monkeypatch):
    rig = Rig()
    monkeypatch.setattr(ops, "mlp", lambda *_: [][1])
    with pytest.raises(IndexError):
        run_step(rig.run, *rig.batch(0), batch_size=3)


def test_the_cpu_allocator_s_error_counts_too(monkeypatch):
    rig = Rig()

    def full(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(ops, "mlp", full)
    with pytest.raises(StepOutOfMemoryError, match="batch_size=3"):
        run_step(rig.run, *rig.batch(0), batch_size=3)


# ---- a long run


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_10_000_steps_keep_to_their_memory(graphs):
    rig = Rig("bfloat16-master", graphs)

    def run(steps):
        for index in range(steps // 100):
            rig.train(99, first=100 * index)
            rig.train(1, clips=1 + index % 2)  # the short batch at an epoch's end

    # the allocator's caches settle within about two thousand steps
    run(2_000)
    before = resident_bytes()
    run(10_000)
    grown = resident_bytes() - before
    assert grown < 2 << 20, f"{grown / 2**20:.1f} MiB more after the steps"
