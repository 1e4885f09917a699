"""Waveforms to logits: part of the suite `inference`.

On a GPU the peers start from features that are already there, which is more than anybody gives them: a front end on the
CPU would be all that one sees. Ours computes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..case import DTYPES, Candidate, Case, Inputs, Run, Settings
from ..models import State, forward_flops, ours, plain, weights, with_transformers
from ..peers import compiled, compiled_parts, feature_extractor, need, torchaudio_fbank
from .frontend import RATE, waves
from .inference import Build, depth_of, gate_depth, on, oracle_of, packed

FRAMES = 1024
Call = Callable[[Inputs], Tensor]


def cases(settings: Settings, dtype: str) -> Iterator[Case]:
    """10 s of sound at 16 kHz, padded to 1024 frames."""
    size = "base" if settings.cuda else "tiny"
    for clips in [64, 1] if settings.cuda else [1]:
        yield _case(settings, size, clips, dtype)
        if settings.cuda and dtype == "bf16":
            # compiling may fail: alone, it takes no other figure with it
            yield _case(settings, size, clips, dtype, compiled_peer=True)


def _own(network: Any) -> Call:
    return lambda inputs: network.forward_waveform(inputs["wave"])


def _graphed(network: Any) -> Call:
    forward = need("ast_fast.graphs").GraphedForward(network)
    return lambda inputs: forward.forward_waveform(inputs["wave"])


def _fp8(network: Any) -> Call:
    return _own(network.set_precision("fp8"))


def _given(network: nn.Module) -> Call:
    return lambda inputs: network(inputs["x"])


def _computed(features: Callable[[], Callable[[Tensor], Tensor]], cast: torch.dtype) -> Any:
    def start(network: nn.Module) -> Call:
        extract = features()
        return lambda inputs: network(extract(inputs["wave"]).to(cast))

    return start


def _torch_features() -> Callable[[Tensor], Tensor]:
    fbank = torchaudio_fbank()
    mean, std = need("ast_fast.config").NORMALISATION["audioset"]

    def run(wave: Tensor) -> Tensor:
        raw = fbank(wave)
        padded = torch.nn.functional.pad(raw, (0, 0, 0, FRAMES - raw.shape[1]))
        return (padded - mean) / (2 * std)

    return run


def _case(
    settings: Settings, size: str, clips: int, dtype: str, compiled_peer: bool = False
) -> Case:
    cast = DTYPES[dtype]

    def entry(name: str, build: Build, start: Callable[[Any], Call], compile_: bool = False) -> Any:
        def runner(depth: int, inputs: list[Inputs], gate: bool = False) -> Run:
            state: State = weights(size, FRAMES, depth)
            network: Any = on(build(size, FRAMES, depth, state), settings, dtype).eval()
            if compile_:
                network = compiled_parts(network) if gate else compiled(network)
            call = start(network)

            def run(index: int) -> tuple[Tensor]:
                with torch.no_grad():
                    return (call(inputs[index % len(inputs)]),)

            return run

        return Candidate(
            name,
            lambda inputs: runner(depth_of(settings), inputs),
            yardstick=name == "torch",
            prepare_gate=lambda given: runner(gate_depth(settings), [given], gate=True),
        )

    def make_inputs(seed: int) -> Inputs:
        made = waves(clips, 10.0, settings.device, torch.float32)(seed)
        if settings.cuda:
            made["x"] = _features(made["wave"]).to(settings.device, cast)
        return made

    def oracle(inputs: Inputs) -> tuple[Tensor]:
        x = _features(inputs["wave"][:1].cpu().double()).to(settings.device)
        return oracle_of(size, FRAMES, settings, dtype)({"x": x})

    transformers = with_transformers("sdpa")
    own = entry(settings.ours, packed(settings, dtype), _own)
    name = f"{size}_waveform"
    if not settings.cuda:
        peers = [
            entry("torch", plain, _computed(_torch_features, cast)),
            entry("transformers", transformers, _computed(feature_extractor, cast)),
        ]
    elif compiled_peer:
        name += "_compiled"
        peers = [
            entry("torch", plain, _given),
            entry("transformers-compile", transformers, _given, compile_=True),
        ]
    else:
        peers = [
            entry("torch", plain, _given),
            entry("transformers", transformers, _given),
            entry("graph", ours, _graphed),
            entry("fp8", ours, _fp8),
        ]
    return Case(
        suite="inference",
        name=name,
        mode="forward",
        shape={"B": clips, "N": 10 * RATE},
        dtype=dtype,
        outputs=("logits",),
        make_inputs=make_inputs,
        oracle=oracle,
        candidates=(own, *peers),
        kinds=("logits",),
        clips=clips,
        flops=clips * forward_flops(size, FRAMES, depth_of(settings)),
    )


def _features(wave: Tensor) -> Tensor:
    """Normalised features of the reference in float64."""
    mel = need("ast_fast.reference.mel").mel_tables()
    mean, std = need("ast_fast.config").NORMALISATION["audioset"]
    x: Tensor = need("ast_fast.reference.ops").log_mel(wave.double(), None, mel, FRAMES, mean, std)
    return x
