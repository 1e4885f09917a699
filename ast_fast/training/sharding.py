"""FSDP2: every process keeps a part of the weights, their gradients and their optimiser state.

PyTorch's `fully_shard` cuts each weight along one dimension. A block's weights are gathered when it is
about to compute, forward and backward, and let go afterwards; its gradients are summed over the
processes and cut again. The optimiser, clipping and averages work on the parts alone, as plain tensors
that share memory with the model's. Checkpoints hold whole tensors: the same files as without sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..layers import Block
from .errors import TrainingError
from .master import OptimizerFactory
from .weights import Weights, is_sharded, part_of, total_norm


def shard(model: Any, mesh: DeviceMesh, *, narrow: bool = False) -> Any:
    """Cut a model's weights over the processes of a mesh, in place, and return it.

    All get the weights of the first process. Each transformer block (`model.v.blocks`) is gathered by
    itself, the rest of the model together; a model without such blocks is gathered as one.

    Args:
        model: on any device; whole weights are moved to the mesh's device one block at a time.
        mesh: of one dimension.
        narrow: gather, and compute in, bfloat16; gradients are summed in float32.

    Raises:
        TrainingError: the model computes from its blocks' weights without calling the blocks.
    """
    _check_calls_blocks(model)
    policy = MixedPrecisionPolicy()
    if narrow:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = getattr(getattr(model, "v", None), "blocks", ())
    for module in (*blocks, model):
        _equal_weights(module, mesh)
        # the whole model too: weights that an evaluation left gathered would not see an update
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=functools.partial(_placement, mesh.size()),
            mp_policy=policy,
        )
        if isinstance(module, Block):
            module.gathered = True  # the last one may go on leaving out what nobody asks for
    return model


def _check_calls_blocks(model: Any) -> None:
    trunk = getattr(model, "v", None)
    if is_sharded(model):
        raise TrainingError(
            "the model is sharded already: expected a whole one; load it from the file that was saved"
        )
    if getattr(trunk, "runner", None) is not None:
        raise TrainingError(
            "strategy='fsdp2' with a model that optimize_for_inference packed: expected one that was "
            "not; make or load it anew, or use ddp"
        )
    if getattr(trunk, "merging", None) is not None:
        raise TrainingError(
            "strategy='fsdp2' with token merging, which reads the blocks' weights without calling them: "
            "switch it off with set_token_merging(0), or use ddp"
        )


def _equal_weights(module: nn.Module, mesh: DeviceMesh) -> None:
    """Move what is still whole to the mesh's device, with the first process's values."""
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
            torch.distributed.broadcast(tensor.data, group=mesh.get_group(), group_src=0)


def _placement(processes: int, parameter: nn.Parameter) -> Shard:
    """The first dimension, unless it is too short and another one can be cut into equal parts."""
    if parameter.shape[0] < processes:
        for dim in range(1, parameter.dim()):
            if parameter.shape[dim] and parameter.shape[dim] % processes == 0:
                return Shard(dim)
    return Shard(0)


class ShardedWeights(Weights):
    """Weights of which every process holds a part.

    It stands where masters stand: `TrainingStep` takes the gradients of the parts from `gather`.

    Args:
        model: as `shard` left it.
        optimizer_factory: makes the optimiser from this process's parts, by name.
        first: whether this process is the one that gets whole tensors.
    """

    def __init__(self, model: nn.Module, optimizer_factory: OptimizerFactory, first: bool) -> None:
        self._model, self._first, self.masters = model, first, None
        self._sharded: dict[str, Any] = dict(model.named_parameters())
        self._group = next(iter(self._sharded.values())).device_mesh.get_group()
        self.trainable = {
            name: nn.Parameter(part_of(parameter))
            for name, parameter in self._sharded.items()
            if parameter.requires_grad
        }
        self.optimizer = optimizer_factory(self.trainable)

    def share(self) -> None:
        """Nothing: `shard` gave all processes the same."""

    def for_step(self) -> dict[str, Any]:
        """Gradients and their norm come from here, and every process runs every part of a batch."""
        return {"masters": self, "norm": self.norm, "every_part": True}

    def here(self) -> dict[str, Tensor]:
        """What this process has, by the model's names: parts of weights, whole buffers."""
        state = self._model.state_dict(keep_vars=True)
        return {name: part_of(value) for name, value in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Keep this process's parts of whole weights.

        Raises:
            RuntimeError: names or shapes differ.
        """
        own = self._model.state_dict(keep_vars=True)
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise RuntimeError(
                f"{', '.join(wrong[:5])}: expected names and shapes of {type(self._model).__name__}'s "
                "weights"
            )
        for name, value in own.items():
            part_of(value).copy_(self.part(name, state[name]))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Cut out what this process keeps of a tensor [shape of the weight]; a scalar as it is."""
        like = self._sharded.get(name)
        if like is None or not whole.dim():
            return whole
        (place,), mesh = like.placements, like.device_mesh
        # as torch.chunk cuts: all but the last parts are of one length
        length = whole.shape[place.dim]
        most = -(-length // mesh.size())
        start = min(most * mesh.get_local_rank(), length)
        return whole.narrow(place.dim, start, min(most, length - start)).clone()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor, on the CPU, in the first process; the part itself in the others.

        All processes call it, in one order.
        """
        like = self._sharded.get(name)
        if like is None or not part.dim():
            return part
        gathered = DTensor.from_local(
            part,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        ).full_tensor()
        return gathered.cpu() if self._first else part

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of the gradients of all processes' parts, the same in all of them."""
        squared = total_norm(grads).double().square()
        torch.distributed.all_reduce(squared, group=self._group)
        return squared.sqrt().float()

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Let the parts see their gradients; returns those."""
        grads = []
        for name, own in self.trainable.items():
            grad = self._sharded[name].grad
            own.grad = None if grad is None else part_of(grad)
            if own.grad is not None:
                grads.append(own.grad)
        return grads

    def scatter(self) -> None:
        """Nothing: the parts lie where the model's do."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._sharded.values(), *self.trainable.values()):
            parameter.grad = None
