"""Whether a library is to run an op in place of our kernels: the choice that a measurement allows.

A library is taken where it is faster by more than noise, and may stand for ours: a backward that callers
want the same bits of twice stays ours unless the library's is as repeatable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .tune_slots import Slot

# a library must be faster than ours by this factor in the median, and faster at all in 80 % of the rounds
WORTH = 1.03
# by op and direction: the measured libraries that a table may name, and by which name. Left out:
# - the gradients of SDPA add up in any order, so they serve callers with deterministic=False alone;
# - those of the convolution and of the references of log-mel and patches scatter with atomics.
ALLOWED: dict[tuple[str, str], dict[str, str]] = {
    ("attention", "forward"): {name: name for name in ("sdpa-cudnn", "sdpa-flash")}
    | {"sdpa-efficient": "sdpa-efficient"},
    ("attention", "backward_any_order"): {
        name: name for name in ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
    },
    ("layer_norm", "forward"): {"torch": "torch"},
    ("layer_norm", "backward"): {"torch": "torch"},
    ("add_layer_norm", "forward"): {"torch": "torch"},
    ("add_layer_norm", "backward"): {"torch": "torch"},
    ("mlp", "forward"): {"torch": "torch"},
    ("mlp", "backward"): {"torch": "torch"},
    ("log_mel", "forward"): {"torch": "reference"},
    ("patch_embed", "forward"): {"torch-unfold": "reference"},
    # a boolean beside the configuration: ours in place of cuBLAS and a kernel after it
    ("gemm", "forward"): {"torch": "cublas"},
    ("gemm", "backward"): {"torch": "cublas"},
}
OURS = "triton"


class Against(NamedTuple):
    """Times of a library over the committed configuration's, round by round."""

    p20: float
    p50: float
    p80: float


def use_key(place: Slot) -> tuple[str, ...] | None:
    """Which choice measurements of a slot decide: op, direction and what else it is by; None: none."""
    if (place.op, place.direction) not in ALLOWED:
        return None
    if place.op == "attention":
        return (place.op, place.direction, *place.path[1:3])
    if place.op == "gemm":
        return (place.op, place.direction, place.path[0])
    return (place.op, place.direction)


def choose(
    op: str, direction: str, ours: float, libraries: Mapping[str, Against]
) -> tuple[str, float]:
    """The name for the table, and the factor by which it is faster than the other choice's best.

    Args:
        op: the op.
        direction: `forward`, `backward` or `backward_any_order`.
        ours: time of our best configuration over the committed one's.
        libraries: what each library took over the committed one's time.
    """
    names = ALLOWED.get((op, direction), {})
    # below 1 the library is faster
    ratios = {name: each.p50 / ours for name, each in libraries.items() if name in names}
    if not ratios:
        return OURS, 1.0
    fastest = min(ratios, key=lambda name: ratios[name])
    steady = libraries[fastest].p80 < ours
    if ratios[fastest] * WORTH < 1.0 and steady:
        return names[fastest], 1.0 / ratios[fastest]
    return OURS, ratios[fastest]


def fused_is_faster(ours: float, library: Against) -> bool:
    """Whether our product with its epilogue beats cuBLAS and a kernel after it: the other way round."""
    return library.p50 / ours > WORTH and library.p20 > ours
