"""Linear layers whose weights oneDNN holds in its own layout, for inference on a CPU.

PyTorch hands oneDNN a weight as rows, which it must lay out anew in every product; that counts where rows of x are
few. Packed once, at the price of a second copy of the weights, it need not; GELU then comes in the same pass. The doors are operators of PyTorch's own compiler (`torch.ops.mkldnn`,
`torch.ops.onednn`), which it does not promise to keep: `unsupported` and `int8_unsupported` say where they are
missing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _C
from ..reference.int8 import quantise_weight
from ._common import CODES, rows_of, threads, wide

# what bytes stand for: (q - zero) * scale, with a scale for each row. GELU never falls below -0.17, so that nearly
# all its range is above zero.
ZERO, GELU_ZERO = 128, 16
# oneDNN asks for a number of rows; its layouts for two rows and more are the same
_PACKED_FOR_ROWS = 1024


@functools.cache
def unsupported() -> str | None:
    """Why weights cannot be packed, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        made = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this version of PyTorch does not pack weights: {error}"
    return None if torch.equal(made, x @ weight.t()) else "packed weights give wrong products"


@functools.cache
def bfloat16_unsupported() -> str | None:
    """Why bfloat16 would not be faster than float32 on this CPU, or None."""
    asked = (
        getattr(torch.cpu, name, None)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    if any(ask is not None and ask() for ask in asked):
        return None
    return "this CPU has neither AVX512-BF16 nor AMX"


@functools.cache
def int8_unsupported() -> str | None:
    """Why products of bytes are not to be had, or None."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    if vnni is None or not vnni():
        return "this CPU has no VNNI, without which products of bytes overflow"
    try:
        # two neighbours whose sum leaves 16 bits: 255 * 127 * 2
        layer = Int8Linear(torch.tensor([[127.0, 127.0, -3.0, 1.0]]), None)
        made = layer(torch.tensor([[255, 255, 128, 0]], dtype=torch.uint8), ZERO)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this version of PyTorch has no products of bytes: {error}"
    return None if made.item() == 32128 else "products of bytes come out wrong here"


def fingerprint(tensors: list[Tensor]) -> int:
    """A number that changes with the values in sixteen places spread over each tensor.

    Writes through `.data`, and all writes to inference tensors, leave no other trace.
    """
    found: int = _C.fingerprint([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors])
    return found


class PackedLinear:
    """`x weight^T + bias`, and exact GELU of it if asked, in the dtype of the packed weight.

    Args:
        weight: [K, C], float32 or bfloat16.
        bias: [K], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._bias = None if bias is None else bias.detach().to(weight.dtype).clone()

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:  # [R, C] -> [R, K]
        """The product for rows x."""
        name, how = ("gelu", "none") if gelu else ("none", "")
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, name, [], how
        )
        return made


class Int8Linear:
    """Products of quantised rows with a quantised weight, one scale an output.

    Args:
        weight: [K, C]; each of its rows is rounded to 255 levels.
        bias: [K], or None; whoever brings the product back to scale adds it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        levels, self._scale = quantise_weight(weight.detach())
        self._weight = torch.ops.onednn.qlinear_prepack(levels, [_PACKED_FOR_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        self.bias = (
            torch.zeros(weight.shape[0])
            if bias is None
            else bias.detach().to(torch.float32, copy=True).contiguous()
        )

    def __call__(self, q: Tensor, zero: int) -> Tensor:  # [R, C] bytes -> [R, K]
        """The product in bfloat16, to be multiplied by the scale of each row of q."""
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            q,
            1.0,
            zero,
            self._weight,
            self._scale,
            self._zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        return made


def int8_rows(
    x: Tensor,  # [R, C]
    x_scale: Tensor | None = None,  # [R]
    bias: Tensor | None = None,  # [C] float32
    *,
    residual: Tensor | None = None,  # [R, C]
    norm: tuple[Tensor, Tensor, float] | None = None,  # [C], [C], eps
    gelu: bool = False,
    zero: int = ZERO,
    restore_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over rows between two products of bytes.

    Args:
        x: float32 or bfloat16; with `x_scale` a product still to be multiplied by it.
        x_scale: scale of each row.
        bias: added after the scale.
        residual: the stream to be added; the sum is returned in its dtype.
        norm: float32 weight and bias of a LayerNorm, and what is added to its variance.
        gelu: apply exact GELU, to 2.5e-4 relatively.
        zero: the byte that stands for 0.
        restore_to: give values in this dtype rather than bytes.

    Raises:
        ValueError: the arguments do not fit together.

    Returns:
        Bytes [R, C] and their scales [R] (or the values, and an empty tensor), and the sum if there
        is a residual.
    """
    if (x_scale is None) != (bias is None):
        raise ValueError("x_scale and bias: expected both or neither")
    if not 1 <= zero <= 254:
        raise ValueError(f"zero={zero}: expected 1 to 254")
    if residual is not None and restore_to not in (None, residual.dtype):
        raise ValueError(f"restore_to={restore_to}: expected the residual's {residual.dtype}")
    rows, cols = x.shape
    fitting = [(residual, (rows, cols)), (x_scale, (rows,)), (bias, (cols,))]
    fitting += [] if norm is None else [(norm[0], (cols,)), (norm[1], (cols,))]
    for given, shape in fitting:
        if given is not None and given.shape != shape:
            raise ValueError(
                f"shape {tuple(given.shape)} beside x [{rows}, {cols}]: expected {shape}"
            )
    x = rows_of(x)
    residual = None if residual is None else rows_of(residual)
    x_scale, bias = (None if t is None else wide(t) for t in (x_scale, bias))
    stream = residual.dtype if residual is not None else restore_to or torch.float32
    total = None if residual is None else torch.empty((rows, cols), dtype=stream)
    out = torch.empty((rows, cols), dtype=restore_to or torch.uint8)
    scale = torch.empty(0 if restore_to else rows)
    weight = shift = None
    eps = 0.0
    if norm is not None:
        weight, shift, eps = wide(norm[0]), wide(norm[1]), norm[2]
    if rows and cols:
        _C.int8_rows(
            x.data_ptr(),
            CODES[x.dtype],
            x.stride(0),
            0 if x_scale is None else x_scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            0 if total is None else total.data_ptr(),
            CODES[stream],
            0 if weight is None else weight.data_ptr(),
            0 if shift is None else shift.data_ptr(),
            eps,
            gelu,
            out.data_ptr(),
            0 if restore_to else scale.data_ptr(),
            zero,
            rows,
            cols,
            threads(),
        )
    return out, scale, total
