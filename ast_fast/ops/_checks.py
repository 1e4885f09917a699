"""What a registered op is told before it touches memory: shapes, dtypes, devices and numbers that fit together.

`torch.ops.ast_fast.*` may be called by anybody, and a kernel takes addresses from what it gets. So every call that
comes through the dispatcher is checked here, on real and on fake tensors alike, by sizes alone: nothing waits for
a device. What only values can tell (starts of packed clips, tokens of a mask) is checked on the CPU, where it
costs nothing, and made harmless by the kernels elsewhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sizes = dict[str, Any]

_MOST_FORMS = 1024  # that are remembered for each op

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_INTEGERS = frozenset((torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64))
_KINDS = {
    "float": FLOATS,
    "float32": frozenset((torch.float32,)),
    "integer": _INTEGERS,
    "int32": frozenset((torch.int32,)),
    "int64": frozenset((torch.int64,)),
    "uint8": frozenset((torch.uint8,)),
    "wave": FLOATS | {torch.int16},
}


class _Operand(NamedTuple):
    place: int
    name: str
    leading: bool  # any dims may come before the named ones
    dims: tuple[str, ...]
    like: str  # operand that gives the dtype, or ""
    statistics: bool  # of that dtype
    dtypes: frozenset[torch.dtype]
    kind: str


class Checks:
    """What the arguments of one op must be.

    Args:
        tensors: for each tensor its dims and its dtype, as "* C float": `*` stands for any leading dims, a letter or
            a name for one size, the same wherever it stands; dtypes are those of `_KINDS`, "=x" for that of x, and
            "~x" for that of the statistics of x, which may be float32 for float64 too.
        finite: numbers that must not be infinite or NaN.
        at_least: least values of numbers; they must not be NaN either.
        floats: dtypes that must be floating.
        also: called with the arguments by name and the sizes; raises ValueError for what dims cannot say.
        values: the same, for real tensors alone.
        backend: why the backend that is named cannot run this, or None; called with the arguments by name.
    """

    def __init__(
        self,
        tensors: dict[str, str],
        finite: Sequence[str] = (),
        at_least: dict[str, float] | None = None,
        floats: Sequence[str] = (),
        also: Callable[[dict[str, Any], Sizes], None] | None = None,
        values: Callable[[dict[str, Any], Sizes], None] | None = None,
        backend: Callable[[dict[str, Any]], str | None] | None = None,
    ) -> None:
        self._tensors, self._finite, self._floats = tensors, tuple(finite), tuple(floats)
        self._at_least = at_least or {}
        self._also, self._values, self._backend = also, values, backend
        self._op = ""
        self._names: tuple[str, ...] = ()
        self._operands: list[_Operand] = []
        self._good: set[tuple[Any, ...]] = set()

    def bind(self, op: str, function: Callable[..., Any]) -> None:
        """Learn the places of the arguments from the op's body."""
        self._op, self._names = op, tuple(inspect.signature(function).parameters)
        for name, text in self._tensors.items():
            *dims, kind = text.split()
            leading = dims[:1] == ["*"]
            self._operands.append(
                _Operand(
                    self._names.index(name),
                    name,
                    leading,
                    tuple(dims[1:] if leading else dims),
                    kind[1:] if kind[0] in "=~" else "",
                    kind[0] == "~",
                    FLOATS if kind[0] in "=~" else _KINDS[kind],
                    kind,
                )
            )

    def fake(self, arguments: Sequence[Any]) -> None:
        """Raise ValueError unless the arguments fit by shape, dtype, device and number."""
        sizes: Sizes = {"1": 1, "3": 3}
        dtypes: dict[str, torch.dtype] = {}
        device = None
        for place, name, leading, dims, like, statistics, allowed, _ in self._operands:
            x = arguments[place]
            if x is None:
                continue
            shape, dtype = x.shape, x.dtype
            if leading:
                split = len(shape) - len(dims)
                fits = split >= 0 and sizes.setdefault("*", shape[:split]) == shape[:split]
                shape = shape[max(split, 0) :]
            else:
                fits = len(shape) == len(dims)
            if fits:
                for dim, size in zip(dims, shape, strict=True):
                    if sizes.setdefault(dim, size) != size:
                        fits = False
                        break
            if not fits:
                raise ValueError(self._misfit(name, x, sizes))
            dtypes[name] = dtype
            if like:
                wanted = dtypes[like]
                if statistics and (wanted != torch.float64 or dtype == torch.float32):
                    wanted = torch.float32
                if dtype != wanted:
                    raise ValueError(
                        f"ast_fast::{self._op}: {name} is {dtype}, expected {wanted} with {like} in "
                        f"{dtypes[like]}: cast it"
                    )
            elif dtype not in allowed:
                raise ValueError(
                    f"ast_fast::{self._op}: {name} is {dtype}, expected {_said(allowed)}"
                )
            if device is None:
                device, first = x.device, name
            elif x.device != device:
                raise ValueError(
                    f"ast_fast::{self._op}: {name} is on {x.device} and {first} on {device}: move them to "
                    "one device"
                )
        self._check_numbers(arguments)
        if self._also is not None:
            self._also(dict(zip(self._names, arguments, strict=True)), sizes)

    def __call__(self, arguments: Sequence[Any]) -> None:
        """Raise ValueError unless a body may run with these."""
        form = _form(arguments)
        if form not in self._good:
            self.fake(arguments)
            if self._backend is not None:
                named = dict(zip(self._names, arguments, strict=True))
                reason = self._backend(named)
                if reason is not None:
                    raise ValueError(
                        f"ast_fast::{self._op}: backend={named['backend']!r}: {reason}"
                    )
            if len(self._good) >= _MOST_FORMS:
                self._good.clear()
            self._good.add(form)
        if self._values is not None:
            self._values(dict(zip(self._names, arguments, strict=True)), {})

    def _check_numbers(self, arguments: Sequence[Any]) -> None:
        for name in self._finite:
            value = arguments[self._names.index(name)]
            if not -math.inf < value < math.inf:
                raise ValueError(f"ast_fast::{self._op}: {name}={value}, expected a finite number")
        for name, least in self._at_least.items():
            value = arguments[self._names.index(name)]
            if not least <= value < math.inf:
                raise ValueError(
                    f"ast_fast::{self._op}: {name}={value}, expected a finite number of {least:g} or more"
                )
        for name in self._floats:
            dtype = arguments[self._names.index(name)]
            if dtype not in FLOATS:
                raise ValueError(
                    f"ast_fast::{self._op}: {name} is {dtype}, expected {_said(FLOATS)}"
                )

    def _misfit(self, name: str, x: Tensor, sizes: Sizes) -> str:
        operand = next(each for each in self._operands if each.name == name)
        dims = ["...", *operand.dims] if operand.leading else list(operand.dims)
        known = [
            f"{dim}={sizes[dim]}" for dim in operand.dims if dim in sizes and not dim.isdigit()
        ]
        if operand.leading and "*" in sizes:
            known.insert(0, f"...={tuple(sizes['*'])}")
        others = f" with {', '.join(known)} of the arguments before it" if known else ""
        return (
            f"ast_fast::{self._op}: {name} has shape {tuple(x.shape)}, expected "
            f"[{', '.join(dims)}]{others}"
        )


def _form(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """All of a call that its checks look at but values; equal ones need no second look."""
    return tuple(
        [
            (a.shape, a.dtype, a.device)
            if isinstance(a, Tensor)
            else _form(a)
            if isinstance(a, list | tuple)
            else a
            for a in arguments
        ]
    )


def _said(dtypes: frozenset[torch.dtype]) -> str:
    return " or ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
