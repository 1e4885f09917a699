"""Recorded inference: the model's own results, for shapes that come back, until something changes."""

import pytest
import torch
from torch import nn

from ast_fast import create_model, use_backend
from ast_fast.graphs import CudaGraphs, GraphedForward

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 1, "input_fdim": 32, "input_tdim": 32}


class FakeGraphs:
    """Replays the recorded Python function into the recorded result."""

    def __init__(self):
        self.warmed = self.captured = self.replayed = 0
        self.error = None

    def warm_up(self, function):
        self.warmed += 1
        return function()

    def capture(self, function):
        if self.error is not None:
            raise self.error
        self.captured += 1
        result = torch.full_like(function(), float("nan"))

        def replay():
            self.replayed += 1
            result.copy_(function())

        return result, replay


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model("ast_mini_p16_s10", num_classes=4, **SIZES).eval()


@pytest.fixture
def graphed(network):
    return GraphedForward(network, max_graphs=3, graphs=FakeGraphs())


def spectrogram(seed, clips=1, dtype=torch.float32):
    return torch.randn(clips, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def test_replayed_calls_give_the_model_s_results_and_keep_them(network, graphed):
    results = [graphed(spectrogram(seed)) for seed in range(6)]
    for seed, result in enumerate(results):
        assert torch.equal(result, network(spectrogram(seed)))
    made = graphed._graphs
    assert (made.warmed, made.captured, made.replayed, graphed.recorded) == (2, 1, 4, 1)


@torch.no_grad()
def test_waveforms_with_and_without_lengths(network, graphed):
    for seed in range(5):
        wave = 0.1 * torch.randn(1, 6000, generator=torch.Generator().manual_seed(seed))
        lengths = torch.tensor([3000 + 100 * seed])
        assert torch.equal(graphed.forward_waveform(wave), network.forward_waveform(wave))
        found = graphed.forward_waveform(wave, lengths)
        assert torch.equal(found, network.forward_waveform(wave, lengths))
    assert graphed.recorded == 2


@torch.no_grad()
def test_the_shape_unused_for_longest_goes_first(graphed):
    for clips in (1, 2, 3, 1, 4):
        for seed in range(3):
            graphed(spectrogram(seed, clips))
    assert graphed.recorded == 3 and graphed._graphs.captured == 4
    graphed(spectrogram(0, 1))  # used since: still there
    assert graphed._graphs.captured == 4
    for seed in range(3):
        graphed(spectrogram(seed, 2))
    assert graphed._graphs.captured == 5


def changes(network):
    def in_place():
        with torch.no_grad():
            network.mlp_head[1].bias.add_(1.0)

    def moved():
        network.mlp_head[1].bias.data = network.mlp_head[1].bias.data + 1.0

    def replaced():
        network.mlp_head[1].bias = nn.Parameter(network.mlp_head[1].bias.detach() + 1.0)

    def other_module():
        torch.manual_seed(5)
        network.mlp_head[1] = nn.Linear(32, 4)

    def narrower():
        network.bfloat16()

    return {f.__name__: f for f in (in_place, moved, replaced, other_module, narrower)}


@pytest.mark.parametrize("kind", ["in_place", "moved", "replaced", "other_module", "narrower"])
@torch.no_grad()
def test_weights_that_change_drop_the_recordings(kind, network, graphed):
    for seed in range(4):
        before = graphed(spectrogram(seed))
    changes(network)[kind]()
    x = spectrogram(3, dtype=next(network.parameters()).dtype)
    after = graphed(x)
    assert torch.equal(after, network(x)) and not torch.equal(after.float(), before)
    assert graphed.recorded == 0
    graphed(x), graphed(x)
    assert graphed.recorded == 1


def test_autograd_hooks_and_a_cpu_call_the_model_and_say_so_once(network, graphed, caplog):
    with torch.no_grad():
        for seed in range(4):
            graphed(spectrogram(seed))
    replayed = graphed._graphs.replayed
    for _ in range(2):
        graphed(spectrogram(0)).sum().backward()  # a gradient arrives
        assert network.mlp_head[1].weight.grad is not None
    calls = []
    handle = network.v.norm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        graphed(spectrogram(0)), graphed(spectrogram(0))
        assert len(calls) == 2 and graphed._graphs.replayed == replayed
        handle.remove()
        graphed(spectrogram(0))
        assert graphed._graphs.replayed == replayed + 1
        plain = GraphedForward(network)
        assert torch.equal(plain(spectrogram(0)), network(spectrogram(0)))
        plain(spectrogram(1))
    said = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(said) == 3
    assert "autograd" in said[0] and "v.norm" in said[1] and "cpu" in said[2]


@torch.no_grad()
def test_autocast_backend_and_inference_mode_have_recordings_of_their_own(network, graphed):
    x = spectrogram(0)
    for _ in range(4):
        assert torch.equal(graphed(x), network(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(graphed(x), network(x))
        with torch.inference_mode():
            assert torch.equal(graphed(x), network(x))
    assert graphed.recorded == 3
    with use_backend("reference"):
        assert torch.equal(graphed(x), network(x))


@torch.no_grad()
def test_recording_leaves_the_caller_s_autocast_cache_alone():
    """Copies in it are freed when the context is left; a recording would go on reading them."""
    cached = []

    class Layer(nn.Linear):
        def forward(self, x):
            cached.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    graphed = GraphedForward(Layer(4, 4), graphs=FakeGraphs())
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        results = [graphed(x) for _ in range(4)]
        assert torch.is_autocast_cache_enabled()
        assert all(torch.equal(each, graphed.model(x)) for each in results)
    assert graphed.recorded == 1 and not any(cached[:-4])


OPTIONS = {
    "merging": lambda network: network.set_token_merging(1),
    "fp8": lambda network: network.set_precision("fp8"),
    "deterministic": lambda network: setattr(network.v.blocks[0].attn, "deterministic", False),
    "a part in training": lambda network: network.v.blocks[1].train(),
}


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_options_set_afterwards_drop_the_recordings(option, network, graphed):
    for seed in range(4):
        graphed(spectrogram(seed))
    assert graphed.recorded == 1
    OPTIONS[option](network)
    x = spectrogram(0)
    assert torch.equal(graphed(x), network(x))
    assert graphed.recorded == 0


@torch.no_grad()
def test_a_front_end_set_afterwards_drops_the_recordings(network, graphed):
    wave = 0.1 * torch.randn(1, 6000)
    for _ in range(4):
        graphed.forward_waveform(wave)
    network.frontend_config = network.frontend_config.replace(mean=1.0)
    assert torch.equal(graphed.forward_waveform(wave), network.forward_waveform(wave))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        network = create_model("ast_mini_p16_s10", num_classes=4, **SIZES).eval()
        graphed = GraphedForward(network, graphs=FakeGraphs())
        for seed in range(4):
            assert torch.equal(graphed(spectrogram(seed)), network(spectrogram(seed)))
    assert graphed.recorded == 1


def test_cuda_graphs_belong_to_one_device():
    graphs = CudaGraphs()
    graphs.bind(torch.device("cuda:1"))
    assert graphs._device == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:0 and CUDA graphs on cuda:1"):
        graphs.bind(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="weights are on cpu"):
        CudaGraphs().bind(torch.device("cpu"))


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, KeyError])
@torch.no_grad()
def test_what_cannot_be_recorded_is_called(kind, network, graphed, caplog):
    graphed._graphs.error = kind("operation not permitted when stream is capturing")
    for seed in range(5):
        assert torch.equal(graphed(spectrogram(seed)), network(spectrogram(seed)))
    assert graphed.recorded == 0
    assert sum("recorded" in r.message for r in caplog.records) == 1


@torch.no_grad()
def test_a_compiler_sees_the_model_itself(network, graphed):
    torch._dynamo.reset()
    for seed in range(4):
        graphed(spectrogram(seed))
    from torch.fx.experimental.proxy_tensor import make_fx

    replayed = graphed._graphs.replayed
    traced = make_fx(lambda x: graphed(x))(spectrogram(0))
    assert torch.equal(traced(spectrogram(1)), network(spectrogram(1)))
    assert graphed._graphs.replayed == replayed


def test_no_room_for_a_recording_is_an_error(network):
    with pytest.raises(ValueError, match="max_graphs=0"):
        GraphedForward(network, max_graphs=0)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("clips", [1, 3])
def test_cuda_graphs_replay_to_the_bit(network, clips):
    network.cuda()
    graphed = GraphedForward(network)
    for seed in range(6):
        x = spectrogram(seed, clips).cuda()
        assert torch.equal(graphed(x), network(x))
    assert isinstance(graphed._graphs, CudaGraphs) and graphed.recorded == 1
