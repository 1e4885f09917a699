"""What tests of ops need: guard zones, poisoned memory, awkward layouts, seeded inputs, error checks.

Kept in the package so that kernels can be tested on a machine that has only the installed wheel.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import backend, ops, reference
from .equivalence import cases
from .equivalence.budgets import Kind, budget, precision_of
from .equivalence.cases import OpCase, Tensors, normal
from .equivalence.measures import Errors, measure

GUARD = 4096  # elements on either side of a guarded tensor
_SENTINEL = {
    torch.uint8: 171,
    torch.int8: -85,
    torch.int16: -21555,
    torch.int32: -1431655766,
    torch.int64: -6148914691236517206,
}
_FLOAT_SENTINEL = -24672.0  # exact in every floating dtype


_FEW = 16  # elements


class GuardZoneError(AssertionError):
    """A kernel wrote outside a tensor."""


class GuardZones:
    """Tensors cut from larger buffers whose edges are checked afterwards.

    >>> zones = GuardZones()
    >>> x = zones.copy(torch.arange(3.0))
    >>> x += 1
    >>> zones.check()
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[str, Tensor, int, int]] = []

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "tensor",
    ) -> Tensor:
        """A contiguous tensor of NaN (or the sentinel, for integers) between two guard zones."""
        size = 1
        for extent in shape:
            size *= extent
        value = _SENTINEL.get(dtype, _FLOAT_SENTINEL)
        buffer = torch.full((size + 2 * GUARD,), value, dtype=dtype, device=device)
        self._buffers.append((name, buffer, GUARD, size))
        inside = buffer[GUARD : GUARD + size]
        if dtype.is_floating_point:
            inside.fill_(float("nan"))
        return inside.view(shape)

    def copy(self, tensor: Tensor, name: str = "tensor") -> Tensor:
        """A contiguous copy of a tensor between two guard zones."""
        return self.empty(tuple(tensor.shape), tensor.dtype, tensor.device, name).copy_(tensor)

    def check(self) -> None:
        """Raise `GuardZoneError` if anything was written outside a tensor."""
        for name, buffer, start, size in self._buffers:
            value = _SENTINEL.get(buffer.dtype, _FLOAT_SENTINEL)
            for side, zone in (("before", buffer[:start]), ("after", buffer[start + size :])):
                changed = (zone != value).nonzero()
                if len(changed):
                    raise GuardZoneError(
                        f"{len(changed)} elements {side} {name} were overwritten, the first at offset "
                        f"{int(changed[0]) if side == 'after' else int(changed[0]) - start}"
                    )


@contextlib.contextmanager
def guarded_memory() -> Iterator[GuardZones]:
    """Poison and guard what ast_fast allocates: `torch.empty`, `empty_like` and `new_empty`.

    Inside, every such CPU or CUDA tensor starts as NaN (so that an element a kernel forgets is seen)
    and lies between guard zones that are checked on the way out.
    """
    zones = GuardZones()
    plain_empty, plain_like = torch.empty, torch.empty_like
    plain_new = Tensor.new_empty

    def fits(tensor: Tensor, options: dict[str, object]) -> bool:
        known = {"dtype", "device", "requires_grad", "layout"}
        return (
            type(tensor) is Tensor
            and tensor.is_contiguous()
            and tensor.device.type in ("cpu", "cuda")
            and not torch.compiler.is_compiling()
            and set(options) <= known
            and (tensor.is_floating_point() or tensor.dtype in _SENTINEL)
        )

    def guard(tensor: Tensor, options: dict[str, object]) -> Tensor:
        if not fits(tensor, options):
            return tensor
        return zones.empty(tuple(tensor.shape), tensor.dtype, tensor.device, "an allocation")

    def empty(*size: Any, **options: Any) -> Tensor:
        return guard(plain_empty(*size, **options), options)

    def empty_like(tensor: Tensor, **options: Any) -> Tensor:
        return guard(plain_like(tensor, **options), options)

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return guard(plain_new(self, *size, **options), options)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield zones
    zones.check()


class Guarded:
    """A function whose tensors lie between guard zones: what it is given, what it allocates, what it writes.

    Whatever it reads outside of them is NaN. Arguments it does not name as outputs must stay as they are.

    Args:
        function: takes tensors, lists of them, and other things, by place or by name.
        outputs: names of the parameters that it writes into.
    """

    def __init__(self, function: Callable[..., Any], outputs: tuple[str, ...] = ()) -> None:
        self._function, self._outputs = function, outputs
        self._signature = inspect.signature(function)
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function; raise `GuardZoneError` if it left its memory."""
        bound = self._signature.bind(*args, **options)
        held: list[tuple[str, Tensor, Tensor, Tensor]] = []

        def hold(name: str, x: Any) -> Any:
            if isinstance(x, list | tuple) and x and all(isinstance(each, Tensor) for each in x):
                return [hold(name, each) for each in x]
            if not isinstance(x, Tensor) or not x.numel():
                return x
            buffer, inside = _between_zones(x)
            held.append((name, x, buffer, inside))
            return inside

        for name, value in bound.arguments.items():
            bound.arguments[name] = hold(name, value)
        before = [buffer.clone() for _, _, buffer, _ in held]
        with guarded_memory():
            made = self._function(*bound.args, **bound.kwargs)
        for (name, x, buffer, inside), untouched in zip(held, before, strict=True):
            if name in self._outputs:
                x.copy_(inside)
                _at_home(untouched, inside, buffer).copy_(inside)
            if not torch.equal(buffer.view(torch.uint8), untouched.view(torch.uint8)):
                raise GuardZoneError(f"{name}, or memory around it, was written to")
        self.calls += 1
        # results of their own, not parts of a larger buffer
        return tree_map_only(Tensor, torch.clone, made)


def _between_zones(x: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer with guard zones, and x's copy in it with the same strides and alignment."""
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    start = GUARD + x.data_ptr() % 64 // x.element_size()
    fill = float("nan") if x.is_floating_point() else _SENTINEL.get(x.dtype, 1)
    buffer = torch.full((start + extent + GUARD,), fill, dtype=x.dtype, device=x.device)
    # rows that repeat in memory cannot be written one by one
    buffer[start : start + extent] = x.detach().as_strided((extent,), (1,))
    inside = buffer.as_strided(x.shape, x.stride(), start)
    return buffer, inside


def _at_home(buffer: Tensor, inside: Tensor, home: Tensor) -> Tensor:
    """The part of another buffer that lies as `inside` does in `home`."""
    place = inside.storage_offset() - home.storage_offset()
    return buffer.as_strided(inside.shape, inside.stride(), place)


def random_tensor(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """Standard normal entries times `scale`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return draw.to(device=device, dtype=dtype)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x.clone()


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


def _row_sliced(x: Tensor) -> Tensor:
    wide = x.new_zeros((2 * x.shape[0], *x.shape[1:]))
    wide[::2] = x
    return wide[::2]


def _flipped(x: Tensor) -> Tensor:
    return x.flip(0).contiguous().flip(0)


def _offset(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.numel() + 1)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].view(x.shape)


# the same numbers in memory layouts that kernels get wrong
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "every second element": _sliced,
    "every second row": _row_sliced,
    "flipped": _flipped,
    "one element off": _offset,
}


def assert_within(
    result: Tensor,
    oracle: Tensor,
    kind: Kind,
    plain: Tensor | None = None,
    dtype: torch.dtype | None = None,
    what: str = "result",
) -> Errors:
    """Assert that a result keeps its budget.

    Args:
        result: ours.
        oracle: in float64.
        kind: of budget.
        plain: plain PyTorch's result, if its error may widen the budget.
        dtype: whose budget; that of the result by default.
        what: name for the message.
    """
    errors = measure(result, oracle)
    reference = None if plain is None else measure(plain, oracle)
    allowed = budget(kind, precision_of(dtype or result.dtype), reference)
    if oracle.numel() < _FEW:  # their norm is no mean: it may be a single one that cancels
        allowed = allowed._replace(rel_l2=max(allowed.rel_l2, allowed.worst))
    assert allowed.admits(errors), (
        f"{what}: worst {errors.worst:.2e}, relative L2 {errors.rel_l2:.2e}, "
        f"budget {allowed.worst:.2e} {allowed.rel_l2:.2e}"
    )
    return errors


def assert_same(result: Tensor, expected: Tensor, what: str = "result") -> None:
    """Assert equal shape, dtype and bits (NaN equals NaN)."""
    assert result.shape == expected.shape and result.dtype == expected.dtype, (
        f"{what}: {tuple(result.shape)} {result.dtype}, expected {tuple(expected.shape)} "
        f"{expected.dtype}"
    )
    same = (result == expected) | (result.isnan() & expected.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def log_mel_case(clips: int = 2, samples: int = 1600, lengths: list[int] | None = None) -> OpCase:
    """The front end on noise, as a case like those of the other ops."""
    tables = reference.mel.mel_tables(num_mel_bins=32)
    frames = tables.num_frames(samples) + 1

    def inputs(generator: torch.Generator) -> Tensors:
        tensors = {"wave": 0.1 * normal(generator, clips, samples)}
        if lengths is not None:
            tensors["lengths"] = torch.tensor(lengths)
        return tensors

    def ours(t: Tensors) -> Tensors:
        lengths = t.get("lengths")
        y = ops.log_mel(t["wave"], lengths, num_mel_bins=32, num_frames=frames, mean=-4.0, std=4.5)
        return {"y": y}

    return OpCase(
        op="log_mel",
        shape=f"{clips}x{samples}",
        inputs=inputs,
        ours=ours,
        plain=lambda t: {
            "y": reference.ops.log_mel(t["wave"], t.get("lengths"), tables, frames, -4.0, 4.5)
        },
        oracle=lambda t: {
            "y": reference.ops.log_mel(t["wave"], t.get("lengths"), tables, frames, -4.0, 4.5)
        },
        kinds={"y": "waveform gradient", "dwave": "waveform gradient"},
    )


def small_op_cases() -> dict[str, OpCase]:
    """One small case an op, by name: sizes odd where an op takes odd sizes."""
    return {
        "log_mel": log_mel_case(),
        "log_mel with lengths": log_mel_case(3, 1700, [1700, 1000, 399]),
        "layer_norm": cases.layer_norm(7, 33),
        "add_layer_norm": cases.add_layer_norm(7, 33),
        "mlp": cases.mlp(5, 12),
        "patch_embed": cases.patch_embed(2, 41, 24, (16, 16), (56, 10)),
        "attention": cases.attention(2, 37, 2, 32),
        "attention with lengths": cases.attention(3, 19, 2, 32, [19, 7, 0]),
        "attention_qkv": cases.attention_qkv(2, 21, 2, 32),
        "attention_masked": cases.attention_masked(2, (3, 5), 2, 32),
        "attention_masked window": cases.attention_masked(2, (2, 9), 2, 32, 2),
        "attention_varlen": cases.attention_varlen([17, 1, 30], 2, 32),
    }


def available_backends() -> list[str]:
    """Backends that run CPU tensors here."""
    return ["reference"] + (["cpp"] if backend.why_not("cpp", "cpu", torch.float32) is None else [])
