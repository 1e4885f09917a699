"""Every registered op called with wrong arguments, one at a time: it raises, and writes nowhere it should not."""

import math

import pytest
import torch
from torch.utils._pytree import tree_map

from ast_fast import ops, use_backend
from ast_fast.testing import (
    LAYOUTS,
    GuardZones,
    assert_same,
    available_backends,
    guarded_memory,
    measure,
    random_tensor,
)
from ast_fast.testing_calls import op_calls, registered_ops

BACKENDS = (*available_backends(), "auto")
OPS = sorted(registered_ops())
ERRORS = (ValueError, RuntimeError, TypeError, NotImplementedError)

# What nothing else in the call fixes: changed alone it makes another right call, with the reference's result.
# A batch may have any size where one operand alone has it, a waveform any samples, a spectrogram frames that
# fill no patch, and parameters another floating dtype than the rows.
ROWS = ("shorter", "nothing", "deeper")
RIGHT = {
    "add_layer_norm": dict.fromkeys(("x", "residual", "weight", "bias"), ("halves",)),
    "add_layer_norm_backward": dict.fromkeys(("dy", "dtotal", "total", "weight"), ("halves",)),
    "attention": {"backend": ("'sdpa'",)},
    "attention_backward": {"backend": ("'sdpa'",)},
    "attention_biased": {"backend": ("'sdpa'",)},
    "attention_masked": {"backend": ("'sdpa'",)},
    "attention_masked_backward": {"backend": ("'sdpa'",)},
    "attention_qkv": {"qkv": ("narrower", "halves"), "backend": ("'sdpa'",)},
    "attention_qkv_backward": {"backend": ("'sdpa'",)},
    "attention_varlen": {"backend": ("'sdpa'",)},
    "attention_varlen_backward": {"backend": ("'sdpa'",)},
    "layer_norm": {"x": (*ROWS, "halves"), "weight": ("halves",), "bias": ("halves",)},
    "layer_norm_backward": dict.fromkeys(("dy", "x", "weight"), ("halves",)),
    "linear_fp8": dict.fromkeys(
        ("x", "residual", "norm_weight", "norm_bias", "weight", "bias"), ("halves",)
    ),
    # rows are padded with zeros to 16s: a row less is one without a gradient
    "linear_fp8_backward": {"dy": ("shorter", "deeper", "halves"), "weight": ("halves",)},
    "log_mel": {"wave": ("narrower", "integers", "halves")},
    "log_mel_backward": {"dy": ("halves",), "wave": ("narrower", "halves")},
    "mlp": {"x": ROWS},
    "mlp_fp8": dict.fromkeys(
        ("x", "residual", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2"), ("halves",)
    ),
    "mlp_fp8_backward": {
        "dy": ("deeper", "halves"),
        "saved": ("[2] halves",),
        "w1": ("halves",),
        "w2": ("halves",),
    },
    "patch_embed": {
        "x": ("shorter", "nothing"),
        "weight": ("narrower",),
        "pos": ("halves",),
        "prefix": ("halves",),
    },
    "patch_embed_backward": {"weight": ("narrower",)},
}


def hostile_tensors(t):
    """Wrong versions of a tensor, by what is wrong."""
    if t.dim():
        yield "narrower", t[..., :-1]
        yield "shorter", t[:-1]
        yield "nothing", t[:0]
    yield "deeper", t[None]
    yield "flatter", t.flatten(0, 1) if t.dim() > 1 else t.sum()
    if t.is_floating_point():
        yield "integers", t.to(torch.int16)
        yield "complex", t.to(torch.complex64)
        yield "halves", t.half()
    else:
        yield "floats", t.float()
    yield "elsewhere", t.to("meta")


def hostile_values(kind, name, value):
    """Wrong versions of an argument, by what is wrong."""
    if isinstance(value, torch.Tensor):
        yield from hostile_tensors(value)
    elif kind.startswith("List[Tensor]"):
        yield "one missing", value[:-1]
        yield "none", []
        for place, each in enumerate(value):
            for what, wrong in hostile_tensors(each):
                yield f"[{place}] {what}", [*value[:place], wrong, *value[place + 1 :]]
    elif name == "backend":
        for wrong in ("", "triton", "torch", "sdpa", "sdpa-flash", "cuda", "CPP"):
            yield repr(wrong), wrong
    elif kind == "float":
        yield "nan", math.nan
        yield "inf", math.inf
        yield "-inf", -math.inf
        if name in ("eps", "std"):
            yield "negative", -1.0
        if name == "std":
            yield "zero", 0.0
    elif name == "out_dtype":
        yield "int32", torch.int32
        yield "complex64", torch.complex64
    elif kind == "int":
        yield "negative", -1
        if name != "num_prefix" and not name.startswith("num_frames"):
            yield "zero", 0
    elif kind == "List[float]":
        yield "one missing", value[:-1]
        yield "none", []
        for place in range(4):
            yield f"[{place}] nan", [*value[:place], math.nan, *value[place + 1 :]]
            yield f"[{place}] negative", [*value[:place], -1.0, *value[place + 1 :]]
            yield f"[{place}] huge", [*value[:place], 1e300, *value[place + 1 :]]
    elif kind == "List[bool]":
        yield "one missing", value[:-1]
        yield "one more", [*value, True]


def calls_of(name, backend):
    """The right calls of an op."""
    for label, op, args in op_calls("reference", torch.float32):
        if label.split()[0] == name:
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            yield label, op, [*plain[:-1], backend]


def tensors_of(value):
    found = value if isinstance(value, (list, tuple)) else (value,)
    return [t for t in found if isinstance(t, torch.Tensor)]


def outcome(op, args):
    """What a call gives, made with every tensor between guard zones."""
    zones = GuardZones()

    def held(a):
        if isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
            return [held(each) for each in a]
        if isinstance(a, torch.Tensor) and a.device.type == "cpu" and not a.is_complex():
            return zones.copy(a)
        return a

    try:
        with guarded_memory():
            return op(*(held(a) for a in args))
    finally:
        zones.check()


def changed_calls(name, backend):
    """Calls of an op with one argument changed: the call, the argument and what was done to it."""
    fp8 = "fp8" in name and backend == "cpp"  # which has none, and says so
    calls = list(calls_of(name, "reference" if fp8 else backend))
    assert calls, f"ast_fast::{name} has no call in ast_fast.testing_calls: add one"
    for label, op, args in calls[1:]:
        outcome(op, args)
        for place, argument in enumerate(op.default._schema.arguments):
            kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
            kind = str(argument.type) if kind.startswith("List") else kind
            for what, wrong in hostile_values(kind, argument.name, args[place]):
                yield label, op, [*args[:place], wrong, *args[place + 1 :]], argument.name, what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_a_wrong_argument_raises_and_the_others_give_the_result_of_the_reference(name, backend):
    right = {(n, what) for n, changes in RIGHT.get(name, {}).items() for what in changes}
    passed = set()
    for label, op, args, argument, what in changed_calls(name, backend):
        try:
            got = outcome(op, args)
        except ERRORS:
            continue
        passed.add((argument, what))
        assert (argument, what) in right, f"{label}: {argument} {what} did not raise"
        want = outcome(op, [*args[:-1], "reference"])
        for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            if a.dtype != torch.uint8 and a.numel() and bool(b.isfinite().any()):
                finite = b.isfinite()
                assert torch.equal(a.isfinite(), finite)
                assert measure(a[finite], b[finite]).rel_l2 < 1e-2, (label, argument, what)
    if backend == "reference":
        assert passed == right, "what RIGHT lists is not right any more"


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_argument_raises_on_tensors_without_memory(name):
    right = RIGHT.get(name, {})
    seen = 0
    for _, op, args, argument, what in changed_calls(name, "reference"):
        if what.split()[-1] not in ("narrower", "flatter", "integers", "complex"):
            continue
        if what in right.get(argument, ()) or argument in ("key_lengths", "lengths"):
            continue
        if argument == "rectangles":  # a mask stays on the CPU
            continue
        seen += 1
        with pytest.raises(ERRORS):
            op(*tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, args))
    assert seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_strides_do_not_matter(name, backend):
    fp8 = "fp8" in name and backend == "cpp"
    label, op, args = list(calls_of(name, "reference" if fp8 else backend))[-1]
    want = tensors_of(op(*args))
    for layout, move in LAYOUTS.items():
        for place, value in enumerate(args):
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            got = tensors_of(op(*args[:place], move(value), *args[place + 1 :]))
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.stride() == b.stride()
                same = torch.equal(a, b) or measure(a, b).rel_l2 < 1e-5
                assert same or a.dtype == torch.uint8, (label, layout, place)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ extension is not built")
def test_a_call_that_was_right_excuses_no_other():
    registry = torch.ops.ast_fast
    q = random_tensor(2, 5, 2, 32, seed=0).requires_grad_()
    short = q.detach()[:, :4]

    def wrong():
        with pytest.raises(ValueError, match="v has shape"):
            registry.attention(q.detach(), q.detach(), short, None, 0.2, True, False, "cpp")

    seen = []

    def pack(x):
        # runs in the middle of a call whose arguments a wrapper has checked
        seen.append(wrong())
        return x

    with use_backend("cpp"):
        for _ in range(2):
            ops.attention(q, q, q).sum().backward()
            wrong()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ops.attention(q, q, q)
    assert seen
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    args = (*[q.detach()[0]] * 3, starts, starts, 3, 3, 0.2, True, False, "cpp")
    registry.attention_varlen(*args)
    starts[1] = 7
    with pytest.raises(ValueError, match="cu_seqlens_q is"):
        registry.attention_varlen(*args)


FAR = [-(2**40), -1, 0, 3, 17, 18, 2**31, 2**32 + 3, 2**62]


@pytest.mark.parametrize("backend", (*BACKENDS, "sdpa"))
def test_key_lengths_beyond_32_bits_do_not_wrap(backend):
    registry = torch.ops.ast_fast
    q, k, v, do = (random_tensor(len(FAR), 17, 2, 32, seed=seed) for seed in range(4))
    far = torch.tensor(FAR)
    near = far.clamp(0, 17).to(torch.int32)
    results = []
    for lengths in (far, near):
        options = (lengths, 0.2, True, False, backend)
        o, lse = registry.attention(q, k, v, *options)
        grads = registry.attention_backward(do, q, k, v, o, lse, *options)
        qkv = torch.stack((q, k, v), 2)
        fused = registry.attention_qkv(qkv, *options)
        dqkv = registry.attention_qkv_backward(do, qkv, *fused, *options)
        results.append((o, lse, *grads, *fused, dqkv))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)
    if backend in available_backends():
        with use_backend(backend):
            made = ops.attention(q, k, v, 0.2, far), ops.attention(q, k, v, 0.2, near)
        assert_same(*made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_waveforms_beyond_their_samples_do_not_wrap(backend):
    registry = torch.ops.ast_fast
    _, _, args = list(calls_of("log_mel", backend))[-1]
    setting, (num_frames, mean, std) = args[2], args[3:6]
    far = torch.tensor([-(2**40), -1, 0, 500, 1600, 2**31, 2**32 + 500, 2**62])
    wave = random_tensor(len(far), 1600, seed=0)
    dy = random_tensor(len(far), num_frames, int(setting[1]), seed=1)
    results = []
    for lengths in (far, far.clamp(0, 1600)):
        y = registry.log_mel(wave, lengths, setting, num_frames, mean, std, torch.float32, backend)
        dwave = registry.log_mel_backward(dy, wave, lengths, setting, mean, std, backend)
        results.append((y, dwave))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


WRONG_STARTS = {
    "backwards": [0, 16, 3, 34],
    "past the end": [0, 16, 35],
    "short of the end": [0, 16, 33],
    "late": [1, 16, 34],
    "negative": [0, -4, 34],
    "far": [0, 2**31 - 1, -(2**31), 34],
    "alone": [0],
}


@pytest.mark.parametrize("backend", (*BACKENDS, "sdpa"))
@pytest.mark.parametrize("wrong", WRONG_STARTS.values(), ids=WRONG_STARTS)
@pytest.mark.parametrize("side", (0, 1))
@pytest.mark.parametrize("name", ("attention_varlen", "attention_varlen_backward"))
def test_starts_that_bound_no_clips_are_named(name, side, wrong, backend):
    _, op, args = list(calls_of(name, backend))[-1]
    place = [a.name for a in op.default._schema.arguments].index("cu_seqlens_q")
    right = [0] + [34] * (len(wrong) - 1)
    starts = [torch.tensor(right, dtype=torch.int32) for _ in range(2)]
    starts[side] = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected|lse has"):
        outcome(op, [*args[:place], *starts, *args[place + 2 :]])
    if name == "attention_varlen" and backend in available_backends() and len(wrong) > 1:
        letter = "qk"[side]
        with use_backend(backend), pytest.raises(ValueError, match=f"cu_seqlens_{letter} is"):
            ops.attention_varlen(*args[:3], *starts, 34, 34)


def test_a_clip_longer_than_was_said_is_named():
    q = random_tensor(20, 2, 32, seed=0)
    starts = torch.tensor([0, 13, 20], dtype=torch.int32)
    for longest, name in (((12, 13), "max_seqlen_q=12"), ((13, 12), "max_seqlen_k=12")):
        with pytest.raises(ValueError, match=f"{name}.*expected 13 or more"):
            ops.attention_varlen(q, q, q, starts, starts, *longest)
    assert ops.attention_varlen(q, q, q, starts, starts, 13, 99).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("attention_masked", "attention_masked_backward"))
def test_tokens_of_a_mask_beyond_the_sequence_raise(name, backend):
    _, op, args = list(calls_of(name, backend))[-1]
    place = [a.name for a in op.default._schema.arguments].index("rectangles")
    for index, tensor in enumerate(args[place]):
        if not tensor.numel() or tensor.dtype == torch.uint8:
            continue
        for value in (-7, 17, 2**30):
            moved = tensor.clone()
            moved.view(-1)[0] = value
            rectangles = [*args[place][:index], moved, *args[place][index + 1 :]]
            with pytest.raises(ValueError, match="rectangles do not fit"):
                outcome(op, [*args[:place], rectangles, *args[place + 1 :]])
