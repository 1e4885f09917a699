"""What the attention launchers ask the compiler for: only what the gate compiled, and little of it.

The launchers run for real on tensors of the CPU, with a driver that pretends to be a GPU; the one call
that would compile records its request instead.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not specialised", allow_module_level=True)
pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from ast_fast.attention_mask import AttentionMask
from ast_fast.kernels import (
    _aot,
    _tuned,
    attention,
    attention_launch,
    attention_masked,
    attention_varlen,
)

pytestmark = pytest.mark.aot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PretendDriver:
    """As much of a driver as a launch asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def request(fn, signature, constants, attrs, warps, stages):
    """One specialisation as something that can be compared."""
    return (
        fn.fn.__name__,
        tuple(sorted((name, str(kind)) for name, kind in signature.items())),
        tuple(sorted((path, str(value)) for path, value in constants.items())),
        tuple(sorted((path, str(value)) for path, value in attrs.items() if value)),
        warps,
        stages,
    )


@pytest.fixture
def recorder(monkeypatch):
    """A function that pretends to be a GPU of some architecture and returns the list of requests."""

    def start(arch: int) -> list:
        requests: list = []
        monkeypatch.setattr(triton.runtime.driver, "_active", PretendDriver(arch))
        monkeypatch.setattr(_tuned, "capability", lambda device: arch)
        monkeypatch.setattr(_tuned, "sm_count", lambda device: 132)

        def record(self, key, signature, device, constexprs, options, attrs, warmup):
            found = request(
                self, signature, constexprs, attrs, options.num_warps, options.num_stages
            )
            requests.append(found)

        for fn in kernels():
            fn.device_caches.clear()
            monkeypatch.setattr(type(fn), "_do_compile", record)
        return requests

    yield start
    for fn in kernels():
        fn.device_caches.clear()


def kernels() -> list:
    """Every kernel that a launch may start."""
    cases = (*attention.aot_cases(90), *attention_masked.aot_cases(90))
    return list({id(case.fn): case.fn for case in cases}.values())


def gate(arch: int, module=attention) -> set:
    """The specialisations of one kernel file that the compile gate compiles for `arch`."""
    found = set()
    for case in module.aot_cases(arch):
        source = _aot.source(case)
        constants = {(case.fn.arg_names.index(k),): v for k, v in case.constexprs.items()}
        found.add(
            request(
                case.fn, source.signature, constants, source.attrs, case.num_warps, case.num_stages
            )
        )
    return found


def run_dense(
    clips, queries, keys, heads, width, dtype, tf32=False, ragged=False, fused=False, ordered=True
):
    """Forward and backward launches of one dense problem."""
    q = torch.empty(clips, queries, heads, width, dtype=dtype)
    k, v = (torch.empty(clips, keys, heads, width, dtype=dtype) for _ in range(2))
    if fused:
        q, k, v = torch.empty(clips, queries, 3, heads, width, dtype=dtype).unbind(2)
    lengths = torch.ones(clips, dtype=torch.int32) if ragged else None
    o, lse = attention.forward(q, k, v, 0.125, lengths, allow_tf32=tf32)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    attention.backward(o, q, k, v, o, lse, 0.125, lengths, ordered, *grads, allow_tf32=tf32)


def run_packed(clips, longest, heads, width, dtype, tf32=False, ordered=True):
    """Forward and backward launches of one packed problem."""
    q, k, v = torch.empty(clips * longest, 3, heads, width, dtype=dtype).unbind(1)
    starts = torch.arange(clips + 1, dtype=torch.int32) * longest
    layout = (starts, starts, longest, longest, 0.125)
    o, lse = attention_varlen.forward(q, k, v, *layout, allow_tf32=tf32)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    attention_varlen.backward(o, q, k, v, o, lse, *layout, ordered, *grads, allow_tf32=tf32)


def run_masked(mask, clips, heads, width, dtype, tf32=False, fused=False):
    """Forward and backward launches under one mask."""
    q = torch.empty(clips, mask.queries, heads, width, dtype=dtype)
    k, v = (torch.empty(clips, mask.keys, heads, width, dtype=dtype) for _ in range(2))
    if fused:
        q, k, v = torch.empty(clips, mask.queries, 3, heads, width, dtype=dtype).unbind(2)
    rectangles = [*mask.by_query, *mask.by_key]
    o, lse = attention_masked.forward(q, k, v, rectangles, 0.125, allow_tf32=tf32)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    attention_masked.backward(o, q, k, v, o, lse, rectangles, 0.125, True, *grads, allow_tf32=tf32)


@pytest.mark.parametrize("arch", _aot.ARCHITECTURES)
def test_a_launch_asks_for_nothing_that_the_gate_did_not_compile(recorder, arch):
    requests = recorder(arch)
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and arch < 80:
            continue
        for tf32 in (False, True):
            for width in attention_launch.WIDTHS:
                run_dense(1, 5, 17, 1, width, dtype, tf32)
                run_dense(4, 1214, 1214, 12, width, dtype, tf32, fused=True)
                run_dense(2, 160, 33, 3, width, dtype, tf32, ragged=True)
                run_packed(3, 48, 2, width, dtype, tf32)
                run_dense(4, 160, 1214, 12, width, dtype, tf32, fused=True, ordered=False)
                run_packed(3, 48, 2, width, dtype, tf32, ordered=False)
    unaligned = torch.empty(2 * 9 * 2 * 64 + 1, dtype=torch.float16)[1:].view(2, 9, 2, 64)
    o, lse = attention.forward(unaligned, unaligned, unaligned.expand(2, 9, 2, 64), -1.0, None)
    grads = [torch.empty_like(unaligned) for _ in range(3)]
    expanded = o[:, :1].expand(2, 9, 2, 64)
    attention.backward(expanded, unaligned, unaligned, unaligned, o, lse, 0.1, None, False, *grads)
    assert requests
    missing = set(requests) - gate(arch)
    assert not missing, f"{len(missing)} of {len(set(requests))}, for example {missing.pop()}"


@pytest.mark.parametrize("arch", [80, 90])
def test_batch_and_length_do_not_recompile(recorder, arch):
    requests = recorder(arch)
    for clips in (1, 2, 3, 8, 15, 16, 33, 64):
        run_dense(clips, 600, 600, 12, 64, torch.float16, fused=True)
    dense = len(set(requests))
    run_packed(16, 600, 12, 64, torch.float16)
    assert len(set(requests)) == dense + 1, "packed clips share all but the list of tiles"
    by_kernel: dict[str, set] = {}
    for found in requests:
        by_kernel.setdefault(found[0], set()).add(found)
    # forward has a second, smaller tile for grids that do not fill the GPU
    assert {name: len(found) for name, found in by_kernel.items()} == {
        "attention_forward_kernel": 2,
        "attention_dq_kernel": 1,
        "attention_dkv_kernel": 1,
        "attention_tile_list_kernel": 1,
    }
    before = set(requests)
    for length in (1, 2, 16, 127, 128, 1214, 2048):
        run_dense(16, length, length, 12, 64, torch.float16, fused=True)
        run_dense(1, length, 77, 12, 64, torch.float16, ragged=True)
        for clips in (1, 16, 300):
            run_packed(clips, length, 12, 64, torch.float16)
    assert set(requests) == before


@pytest.mark.parametrize("arch", [80, 90])
def test_the_one_pass_backward_compiles_three_kernels(recorder, arch):
    requests = recorder(arch)
    run_dense(2, 600, 600, 12, 64, torch.float16, fused=True)
    run_packed(2, 600, 12, 64, torch.float16)
    requests.clear()
    for clips in (1, 2, 16, 33):
        for length in (1, 16, 127, 602):
            run_dense(clips, length, length, 12, 64, torch.float16, fused=True, ordered=False)
            run_dense(clips, length, 77, 12, 64, torch.float16, ragged=True, ordered=False)
            run_packed(clips, length, 12, 64, torch.float16, ordered=False)
    backward = {found[0] for found in requests} - {"attention_forward_kernel"}
    assert backward == {
        "attention_delta_kernel",
        "attention_one_pass_kernel",
        "attention_round_kernel",
        "attention_tile_list_kernel",
    }
    assert len({found for found in requests if found[0] in backward}) == len(backward)


@pytest.mark.parametrize("arch", _aot.ARCHITECTURES)
def test_a_masked_launch_asks_for_nothing_that_the_gate_did_not_compile(recorder, arch):
    requests = recorder(arch)
    masks = [
        AttentionMask.factorised(12, 25),
        AttentionMask.time_window(12, 25, 3),
        AttentionMask.from_dense(torch.ones(5, 300, dtype=torch.bool)),
    ]
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and arch < 80:
            continue
        for tf32 in (False, True):
            for width in attention_launch.WIDTHS:
                for mask in masks:
                    run_masked(mask, 2, 3, width, dtype, tf32, fused=mask.queries == mask.keys)
    run_masked(masks[2], 1, 1, 64, torch.float16)
    assert requests
    missing = set(requests) - gate(arch, attention_masked)
    assert not missing, f"{len(missing)} of {len(set(requests))}, for example {missing.pop()}"


def test_masks_and_batches_do_not_recompile(recorder):
    requests = recorder(90)
    for clips in (1, 3, 16):
        for t_dim in (20, 25, 64):
            run_masked(
                AttentionMask.factorised(12, t_dim), clips, 12, 64, torch.bfloat16, fused=True
            )
    by_kernel: dict[str, set] = {}
    for found in requests:
        by_kernel.setdefault(found[0], set()).add(found)
    # no more than the tiles of the table
    assert by_kernel
    for kernel, fn in attention_masked.KERNELS.items():
        offered = attention_masked.table_configs(90, kernel, "16bit", 64)
        assert len(by_kernel[fn.fn.__name__]) <= len(offered)
