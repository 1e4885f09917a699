"""PyTorch's fused attention as an implementation of ours: numbers, mixed directions, guards, signatures."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from ast_fast import backend, ops, reference
from ast_fast.equivalence import cases
from ast_fast.equivalence.run_ops import run_op_case
from ast_fast.kernels import _use
from ast_fast.ops import _sdpa, _sdpa_varlen
from ast_fast.reference import backward as reference_backward
from ast_fast.testing import assert_same, available_backends, measure, random_tensor

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (1, 2, 127, 128, 129)
CASES = {
    **{f"attention T{t}": cases.attention(2, t, 2) for t in TOKENS},
    **{f"attention D{d}": cases.attention(1, 70, 2, d) for d in (32, 48, 80, 128)},
    "attention lengths": cases.attention(4, 133, 1, 64, [133, 128, 1, 0]),
    "attention no lengths": cases.attention(2, 5, 1, 64, [0, 0]),
    **{f"attention_qkv T{t}": cases.attention_qkv(2, t, 3) for t in TOKENS},
    "attention_varlen": cases.attention_varlen([129, 1, 0, 128, 17], 2),
    "attention_varlen one clip": cases.attention_varlen([31], 1, 32),
}
CUDNN_BACKWARD = ("sdpa-cudnn", "backward_any_order")


def tensors(q, k, heads=2, width=64, clips=2, dtype=torch.float32):
    made = [random_tensor(clips, t, heads, width, seed=i) for i, t in enumerate((q, k, k, q))]
    return [x.to(dtype) for x in made]


@pytest.fixture
def only_sdpa(monkeypatch):
    """No scores are stored: neither the kernels of ours nor the reference runs attention."""

    def refuse(*args, **options):
        raise AssertionError("attention stored its scores")

    for module, names in (
        (reference.ops, ("_attention",)),
        (reference_backward, ("_attention",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    real = backend.choose
    fused = backend.SDPA_OPS

    def choose(op, *args):
        return backend.SDPA if op in fused else real(op, *args)

    monkeypatch.setattr(backend, "choose", choose)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_keep_the_budgets_of_every_backend(name, dtype, monkeypatch):
    monkeypatch.setattr(
        backend, "choose", lambda *args: "reference" if args[2].dtype == torch.float64 else "sdpa"
    )
    monkeypatch.setattr(backend, "requested", lambda: "auto")
    rows = run_op_case(CASES[name], CPU, DTYPES[dtype], "auto")
    failed = [row for row in rows if not row.ok]
    assert not failed, "\n".join(f"{r.what}: {r.error}, budget {r.budget}" for r in failed)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize(("queries", "keys"), ((33, 70), (70, 33), (5, 1), (0, 3), (3, 0)))
@pytest.mark.parametrize("scale", (0.125, -0.3, 0.0))
@pytest.mark.parametrize("lengths", (None, (0, 20)))
def test_other_lengths_of_keys_scales_and_padding_that_holds_nan(
    queries, keys, scale, lengths, dtype
):
    q, k, v, do = tensors(queries, keys, dtype=dtype)
    key_lengths = visible = None
    if lengths is not None:
        key_lengths = torch.tensor([min(n, keys) for n in lengths], dtype=torch.int32)
        for clip, length in enumerate(key_lengths.tolist()):
            k[clip, length:] = v[clip, length:] = math.nan
        visible = _sdpa.visible_keys(key_lengths, keys)
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = reference.ops.attention(*wide, scale, key_lengths)
    want_grads = reference_backward.attention(do.double(), *wide, want_lse, scale, key_lengths)
    o, lse = _sdpa.forward("sdpa-cpu", q, k, v, scale, visible)
    grads = [torch.full_like(x, 7.0) for x in (q, k, v)]
    _sdpa.backward("sdpa-cpu", do, q, k, v, o, lse, scale, visible, True, grads)
    limit = 1e-5 if dtype == torch.float32 else 3e-3
    for found, expected in zip((o, *grads), (want, *want_grads), strict=True):
        if found.numel():
            error = (found.double() - expected).abs().max()
            assert error < limit * (1 + expected.abs().max())
    assert torch.equal(lse.isinf(), want_lse.isinf()) and lse.shape == want_lse.shape
    finite = want_lse.isfinite()
    assert not finite.any() or (lse[finite] - want_lse[finite]).abs().max() < 1e-3


def test_a_mask_with_blind_queries_and_unseen_keys_is_that_of_the_reference():
    q, k, v, do = tensors(40, 50)
    pairs = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    pairs[3] = pairs[17] = False
    pairs[:, 5] = False
    k[:, 5] = v[:, 5] = q[:, 3] = math.nan
    visible = _sdpa.visible_pairs(pairs)
    o, lse = _sdpa.forward("sdpa-cpu", q, k, v, 0.2, visible)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    _sdpa.backward("sdpa-cpu", do, q, k, v, o, lse, 0.2, visible, True, grads)
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = reference.ops.attention_masked(*wide, pairs, 0.2)
    want_grads = reference_backward.attention_masked(do.double(), *wide, want_lse, 0.2, pairs)
    for found, expected in zip((o, *grads), (want, *want_grads), strict=True):
        assert (found.double() - expected).abs().max() < 1e-5
    assert (o[:, 3] == 0).all() and (grads[1][:, 5] == 0).all()


def test_no_attention_of_an_odd_head_width_stores_its_scores(only_sdpa):
    """At 64 clips they are 4.5 GB a copy."""
    x = [random_tensor(2, 30, 2, 80, seed=i).requires_grad_() for i in range(3)]
    lengths = torch.tensor([30, 7])
    pairs = torch.ones(30, 30, dtype=torch.bool).tril()
    packed = [each.detach().flatten(0, 1).requires_grad_() for each in x]
    starts = torch.tensor([0, 50, 60], dtype=torch.int32)
    made = [
        ops.attention(*x),
        ops.attention(*x, key_lengths=lengths),
        ops.attention_qkv(torch.stack(x, 2)),
        ops.attention_masked(*x, ops.AttentionMask.from_dense(pairs)),
        ops.attention_varlen(*packed, starts, starts, 50, 50),
    ]
    sum(each.sum() for each in made).backward()
    assert all(each.grad is not None for each in (*x, *packed))
    with torch.no_grad():
        ops.attention_biased(*x, torch.zeros(2, 30))


def test_a_bias_a_key_keeps_its_digits_in_16_bits(only_sdpa):
    q, k, v, _ = tensors(9, 20, width=80)
    bias = random_tensor(2, 20, seed=9) * 3
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 80**-0.5
    p = torch.softmax(scores + bias.double()[:, None, None], -1)
    want = torch.einsum("bhqk,bkhd->bqhd", p, v.double())
    with torch.no_grad():
        exact = ops.attention_biased(q, k, v, bias)
        short = ops.attention_biased(q.half(), k.half(), v.half(), bias)
    assert (exact.double() - want).abs().max() < 1e-5
    assert (short.double() - want).abs().max() < 3e-3


# forward by one implementation and backward by another: the C++ kernels stand for Triton's
@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "names", (("sdpa-flash", "triton"), ("triton", "sdpa-flash"), ("triton", "triton"))
)
@pytest.mark.parametrize("name", [n for n in CASES if "D48" not in n and "D80" not in n])
def test_directions_mix(name, names, monkeypatch):
    ran = []
    for op in ("attention", "attention_varlen"):
        module = importlib.import_module(f"ast_fast.ops.{op}")
        kernel = module._load("cpp")

        def load(_, kernel=kernel, op=op):
            def forward(*args):
                ran.append((op, "forward"))
                return kernel.forward(*args)

            def backward(*args):
                ran.append((op, "backward"))
                return kernel.backward(*args)

            return SimpleNamespace(forward=forward, backward=backward)

        monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(backend, "native", lambda device_type: "triton")
    monkeypatch.setattr(
        backend, "choose", lambda *args: "reference" if args[2].dtype == torch.float64 else "auto"
    )
    op = name.split()[0].replace("_qkv", "")
    forced = {(op, "forward"): names[0], (op, "backward"): names[1]}
    with _use.force(forced):
        rows = run_op_case(CASES[name], CPU, torch.float32, "auto")
    assert all(row.ok for row in rows)
    assert set(ran) == {(op, d) for (op, d), chosen in forced.items() if chosen == "triton"}


def refusal(name, direction="forward", dtype=torch.bfloat16, width=64, t=1214, clips=2, **options):
    """`why_not` for tensors on a pretend GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(clips, t, 3, width, device="cuda", dtype=dtype)
    options = {"masked": False} | options
    return _sdpa.why_not(name, direction, q, options.pop("keys", t), **options)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_cudnn_is_not_taken_with_a_mask_where_its_gradient_is_nan(hopper):
    for t, keys in ((64, 64), (192, 192), (704, 100), (100, 704)):
        assert "NaN" in refusal(*CUDNN_BACKWARD, t=t, keys=keys, masked=True)
        assert refusal(*CUDNN_BACKWARD, t=t, keys=keys, masked=False) is None
    for t in (128, 640, 1214):
        assert refusal(*CUDNN_BACKWARD, t=t, masked=True) is None


def test_a_backward_that_is_not_deterministic_is_not_taken_where_that_is_promised(hopper):
    wanted = {"direction": "backward", "deterministic": True}
    assert "not deterministic" in refusal("sdpa-cudnn", **wanted)
    assert "deterministic" in refusal("sdpa-flash", **wanted)
    assert refusal("sdpa-efficient", **wanted) is None
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch only warns
    assert "deterministic" in refusal("sdpa-flash", **wanted)
    torch.use_deterministic_algorithms(True)
    assert refusal("sdpa-flash", **wanted) is None
    assert "not deterministic" in refusal("sdpa-cudnn", **wanted)
    torch.use_deterministic_algorithms(False)
    for name in ("sdpa-cudnn", "sdpa-flash"):
        assert refusal(name, "backward_any_order") is None


def test_each_implementation_says_what_it_cannot_take(hopper):
    assert "mask" in refusal("sdpa-flash", masked=True)
    assert "float32" in refusal("sdpa-flash", dtype=torch.float32)
    assert "float32" in refusal("sdpa-cudnn", dtype=torch.float32)
    assert "float64" in refusal("sdpa-efficient", dtype=torch.float64)
    assert refusal("sdpa-flash", width=80) is None
    assert "256" in refusal("sdpa-flash", width=264)
    assert "128" in refusal("sdpa-cudnn", width=136)
    assert refusal("sdpa-efficient", width=520, masked=True) is None
    assert "65535" in refusal("sdpa-efficient", clips=65536)
    hopper.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "AVOID_RECOMPILE" in refusal("sdpa-cudnn")
    hopper.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 0))
    assert "8.0" in refusal("sdpa-flash", dtype=torch.float16)
    assert refusal("sdpa-efficient", dtype=torch.float16) is None
    assert "bfloat16" in refusal("sdpa-efficient")
    hopper.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 9))
    assert "192" in refusal("sdpa-flash", "backward_any_order", width=256)


def test_what_a_user_switched_off_in_pytorch_stays_off(hopper):
    for name, switch in (
        ("sdpa-cudnn", torch.backends.cuda.enable_cudnn_sdp),
        ("sdpa-flash", torch.backends.cuda.enable_flash_sdp),
        ("sdpa-efficient", torch.backends.cuda.enable_mem_efficient_sdp),
    ):
        assert refusal(name) is None
        switch(False)
        try:
            assert "switched off" in refusal(name)
        finally:
            switch(True)


@pytest.mark.parametrize("width", (64, 80))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("name", ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient"))
def test_calls_on_a_gpu_fit_the_signatures_of_pytorch(
    name, masked, deterministic, width, monkeypatch
):
    if name == "sdpa-flash" and masked:
        pytest.skip("takes no mask")
    monkeypatch.setattr(_sdpa, "operand", lambda x: x)  # reads addresses
    splits = []
    # its fake lacks an argument that it has
    schema = torch.ops.aten._efficient_attention_backward.default._schema

    def efficient(*args, **options):
        splits.append(options["num_splits_key"])
        positional = [a for a in schema.arguments if not a.kwarg_only]
        assert len(args) == len(positional)
        assert set(options) <= {a.name for a in schema.arguments if a.kwarg_only}
        for given, wanted in zip(args, positional, strict=True):
            kinds = {"Tensor": torch.Tensor, "int": int, "float": float, "bool": bool}
            kind = kinds[str(wanted.type).removeprefix("Optional[").removesuffix("]")]
            assert isinstance(given, kind) or given is None, wanted.name
        grads = [torch.empty_like(x) for x in args[1:4]]
        return (*grads, None)

    stand_in = SimpleNamespace(
        **{
            n: getattr(torch.ops.aten, n)
            for n in (
                "_flash_attention_forward",
                "_flash_attention_backward",
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_cudnn_attention_backward",
                "_efficient_attention_forward",
            )
        },
        _efficient_attention_backward=efficient,
    )
    monkeypatch.setattr(_sdpa, "_aten", stand_in)
    monkeypatch.setattr(_sdpa_varlen, "_aten", stand_in)
    with FakeTensorMode():
        q = torch.empty(2, 70, 3, width, device="cuda", dtype=torch.bfloat16)
        k = v = torch.empty(2, 33, 3, width, device="cuda", dtype=torch.bfloat16)
        visible = None
        if masked:
            visible = _sdpa.visible_keys(torch.empty(2, dtype=torch.int32, device="cuda"), 33)
        o, lse = _sdpa.forward(name, q, k, v, 0.1, visible)
        assert o.shape == q.shape and o.is_contiguous() and o.dtype == q.dtype
        assert lse.shape == (2, 3, 128) and lse.dtype == torch.float32
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _sdpa.backward(name, o, q, k, v, o, lse, 0.1, visible, deterministic, grads)
        if name != "sdpa-cudnn" and not masked:
            packed = [x.flatten(0, 1) for x in (q, k, v)]
            starts = [torch.empty(4, dtype=torch.int32, device="cuda") for _ in range(2)]
            clips = (*starts, 100, 50, 0.1)
            o, lse = _sdpa_varlen.forward(name, *packed, *clips)
            assert o.shape == packed[0].shape and lse.shape == (3, 640)
            grads = [torch.empty_like(x) for x in packed]
            _sdpa_varlen.backward(name, o, *packed, o, lse, *clips, deterministic, grads)
    if name == "sdpa-efficient":
        # two programs that add to the same element add in any order
        assert set(splits) == {1 if deterministic else None}


def test_a_bias_keeps_its_digits_on_a_gpu_too(monkeypatch):
    """The memory-efficient kernel wants it in the dtype of q."""
    monkeypatch.setattr(_sdpa, "operand", lambda x: x)  # reads addresses
    seen = []

    def forward(q, k, v, bias, *args, **options):
        seen.append((q.dtype, bias.dtype, bias.shape, bias.stride()))
        return torch.ops.aten._efficient_attention_forward(q, k, v, bias, *args, **options)

    monkeypatch.setattr(_sdpa, "_aten", SimpleNamespace(_efficient_attention_forward=forward))
    with FakeTensorMode():
        q = torch.empty(2, 9, 3, 80, device="cuda", dtype=torch.bfloat16)
        bias = torch.empty(2, 9, device="cuda")
        o, _ = _sdpa.forward("sdpa-efficient", q, q, q, 0.1, key_bias=bias)
    assert o.dtype == torch.bfloat16
    # one row a clip, on 16 elements, for all heads and queries
    assert seen == [(torch.float32, torch.float32, (2, 3, 9, 9), (16, 0, 0, 1))]


def test_operands_start_where_a_gpu_wants_them(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    qkv = random_tensor(2, 9, 3, 2, 64, seed=0).half()
    whole = qkv.unbind(2)[1]
    assert _sdpa.operand(whole) is whole
    assert _sdpa.operand(whole[..., :60]).shape[-1] == 64
    shifted = torch.empty(2 * 9 * 128 + 1, dtype=torch.float16)[1:].view(2, 9, 2, 64)
    assert _sdpa.operand(shifted).data_ptr() % 16 == 0
    expanded = whole[:1].expand(2, -1, -1, -1)
    assert _sdpa.operand(expanded).is_contiguous()
    assert_same(_sdpa.operand(expanded), expanded)


@pytest.mark.parametrize("backend_argument", ("sdpa", "auto"))
def test_registered_ops_pass_opcheck_and_compile(backend_argument, monkeypatch):
    """Where Triton cannot be imported or launched, "auto" runs the same."""
    monkeypatch.setattr(backend, "_failures", {})
    registry = torch.ops.ast_fast
    q = [random_tensor(2, 20, 2, 80, seed=i).requires_grad_() for i in range(3)]
    lengths = torch.tensor([20, 3], dtype=torch.int32)
    arguments = (*q, lengths, 0.1, True, False, backend_argument)
    torch.library.opcheck(registry.attention.default, arguments)
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in q]
    starts = torch.tensor([0, 30, 40], dtype=torch.int32)
    torch.library.opcheck(
        registry.attention_varlen.default,
        (*packed, starts, starts, 30, 30, 0.1, True, False, backend_argument),
    )

    def run(*x):
        return registry.attention(*x, lengths, 0.1, True, False, backend_argument)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*q), run(*q))


def test_the_choice_of_sdpa_compiles_and_exports_without_a_break():
    q = [random_tensor(2, 20, 2, 80, seed=i, dtype=torch.float16) for i in range(3)]

    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.attention(q, k, v)

    eager = Attend()(*q)
    want = ops.attention(*(x.double() for x in q))
    assert measure(eager, want).rel_l2 < 1e-3
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*q), eager)
    exported = torch.export.export(Attend(), tuple(q)).module()
    assert torch.equal(exported(*q), eager)
