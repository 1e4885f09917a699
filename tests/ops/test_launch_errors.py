"""On a pretend CUDA machine: what runs where a Triton kernel cannot be taken, compiled or launched.

The C++ kernels (for FP8 the reference's primitives) stand for Triton's: they take the same arguments.
"""

import gc
import importlib
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import ast_fast
from ast_fast import backend, ops, reference
from ast_fast.kernels import _tuned, _use
from ast_fast.ops import _dispatch, _fp8
from ast_fast.testing import available_backends, random_tensor

pytestmark = pytest.mark.skipif(
    "cpp" not in available_backends(), reason="the C++ extension is not built"
)


def rand(*shape, seed=0):
    return random_tensor(*shape, seed=seed).requires_grad_()


def call(op):
    """A function that runs an op on inputs of its own, and those whose gradients it has."""
    x, r = rand(6, 32), rand(6, 32, seed=1)
    w, b = rand(32, seed=2), rand(32, seed=3)
    w1, b1, w2, b2 = rand(64, 32, seed=4), rand(64, seed=5), rand(32, 64, seed=6), rand(32, seed=7)
    q = [rand(2, 20, 2, 64, seed=i) for i in range(3)]
    packed = [rand(40, 2, 64, seed=i) for i in range(3)]
    starts = torch.tensor([0, 25, 40], dtype=torch.int32)
    mask = ops.AttentionMask.from_dense(torch.ones(20, 20, dtype=torch.bool).tril())
    wave, image = rand(2, 1600), rand(2, 40, 32)
    kernel, table, prefix = rand(24, 1, 16, 16, seed=8), rand(2 * 3 + 2, 24), rand(2, 24, seed=9)
    bias = random_tensor(24, seed=3).requires_grad_()
    mel = {"num_mel_bins": 32}
    return {
        "attention": (lambda: ops.attention(*q), q),
        "attention_qkv": (lambda: ops.attention_qkv(torch.stack(q, 2)), q),
        "attention_varlen": (lambda: ops.attention_varlen(*packed, starts, starts, 25, 25), packed),
        "attention_masked": (lambda: ops.attention_masked(*q, mask), q),
        "attention_biased": (
            lambda: ops.attention_biased(*(t.detach() for t in q), torch.ones(2, 20)),
            [],
        ),
        "layer_norm": (lambda: ops.layer_norm(x, w, b), [x, w, b]),
        "add_layer_norm": (lambda: ops.add_layer_norm(x, r, w, b)[0], [x, r, w, b]),
        "mlp": (lambda: ops.mlp(x, w1, b1, w2, b2), [x, w1, b1, w2, b2]),
        "patch_embed": (
            lambda: ops.patch_embed(image, kernel, bias, table, prefix, 16, 10),
            [image, kernel, bias, table, prefix],
        ),
        "log_mel": (lambda: ops.log_mel(wave, **mel), [wave]),
        "linear_fp8": (lambda: ops.linear_fp8(x, w1, b1), [x, w1, b1]),
        "mlp_fp8": (lambda: ops.mlp_fp8(x, w1, b1, w2, b2), [x, w1, b1, w2, b2]),
    }[op]


OPS = (*backend.OPS, "attention_qkv", "linear_fp8", "mlp_fp8")
BOTH = [
    (op, direction)
    for op in OPS
    for direction in ("forward", "backward")
    if (op, direction) != ("attention_biased", "backward")
]


def results(op):
    run, inputs = call(op)
    y = run()
    if not inputs:
        return [y]
    upstream = random_tensor(*y.shape, seed=11)
    return [y, *torch.autograd.grad(y, inputs, upstream)]


class Machine:
    """A pretend GPU: whether its kernels fail, and how often they were called."""

    def __init__(self):
        self.errors = {}  # (op, direction) to an exception
        self.calls = []
        self.refusals = {}  # op to a reason

    def kernels(self, op, of_cpp):
        def run(direction):
            def kernel(*args):
                self.calls.append((op, direction))
                if (op, direction) in self.errors:
                    if direction == "backward" and op == "attention":
                        args[9].fill_(torch.nan)  # half written
                    raise self.errors[op, direction]
                return getattr(of_cpp, direction)(*args)

            return kernel

        return SimpleNamespace(
            unsupported=lambda *args: self.refusals.get(op),
            forward=run("forward"),
            backward=run("backward"),
        )


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(backend, "native", lambda device_type: "triton")
    monkeypatch.setattr(backend, "why_not", lambda *args: None)
    monkeypatch.setattr(backend, "_announced", set())
    monkeypatch.setattr(backend, "_failures", {})
    monkeypatch.setattr(_tuned, "capability", lambda device: 90)
    monkeypatch.setattr(_tuned, "sm_count", lambda device: 132)
    for op in backend.OPS:
        module = importlib.import_module(f"ast_fast.ops.{op}")
        real = module._load
        kernels = made.kernels(op, real("cpp"))
        monkeypatch.setattr(
            module,
            "_load",
            lambda name, kernels=kernels, real=real: kernels if name == "triton" else real(name),
        )
    from ast_fast.reference import fp8

    def load(name):
        if name != "triton":
            return fp8

        # the layers share primitives: the one that both begin each direction with fails
        def facts(x):
            op = next((op for op, _ in made.errors if op.endswith("fp8")), "")
            direction = "backward" if x is not None and made.in_backward else "forward"
            made.calls.append((op, direction))
            if (op, direction) in made.errors:
                raise made.errors[op, direction]
            return fp8.facts(x)

        return SimpleNamespace(**{**vars(fp8), "facts": facts, "unsupported": lambda *a: None})

    made.in_backward = False
    for name in ("linear_backward", "mlp_backward"):
        step = getattr(_fp8, name)

        def backward(*args, step=step):
            made.in_backward = True
            try:
                return step(*args)
            finally:
                made.in_backward = False

        monkeypatch.setattr(_fp8, name, backward)
    monkeypatch.setattr(_fp8, "load", load)
    return made


@pytest.fixture
def warnings():
    """The records of the backend's warnings, as they come."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    log, handler = logging.getLogger("ast_fast.backend"), Keep(logging.WARNING)
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)


def near(found, want):
    return all(
        torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)
        for a, b in zip(found, want, strict=True)
    )


def compile_error():
    """What Triton's compiler raises for a kernel that it cannot compile."""
    return CompilationError("def kernel():\n    x", None, "no such thing")


def raised_in_triton(error):
    """An error of a plain kind with a frame of Triton's in its trace, as a pass that gives up leaves."""
    scope = {"__name__": "triton.backends.nvidia.compiler", "error": error}
    exec("def make_ttgir():\n    raise error", scope)
    try:
        scope["make_ttgir"]()
    except type(error) as caught:
        return caught


LAUNCH = {
    "resources": OutOfResources(300000, 232448, "shared memory"),
    "ptxas": PTXASError("ptxas fatal: too old"),
    "driver": RuntimeError("Triton Error [CUDA]: out of resource"),
    "image": RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"),
    "no gcc's result": ImportError("launcher.so: cannot open shared object file"),
    "compiler": compile_error(),
    "pass": raised_in_triton(RuntimeError("PassManager::run failed")),
    "no compiler for C": raised_in_triton(RuntimeError("Failed to find C compiler.")),
    "cache": raised_in_triton(PermissionError("~/.triton/cache")),
}
FATAL = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory at launch": RuntimeError("Triton Error [CUDA]: out of memory"),
    "address": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "launch": RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    "assert": RuntimeError("CUDA error: device-side assert triggered"),
    "misaligned": RuntimeError("Triton Error [CUDA]: misaligned address"),
    "memory, said otherwise": raised_in_triton(
        torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory.")
    ),
    "a fault of ours": ValueError("strides do not fit"),
    "a fault of torch's": RuntimeError("The size of tensor a (3) must match"),
}


@pytest.mark.parametrize(("op", "direction"), BOTH)
def test_a_kernel_that_cannot_be_launched_falls_back_once_with_one_warning(
    op, direction, machine, warnings
):
    with ast_fast.use_backend("reference"):
        want = results(op)
    name = op.replace("_qkv", "")
    machine.errors[name, direction] = OutOfResources(300000, 232448, "shared memory")
    assert near(results(op), want)
    tried = machine.calls.count((name, direction))
    assert tried >= 1
    assert near(results(op), want)
    assert machine.calls.count((name, direction)) == tried, "it was tried again"
    (record,) = warnings
    said = record.getMessage()
    assert f"ast_fast.{name} ({direction}, float32" in said and "shared memory" in said
    instead = "sdpa-cpu" if name in backend.SDPA_OPS else "reference"
    assert f"runs in {instead} from now on, triton" in said


@pytest.mark.parametrize(("op", "direction"), BOTH)
def test_by_name_the_error_is_the_callers(op, direction, machine, warnings):
    name = op.replace("_qkv", "")
    machine.errors[name, direction] = OutOfResources(300000, 232448, "shared memory")
    with ast_fast.use_backend("triton"), pytest.raises(OutOfResources):
        results(op)
    assert not warnings


@pytest.mark.parametrize("kind", LAUNCH)
def test_each_kind_of_launch_error_falls_back(kind, machine, warnings):
    with ast_fast.use_backend("reference"):
        want = results("attention")
    machine.errors["attention", "backward"] = LAUNCH[kind]
    assert near(results("attention"), want)
    assert len(warnings) == 1


@pytest.mark.parametrize("kind", FATAL)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_what_is_no_launch_error_is_raised(kind, direction, machine, warnings):
    machine.errors["attention", direction] = FATAL[kind]
    with pytest.raises(type(FATAL[kind])) as info:
        results("attention")
    assert info.value is FATAL[kind] and not warnings and not backend._failures


def test_errors_of_the_device_that_torch_raises_are_not_swallowed():
    error = getattr(torch, "AcceleratorError", None)
    if error is None:
        pytest.skip("this PyTorch raises RuntimeError")
    assert not _dispatch.cannot_launch("triton", error("CUDA error: invalid argument"))


def test_a_failure_keeps_no_tensor_alive(machine):
    """An error's traceback holds the frames, and those the activations of a step."""
    machine.errors["layer_norm", "forward"] = OutOfResources(1, 0, "registers")
    gc.disable()
    try:
        x = torch.ones(3, 32)
        gone = weakref.ref(x)
        ops.layer_norm(x, torch.ones(32), torch.ones(32))
        machine.errors.clear()  # which this test itself keeps
        del x
        assert gone() is None
    finally:
        gc.enable()


def test_another_form_of_the_kernel_is_tried_by_itself(machine, warnings):
    machine.errors["layer_norm", "forward"] = OutOfResources(1, 0, "registers")
    for width in (32, 48, 32, 48):
        ops.layer_norm(torch.ones(3, width), torch.ones(width), torch.ones(width))
    assert machine.calls.count(("layer_norm", "forward")) == len(warnings) == 2


def test_no_graph_records_what_did_not_run_before(machine, warnings, monkeypatch):
    monkeypatch.setattr(_dispatch, "_capturing", lambda lead: True)
    machine.errors["layer_norm", "forward"] = OutOfResources(1, 0, "registers")
    x = torch.ones(3, 32)
    with pytest.raises(OutOfResources):
        ops.layer_norm(x, x[0], x[0])
    assert not warnings
    monkeypatch.setattr(_dispatch, "_capturing", lambda lead: False)
    ops.layer_norm(x, x[0], x[0])
    monkeypatch.setattr(_dispatch, "_capturing", lambda lead: True)
    ops.layer_norm(x, x[0], x[0])  # by now a graph may record the fallback
    assert len(warnings) == 1


def test_what_the_kernels_do_not_take_runs_in_sdpa_and_not_the_reference(
    machine, warnings, monkeypatch
):
    def refuse(*args, **options):
        raise AssertionError("the scores were stored")

    machine.refusals["attention"] = "head width 80 is not one of (32, 64, 96, 128)"
    q = [rand(2, 20, 2, 80, seed=i) for i in range(3)]
    with ast_fast.use_backend("reference"):
        want = ops.attention(*q)
    monkeypatch.setattr(reference.ops, "attention", refuse)
    o = ops.attention(*q)
    o.sum().backward()
    assert near([o], [want]) and not machine.calls
    (record,) = warnings
    assert "ast_fast.attention runs in PyTorch's fused attention (SDPA): head width 80" in (
        record.getMessage()
    )


def test_a_gpu_that_triton_does_not_know_runs_attention_in_sdpa(machine, warnings, monkeypatch):
    reason = "Triton kernels need compute capability 7.5 or newer, got 7.0"
    monkeypatch.setattr(backend, "why_not", lambda *args: reason)
    with backend.watch() as seen:
        results("attention")
        results("attention_varlen")
        results("layer_norm")
    assert seen.ran[("attention", "forward")] == "sdpa-cpu"
    assert seen.ran[("attention_varlen", "backward")] == "sdpa-cpu"
    assert len(warnings) == 1 and "7.0" in warnings[0].getMessage()


def test_where_no_sdpa_can_run_either_the_reference_does_and_the_warning_says_why(
    machine, warnings, monkeypatch
):
    from ast_fast.ops import _sdpa

    with ast_fast.use_backend("reference"):
        want = results("attention_masked")
    machine.errors["attention_masked", "forward"] = OutOfResources(1, 0, "shared memory")
    monkeypatch.setattr(_sdpa, "why_not", lambda *args: "it is switched off")
    assert near(results("attention_masked"), want)
    assert near(results("attention_masked"), want)
    messages = [record.getMessage() for record in warnings]
    stored = [m for m in messages if "stores the scores" in m]
    assert len(stored) == 1 and "sdpa-cpu: it is switched off" in stored[0]
    assert "shared memory" in stored[0]


def test_a_measured_choice_runs_by_direction_and_is_not_a_fallback(machine, warnings):
    with ast_fast.use_backend("reference"):
        want = results("attention")
    with _use.force({("attention", "backward"): "sdpa-cudnn"}), backend.watch() as seen:
        assert near(results("attention"), want)
    assert seen.ran == {("attention", "forward"): "triton", ("attention", "backward"): "sdpa-cudnn"}
    assert machine.calls == [("attention", "forward")] and not warnings


def test_callers_who_want_no_fixed_order_have_a_choice_of_their_own(machine):
    q = [rand(2, 20, 2, 64, seed=i) for i in range(3)]
    with (
        _use.force({("attention", "backward_any_order"): "sdpa-flash"}),
        backend.watch() as seen,
    ):
        ops.attention(*q).sum().backward()
        ops.attention(*q, deterministic=False).sum().backward()
    assert seen.ran[("attention", "backward")] == "triton"
    assert seen.ran[("attention", "backward_any_order")] == "sdpa-flash"


def test_masked_attention_is_deterministic_wherever_it_runs(machine, monkeypatch):
    """Its page says so, whatever `deterministic` is."""
    from ast_fast.ops import _sdpa

    seen = []
    real = _sdpa.backward

    def backward(*args):
        seen.append(args[9])
        real(*args)

    monkeypatch.setattr(_sdpa, "backward", backward)
    q = [rand(2, 20, 2, 64, seed=i) for i in range(3)]
    mask = ops.AttentionMask.from_dense(torch.ones(20, 20, dtype=torch.bool).tril())
    with _use.force({("attention_masked", "backward_any_order"): "sdpa-efficient"}):
        ops.attention_masked(*q, mask, deterministic=False).sum().backward()
    assert seen == [True]


def test_a_measured_choice_that_cannot_take_a_call_leaves_it_to_triton(
    machine, warnings, monkeypatch
):
    from ast_fast.ops import _sdpa

    monkeypatch.setattr(
        _sdpa, "why_not", lambda name, *rest: "NaN" if name == "sdpa-cudnn" else None
    )
    with _use.force({("attention", "forward"): "sdpa-cudnn"}), backend.watch() as seen:
        results("attention")
    assert seen.ran[("attention", "forward")] == "triton" and not warnings


def test_a_measured_choice_that_cannot_be_launched_leaves_it_to_triton(
    machine, warnings, monkeypatch
):
    from ast_fast.ops import _sdpa

    def refuse(*args):
        raise RuntimeError("cuDNN Frontend error: No valid execution plans built.")

    monkeypatch.setattr(_sdpa, "_forward", refuse)
    with _use.force({("attention", "forward"): "sdpa-cudnn"}), backend.watch() as seen:
        results("attention")
    assert seen.ran[("attention", "forward")] == "triton"
    assert len(warnings) == 1 and "No valid execution plans" in warnings[0].getMessage()


@pytest.mark.parametrize("op", ("layer_norm", "add_layer_norm", "mlp"))
def test_torch_as_a_measured_choice_gives_the_numbers_of_the_reference(op, machine):
    with ast_fast.use_backend("reference"):
        want = results(op)
    forced = {(op, "forward"): "torch", (op, "backward"): "torch"}
    with _use.force(forced), backend.watch() as seen:
        assert near(results(op), want)
    assert seen.ran == forced and not machine.calls


@pytest.mark.parametrize("op", ("patch_embed", "log_mel", "linear_fp8", "mlp_fp8"))
def test_the_reference_as_a_measured_choice(op, machine):
    with ast_fast.use_backend("reference"):
        want = results(op)
    forced = {(op, "forward"): "reference", (op, "backward"): "reference"}
    with _use.force(forced), backend.watch() as seen:
        assert near(results(op), want)
    assert seen.ran == forced and not machine.calls


def test_every_name_that_a_table_may_give_is_one_that_its_op_runs(machine):
    for op in (*backend.OPS, "linear_fp8", "mlp_fp8"):
        for direction in ("forward", "backward"):
            for name in _use.NAMES[op]:
                with _use.force({(op, direction): name}), backend.watch() as seen:
                    results(op)
                if (op, direction) != ("attention_biased", "backward"):
                    assert seen.ran[op, direction] == name


def test_the_reference_is_selectable_for_every_op(machine):
    with ast_fast.use_backend("reference"), backend.watch() as seen:
        for op in OPS:
            results(op)
    assert not machine.calls and set(seen.ran.values()) <= {"reference"}


def test_the_table_of_explain_shows_choices_fallbacks_and_failures(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine.errors["layer_norm", "forward"] = OutOfResources(1, 0, "registers")
    results("layer_norm")
    with _use.force({("attention", "backward"): "sdpa-cudnn"}):
        table = backend.explain()
        rows = {row["op"]: row for row in backend.status() if row["device"] == "cuda"}
    assert rows["attention"]["measured"] == "backward sdpa-cudnn"
    assert rows["attention"]["fallback"] == "sdpa, reference"
    assert rows["layer_norm"]["fallback"] == "reference"
    assert "registers" in rows["layer_norm"]["failed"] and not rows["mlp"]["failed"]
    assert "measured: backward sdpa-cudnn" in table and "failed: forward of float32" in table
    backend.forget_failures()
    assert "registers" not in backend.explain()


def test_the_errors_tested_are_those_of_the_triton_installed():
    assert issubclass(CompilationError, triton.errors.TritonError)
    assert issubclass(OutOfResources, triton.errors.TritonError)
