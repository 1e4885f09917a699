"""What one measurement is: inputs, an oracle, and the candidates that compute the same thing."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ast_fast.equivalence import budgets

# how far an output may be off is the equivalence checks' to say; log-mel has a rule of its own there
Kind = budgets.Kind | Literal["log mel"]
Inputs = dict[str, Tensor]
# computes on input set number i and returns the outputs the case names
Run = Callable[[int], Sequence[Tensor]]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Skipped(Exception):
    """A candidate cannot take part; the message says why, for the record."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("f32", "bf16")
    backend: str = "cpp"  # of our own ops
    quick: bool = False  # few shapes
    tiny: bool = False  # shapes for a dry run: only the control flow matters
    peers: tuple[str, ...] | None = None  # None: all that can be imported
    without: tuple[str, ...] = ()  # peers that take no part all the same
    only: tuple[str, ...] = ()  # parts of titles, one of which a case must have

    @property
    def ours(self) -> str:
        """Our name in tables."""
        return f"ast_fast[{self.backend}]"

    @property
    def cuda(self) -> bool:
        """Whether this run is on a GPU."""
        return self.device == "cuda"

    def wants(self, peer: str) -> bool:
        """Whether a peer was asked for, by its name or a pattern such as `sdpa*`."""
        if any(fnmatch.fnmatchcase(peer, name) for name in self.without):
            return False
        return self.peers is None or any(fnmatch.fnmatchcase(peer, name) for name in self.peers)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation. `prepare` may build models or graphs; what it returns is what is timed."""

    name: str
    prepare: Callable[[list[Inputs]], Run]
    # its error is the yardstick of the budget, ours may be twice it; the first that is there counts
    yardstick: bool = False
    # what is checked, where that is not what is timed: a smaller model, or gradients before a step
    prepare_gate: Callable[[Inputs], Run] | None = None
    timed: bool = True  # False: takes part in the check alone
    own: bool = False  # ours in another form: held to our budget, not to a peer's


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of a table: candidates[0] is ours, the rest are peers."""

    suite: str
    name: str
    mode: str
    shape: dict[str, int]
    dtype: str
    outputs: tuple[str, ...]
    make_inputs: Callable[[int], Inputs]  # seed -> inputs on the device
    oracle: Callable[[Inputs], Sequence[Tensor]]  # float64; a shorter dim 0 checks the first clips
    candidates: tuple[Candidate, ...]
    kinds: tuple[Kind, ...]  # of each output: which budget of `ast_fast.equivalence` it has
    measure: str = "rel_l2"  # or max_abs
    clips: int | None = None  # for clips a second
    flops: float | None = None
    bytes: float | None = None  # fewest bytes that device memory must move
    bound: str = "gemm"  # which ceiling the share is of: gemm or copy
    # inputs of the check where the timed ones would make the oracle too slow
    make_gate_inputs: Callable[[int], Inputs] | None = None
    graph: bool = False  # also worth timing as a CUDA graph
    tf32: bool = False  # float32 products round their factors to TF32

    @property
    def title(self) -> str:
        """Name, mode, shape and dtype in one line."""
        sizes = " ".join(f"{key}{value}" for key, value in self.shape.items())
        return f"{self.suite}/{self.name} {self.mode} {sizes} {self.dtype}"


def texts(given: str) -> tuple[str, ...]:
    """Texts of a comma-separated list."""
    return tuple(text.strip() for text in given.split(",") if text.strip())


def listed(title: str, only: Sequence[str]) -> bool:
    """Whether a title has one of some texts or matches one of some patterns; none asks for all."""
    return not only or any(
        text in title or fnmatch.fnmatchcase(title, f"*{text}*") for text in only
    )


def generator(seed: int, device: str) -> torch.Generator:
    """A seeded generator on a device."""
    return torch.Generator(device=device).manual_seed(seed)


def wide(inputs: Inputs) -> Inputs:
    """The same rounded numbers in float64, cut from any graph."""
    return {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def forward_run(function: Callable[..., Sequence[Tensor]], inputs: list[Inputs]) -> Run:
    """Time a function of the inputs without a graph."""

    def run(index: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(**inputs[index % len(inputs)])

    return run


def backward_run(
    function: Callable[..., Sequence[Tensor]],
    inputs: list[Inputs],
    wrt: Sequence[str],
    upstream: Sequence[str],
) -> Run:
    """Time the backward alone: one forward per input set, its graph kept.

    Args:
        function: forward; gets every input that is not an upstream gradient.
        inputs: input sets.
        wrt: inputs whose gradients are the outputs.
        upstream: inputs that hold the gradients of the function's outputs, in order.
    """
    graphs = []
    for given in inputs:
        leaves = {
            name: tensor.detach().requires_grad_(name in wrt)
            for name, tensor in given.items()
            if name not in upstream
        }
        outputs = function(**leaves)
        graphs.append((outputs, [leaves[name] for name in wrt], [given[name] for name in upstream]))

    def run(index: int) -> Sequence[Tensor]:
        outputs, leaves, dys = graphs[index % len(graphs)]
        return torch.autograd.grad(outputs, leaves, dys, retain_graph=True)

    return run


def candidate(
    name: str,
    function: Callable[..., Sequence[Tensor]],
    mode: str,
    wrt: Sequence[str] = (),
    upstream: Sequence[str] = (),
    yardstick: bool = False,
) -> Candidate:
    """A candidate from one forward function, for mode `forward` or `backward`."""

    def prepare(inputs: list[Inputs]) -> Run:
        if mode == "backward":
            return backward_run(function, inputs, wrt, upstream)
        kept = [{k: v for k, v in given.items() if k not in upstream} for given in inputs]
        return forward_run(function, kept)

    return Candidate(name, prepare, yardstick)


def oracle(
    function: Callable[..., Sequence[Tensor]],
    mode: str,
    wrt: Sequence[str] = (),
    upstream: Sequence[str] = (),
) -> Callable[[Inputs], Sequence[Tensor]]:
    """The same in float64 on the same rounded inputs."""

    def compute(inputs: Inputs) -> Sequence[Tensor]:
        return candidate("oracle", function, mode, wrt, upstream).prepare([wide(inputs)])(0)

    return compute
