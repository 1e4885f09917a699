"""The processes of a run: what torchrun says of them, and Lightning Fabric, which joins them."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from .._optional import require_package
from ..config import TrainConfig
from .errors import TrainingError


def by_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def machines() -> int:
    """Machines that torchrun has started processes on; 1 without it.

    Raises:
        ValueError: the machines have different numbers of processes.
    """
    if not by_torchrun():
        return 1
    everywhere, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if everywhere % here:
        raise ValueError(
            f"torchrun started {everywhere} processes, {here} of them on this machine: expected as many on "
            "each"
        )
    return everywhere // here


def from_all(value: Any, world_size: int) -> list[Any]:
    """A value of each process, in all of them; any that can be pickled."""
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all of torchrun's."""
    return not by_torchrun() or os.environ.get("RANK", "0") == "0"


def make_fabric(config: TrainConfig, autocast: torch.dtype | None) -> Any:
    """Lightning Fabric for a run: device, precision, and the processes, which are started.

    Args:
        config: accelerator, devices, strategy and precision.
        autocast: what the run computes in, if not in float32 alone.

    Raises:
        TrainingError: there is no GPU, or nobody to share weights with.
    """
    fabric_module = require_package("lightning_fabric", "training", "train")
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainingError("accelerator='cuda': PyTorch sees no GPU here; use auto or cpu")
    nodes = machines()
    processes = config.devices * nodes
    strategy: Any = "auto"
    if config.strategy == "fsdp2":
        if processes == 1:
            raise TrainingError(
                "strategy='fsdp2' in one process: expected several to share the weights; set devices, "
                "or use ddp"
            )
        strategies = require_package("lightning_fabric.strategies", "training", "train")
        strategy = strategies.ModelParallelStrategy(
            functools.partial(_shard, config.precision == "bfloat16-master"),
            data_parallel_size=processes,
            tensor_parallel_size=1,
        )
    fabric = fabric_module.Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=nodes,
        strategy=strategy,
        # float16 is cast and scaled by the step: a scaler of Fabric's would wait for the device
        precision="bf16-mixed" if autocast is torch.bfloat16 else "32-true",
    )
    if processes > 1:
        fabric.launch()
    return fabric


def _shard(narrow: bool, model: Any, mesh: Any) -> Any:
    from .sharding import shard

    return shard(model, mesh["data_parallel"], narrow=narrow)


def hold(fabric: Any, model: Any) -> AbstractContextManager[object]:
    """Gradients of a part of a batch stay in this process until its last part."""
    if fabric.world_size == 1:
        return contextlib.nullcontext()
    held: AbstractContextManager[object] = fabric.no_backward_sync(model)
    return held
