"""Flash attention by the compiled kernels, for separate or fused q, k, v with any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ._common import CODES, need, threads, why_not

WIDTHS = (32, 64, 96, 128)
LSE_BLOCK = 128
_SMALLEST_SCALE = 1e-30
View = tuple[int, int, int, int]


def unsupported(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if q.shape[-1] not in WIDTHS:
        return f"the C++ attention takes head widths {WIDTHS}, got {q.shape[-1]}"
    if not (q.dtype == k.dtype == v.dtype):
        return "the C++ attention takes one dtype for q, k and v"
    return why_not(q=q, k=k, v=v)


def dense(x: Tensor) -> Tensor:
    """`x` itself if its last dim is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check(
    q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...] = (), grads: tuple[Tensor, ...] = ()
) -> None:
    """Raise ValueError unless q, k, v, what is saved of the shape of q, and outputs fit together."""
    shape, keys, dtype = q.shape, k.shape, q.dtype
    # one expression, and a message only where it is needed: a small call takes a few microseconds in all
    if not (
        keys == v.shape
        and shape[-2:] == keys[-2:]
        and len(shape) == len(keys)
        and (shape[0] == keys[0] if len(shape) == 4 else len(shape) == 3)
        and shape[-1] in WIDTHS
        and dtype in CODES
        and dtype == k.dtype == v.dtype
    ):
        need(False, f"q, k, v of one dtype, heads and head width of {WIDTHS}", q, k, v)
    for x in saved:
        if x.shape != shape or x.dtype != dtype:
            need(False, "do and o like q", q, x)
    for x, like in zip(grads, (q, k, v), strict=bool(grads)):
        if x.shape != like.shape or x.dtype != dtype or x.stride(-1) != 1:
            need(False, "dq, dk, dv like q, k, v with contiguous rows", like, x)


def check_lse(lse: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the log-sum-exp is what a forward pass gives."""
    if lse.shape != shape or lse.dtype != torch.float32:
        need(False, f"a float32 lse {shape}", lse)


def view(x: Tensor) -> View:
    """Address and strides of a clip, a row and a head of x [B, T, H, D]."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """An equal problem with a positive scale, as the kernels want: q, scale, and the factor on q."""
    if scale > 0:
        # one that float32 rounds to 0 makes every score 0 as surely
        return q, max(scale, _SMALLEST_SCALE), 1.0
    factor = -1.0 if scale < 0 else 0.0
    return q * factor, max(-scale, _SMALLEST_SCALE) if scale else 1.0, factor


def _check_keys(clips: int, keys: int, lengths: Tensor | None, bias: Tensor | None) -> None:
    if lengths is not None and lengths.shape != (clips,):
        need(False, f"{clips} lengths of keys", lengths)
    if bias is not None and (bias.shape != (clips, keys) or bias.dtype != torch.float32):
        need(False, f"a float32 bias {(clips, keys)}", bias)


def _lengths(key_lengths: Tensor | None) -> Tensor | None:
    if key_lengths is None:
        return None
    if key_lengths.dtype == torch.int32 and key_lengths.device.type == "cpu":
        return key_lengths.contiguous()
    # a wider integer must not wrap
    return key_lengths.clamp(-1, 2**31 - 1).to("cpu", torch.int32).contiguous()


def forward(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    scale: float,
    key_lengths: Tensor | None,  # [B]
    allow_tf32: bool = False,
    key_bias: Tensor | None = None,  # [B, Tk] float32
) -> tuple[Tensor, Tensor]:  # [B, Tq, H, D], [B, H, Tpad]
    """Return o and the natural log-sum-exp, its padding +inf; `key_bias` is added to the scores."""
    check(q, k, v)
    clips, tq, heads, width = q.shape
    _check_keys(clips, k.shape[1], key_lengths, key_bias)
    columns = -(-tq // LSE_BLOCK) * LSE_BLOCK
    o = torch.empty((clips, tq, heads, width), dtype=q.dtype)
    lse = torch.empty((clips, heads, columns), dtype=torch.float32)
    lse[:, :, tq:] = float("inf")
    if o.numel():
        q, scale, _ = positive(q, scale)
        q, k, v, lengths = dense(q), dense(k), dense(v), _lengths(key_lengths)
        key_bias = None if key_bias is None else key_bias.contiguous()
        _C.attention_forward(
            view(q),
            view(k),
            view(v),
            view(o),
            lse.data_ptr(),
            columns,
            clips,
            tq,
            k.shape[1],
            heads,
            width,
            0 if lengths is None else lengths.data_ptr(),
            0,
            0,
            scale,
            CODES[q.dtype],
            threads(),
            0 if key_bias is None else key_bias.data_ptr(),
        )
    return o, lse


def backward(
    do: Tensor,  # [B, Tq, H, D]
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    o: Tensor,  # [B, Tq, H, D]
    lse: Tensor,  # [B, H, Tpad]
    scale: float,
    key_lengths: Tensor | None,  # [B]
    deterministic: bool,
    dq: Tensor,  # [B, Tq, H, D]
    dk: Tensor,  # [B, Tk, H, D]
    dv: Tensor,  # [B, Tk, H, D]
    allow_tf32: bool = False,
) -> None:
    """Write the gradients into dq, dk and dv; always deterministic."""
    check(q, k, v, (do, o), (dq, dk, dv))
    clips, tq, heads, width = q.shape
    _check_keys(clips, k.shape[1], key_lengths, None)
    check_lse(lse, (clips, heads, -(-tq // LSE_BLOCK) * LSE_BLOCK))
    if not q.numel() or not k.numel():
        for grad in (dq, dk, dv):
            grad.zero_()
        return
    q, scale, factor = positive(q, scale)
    do, q, k, v, o, lse = dense(do), dense(q), dense(k), dense(v), dense(o), lse.contiguous()
    lengths = _lengths(key_lengths)
    _C.attention_backward(
        view(q),
        view(k),
        view(v),
        view(o),
        lse.data_ptr(),
        lse.shape[2],
        clips,
        tq,
        k.shape[1],
        heads,
        width,
        0 if lengths is None else lengths.data_ptr(),
        0,
        0,
        scale,
        CODES[q.dtype],
        threads(),
        view(do),
        view(dq),
        view(dk),
        view(dv),
    )
    if factor != 1.0:
        dq.mul_(factor)
