"""NaN and infinity are no results: where a number is given out or a weight taken in, they are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """A weight, or a number that a model gives, is NaN or infinite."""


def count_not_finite(values: Tensor) -> int:
    """How many entries are NaN or infinite; one pass, and no memory, where none is."""
    if not values.is_floating_point() or not values.numel() or values.is_meta:
        return 0
    # NaN and infinity survive every sum; a finite tensor whose sum overflows is looked at again
    if bool(values.detach().sum().isfinite()):
        return 0
    return values.numel() - int(values.isfinite().sum())


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first named tensors that hold NaN or infinity, in words; None where none does."""
    found = []
    for name, values in tensors:
        count = count_not_finite(values)
        if count:
            found.append(f"{name!r} ({count} of {values.numel()} values)")
    if not found:
        return None
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def weights_not_finite(model: nn.Module) -> str | None:
    """Which weights and buffers of a model are not finite, in words; None where all are."""
    return not_finite((*model.named_parameters(), *model.named_buffers()))


def check_state(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights by name that are NaN or infinite.

    Raises:
        NotFiniteError: says which.
    """
    found = not_finite(state.items())
    if found is not None:
        raise NotFiniteError(
            f"{what} has weights that are NaN or infinite: {found}; take a checkpoint from before they "
            "became so"
        )


def check_results(values: Tensor, what: str, model: nn.Module | None = None) -> None:
    """Refuse numbers that a model gives: [B, ...], one row a clip.

    Args:
        values: the numbers.
        what: they are, for the message.
        model: which gave them: its weights are looked at for the cause.

    Raises:
        NotFiniteError: says how many rows, and the weights that are to blame if any are.
    """
    if not count_not_finite(values):
        return
    rows = values.reshape(len(values), -1).isfinite().all(1).logical_not()
    raise NotFiniteError(
        f"{what} are NaN or infinite for {int(rows.sum())} of {len(rows)} clips, first for number "
        f"{int(rows.nonzero()[0])}: {blame(model)}"
    )


def blame(model: nn.Module | None) -> str:
    """Why a model's numbers may be NaN, and what to do."""
    found = None if model is None else weights_not_finite(model)
    if found is not None:
        return f"so are its weights {found}; take a checkpoint from before they became so"
    return (
        "expected finite numbers; a value beyond the range of 16 bits overflows: compute in float32, "
        "or look at the weights with torch.isfinite"
    )


def finite_row(values: Tensor) -> Tensor:
    """Which rows of [B, ...] are finite, [B] bool."""
    return torch.isfinite(values.reshape(len(values), -1)).all(1)
