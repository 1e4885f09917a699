"""Recording on a pretended GPU: what a failed capture leaves behind, and what a recording is made of."""

import contextlib

import pytest
import torch
from torch import nn

from ast_fast.cuda_graphs import CudaGraphs, Recording
from ast_fast.graphs import GraphedForward
from ast_fast.training import GraphedStep, TrainingStep, run_step

pytestmark = pytest.mark.usefixtures("one_thread")
INVALID = "operation failed due to a previous error during capture"


class Stream:
    """Knows nothing but that it is another one."""

    def wait_stream(self, stream):
        pass


class PretendCuda:
    """As much of torch.cuda as recording touches; the allocator is as unforgiving as the real one."""

    def __init__(self, monkeypatch, newer):
        self.newer = (
            newer  # capture_end ends the allocation before it raises, and reset releases the pool
        )
        self.stream = self.default = Stream()
        self.capturing = self.invalid = False
        self.recorded_to, self.uses, self.pools = set(), {}, 0
        self.calls, self.ran_on = [], []
        for name in ("graph", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, {"Stream": Stream}.get(name) or self.bound(name))
        for name, value in {
            "device": lambda _: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "stream": self.on,
            "graph_pool_handle": self.new_pool,
            "is_current_stream_capturing": lambda: self.capturing,
            "empty_cache": self.empty_cache,
            "synchronize": self.synchronize,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def bound(self, name):
        owner, kind = self, {"graph": Capture, "CUDAGraph": Graph}[name]
        return lambda *args, **options: kind(owner, *args, **options)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)

    def synchronize(self):
        """Not permitted while a stream is captured: the capture is lost."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def empty_cache(self):
        self.calls.append("empty_cache")
        if self.recorded_to:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def begin(self, pool):
        assert pool not in self.recorded_to, "beginAllocateToPool: already recording to mempool_id"
        assert self.uses.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.recorded_to.add(pool)
        self.uses[pool] = self.uses.get(pool, 0) + 1

    def end(self, device, pool):
        if pool not in self.recorded_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.calls.append("end")
        self.recorded_to.remove(pool)

    def release(self, device, pool):
        self.calls.append("release")
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"


class Graph:
    """torch.cuda.CUDAGraph; a replay runs what was recorded again."""

    def __init__(self, cuda):
        self.cuda, self.pool, self.ended, self.function = cuda, None, False, None

    def begin(self, pool):
        self.cuda.begin(pool)
        self.pool, self.cuda.capturing = pool, True

    def capture_end(self):
        self.cuda.capturing = False
        invalid, self.cuda.invalid = self.cuda.invalid, False
        if self.cuda.newer or not invalid:
            self.cuda.end(0, self.pool)
        if invalid:
            raise RuntimeError(INVALID)
        self.ended = True

    def reset(self):
        self.cuda.calls.append("reset")
        if self.ended or self.cuda.newer:
            self.cuda.release(0, self.pool)
        self.pool = None

    def replay(self):
        pass


class Capture:
    """torch.cuda.graph: on the way out the stream is put back only if the capture could be ended."""

    def __init__(self, cuda, graph, pool, stream, capture_error_mode):
        self.cuda, self.graph, self.pool, self.stream = cuda, graph, pool, stream

    def __enter__(self):
        self.cuda.synchronize()
        self.cuda.empty_cache()
        self.before, self.cuda.stream = self.cuda.stream, self.stream
        self.graph.begin(self.pool)

    def __exit__(self, *_):
        self.graph.capture_end()
        self.cuda.stream = self.before


@pytest.fixture(params=["torch 2.11", "newer"])
def cuda(request, monkeypatch):
    return PretendCuda(monkeypatch, newer=request.param == "newer")


def waits():
    """What must not be recorded."""
    torch.cuda.synchronize()


def test_a_failed_capture_leaves_no_pool_behind_and_the_next_works(cuda):
    graphs = CudaGraphs()
    graphs.warm_up(lambda: None)
    graphs.capture(lambda: "kept")  # lives on in the pool that the failing one shares
    first = graphs._pool
    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(waits)
    assert cuda.stream is cuda.default
    assert not cuda.recorded_to and cuda.uses == {first: 1}, "one use is the living graph's"
    ours = ["reset", "end", "release"]
    assert [call for call in cuda.calls if call != "empty_cache"] == (
        ours if not cuda.newer else ["end", "reset", "release"]
    )
    torch.cuda.empty_cache()
    result, _ = graphs.capture(lambda: 5)
    assert result == 5 and graphs._pool != first and cuda.stream is cuda.default


def test_the_function_s_own_error_is_raised_and_said(cuda, caplog):
    def fails():
        with contextlib.suppress(RuntimeError):
            waits()
        raise ValueError("the function's own error")

    with caplog.at_level("INFO", logger="ast_fast"), pytest.raises(ValueError, match="own error"):
        CudaGraphs().capture(fails)
    assert "the function's own error" in caplog.text and INVALID not in caplog.text
    assert not cuda.recorded_to


def test_a_function_that_hides_its_error_fails_at_the_end(cuda):
    """Only ending the capture then says that it was lost."""

    def hides():
        with contextlib.suppress(RuntimeError):
            waits()

    with pytest.raises(RuntimeError, match=INVALID):
        CudaGraphs().capture(hides)
    assert cuda.stream is cuda.default and not cuda.recorded_to


def test_torch_without_the_private_functions_is_left_alone(cuda, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs().capture(waits)
    assert cuda.stream is cuda.default


@pytest.mark.gpu
def test_a_real_failed_capture_leaves_no_pool_behind_and_the_next_works():
    graphs, x = CudaGraphs(), torch.ones(1 << 20, device="cuda")

    def fails():
        torch.cuda.synchronize()
        return x + 1.0

    for _ in range(2):
        graphs.warm_up(lambda: x + 1.0)
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="captur"):
            graphs.capture(fails)
        assert torch.cuda.current_stream() == before
        torch.cuda.empty_cache()
    result, replay = graphs.capture(lambda: x + 1.0)
    replay()
    assert bool((result == 2.0).all())


def training_step(before=lambda: None):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def call(x):
        before()
        return model(x)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return model, TrainingStep(call, nn.functional.cross_entropy, optimizer)


def batch(index):
    draw = torch.Generator().manual_seed(index)
    return torch.randn(5, 4, generator=draw), torch.randint(3, (5,), generator=draw)


def test_training_goes_on_after_a_failed_capture_with_one_warning(cuda, monkeypatch, caplog):
    monkeypatch.setattr(CudaGraphs, "bind", lambda self, device: None)
    # on this machine memory is given back as if the weights were on a GPU
    monkeypatch.setattr("ast_fast.training.modes.empty_cache", lambda _: torch.cuda.empty_cache())
    plain, step = training_step()
    model, inner = training_step(lambda: torch.cuda.is_current_stream_capturing() and waits())
    graphed = GraphedStep(inner, CudaGraphs(), model)
    for index in range(7):
        expected = step(*batch(index))
        assert torch.equal(run_step(graphed, *batch(index), batch_size=5), expected)
        assert cuda.stream is cuda.default
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted" in caplog.text and not cuda.recorded_to
    assert not any(cuda.uses.values())


def test_memory_that_cannot_be_given_back_does_not_end_training(monkeypatch, caplog):
    from ast_fast.training.step import empty_cache

    def asserts():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", asserts)
    empty_cache(torch.device("cuda"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


class Watching:
    """Records by remembering; notes what each function was given."""

    def __init__(self):
        self.phase = "outside"

    def warm_up(self, function):
        return self.during("warm-up", function)

    def capture(self, function):
        result = self.during("capture", function)
        return result, lambda: result.copy_(self.during("replay", function))

    def during(self, phase, function):
        self.phase = phase
        try:
            return function()
        finally:
            self.phase = "outside"


def unaligned(seed=0):
    """[3, 20] with rows 24 apart, beginning 4 bytes into its memory."""
    memory = torch.randn(1 + 3 * 24, generator=torch.Generator().manual_seed(seed))
    return memory[1:].view(3, 24)[:, :20]


def seen(x):
    return x.data_ptr(), x.data_ptr() % 16, x.stride(), tuple(x.shape)


@torch.no_grad()
def test_a_forward_is_warmed_up_on_the_very_tensors_that_are_recorded():
    graphs, notes = Watching(), {}

    class Layer(nn.Linear):
        def forward(self, x):
            notes.setdefault(graphs.phase, []).append(seen(x))
            return super().forward(x)

    graphed = GraphedForward(Layer(20, 2), graphs=graphs)
    for seed in range(5):
        x = unaligned(seed)
        found = graphed(x)
        assert torch.equal(found, nn.functional.linear(x, graphed.model.weight, graphed.model.bias))
    assert [len(notes[phase]) for phase in ("warm-up", "capture", "replay")] == [2, 1, 3]
    assert len({note for phase in notes.values() for note in phase}) == 1
    ((address, rest, strides, _),) = set(notes["capture"])
    assert strides == (24, 1), "another stride would be another compiled form"
    assert rest == 0 and address != x.data_ptr()


def test_a_step_is_warmed_up_on_the_very_tensors_that_are_recorded():
    graphs, notes = Watching(), {}
    step = training_step()[1]
    model, inner = training_step()
    call = inner._call

    def noting(x):
        notes.setdefault(graphs.phase, []).append(seen(x))
        return call(x)

    inner._call = noting
    graphed = GraphedStep(inner, graphs, model)
    for index in range(3):
        x, y = batch(index)
        assert torch.equal(graphed(x, y), step(x, y))
    assert len(set(notes["warm-up"])) == 1 and len(notes["warm-up"]) == 3
    graphed(*batch(3))  # recorded, which here runs it
    assert set(notes["capture"]) == set(notes["warm-up"])


@torch.no_grad()
def test_a_shape_that_comes_back_between_others_is_recorded_and_few_buffers_are_kept():
    graphed = GraphedForward(nn.Linear(4, 2), max_graphs=2, graphs=Watching())
    for turn in range(4):
        for rows in (1, *range(10 * turn + 10, 10 * turn + 15)):
            x = torch.randn(rows, 4)
            assert torch.equal(graphed(x), graphed.model(x))
            assert len(graphed._warming) <= 2
    assert graphed.recorded == 1


@torch.no_grad()
def test_a_result_of_a_warm_up_outlives_the_next():
    graphed = GraphedForward(nn.Identity(), graphs=Watching())
    inputs = [torch.randn(2, 3) for _ in range(2)]
    results = [graphed(x) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(results, inputs, strict=True))


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "cut rows": lambda x: x[:, :5],
    "expanded": lambda x: x[:1].expand(4, 6),
    "overlapping windows": lambda x: x.flatten().unfold(0, 6, 2),
    "far apart": lambda x: x[:, :1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_are_recorded_as_what_they_hold(layout):
    make = LAYOUTS[layout]
    recording = Recording(Watching(), lambda x: x * 2.0, [make(torch.randn(4, 6))])
    for _ in range(2):
        x = make(torch.randn(4, 6))
        assert torch.equal(recording.warm_up(x), x * 2.0)
    recording.record()
    for _ in range(2):
        x = make(torch.randn(4, 6))
        assert torch.equal(recording(x), x * 2.0)
