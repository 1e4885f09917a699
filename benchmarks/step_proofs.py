"""What only a device can prove of whole steps: graphs replay to the bit, and memory that ran out is given back.

Everything but the graphs themselves also runs on a CPU, where the same claims hold without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import LABELS, ours, weights
from .peers import need


class Rig:
    """A small AST, its optimiser and the step of both."""

    def __init__(self, device: str, dtype: torch.dtype, graphed: bool, size: str = "tiny") -> None:
        training = need("ast_fast.training.step")
        frames, depth = (1024, 4) if device == "cuda" else (36, 2)
        self.device, self.dtype, self.frames = device, dtype, frames
        self.model = ours(size, frames, depth, weights(size, frames, depth)).to(device).train()

        def make(named: dict[str, Any]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                list(named.values()), lr=1e-3, fused=True, capturable=device == "cuda"
            )

        self.masters = None
        if dtype == torch.float32:
            optimizer = make(dict(self.model.named_parameters()))
        else:
            masters = need("ast_fast.training.master")
            self.masters = masters.MasterWeights(self.model, make, dtype)
            optimizer = self.masters.optimizer
        self.step = training.TrainingStep(
            self.model,
            F.binary_cross_entropy_with_logits,
            optimizer,
            masters=self.masters,
            max_norm=1.0,
        )
        self.run = need("ast_fast.training.modes").prepared_step(
            self.step, "graph" if graphed and device == "cuda" else "off", self.model
        )

    def batch(self, seed: int, clips: int = 4) -> tuple[Tensor, Tensor]:
        """Features and targets."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(clips, self.frames, 128, generator=draw).to(self.device, self.dtype)
        y = (torch.rand(clips, LABELS, generator=draw) < 0.02).float().to(self.device)
        return x, y

    def train(self, first: int, count: int, clips: int = 4) -> None:
        """Some steps at a rate that changes."""
        for index in range(first, first + count):
            self.run.set_lr(1e-4 * (1 + index % 3))
            self.run(*self.batch(index, clips))

    def state(self) -> list[Tensor]:
        """Copies of weights, masters and moments."""
        moments = [v for w in self.step.weights for v in self.step.optimizer.state[w].values()]
        found = [*self.model.parameters(), *self.step.weights, *moments]
        return [tensor.detach().clone() for tensor in found]


def step_graph(device: str, dtype: torch.dtype, same: Callable[..., None]) -> None:
    """A recorded step is the unrecorded one, to the bit, short batches and NaN among them."""
    rigs = [Rig(device, dtype, graphed) for graphed in (False, True)]
    for rig in rigs:
        rig.train(0, 8)
        rig.train(8, 1, clips=3)
        rig.train(9, 4)
    same("training step", rigs[0].state(), rigs[1].state())
    before = rigs[1].state()
    x, y = rigs[1].batch(20)
    x[1, 5] = float("nan")
    rigs[1].run(x, y)
    same("a step that is not finite", before, rigs[1].state())


def forward_graph(device: str, dtype: torch.dtype, same: Callable[..., None]) -> None:
    """Recorded inference gives the model's bits, before and after its weights change."""
    rig = Rig(device, dtype, False)
    rig.model.eval()
    graphed = need("ast_fast.graphs").GraphedForward(rig.model)
    with torch.no_grad():
        for round_ in range(2):
            for clips in (1, 2):
                for seed in range(5):
                    x = rig.batch(seed, clips)[0]
                    same(f"forward, round {round_}", [rig.model(x)], [graphed(x)])
                    wave = 0.1 * torch.randn(clips, 16000, device=device)
                    expected = [rig.model.forward_waveform(wave)]
                    same(f"waveform, round {round_}", expected, [graphed.forward_waveform(wave)])
            rig.model.mlp_head[1].bias.add_(1.0)


def step_memory(device: str, dtype: torch.dtype, same: Callable[..., None]) -> None:
    """A step too large for memory is a clean error; weights stay, memory comes back, the next works."""
    training = need("ast_fast.training.step")
    errors = need("ast_fast.training.errors")
    rig, twin = (Rig(device, dtype, True) for _ in range(2))
    for each in (rig, twin):
        each.train(0, 6)
    before, batch = rig.state(), rig.batch(30, 64)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        training.run_step(rig.run, *batch, batch_size=64)
    except errors.StepOutOfMemoryError:
        pass
    else:
        raise AssertionError("64 clips fitted into memory that was capped below them")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same("weights after running out of memory", before, rig.state())
    if torch.cuda.memory_allocated() > held + 2**20:
        raise AssertionError("the failed step still holds memory")
    for each in (rig, twin):
        each.train(6, 6)
    same("steps after running out of memory", twin.state(), rig.state())
