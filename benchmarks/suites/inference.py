"""Whole models, features or waveforms to logits, at batch 1 (latency) and more (throughput)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings, Skipped, generator
from ..models import (
    DEPTH,
    LABELS,
    State,
    forward_flops,
    oracle,
    ours,
    plain,
    weights,
    with_timm,
    with_transformers,
)
from ..peers import compiled, compiled_frozen, compiled_parts, need
from ..runtimes import RUNTIMES

Build = Callable[[str, int, int, State], nn.Module]

# on a CPU the check runs on this many of the identical blocks, where float64 is quick enough
GATE_DEPTH = {"cpu": 3, "cuda": DEPTH}


def depth_of(settings: Settings) -> int:
    """Blocks of a model that is timed."""
    return 2 if settings.tiny else DEPTH


def gate_depth(settings: Settings) -> int:
    """Blocks of a model that is checked."""
    return min(depth_of(settings), GATE_DEPTH[settings.device])


def on(model: nn.Module, settings: Settings, dtype: str) -> nn.Module:
    """The model on the device in a dtype; autocast keeps float32 weights."""
    return model.to(settings.device, DTYPES.get(dtype, torch.float32))


def shapes(settings: Settings) -> list[tuple[str, int, int, bool]]:
    """Size, frames, clips, and whether every peer takes part or transformers' SDPA path alone."""
    if settings.tiny:
        return [("tiny", 36, 2, True)]
    if settings.cuda:
        full = [("base", 1024, 32, True), ("base", 1024, 1, True), ("small", 1024, 64, False)]
        return (
            full[:2]
            if settings.quick
            else [*full, ("base", 512, 64, False), ("base", 128, 128, False)]
        )
    if settings.quick:
        return [("tiny", 128, 1, False), ("small", 128, 4, False)]
    return [
        *(("base", 1024, 1, False), ("base", 512, 1, False), ("base", 128, 1, True)),
        *(("base", 128, 4, False), ("small", 1024, 1, False), ("small", 512, 4, False)),
        *(("small", 128, 4, False), ("tiny", 1024, 1, False), ("tiny", 512, 4, False)),
        *(("tiny", 128, 1, False), ("tiny", 128, 4, False)),
    ]


def _candidate(
    name: str,
    build: Build,
    settings: Settings,
    size: str,
    frames: int,
    dtype: str,
    *,
    compile_: bool = False,
    frozen: bool = False,
    timed: bool = True,
) -> Candidate:
    def model(depth: int) -> nn.Module:
        state = weights(size, frames, depth)
        return on(build(size, frames, depth, state), settings, dtype).eval()

    def runner(depth: int, inputs: list[Inputs], gate: bool = False) -> Run:
        network = model(depth)
        # a check need not compile a whole network of another batch size
        finish = compiled_parts if gate else compiled
        call = finish(network) if compile_ else network
        if frozen:
            call = compiled_frozen(network, parts=gate)

        def run(index: int) -> tuple[Tensor]:
            with torch.no_grad():
                return (call(inputs[index % len(inputs)]["x"]),)

        return run

    return Candidate(
        name,
        lambda inputs: runner(depth_of(settings), inputs),
        yardstick=name == "torch",
        prepare_gate=lambda given: runner(gate_depth(settings), [given], gate=True),
        timed=timed,
    )


def _exported(name: str, settings: Settings, size: str, frames: int) -> Candidate:
    """The plain model in a runtime of its own; same number of threads."""
    start = RUNTIMES[name]

    def runner(depth: int, inputs: list[Inputs]) -> Run:
        if settings.cuda:
            raise Skipped("measured on the CPU only")
        network = plain(size, frames, depth, weights(size, frames, depth)).eval()
        infer = start(network, inputs[0]["x"].float())
        return lambda index: (infer(inputs[index % len(inputs)]["x"]),)

    return Candidate(
        name,
        lambda inputs: runner(depth_of(settings), inputs),
        yardstick=name == "torch-int8",
        prepare_gate=lambda given: runner(gate_depth(settings), [given]),
    )


def packed(settings: Settings, dtype: str) -> Build:
    """Ours as it is meant to be run: with packed weights on a CPU."""

    def build(size: str, frames: int, depth: int, state: State) -> nn.Module:
        model = on(ours(size, frames, depth, state), settings, dtype)
        if settings.cuda or settings.backend != "cpp":
            return model
        optimize = need("ast_fast.optimized").optimize_for_inference
        try:
            return optimize(model, "int8" if dtype == "int8" else "exact")
        except ValueError as error:
            raise Skipped(str(error)) from error

    return build


def spectrograms(
    settings: Settings, frames: int, clips: int, dtype: str, labelled: bool = False
) -> Callable[[int], Inputs]:
    """Draws x [B, S, 128] of normalised spectrograms, and y [B, 527] where a loss wants it."""

    def make(seed: int) -> Inputs:
        draw = generator(seed, settings.device)
        x = torch.randn(clips, frames, 128, device=settings.device, generator=draw) * 0.5
        inputs = {"x": x.to(DTYPES.get(dtype, torch.float32))}
        if labelled:
            y = torch.rand(clips, LABELS, device=settings.device, generator=draw) < 0.02
            inputs["y"] = y.float()
        return inputs

    return make


def oracle_of(size: str, frames: int, settings: Settings, dtype: str):  # type: ignore[no-untyped-def]
    def compute(inputs: Inputs) -> tuple[Tensor]:
        depth = gate_depth(settings)
        # the weights as this dtype rounds them: what is measured is arithmetic, not storage
        rounded = DTYPES.get(dtype, torch.float32)
        state = {k: v.to(rounded) for k, v in weights(size, frames, depth).items()}
        network = oracle(size, frames, depth, state).to(settings.device)
        with torch.no_grad():
            return (network(inputs["x"][:1].double()),)

    return compute


def cases(settings: Settings) -> Iterator[Case]:
    """Features to logits over sizes and lengths, then waveforms to logits at the full length."""
    dtypes = [dtype for dtype in settings.dtypes if dtype in DTYPES]
    if "bf16" in dtypes and not settings.cuda and settings.backend == "cpp":
        dtypes.append("int8")
    for dtype in dtypes:
        for size, frames, clips, everyone in shapes(settings):
            if dtype == "int8":
                yield _bytes(settings, size, frames, clips, everyone)
                continue
            yield _features(settings, size, frames, clips, dtype, everyone)
        if not settings.tiny and dtype in DTYPES:
            # imported late: it builds on this file
            from . import waveforms

            yield from waveforms.cases(settings, dtype)


def _features(
    settings: Settings, size: str, frames: int, clips: int, dtype: str, everyone: bool
) -> Case:
    def make(name: str, build: Build, **options: bool) -> Candidate:
        return _candidate(name, build, settings, size, frames, dtype, **options)

    peers = [
        make("torch", plain, timed=everyone or settings.cuda),
        make("transformers", with_transformers("sdpa")),
    ]
    if not settings.cuda:
        peers.append(make("unpacked", ours))
    if everyone:
        peers += [
            make("transformers-eager", with_transformers("eager")),
            make("timm", with_timm),
        ]
    if everyone and not (settings.quick and not settings.cuda):
        peers += [
            make("transformers-compile", with_transformers("sdpa"), compile_=True),
            make("torch-compile", plain, compile_=True),
        ]
        if not settings.cuda:
            sdpa = with_transformers("sdpa")
            peers.append(make("transformers-compile-frozen", sdpa, frozen=True))
    runtimes = {"f32": ("onnxruntime", "openvino"), "bf16": ("openvino-bf16",)}
    if everyone or (size, clips) == ("base", 1):
        peers += [_exported(name, settings, size, frames) for name in runtimes.get(dtype, ())]
    return Case(
        suite="inference",
        name=f"{size}_features",
        mode="forward",
        shape={"B": clips, "S": frames},
        dtype=dtype,
        outputs=("logits",),
        make_inputs=spectrograms(settings, frames, clips, dtype),
        oracle=oracle_of(size, frames, settings, dtype),
        candidates=(make(settings.ours, packed(settings, dtype)), *peers),
        kinds=("logits",),
        clips=clips,
        flops=clips * forward_flops(size, frames, depth_of(settings)),
        graph=clips == 1,
    )


def _bytes(settings: Settings, size: str, frames: int, clips: int, everyone: bool) -> Case:
    """Products of bytes on a CPU, beside what else is faster than float32 there."""
    names = ["torch-int8"]
    if everyone or (size, clips) == ("base", 1):
        names += ["openvino-bf16", "openvino-int8", "onnxruntime-int8"]
    own = _candidate(settings.ours, packed(settings, "int8"), settings, size, frames, "int8")
    return Case(
        suite="inference",
        name=f"{size}_features",
        mode="forward",
        shape={"B": clips, "S": frames},
        dtype="int8",
        outputs=("logits",),
        make_inputs=spectrograms(settings, frames, clips, "int8"),
        oracle=oracle_of(size, frames, settings, "int8"),
        candidates=(own, *(_exported(name, settings, size, frames) for name in names)),
        kinds=("logits",),
        clips=clips,
        flops=clips * forward_flops(size, frames, depth_of(settings)),
    )
