"""What tuning compiles and times: one attention kernel in several configurations, straight from its launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .case import DTYPES, Candidate, Case, Inputs, Run, Settings, generator, oracle
from .record import Row
from .suites.attention import KINDS, WRT, first_clips, plain
from .tune_space import Entry, Place

_SPELLED = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}


def compile_row(row: Row, place: Place, entry: Entry, dtype: str, capability: int) -> Row:
    """Compile one candidate ahead of time; `row` gets what became of it."""
    from ast_fast.kernels import _aot, attention_aot
    from ast_fast.kernels.attention_problem import Config

    case = attention_aot.config_case(
        place.kernel, _SPELLED[dtype], place.arithmetic, place.width, Config(**entry), capability
    )
    found = _aot.problems(case, _aot.compile_case(case, capability))
    row.status, row.reason = ("ok", "") if not found else ("failed", "; ".join(found))
    row.provider = case.name
    return row


def tune_case(
    settings: Settings, place: Place, group: Sequence[Entry], shape: Sequence[int], dtype: str
) -> Case:
    """A case whose candidates are configurations, the committed one first."""
    from ast_fast.kernels.attention_problem import Config

    clips, tokens = shape
    heads = 2 if settings.tiny else 768 // place.width
    mode = "forward" if place.kernel == "forward" else "backward"

    def inputs(seed: int) -> Inputs:
        draw = generator(seed, settings.device)
        sizes = (clips, tokens, heads, place.width)
        made = torch.randn(4, *sizes, device=settings.device, generator=draw).to(DTYPES[dtype])
        return dict(zip(("q", "k", "v", "do"), made, strict=True))

    def made(entry: Entry) -> Candidate:
        config = Config(**entry)

        def prepare(given: list[Inputs]) -> Run:
            runs = [_run(place.kernel, config, each) for each in given]
            return lambda index: runs[index % len(runs)]()

        return Candidate(config.name, prepare)

    yardstick = Candidate("plain", _yardstick(mode), yardstick=True, timed=False)
    products = 4 if mode == "forward" else 10
    return Case(
        suite="tune",
        name=str(place),
        mode=mode,
        shape={"B": clips, "T": tokens, "H": heads, "D": place.width},
        dtype=dtype,
        outputs=("o",) if mode == "forward" else ("dq", "dk", "dv"),
        make_inputs=inputs,
        oracle=first_clips(oracle(plain, mode, WRT, ("do",)), 2),
        candidates=(*map(made, group), yardstick),
        kinds=KINDS[mode],
        clips=clips,
        flops=float(products) * clips * heads * tokens * tokens * place.width,
    )


def _yardstick(mode: str) -> Any:
    from .case import candidate
    from .peers import sdpa

    return candidate("plain", sdpa("sdpa"), mode, WRT, ("do",)).prepare


def _run(kernel: str, config: Any, given: Inputs) -> Any:
    from ast_fast.kernels import attention

    q, k, v, do = given["q"], given["k"], given["v"], given["do"]
    scale = q.shape[-1] ** -0.5
    if kernel == "forward":
        return lambda: attention.forward(q, k, v, scale, None, False, config)[:1]
    with torch.no_grad():
        o, lse = attention.forward(q, k, v, scale, None)
    options = {f"{kernel}_config": config}
    grads: tuple[Tensor, ...] = tuple(torch.empty_like(x) for x in (q, k, v))
    deterministic = kernel != "one_pass"

    def backward() -> tuple[Tensor, ...]:
        attention.backward(
            do, q, k, v, o, lse, scale, None, deterministic, *grads, False, **options
        )
        return grads

    return backward
