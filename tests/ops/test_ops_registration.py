"""Registered ops under everything that calls them: opcheck, compile, export, fake tensors, autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ast_fast import backend as backends
from ast_fast import ops
from ast_fast.equivalence import cases
from ast_fast.equivalence.run_ops import SEED, draw_upstream, evaluate, place
from ast_fast.testing import available_backends, measure, random_tensor, small_op_cases
from ast_fast.testing_calls import op_calls, registered_ops

CPU = torch.device("cpu")
CASES = small_op_cases()
by_case = pytest.mark.parametrize("name", CASES)
by_backend = pytest.mark.parametrize("backend", available_backends())
SETTINGS = {
    "reference float64": ("reference", torch.float64),
    "cpp float32": ("cpp", torch.float32),
    "cpp bfloat16": ("cpp", torch.bfloat16),
}
by_setting = pytest.mark.parametrize("setting", SETTINGS)
OP_NAMES = sorted({name for name, _, _ in op_calls("reference", torch.float64)})
QUICK = [
    name if name.endswith("2") else pytest.param(name, marks=pytest.mark.slow) for name in OP_NAMES
]


def test_every_registered_op_is_checked_here():
    assert registered_ops() == {name.split()[0] for name in OP_NAMES}


@by_setting
@pytest.mark.parametrize("name", QUICK)
def test_opcheck(name, setting):
    backend, dtype = SETTINGS[setting]
    if backend not in available_backends():
        pytest.skip("the C++ extension is not built")
    opcheck(name, backend, dtype)


@pytest.mark.parametrize("name", [name for name in OP_NAMES if name.endswith(" 0")])
def test_opcheck_of_what_a_program_made_on_a_gpu_falls_back_to(name):
    opcheck(name, "auto", torch.float32)


def opcheck(name, backend, dtype):
    calls = {n: (op, args) for n, op, args in op_calls(backend, dtype)}
    if name not in calls:
        pytest.skip("not for this dtype")
    op, args = calls[name]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    wants = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    # the waveform's gradient is compared with itself at tolerances no 1/energy can keep
    if wants or "backward" in name:
        utilities += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(op, args, test_utils=utilities, atol=1e-3, rtol=1e-2)


def draw(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(SEED)
    inputs = place(case.inputs(generator), CPU, dtype)
    return inputs, draw_upstream(
        evaluate(case.oracle, place(inputs, CPU, torch.float64)), generator, dtype
    )


def assert_close(got, want):
    for name in want:
        assert got[name].shape == want[name].shape
        bound = 1e-4 if name == "dwave" else 3e-6
        assert measure(got[name], want[name]).rel_l2 < bound, name


@by_backend
@by_case
def test_compiled_without_graph_breaks_equals_eager(name, backend):
    case = CASES[name]
    inputs, upstream = draw(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, backend="aot_eager", fullgraph=True)
    with backends.use_backend(backend):
        assert_close(evaluate(compiled, inputs, upstream), evaluate(case.ours, inputs, upstream))


BATCHED = {
    "layer_norm": lambda n: cases.layer_norm(n, 33),
    "add_layer_norm": lambda n: cases.add_layer_norm(n, 33),
    "mlp": lambda n: cases.mlp(n, 12),
    "patch_embed": lambda n: cases.patch_embed(n, 32, 16, (16, 16), (56, 16)),
    "attention": lambda n: cases.attention(n, 19, 2, 32),
    "attention_qkv": lambda n: cases.attention_qkv(n, 19, 2, 32),
    "attention_masked": lambda n: cases.attention_masked(n, (3, 5), 2, 32),
}


# tracing the reference takes its many small ops: the slow run has it
@pytest.mark.parametrize(
    "backend",
    [b if b == "cpp" else pytest.param(b, marks=pytest.mark.slow) for b in available_backends()],
)
@pytest.mark.parametrize("op", BATCHED)
def test_one_compilation_serves_every_batch_size(op, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(BATCHED[op](2).ours, backend=counter, fullgraph=True, dynamic=True)
    for n in (2, 5, 8):
        case = BATCHED[op](n)
        inputs, upstream = draw(case)
        with backends.use_backend(backend):
            assert_close(
                evaluate(compiled, inputs, upstream), evaluate(case.ours, inputs, upstream)
            )
    assert counter.frame_count <= 2


@pytest.mark.slow
@by_backend
@by_case
def test_compiled_by_inductor_equals_eager(name, backend):
    case = CASES[name]
    inputs, upstream = draw(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True)
    with backends.use_backend(backend):
        assert_close(evaluate(compiled, inputs, upstream), evaluate(case.ours, inputs, upstream))


class Wrapped(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, tensors):
        return self.case.ours(tensors)


@by_backend
@by_case
def test_exported_program_equals_eager(name, backend):
    case = CASES[name]
    inputs, _ = draw(case)
    with backends.use_backend(backend), torch.no_grad():
        program = torch.export.export(Wrapped(case), (inputs,))
        got, want = program.module()(inputs), case.ours(inputs)
    assert_close(got, want)


def test_export_with_a_dynamic_batch():
    case = cases.attention_qkv(2, 19, 2, 32)
    inputs, _ = draw(case)
    shapes = ({"qkv": {0: torch.export.Dim("batch", min=1, max=64)}},)
    with backends.use_backend(available_backends()[-1]), torch.no_grad():
        program = torch.export.export(Wrapped(case), (inputs,), dynamic_shapes=shapes)
        larger, _ = draw(cases.attention_qkv(5, 19, 2, 32))
        assert_close(program.module()(larger), case.ours(larger))


@pytest.mark.parametrize("name", [n for n in OP_NAMES if n.endswith("2")])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fake_cuda_tensors_get_shapes_and_strides_of_the_real_ones(name, dtype):
    op, args = {n: (o, a) for n, o, a in op_calls("reference", dtype)}.get(name, (None, None))
    if op is None:
        pytest.skip("not for this dtype")
    real = op(*args)
    args = tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, args)
    with FakeTensorMode() as mode:
        fakes = tree_map(
            lambda a: mode.from_tensor(a).to("cuda") if isinstance(a, torch.Tensor) else a, args
        )
        fake = op(*fakes)
    real, fake = (x if isinstance(x, (tuple, list)) else (x,) for x in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.device.type == "cuda"


@by_backend
def test_vmap_equals_a_loop(backend):
    x, weight, bias = (
        random_tensor(3, 4, 24, seed=0),
        random_tensor(24, seed=1),
        random_tensor(24, seed=2),
    )
    with backends.use_backend(backend):
        got = torch.vmap(lambda rows: ops.layer_norm(rows, weight, bias))(x)
        want = torch.stack([ops.layer_norm(rows, weight, bias) for rows in x])
    assert measure(got, want).rel_l2 < 1e-6


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ extension is not built")
@by_case
def test_double_backward_says_that_there_is_none(name):
    case = CASES[name]
    inputs, _ = draw(case)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    with backends.use_backend("cpp"):
        y = next(iter(reversed(case.ours(leaves).values())))
        grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            sum(g.square().sum() for g in grads).backward()


@by_case
def test_double_backward_works_in_the_reference(name):
    case = CASES[name]
    inputs, _ = draw(case, torch.float64)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    with backends.use_backend("reference"):
        y = next(iter(reversed(case.ours(leaves).values())))
        grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert all(t.grad.isfinite().all() for t in wanted)
