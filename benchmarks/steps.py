"""Whole training steps as candidates: ours in its variants, and the recipes that people train with.

A way is how a step computes: which weights, which casts, which optimiser. Every way starts from the same
weights, gets the same waveforms or features, and ends with updated weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Inputs, Run
from .models import State
from .peers import compiled, compiled_parts, need, torchaudio_fbank

# small: what is timed must not run off
_LR = 1e-6
_MAX_NORM = 1.0  # transformers' Trainer clips there unless told otherwise

Build = Callable[[str, int, int, State], nn.Module]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step computes.

    Attributes:
        build: makes the model from weights.
        weights: dtype of the model's weights.
        amp: autocast to this dtype.
        masters: float32 masters of 16-bit weights (ours).
        features: "given" starts from features; "ours" and "torchaudio" from waveforms.
        mode: ours: off, regional or graph, of which the check sees the model itself; peers: off or
            compile.
        deterministic: ours: attention's backward without atomics.
        memory: ours: fast or less.
        clip: clip the gradient's norm; ours always does, and the original never.
    """

    build: Build
    weights: torch.dtype = torch.float32
    amp: torch.dtype | None = None
    masters: bool = False
    features: str = "given"
    mode: str = "off"
    deterministic: bool = True
    memory: str = "fast"
    clip: bool = True

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """Autocast, or nothing."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(device, self.amp)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in float32."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def network_of(
    way: Way, size: str, frames: int, depth: int, state: State, device: str
) -> nn.Module:
    """The model on its device, in float32 where masters are still to be taken from it."""
    network = way.build(size, frames, depth, state).to(device).train()
    if not way.masters:
        network = network.to(way.weights)
    for block in getattr(getattr(network, "v", None), "blocks", ()):
        if hasattr(block, "recompute_norms"):
            block.attn.deterministic = way.deterministic
            block.recompute_norms = way.memory == "less"
    return network


def reader(way: Way, frames: int, device: str) -> Callable[[Inputs], Tensor]:
    """Features of a set of inputs, the way this step gets them."""
    if way.features == "given":
        return lambda inputs: inputs["x"].to(way.weights)
    config = need("ast_fast.config")
    if way.features == "ours":
        front = config.LogMelConfig(num_mel_bins=128, num_frames=frames)
        make = need("ast_fast.frontend").log_mel_features
        return lambda inputs: make(inputs["wave"], front).to(way.weights)
    fbank = torchaudio_fbank()
    mean, std = config.NORMALISATION["audioset"]

    def from_cpu(inputs: Inputs) -> Tensor:
        # the original's loader: features on the CPU, then the batch goes to the device
        raw = fbank(inputs["wave_cpu"])
        padded = F.pad(raw, (0, 0, 0, max(0, frames - raw.shape[1])))[:, :frames]
        return ((padded - mean) / (2 * std)).to(device)

    return from_cpu


def gradient_run(way: Way, network: nn.Module, inputs: Inputs, frames: int, device: str) -> Run:
    """Forward and backward alone, for the check; returns the loss and leaves `.grad`."""
    read = reader(way, frames, device)
    call: Any = compiled_parts(network) if way.mode == "compile" else network
    if way.masters:
        network.to(torch.bfloat16)

    def run(_: int) -> tuple[Tensor]:
        with way.autocast(device):
            logits = call(read(inputs))
        loss = loss_fn(logits, inputs["y"])
        # as its scaler would: small gradients vanish in float16
        scale = 2.0**16 if way.amp is torch.float16 else 1.0
        (loss * scale).backward()
        for parameter in network.parameters():
            if scale != 1.0 and parameter.grad is not None:
                parameter.grad /= scale
        return (loss.detach(),)

    return run


def step_run(way: Way, network: nn.Module, inputs: list[Inputs], frames: int, device: str) -> Run:
    """Inputs to updated weights."""
    read = reader(way, frames, device)
    if way.features == "ours" or way.masters or way.mode in ("graph", "regional"):
        return _ours(way, network, inputs, read, device)
    call: Any = compiled(network) if way.mode == "compile" else network
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = _adamw(dict(network.named_parameters()))
    scaler = torch.amp.GradScaler(device, enabled=way.amp is torch.float16 and device == "cuda")

    def run(index: int) -> tuple[Tensor]:
        given = inputs[index % len(inputs)]
        optimizer.zero_grad(set_to_none=True)
        with way.autocast(device):
            logits = call(read(given))
        loss = loss_fn(logits, given["y"])
        scaler.scale(loss).backward()
        if way.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        return (loss.detach(),)

    return run


def _adamw(parameters: dict[str, nn.Parameter], capturable: bool = False) -> torch.optim.Optimizer:
    wanted = [p for p in parameters.values() if p.requires_grad]
    return torch.optim.AdamW(wanted, lr=_LR, weight_decay=1e-2, fused=True, capturable=capturable)


def _ours(
    way: Way,
    network: nn.Module,
    inputs: list[Inputs],
    read: Callable[[Inputs], Tensor],
    device: str,
) -> Run:
    training = need("ast_fast.training.step")
    make = lambda named: _adamw(named, capturable=way.mode == "graph")  # noqa: E731
    masters = None
    if way.masters:
        masters = need("ast_fast.training.master").MasterWeights(network, make)
    optimizer = make(dict(network.named_parameters())) if masters is None else masters.optimizer

    def call(x: Tensor) -> Tensor:
        with way.autocast(device):
            logits: Tensor = network(x)
        return logits

    step = training.TrainingStep(call, loss_fn, optimizer, masters=masters, max_norm=_MAX_NORM)
    step.set_lr(_LR)
    held = 0
    if way.mode == "graph":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
    ready = need("ast_fast.training.modes").prepared_step(step, way.mode, network)

    def run(index: int) -> tuple[Tensor]:
        given = inputs[index % len(inputs)]
        with torch.no_grad():
            x = read(given)
        return (ready(x, given["y"])[0],)

    if way.mode == "graph":
        for _ in range(5):  # recorded before anything is timed
            run(0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # a replay allocates nothing: what it needs is what its recording keeps
        run.memory_mib = (torch.cuda.memory_reserved() - held) / 2**20  # type: ignore[attr-defined]
    return run
