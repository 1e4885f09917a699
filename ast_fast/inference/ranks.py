"""Processes that share a job: who this one is, and where they wait for each other.

`torchrun` (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts
them. They talk through gloo, on the CPU, and only at the beginning and the end.
"""

from __future__ import annotations

import datetime
import os
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

_PATIENCE = datetime.timedelta(days=30)  # one rank may be done long before another


class RankLostError(OSError):
    """Another process of the job has ended before its work was done."""


class Ranks:
    """The processes of a job; a context manager.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
        local_rank: number of this process on its machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._own = False
        self._group: Any = None

    @classmethod
    def from_environment(cls) -> Self:
        """What RANK, WORLD_SIZE and LOCAL_RANK say; one process if there is nothing.

        Raises:
            ValueError: they are no numbers that fit.
        """
        values = {}
        for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = os.environ.get(name, str(usual))
            if not text.isdigit():
                raise ValueError(f"{name}={text!r} in the environment: expected a whole number")
            values[name] = int(text)
        if values["RANK"] >= max(1, values["WORLD_SIZE"]):
            raise ValueError(
                f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']} in the environment: "
                "expected a rank below the size; start the processes with torchrun"
            )
        return cls(values["RANK"], max(1, values["WORLD_SIZE"]), values["LOCAL_RANK"])

    @property
    def device(self) -> torch.device:
        """Where this process runs its model: a GPU of its own if there is one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def __enter__(self) -> Self:
        if self.world_size > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
                self._own = True
            else:
                self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._own:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all are here.

        Raises:
            RankLostError: one of them has ended.
        """
        if self.world_size > 1:
            try:
                dist.barrier(self._group)
            except RuntimeError as error:
                raise self._lost(error) from error

    def from_first(self, value: Any) -> Any:
        """What rank 0 has.

        Raises:
            RankLostError: one of them has ended.
        """
        values = [value]
        if self.world_size > 1:
            try:
                dist.broadcast_object_list(values, 0, self._group)
            except RuntimeError as error:
                raise self._lost(error) from error
        return values[0]

    def _lost(self, error: RuntimeError) -> RankLostError:
        reason = str(error).splitlines()[0][:200]
        return RankLostError(
            f"rank {self.rank} of {self.world_size}: another rank has ended early ({reason}); what "
            "all have done is kept: start them again with --resume"
        )
