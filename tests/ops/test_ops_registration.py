"""Registered ops under everything that calls them: opcheck, compile, export, fake tensors, autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ast_fast import backend as backends
from ast_fast import ops
from ast_fast.attention_mask import AttentionMask
from ast_fast.equivalence import cases
from ast_fast.equivalence.run_ops import SEED, draw_upstream, evaluate, place
from ast_fast.testing import available_backends, measure, random_tensor, small_op_cases

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
MEL = [16000.0, 32.0, 25.0, 10.0, 20.0, 0.0, 0.97, 1.0, 1.1920928955078125e-07]


def rand(*shape, seed=0, dtype=torch.float32, grad=True):
    return random_tensor(*shape, seed=seed, dtype=dtype).requires_grad_(grad)


def op_calls(backend, dtype):
    """Direct calls of every registered op: name to (op, arguments), three inputs each."""
    registry = torch.ops.ast_fast
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for variant, rows in enumerate((1, 5, 64)):
        x, r = rand(rows, 24, dtype=dtype), rand(rows, 24, seed=1, dtype=dtype)
        w, b = rand(24, seed=2, dtype=dtype), rand(24, seed=3, dtype=dtype)
        stats = rand(rows, seed=4, dtype=wide, grad=False)
        yield f"layer_norm {variant}", registry.layer_norm, (x, w, b, 1e-6, dtype, backend)
        yield (
            f"layer_norm_backward {variant}",
            registry.layer_norm_backward,
            (x.detach(), r.detach(), w.detach(), stats, stats.abs(), backend),
        )
        yield (
            f"add_layer_norm {variant}",
            registry.add_layer_norm,
            (x, r, w, b, 1e-6, dtype, backend),
        )
        total = None if variant == 0 else x.detach()
        yield (
            f"add_layer_norm_backward {variant}",
            registry.add_layer_norm_backward,
            (x.detach(), total, r.detach(), w.detach(), stats, stats.abs(), backend),
        )
        w1, b1 = rand(32, 24, seed=5, dtype=dtype), rand(32, seed=6, dtype=dtype)
        w2, b2 = rand(24, 32, seed=7, dtype=dtype), rand(24, seed=8, dtype=dtype)
        yield f"mlp {variant}", registry.mlp, (x, w1, b1, w2, b2, True, backend)
        h = rand(rows, 32, seed=9, dtype=dtype, grad=False)
        needs = [True, variant > 0, True, variant > 1, True]
        yield (
            f"mlp_backward {variant}",
            registry.mlp_backward,
            (r.detach(), x.detach(), h, w1.detach(), w2.detach(), needs, backend),
        )
    yield from fp8_calls(backend, dtype)
    for variant, (clips, tokens) in enumerate(((1, 3), (2, 128), (2, 17))):
        shape = (clips, tokens, 2, 32)
        q, k, v, do = (rand(*shape, seed=s, dtype=dtype) for s in range(4))
        lengths = None if variant == 0 else torch.tensor([tokens, 2][:clips], dtype=torch.int32)
        options = (lengths, 0.2, True, False, backend)
        yield f"attention {variant}", registry.attention, (q, k, v, *options)
        qkv = rand(clips, tokens, 3, 2, 32, seed=5, dtype=dtype)
        yield f"attention_qkv {variant}", registry.attention_qkv, (qkv, *options)
        o, lse = registry.attention(q.detach(), k.detach(), v.detach(), *options)
        yield (
            f"attention_backward {variant}",
            registry.attention_backward,
            (do.detach(), q.detach(), k.detach(), v.detach(), o, lse, *options),
        )
        o, lse = registry.attention_qkv(qkv.detach(), *options)
        yield (
            f"attention_qkv_backward {variant}",
            registry.attention_qkv_backward,
            (do.detach(), qkv.detach(), o, lse, *options),
        )
        starts = torch.tensor([0, tokens - 1, clips * tokens], dtype=torch.int32)
        packed = [t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v)]
        longest = (clips * tokens, clips * tokens)
        options = (starts, starts, *longest, 0.2, True, False, backend)
        yield f"attention_varlen {variant}", registry.attention_varlen, (*packed, *options)
        packed = [t.detach() for t in packed]
        o, lse = registry.attention_varlen(*packed, *options)
        yield (
            f"attention_varlen_backward {variant}",
            registry.attention_varlen_backward,
            (do.detach().flatten(0, 1), *packed, o, lse, *options),
        )
        seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(variant)) < 0.6
        rectangles = AttentionMask.from_dense(seen).rectangles
        options = (rectangles, 0.2, True, False, backend)
        yield f"attention_masked {variant}", registry.attention_masked, (q, k, v, *options)
        saved = [t.detach() for t in (q, k, v)]
        o, lse = registry.attention_masked(*saved, *options)
        yield (
            f"attention_masked_backward {variant}",
            registry.attention_masked_backward,
            (do.detach(), *saved, o, lse, *options),
        )
        bias = rand(*saved[1].shape[:2], dtype=torch.float32).detach()
        args = (*saved, bias, 0.2, False, backend)
        yield f"attention_biased {variant}", registry.attention_biased, args
    for variant, prefix in enumerate((0, 1, 2)):
        x, w = rand(2, 36, 16, dtype=dtype), rand(8, 1, 16, 16, seed=1, dtype=dtype)
        pos, tokens = rand(prefix + 3, 8, seed=2, dtype=dtype), rand(prefix, 8, seed=3, dtype=dtype)
        bias = rand(8, seed=4, dtype=dtype)
        args = (x, w, bias, pos, tokens, 10, 10, False, backend)
        yield f"patch_embed {variant}", registry.patch_embed, args
        dy = rand(2, prefix + 3, 8, seed=5, dtype=dtype, grad=False)
        args = (dy, x.detach(), w.detach(), 10, 10, prefix, variant > 0, False, backend)
        yield f"patch_embed_backward {variant}", registry.patch_embed_backward, args
    if dtype != torch.bfloat16:  # waveforms are float32 or wider
        for variant, samples in enumerate((900, 399, 1600)):
            wave = rand(2, samples, dtype=dtype)
            lengths = None if variant == 0 else torch.tensor([samples, 600])
            args = (wave, lengths, MEL, 5, -4.0, 2.0, dtype, backend)
            yield f"log_mel {variant}", registry.log_mel, args
            dy = rand(2, 5, 32, seed=1, dtype=dtype, grad=False)
            args = (dy, wave.detach(), lengths, MEL, -4.0, 2.0, backend)
            yield f"log_mel_backward {variant}", registry.log_mel_backward, args


def fp8_calls(backend, dtype):
    """Direct calls of the FP8 layers, with and without a norm in front."""
    backend = "reference" if backend == "cpp" else backend  # which has no FP8, and says so
    registry = torch.ops.ast_fast
    for variant, rows in enumerate((1, 5, 64)):
        x, dy = rand(rows, 32, dtype=dtype), rand(rows, 32, seed=1, dtype=dtype, grad=False)
        w1, b1 = rand(48, 32, seed=2, dtype=dtype), rand(48, seed=3, dtype=dtype)
        w2, b2 = rand(32, 48, seed=4, dtype=dtype), rand(32, seed=5, dtype=dtype)
        norm = (None, None, None, 0.0)
        if variant:
            ones, zeros = rand(32, seed=7, dtype=dtype), rand(32, seed=8, dtype=dtype)
            norm = (rand(rows, 32, seed=6, dtype=dtype), ones, zeros, 1e-6)
        bias = b1 if variant else None
        args = (x, *norm, w1, bias, True, backend)
        yield f"linear_fp8 {variant}", registry.linear_fp8, args
        made = registry.linear_fp8(*(t.detach() if torch.is_tensor(t) else t for t in args))
        needs = [True, variant > 0, variant > 1]
        args = (made[0], *made[4:], w1.detach(), needs, backend)
        yield f"linear_fp8_backward {variant}", registry.linear_fp8_backward, args
        args = (x, *norm, w1, b1, w2, b2, True, backend)
        yield f"mlp_fp8 {variant}", registry.mlp_fp8, args
        made = registry.mlp_fp8(*(t.detach() if torch.is_tensor(t) else t for t in args))
        args = (dy, list(made[4:]), w1.detach(), w2.detach(), [True, *needs, True], backend)
        yield f"mlp_fp8_backward {variant}", registry.mlp_fp8_backward, args


OP_NAMES = sorted({name for name, _, _ in op_calls("reference", torch.float64)})
QUICK = [
    name if name.endswith("2") else pytest.param(name, marks=pytest.mark.slow) for name in OP_NAMES
]


def test_every_registered_op_is_checked_here():
    registered = {
        name.removeprefix("ast_fast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ast_fast::")
    }
    assert registered == {name.split()[0] for name in OP_NAMES}


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
