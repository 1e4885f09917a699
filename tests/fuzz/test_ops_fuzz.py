"""Shapes, strides, scales and dtypes that Hypothesis draws: budget, guard zones, no stray NaN."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from ast_fast.equivalence import cases
from ast_fast.equivalence.budgets import budget, precision_of
from ast_fast.equivalence.run_ops import draw_upstream, evaluate, evaluate_ours, place
from ast_fast.testing import (
    LAYOUTS,
    GuardZones,
    available_backends,
    guarded_memory,
    log_mel_case,
    measure,
)

CPU = torch.device("cpu")
BACKEND = available_backends()[-1]
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
LAYOUT = st.sampled_from((None, *LAYOUTS))
SEEDS = st.integers(0, 2**31)


# a row of one or two columns has an exact gradient near 0: all that is left of it is rounding
def layer_norms(op):
    return st.builds(op, st.integers(1, 40), st.integers(16, 300))


OPS = {
    "layer_norm": layer_norms(cases.layer_norm),
    "add_layer_norm": layer_norms(cases.add_layer_norm),
    "mlp": st.builds(cases.mlp, st.integers(1, 40), st.integers(1, 64), st.integers(1, 4)),
    "patch_embed": st.builds(
        cases.patch_embed,
        st.integers(1, 3),
        st.integers(32, 60),
        st.integers(1, 40),
        st.sampled_from(((16, 16), (128, 2), (32, 32), (7, 5))),
        st.tuples(st.integers(20, 128), st.integers(1, 40)),
    ),
    "attention": st.integers(1, 3).flatmap(
        lambda clips: st.integers(1, 70).flatmap(
            lambda tokens: st.builds(
                cases.attention,
                st.just(clips),
                st.just(tokens),
                st.integers(1, 3),
                st.sampled_from((32, 64, 96, 128)),
                st.none() | st.lists(st.integers(0, tokens), min_size=clips, max_size=clips),
            )
        )
    ),
    "attention_qkv": st.builds(
        cases.attention_qkv,
        st.integers(1, 3),
        st.integers(1, 150),
        st.integers(1, 3),
        st.sampled_from((32, 64, 96, 128)),
    ),
    "attention_masked": st.builds(
        cases.attention_masked,
        st.integers(1, 2),
        st.tuples(st.integers(1, 8), st.integers(1, 20)),
        st.integers(1, 3),
        st.sampled_from((32, 64, 96, 128)),
        st.none() | st.integers(0, 6),
    ),
    "attention_varlen": st.builds(
        cases.attention_varlen,
        st.lists(st.integers(1, 60), min_size=1, max_size=5),
        st.integers(1, 3),
        st.sampled_from((32, 64, 96, 128)),
    ),
}


def check(case, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = place(case.inputs(generator), CPU, dtype)
    wide = place(inputs, CPU, torch.float64)
    upstream = draw_upstream(evaluate(case.oracle, wide), generator, dtype)
    oracle = evaluate(case.oracle, wide, upstream)
    plain = evaluate(case.plain, inputs, upstream)
    zones = GuardZones()
    held = {name: zones.copy(tensor, name) for name, tensor in inputs.items()}

    def ours(tensors):
        if layout is None:
            return case.ours(tensors)
        move = LAYOUTS[layout]
        return case.ours({n: move(t) if t.is_floating_point() else t for n, t in tensors.items()})

    with guarded_memory():
        results, _, _ = evaluate_ours(case.op, ours, held, upstream, BACKEND)
    zones.check()
    precision = precision_of(dtype)
    for name, kind in case.kinds.items():
        errors = measure(results[name], oracle[name])
        allowed = budget(kind, precision, measure(plain[name], oracle[name]))
        assert allowed.admits(errors), f"{case.op} {case.shape} {dtype} {layout} {name}: {errors}"


@pytest.mark.hypothesis
@pytest.mark.parametrize("op", OPS)
def test_drawn_cases_keep_their_budgets(op):
    @given(OPS[op], DTYPES, LAYOUT, SEEDS)
    def draw(case, dtype, layout, seed):
        check(case, dtype, layout, seed)

    draw()


@given(
    st.integers(1, 4).flatmap(
        lambda clips: st.integers(1, 3000).flatmap(
            lambda samples: st.builds(
                log_mel_case,
                st.just(clips),
                st.just(samples),
                st.none() | st.lists(st.integers(0, samples), min_size=clips, max_size=clips),
            )
        )
    ),
    LAYOUT,
    SEEDS,
)
def test_drawn_waveforms_are_near_float64_and_stay_in_their_memory(case, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = place(case.inputs(generator), CPU, torch.float32)
    wide = place(inputs, CPU, torch.float64)
    upstream = draw_upstream(evaluate(case.oracle, wide), generator, torch.float32)
    oracle = evaluate(case.oracle, wide, upstream)
    zones = GuardZones()
    held = {name: zones.copy(tensor, name) for name, tensor in inputs.items()}

    def ours(tensors):
        wave = tensors["wave"] if layout is None else LAYOUTS[layout](tensors["wave"])
        return case.ours(tensors | {"wave": wave})

    with guarded_memory():
        results, _, _ = evaluate_ours("log_mel", ours, held, upstream, BACKEND)
    zones.check()
    # noise: far from the floor, where float32 keeps four digits of the logarithm
    assert measure(results["y"], oracle["y"]).max_abs < 5e-3
    assert results["dwave"].isfinite().all()
