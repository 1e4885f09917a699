"""What torchrun says of the processes that it started."""

from __future__ import annotations

import os


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


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all of torchrun's."""
    return not by_torchrun() or os.environ.get("RANK", "0") == "0"
