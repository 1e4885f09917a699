"""The check that all warps meet between a wgmma wait and the copy that may overwrite its operands."""

from __future__ import annotations

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

from ast_fast.kernels import _aot
from ast_fast.kernels._aot_barriers import races
from ast_fast.kernels._aot_buffers import places_of_plain_copies

pytestmark = pytest.mark.aot

MMA = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, 1, 1, 1, 0, 0;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
TMA = (
    "@%p1 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%r3], [%rd3, {%r4, %r5, %r6, %r7}], [%r8];"
)
CP_ASYNC = "cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r10;"
BARRIER = "bar.sync 	0;"
MBARRIER = """{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r11], %r12;
	@!complete bra.uni waitLoop;
}"""


def kernel(*lines: str) -> str:
    """A kernel with this body, its parameters and comments as Triton writes them."""
    head = ".version 8.7\n.target sm_90a\n.visible .entry k(\n\t.param .u64 k_param_0\n)\n"
    body = "\n".join(f"\t.loc\t1 10 7  // file.py:10:7\n\t{line}" for line in lines)
    return f"{head}.reqntid 256\n{{\n\t.reg .pred %p<9>; // {{ not a block\n{body}\n\tret;\n}}\n"


def copies(*lines: str, warps: int = 8) -> list[str]:
    """The instructions of the copies that race."""
    return [race.copy.split(" ")[0].rpartition("@")[2] for race in races(kernel(*lines), warps)]


@pytest.mark.parametrize("copy", [TMA, CP_ASYNC])
def test_a_copy_after_a_wait_needs_a_barrier_in_between(copy):
    assert len(copies(MMA, WAIT, copy)) == 1
    assert copies(MMA, WAIT, BARRIER, copy) == []
    assert copies(MMA, BARRIER, WAIT, copy), "a barrier before the wait does not help"
    assert copies(copy, MMA, WAIT) == [], "what was copied before is what the product reads"


def test_lines_are_those_of_the_ptx():
    (race,) = races(text := kernel(MMA, WAIT, TMA), 8)
    lines = text.splitlines()
    assert lines[race.wait_line - 1].strip() == WAIT
    assert lines[race.copy_line - 1].strip() == TMA


def test_a_single_warpgroup_is_exempt():
    assert copies(MMA, WAIT, TMA, warps=4) == []
    assert copies(MMA, WAIT, TMA, warps=16)


@pytest.mark.parametrize("barrier", [(), (BARRIER,)])
def test_the_copy_of_the_next_iteration_is_found_around_the_back_edge(barrier):
    found = copies(
        CP_ASYNC, "$L__BB0_1:  // the loop", TMA, MMA, WAIT, *barrier, "@%p2 bra \t$L__BB0_1;"
    )
    assert len(found) == (0 if barrier else 1)


def test_every_path_needs_its_barrier():
    both = ("@%p2 bra $L__BB0_1;", BARRIER, "bra.uni $L__BB0_2;", "$L__BB0_1:")
    assert copies(MMA, WAIT, *both, "$L__BB0_2:", TMA)
    assert copies(MMA, WAIT, *both, BARRIER, "$L__BB0_2:", TMA) == []
    # a path that ends is none
    assert copies(MMA, WAIT, "@%p2 bra $L__BB0_1;", "ret;", "$L__BB0_1:", BARRIER, TMA) == []
    assert copies(MMA, WAIT, "@%p2 ret;", TMA)


def test_an_mbarrier_tells_nothing_of_the_other_warpgroup():
    assert copies(MMA, WAIT, MBARRIER, TMA)
    assert copies(MMA, WAIT, MBARRIER, BARRIER, MBARRIER, TMA) == [], "labels are those of a block"


@pytest.mark.parametrize(
    ("barrier", "counts"),
    [
        ("bar.sync 0;", True),
        ("bar.sync 1, 256;", True),
        ("bar.sync 1, 128;", False),
        ("bar.sync %r1, %r2;", False),
        ("barrier.sync 0;", True),
        ("barrier.cta.sync.aligned 0;", True),
        ("barrier.cta.sync.aligned 2, 128;", False),
        ("bar.red.popc.u32 %r1, 0, %p1;", True),
        ("bar.red.popc.u32 %r1, 0, 128, %p1;", False),
        ("bar.warp.sync -1;", False),
        ("bar.arrive 0, 256;", False),
        ("@%p3 bar.sync 0;", False),
        ("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;", True),
        ("barrier.cluster.wait.aligned;", False),
        ("barrier.cluster.arrive.aligned;", False),
        ("fence.proxy.async.shared::cta;", False),
    ],
)
def test_only_a_barrier_of_all_threads_counts(barrier, counts):
    assert bool(copies(MMA, WAIT, barrier, TMA)) != counts


def test_a_cluster_arrival_before_the_wait_does_not_count():
    arrive, wait = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
    assert copies(MMA, arrive, WAIT, wait, TMA)


def test_copies_out_of_shared_memory_and_prefetches_are_none():
    store = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];"
    reduce = (
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd1, {%r1}], [%r3];"
    )
    prefetch = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd1, {%r1, %r2}];"
    commit = "cp.async.commit_group;"
    assert copies(MMA, WAIT, store, reduce, prefetch, commit) == []


HERE = ("kernel.py", 5, 7)


@pytest.mark.parametrize(
    ("harmless", "looped", "races_found"),
    [({HERE}, True, 0), ({HERE}, False, 1), ({("kernel.py", 6, 7)}, True, 1), (set(), True, 1)],
)
def test_a_copy_that_no_product_reads_is_left_out_within_the_loop_of_the_wait(
    harmless, looped, races_found
):
    loop = "@%p2 bra $L__BB0_1;" if looped else "mov.b32 %r1, %r2;"
    text = kernel("$L__BB0_1:", MMA, WAIT, ".loc\t1 5 7  // kernel.py:5:7", CP_ASYNC, loop)
    # the kernel's own lines put a position of another file before every statement
    text = text.replace("\t.loc\t1 10 7  // file.py:10:7\n\tcp", "\tcp")
    text += '\t.file\t1 "kernel.py"\n'
    assert len(races(text, 8, frozenset(harmless))) == races_found


def test_buffers_of_threads_are_told_from_those_of_products():
    copy = "ttg.async_copy_global_to_local"
    text = f"""
    %x = ttg.local_alloc : () -> !ttg.memdesc<2x64x32xi16> loc(#loc9)
    %g = ttg.local_alloc : () -> !ttg.memdesc<2x32x64xf16> loc(#loc9)
    %both = ttg.local_alloc : () -> !ttg.memdesc<2x32x64xf16> loc(#loc9)
    %x_1 = ttg.memdesc_index %x[%c0] : !ttg.memdesc<2x64x32xi16> -> !ttg.memdesc<64x32xi16> loc(#loc9)
    %c1 = {copy} %p, %x_1 mask %m : tensor<64x32> -> <64x32xi16> loc(#loc1)
    %g_1 = ttg.memdesc_index %g[%c0] : !ttg.memdesc<2x32x64xf16> -> !ttg.memdesc<32x64xf16> loc(#loc9)
    %c2 = {copy} %p, %g_1 mask %m : tensor<32x64> -> <32x64xf16> loc(#loc2)
    %both_1 = ttg.memdesc_index %both[%c0] : !ttg.memdesc<2x3> -> !ttg.memdesc<32x64xf16> loc(#loc9)
    %c3 = {copy} %p, %both_1 mask %m : tensor<32x64> -> <32x64xf16> loc(#loc5)
    %c4 = {copy} %p, %x_1 mask %m : tensor<32x64> -> <32x64xf16> loc(#loc5)
    %v = ttg.local_load %x_1 : !ttg.memdesc<64x32xi16> -> tensor<64x32xi16> loc(#loc9)
    %g_2 = ttg.memdesc_trans %g_1 : !ttg.memdesc<32x64xf16> -> !ttg.memdesc<64x32xf16> loc(#loc9)
    %s = ttng.warp_group_dot %a, %g_2, %acc : tensor<64x32xf16> * !ttg.memdesc<64x32xf16> loc(#loc9)
    %t = ttng.warp_group_dot %a, %both_1, %acc : tensor<64x32> * !ttg.memdesc<64x32> loc(#loc9)
#loc1 = loc("x"(#loc3))
#loc2 = loc("kernel.py":6:7)
#loc3 = loc(callsite(#loc4 at #loc2))
#loc4 = loc("kernel.py":5:7)
#loc5 = loc("kernel.py":8:7)
"""
    # line 8 copies into both kinds
    assert places_of_plain_copies(text) == {HERE}


def test_a_branch_that_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="no label"):
        copies(MMA, WAIT, "bra.uni $L__BB0_9;", TMA)
    with pytest.raises(ValueError, match="computed"):
        copies(MMA, WAIT, "brx.idx %r1, targets;", TMA)


def test_the_gate_refuses_a_kernel_with_a_race():
    case = _aot.AotCase("case", None, {}, {})
    report = _aot.AotReport("case", 90, 128, 0, 1000, 0, frozenset(), ("line 7 of the PTX",))
    assert "line 7" in " ".join(_aot.problems(case, report))


@pytest.mark.parametrize("module", ["attention", "gemm"])
def test_a_compiled_kernel_whose_barriers_are_taken_out_is_found(module):
    case = next(c for c in _aot.cases_of(module, 90) if c.num_warps == 8 and "tma" in c.expect)
    ptx = _aot.build(case, 90).asm["ptx"]
    assert races(ptx, case.num_warps) == []
    without = re.sub(r"^\s*bar(?:rier)?[.\w]*\.sync[^\n]*;$", "", ptx, flags=re.MULTILINE)
    assert without != ptx and races(without, case.num_warps)
