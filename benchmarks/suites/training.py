"""A training step: forward, binary cross-entropy, backward, AdamW; where several ways to train are
compared, each clips the gradient's norm too (but the original, which does not).

What is checked is the loss and the whole gradient before the first step, on one clip. `bf16-amp` is
autocast over float32 weights, `bf16-master` bfloat16 weights with float32 masters; there the peers are
other ways to train in 16 bits, each with the weights and casts that it comes with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings, generator
from ..models import (
    LABELS,
    forward_flops,
    gradients,
    oracle,
    ours,
    plain,
    weights,
    with_timm,
    with_transformers,
)
from ..peers import compiled, compiled_parts, need
from ..steps import Way, gradient_run, network_of, step_run
from .frontend import RATE, waves
from .inference import Build, depth_of, gate_depth, on, spectrograms


def _shapes(settings: Settings) -> list[tuple[str, int, int, bool]]:
    """Size, frames, clips, and whether every peer takes part."""
    if settings.tiny:
        return [("tiny", 36, 1, True)]
    if settings.cuda:
        full = [("base", 1024, 32, True), ("small", 1024, 64, False), ("base", 1024, 12, False)]
        return (
            full[:1]
            if settings.quick
            else [*full, ("base", 512, 48, False), ("base", 128, 128, False)]
        )
    if settings.quick:
        return [("tiny", 128, 1, False)]
    return [
        *(("base", 512, 1, False), ("base", 128, 1, True), ("small", 1024, 1, False)),
        *(("small", 128, 4, False), ("tiny", 1024, 1, False), ("tiny", 512, 4, False)),
        *(("base", 1024, 1, False), ("tiny", 128, 4, False)),
    ]


def _loss(model: nn.Module, inputs: Inputs, settings: Settings, dtype: str) -> Tensor:
    amp = dtype == "bf16-amp"
    scope = torch.autocast(settings.device, torch.bfloat16) if amp else contextlib.nullcontext()
    with scope:
        logits = model(inputs["x"])
    return F.binary_cross_entropy_with_logits(logits.float(), inputs["y"])


def _flat(model: nn.Module, order: Sequence[str]) -> Tensor:
    found = gradients(model)
    missing = sorted(set(order) ^ set(found))
    if missing:
        raise ValueError(f"gradients differ in names: {', '.join(missing[:4])}")
    return torch.cat([found[name].flatten().double() for name in order])


def _candidate(
    name: str, build: Build, settings: Settings, size: str, frames: int, dtype: str, compile_: bool
) -> Candidate:
    def model(depth: int) -> nn.Module:
        return on(build(size, frames, depth, weights(size, frames, depth)), settings, dtype).train()

    def prepare(inputs: list[Inputs]) -> Run:
        network = model(depth_of(settings))
        call = compiled(network) if compile_ else network
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=1e-2, fused=True)

        def run(index: int) -> tuple[Tensor]:
            optimiser.zero_grad(set_to_none=True)
            loss = _loss(call, inputs[index % len(inputs)], settings, dtype)
            loss.backward()
            optimiser.step()
            return (loss.detach(),)

        return run

    def prepare_gate(inputs: Inputs) -> Run:
        depth = gate_depth(settings)
        network = model(depth)
        order = sorted(weights(size, frames, depth))
        call = compiled_parts(network) if compile_ else network

        def run(_: int) -> tuple[Tensor, Tensor]:
            loss = _loss(call, inputs, settings, dtype)
            loss.backward()
            return loss.detach(), _flat(network, order)

        return run

    return Candidate(name, prepare, yardstick=name == "torch", prepare_gate=prepare_gate)


def _oracle(settings: Settings, size: str, frames: int, dtype: str):  # type: ignore[no-untyped-def]
    def compute(inputs: Inputs) -> tuple[Tensor, Tensor]:
        depth = gate_depth(settings)
        rounded = DTYPES.get(dtype, torch.float32)
        state = {name: tensor.to(rounded) for name, tensor in weights(size, frames, depth).items()}
        network = oracle(size, frames, depth, state).to(settings.device)
        loss = F.binary_cross_entropy_with_logits(
            network(inputs["x"].double()), inputs["y"].double()
        )
        loss.backward()
        return loss.detach(), _flat(network, sorted(state))

    return compute


def cases(settings: Settings) -> Iterator[Case]:
    """Waveforms to updated weights, then every size and length in each precision."""
    if "bf16" in settings.dtypes or settings.tiny:
        yield from _ways(settings)
    dtypes = [dtype for dtype in settings.dtypes if dtype != "f16"]
    if "bf16" in dtypes and "bf16-amp" not in dtypes:
        dtypes.append("bf16-amp")
    for dtype in dtypes:
        for size, frames, clips, everyone in _shapes(settings):
            if dtype == "f32" and not settings.cuda and size == "base" and frames == 1024:
                continue  # ten seconds a step
            yield _case(settings, size, frames, clips, dtype, everyone)


def _case(
    settings: Settings, size: str, frames: int, clips: int, dtype: str, everyone: bool
) -> Case:
    def make(name: str, build: Build, compile_: bool = False) -> Candidate:
        return _candidate(name, build, settings, size, frames, dtype, compile_)

    plainly = make("torch", plain)
    if not (everyone or settings.cuda):
        plainly = Candidate("torch", plainly.prepare, True, plainly.prepare_gate, timed=False)
    peers = [plainly, make("transformers", with_transformers("sdpa"))]
    if everyone:
        peers += [make("transformers-eager", with_transformers("eager")), make("timm", with_timm)]
    # compiling three precisions of a training step costs a CPU more time than all the rest
    if everyone and settings.cuda:
        peers += [
            make("transformers-compile", with_transformers("sdpa"), True),
            make("torch-compile", plain, True),
        ]
    return Case(
        suite="training",
        name=f"{size}_step",
        mode="step",
        shape={"B": clips, "S": frames},
        dtype=dtype,
        outputs=("loss", "gradient"),
        make_inputs=spectrograms(settings, frames, clips, dtype, True),
        make_gate_inputs=spectrograms(settings, frames, 1, dtype, True),
        oracle=_oracle(settings, size, frames, dtype),
        candidates=(make(settings.ours, ours), *peers),
        kinds=("logits", "whole gradient"),
        clips=clips,
        flops=3.0 * clips * forward_flops(size, frames, depth_of(settings)),
    )


def _ways(settings: Settings) -> Iterator[Case]:
    """Ways to train in 16 bits, whole steps against whole steps."""
    usual = ("transformers", "transformers-amp")
    if settings.tiny:
        yield _way_case(settings, "tiny", 36, 1, "waveform_step", usual)
        return
    if not settings.cuda:
        yield _way_case(settings, "small", 128, 4, "features_step", usual)
        if not settings.quick:
            yield _way_case(settings, "small", 128, 4, "waveform_step", usual)
        return
    # a job each: compiling a whole training step takes a minute or two
    yield _way_case(settings, "base", 1024, 64, "waveform_step", (*usual, "one pass"))
    for name in ("transformers-amp-compile", "transformers-compile"):
        yield _way_case(settings, "base", 1024, 64, f"waveform_step_{name}", (name,))
    # materialised scores of more clips do not fit into 80 GB
    yield _way_case(settings, "base", 1024, 12, "waveform_step_original", ("original",))
    if not settings.quick:
        yield _mode_case(settings, "base", 1024, 64)
        yield _mode_case(settings, "base", 1024, 12)


def _way_case(
    settings: Settings, size: str, frames: int, clips: int, name: str, peers: Sequence[str]
) -> Case:
    """Ours, plain PyTorch as the yardstick, and some of the ways that others take."""
    half, wave = torch.bfloat16, name.startswith("waveform")
    mode = "graph" if settings.cuda else "off"
    own = Way(ours, half, masters=True, features="ours" if wave else "given", mode=mode)
    sdpa, eager = with_transformers("sdpa"), with_transformers("eager")
    others = {
        "one pass": dataclasses.replace(own, deterministic=False),
        "transformers": Way(sdpa, half),
        "transformers-amp": Way(sdpa, amp=half),
        "transformers-compile": Way(sdpa, half, mode="compile"),
        "transformers-amp-compile": Way(sdpa, amp=half, mode="compile"),
        "original": Way(eager, amp=torch.float16, features="torchaudio", clip=False),
    }
    # plain PyTorch in the same dtype says how large the unavoidable error is
    ways = {settings.ours: own, "torch": Way(plain, half), **{n: others[n] for n in peers}}
    return _case_of_ways(settings, f"{size}_{name}", size, frames, clips, ways)


def _mode_case(settings: Settings, size: str, frames: int, clips: int) -> Case:
    """Ours alone: how the step runs, and what it keeps for backward."""
    base = Way(ours, torch.bfloat16, masters=True)
    ways = {
        settings.ours: base,
        "torch": Way(plain, torch.bfloat16),
        "graph": dataclasses.replace(base, mode="graph"),
        "regional": dataclasses.replace(base, mode="regional"),
        "less memory": dataclasses.replace(base, memory="less"),
        "autocast": Way(ours, amp=torch.bfloat16),
    }
    return _case_of_ways(settings, f"{size}_step_modes", size, frames, clips, ways)


def _case_of_ways(
    settings: Settings, name: str, size: str, frames: int, clips: int, ways: dict[str, Way]
) -> Case:
    device = settings.device

    def state(depth: int) -> dict[str, Tensor]:
        # rounded once for all, so that no way is charged for storing weights in another dtype
        return {n: w.bfloat16().float() for n, w in weights(size, frames, depth).items()}

    def candidate(label: str, way: Way) -> Candidate:
        def prepare(inputs: list[Inputs]) -> Run:
            depth = depth_of(settings)
            network = network_of(way, size, frames, depth, state(depth), device)
            return step_run(way, network, inputs, frames, device)

        def prepare_gate(given: Inputs) -> Run:
            depth = gate_depth(settings)
            network = network_of(way, size, frames, depth, state(depth), device)
            order = sorted(weights(size, frames, depth))
            backward = gradient_run(way, network, given, frames, device)

            def run(index: int) -> tuple[Tensor, Tensor]:
                (loss,) = backward(index)
                return loss, _flat(network, order)

            return run

        yardstick = label == "torch"
        timed = settings.cuda or settings.tiny or not yardstick
        return Candidate(label, prepare, yardstick, prepare_gate, timed)

    def inputs_of(count: int):  # type: ignore[no-untyped-def]
        def make(seed: int) -> Inputs:
            # as many samples as fill the frames: no padding
            samples = 400 + 160 * (frames - 1)
            wave = waves(count, samples / RATE, "cpu", torch.float32)(seed)["wave"]
            mel = need("ast_fast.reference.mel").mel_tables()
            mean, std = need("ast_fast.config").NORMALISATION["audioset"]
            x = need("ast_fast.reference.ops").log_mel(wave.double(), None, mel, frames, mean, std)
            draw = generator(seed, "cpu")
            y = (torch.rand(count, LABELS, generator=draw) < 0.02).float()
            placed = {"wave": wave, "x": x.to(torch.bfloat16).float(), "y": y}
            return {"wave_cpu": wave, **{n: tensor.to(device) for n, tensor in placed.items()}}

        return make

    def oracle_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
        depth = gate_depth(settings)
        network = oracle(size, frames, depth, state(depth)).to(device)
        loss = F.binary_cross_entropy_with_logits(
            network(inputs["x"].double()), inputs["y"].double()
        )
        loss.backward()
        return loss.detach(), _flat(network, sorted(state(depth)))

    return Case(
        suite="training",
        name=name,
        mode="step",
        shape={"B": clips, "S": frames},
        dtype="bf16-master",
        outputs=("loss", "gradient"),
        make_inputs=inputs_of(clips),
        make_gate_inputs=inputs_of(1),
        oracle=oracle_of,
        candidates=tuple(candidate(label, way) for label, way in ways.items()),
        kinds=("logits", "whole gradient"),
        clips=clips,
        flops=3.0 * clips * forward_flops(size, frames, depth_of(settings)),
    )
