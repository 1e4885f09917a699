"""Inference on a CPU with weights packed once: `optimize_for_inference`.

The blocks of a trunk then run as one chain of oneDNN products and our kernels, on rows of tokens [R, C], with nothing
of PyTorch's dispatcher in between. Three precisions: the model's own, bfloat16, and bytes (VNNI) with a scale for
each token and for each output of a layer, chosen as the tokens come. Attention, LayerNorm and the residual stream are
never in bytes.

Whatever the chain does not cover (gradients, hooks, replaced parts, autocast) takes the usual way, and says so once;
compilers see the usual way alone.
"""

from __future__ import annotations

import functools
import logging
import zlib
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import backend
from .layers import Block, LayerNorm, Trunk, is_hooked
from .layers_fp8 import uses_fp8
from .ops._common import watched

Precision = Literal["exact", "bf16", "int8"]
_log = logging.getLogger("ast_fast")
Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, precision: Precision = "exact") -> Model:
    """Make a model on a CPU faster where no gradients are recorded; changes it in place and returns it.

    Weights are packed for oneDNN on first use, and again after they changed, as far as a call can see at no cost.
    Watched are: steps of PyTorch's optimisers, each parameter's address and version (what autograd counts: `copy_`,
    `load_state_dict`, in-place arithmetic), and sixteen places spread over its memory. Not seen is a write to single
    elements past autograd, through `.data`, `.numpy()` or a pointer: call `refresh_packed(model)` after one.
    `evaluate` and the equivalence monitor read all weights and catch what was missed. They stay where they are too, so that saving, loading and training go on as before. Packed weights take as much memory again as the
    model's (half of it for bf16, a quarter for int8, of float32). Not copied or pickled with the model.
    `model.set_precision("exact")` takes them away.

    Args:
        model: an `ASTModel`, or any module that holds trunks of AST; switched to eval.
        precision: "exact" computes in the model's dtype and keeps its error budget. "bf16" rounds weights and
            activations of the blocks' products to bfloat16 and keeps bfloat16's budget; the residual stream stays
            in the model's dtype. "int8" rounds them to bytes: 2 to 3 % off in the logits (NUMERICS.md).

    Returns:
        The model.

    Raises:
        ValueError: the precision is unknown, nothing can be optimised, or this machine cannot do it; says why.

    >>> from ast_fast import create_model, optimize_for_inference
    >>> model = optimize_for_inference(create_model("ast_mini_p16_s10"))
    """
    if precision not in ("exact", "bf16", "int8"):
        raise ValueError(f"precision={precision!r}: expected exact, bf16 or int8")
    trunks = [module for module in model.modules() if isinstance(module, Trunk)]
    if not trunks:
        raise ValueError(f"{type(model).__name__} holds no trunk of AST: expected an ASTModel")
    devices = {parameter.device.type for trunk in trunks for parameter in trunk.parameters()}
    if devices != {"cpu"}:
        raise ValueError(
            f"the model is on {', '.join(sorted(devices))}: packed weights are for CPUs; move it with "
            ".to('cpu')"
        )
    if any(uses_fp8(block) for trunk in trunks for block in trunk.blocks):
        raise ValueError("the model computes in FP8: call its set_precision('exact') first")
    why = why_not(precision)
    if why is not None:
        raise ValueError(f"precision={precision!r} is not to be had: {why}")
    _count_steps()
    for trunk in trunks:
        trunk.runner = PackedRunner(precision)
    return model.eval()


def refresh_packed(model: Model) -> Model:
    """Have packed weights made anew on next use; needed after writes that no call can see. Returns the model.

    Such are writes to single elements through `.data`, `.numpy()` or a pointer: see `optimize_for_inference`. A
    model without packed weights stays as it is.

    Args:
        model: what `optimize_for_inference` returned, or a module that holds it.
    """
    for _, runner in _runners(model):
        runner.forget()
    return model


def stale_packs(model: nn.Module) -> list[str]:
    """Blocks whose packed weights are no longer the model's though no call would notice, by name.

    Reads all weights that are packed: 0.2 s for AST-base.

    Args:
        model: what `optimize_for_inference` returned, or a module that holds it.
    """
    found = []
    for name, runner in _runners(model):
        stale = {id(block) for block in runner.stale()}
        for inner, module in model.get_submodule(name).named_modules():
            if id(module) in stale:
                found.append(f"{name}.{inner}" if name else inner)
    return found


def _runners(model: nn.Module) -> list[tuple[str, PackedRunner]]:
    return [
        (name, module.runner)
        for name, module in model.named_modules()
        if isinstance(module, Trunk) and isinstance(module.runner, PackedRunner)
    ]


_steps = 0  # of any optimiser: fused ones change weights without raising their versions


def note_step(*_: Any) -> None:
    """Weights may have changed: called after every optimiser's step, and by whoever replays one."""
    global _steps
    _steps += 1


@functools.cache
def _count_steps() -> None:
    register_optimizer_step_post_hook(note_step)


def why_not(precision: Precision) -> str | None:
    """Why `optimize_for_inference` cannot give this precision on this machine, or None."""
    why = backend.why_not("cpp", "cpu", torch.float32)
    if why is not None:
        return why
    from .cpp import packed

    why = packed.unsupported()
    if why is None and precision == "bf16":
        why = packed.bfloat16_unsupported()
    if why is None and precision == "int8":
        why = packed.int8_unsupported()
    return why


class PackedRunner:
    """Runs the blocks of a trunk with packed weights.

    Args:
        precision: see `optimize_for_inference`.

    Attributes:
        ran: whether the last call used packed weights.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision, self.ran = precision, False
        self._packs: dict[int, tuple[Block, _Pack]] = {}
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # oneDNN's layouts can be neither copied nor pickled: a copy packs its own weights
        return PackedRunner, (self.precision,)

    def __call__(
        self, stream: Tensor, blocks: list[Any], last_norm: nn.Module, keep: int | None
    ) -> Tensor | None:
        """What `Trunk.run_blocks` is to return, or None: take the usual way."""
        if torch.compiler.is_compiling():
            return None
        why = self._cannot_run(stream, blocks, last_norm)
        if why is not None:
            if stream.device.type != "cpu":
                self._packs.clear()
            self.stand_aside(why)
            return None
        self.ran = True
        clips, _, width = stream.shape
        dtype = torch.bfloat16 if self.precision != "exact" else stream.dtype
        # what passes between their steps is a matter of theirs
        arithmetic: Any = _Bytes(stream.dtype) if self.precision == "int8" else _Floats(dtype)
        packs = [self._pack(block, dtype) for block in blocks]
        rows = stream.reshape(-1, width)
        normed = arithmetic.enter(rows, packs[0].norm1)
        for pack, following in zip(packs, [*packs[1:], None], strict=True):
            short = None if following else keep
            update = arithmetic.attention(pack, normed, clips, short)
            rows = _first_of_each(rows, clips, short)
            normed, rows = arithmetic.join(update, rows, pack.norm2)
            update = arithmetic.feed_forward(pack, normed)
            if following:
                normed, rows = arithmetic.join(update, rows, following.norm1)
        made: Tensor = arithmetic.leave(update, rows, _norm(last_norm))
        return made.view(clips, -1, width)

    def forget(self) -> None:
        """Drop what is packed: it is made anew on next use."""
        self._packs.clear()

    def stale(self) -> list[Block]:
        """Blocks whose weights were written to since they were packed, though their state is the same."""
        found = []
        for block, pack in self._packs.values():
            parameters = _parameters_of(block)
            if pack.state == _state_of(parameters) and pack.content != _content_of(parameters):
                found.append(block)
        return found

    def stand_aside(self, why: str) -> None:
        """Say, once, why packed weights are not used."""
        self.ran = False
        if why not in self._said and not torch.compiler.is_compiling():
            self._said.add(why)
            _log.warning(
                "packed weights (precision=%s) are not used: %s; running the usual way",
                self.precision,
                why,
            )

    def _cannot_run(self, stream: Tensor, blocks: list[Any], last_norm: nn.Module) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are recorded (use torch.inference_mode())"
        if stream.device.type != "cpu" or stream.dtype not in (torch.float32, torch.bfloat16):
            return f"tokens are {stream.dtype} on {stream.device}"
        in_bfloat16 = self.precision == "bf16" or stream.dtype == torch.bfloat16
        if in_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this CPU"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if backend.requested() not in ("auto", "cpp"):
            return f"the backend {backend.requested()} was asked for"
        if watched(stream):
            return "operators are watched, traced or compiled"
        if type(last_norm) is not LayerNorm or is_hooked(last_norm):
            return "the norm after the blocks is hooked or was replaced"
        if not blocks or not stream.numel():
            return "there is nothing to compute"
        for block in blocks:
            if type(block) is not Block or not block.can_leave_out_parts:
                return "a block is hooked or was replaced"
            if uses_fp8(block):
                return "a block computes in FP8"
            if block.attn.head_dim not in (32, 64, 96, 128):
                return f"heads are {block.attn.head_dim} wide"
        return None

    def _pack(self, block: Block, dtype: torch.dtype) -> _Pack:
        parameters = _parameters_of(block)
        state = _state_of(parameters)
        _, pack = self._packs.get(id(block), (None, None))
        if pack is None or pack.state != state or pack.dtype != dtype:
            pack = _Pack(block, dtype, self.precision == "int8", state)
            # while they are kept, no other tensor can come to lie at their addresses
            pack.made_from = [parameter.detach() for parameter in parameters]
            pack.content = _content_of(parameters)
            self._packs[id(block)] = block, pack  # the block lives as long as its id counts
        return pack


def _parameters_of(block: Block) -> list[Tensor]:
    attn, mlp = block.attn, block.mlp
    # asked on every call: `block.parameters()` would take longer than some products
    modules = (block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _state_of(parameters: list[Tensor]) -> list[int]:
    """Changes whenever a parameter is written to or replaced."""
    from .cpp import packed

    state = [_steps, packed.fingerprint(parameters)]
    for parameter in parameters:
        state.append(parameter.data_ptr())
        state.append(0 if parameter.is_inference() else parameter._version)
    return state


def _content_of(parameters: list[Tensor]) -> int:
    """A checksum of every byte: sums of the rows and of the columns of their words, at the speed of memory."""
    found = 0
    for parameter in parameters:
        content = parameter.detach().contiguous().view(-1).view(torch.uint8)
        words = content[: len(content) // 8 * 8].view(torch.int64)
        square = words[: len(words) // _ROW * _ROW].view(-1, _ROW)
        rest = content[8 * square.numel() :]
        for part in (square.sum(0), square.sum(1), rest):
            found = zlib.crc32(part.numpy().data, found)
    return found


_ROW = 256  # words

Norm = tuple[Tensor, Tensor, float]


def _norm(module: Any) -> Norm:
    # copies: a view of float32 parameters would change before the packed weights do
    weight, bias = (p.detach().to(torch.float32, copy=True) for p in (module.weight, module.bias))
    return weight.contiguous(), bias.contiguous(), module.eps


def _first_of_each(rows: Tensor, clips: int, keep: int | None) -> Tensor:
    """The first `keep` rows of each clip of rows [R, ...]; all of them for None."""
    if keep is None:
        return rows
    return rows.view(clips, -1, *rows.shape[1:])[:, :keep].flatten(0, 1)


class _Pack:
    """One block's weights as the products want them."""

    def __init__(self, block: Block, dtype: torch.dtype, int8: bool, state: list[int]) -> None:
        self.state, self.dtype, self._int8 = state, dtype, int8
        self.made_from: list[Tensor] = []
        self.content = 0
        self.norm1, self.norm2 = _norm(block.norm1), _norm(block.norm2)
        attn = block.attn
        self.heads, self.scale = (attn.num_heads, attn.head_dim), attn.scale
        self._fused = attn.qkv
        self.proj = self._linear(attn.proj.weight, attn.proj.bias)
        self.fc1 = self._linear(block.mlp.fc1.weight, block.mlp.fc1.bias)
        self.fc2 = self._linear(block.mlp.fc2.weight, block.mlp.fc2.bias)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Any:
        from .cpp import packed

        if self._int8:
            return packed.Int8Linear(weight, bias)
        return packed.PackedLinear(weight.detach().to(self.dtype), bias)

    def _part(self, start: int, stop: int) -> Any:
        width = self._fused.in_features
        rows = slice(start * width, stop * width)
        bias = self._fused.bias
        return self._linear(self._fused.weight[rows], None if bias is None else bias[rows])

    @functools.cached_property
    def qkv(self) -> Any:
        """Queries, keys and values."""
        return self._part(0, 3)

    @functools.cached_property
    def q(self) -> Any:
        """Queries alone, for a last block that only the prefix leaves."""
        return self._part(0, 1)

    @functools.cached_property
    def kv(self) -> Any:
        """Keys and values alone."""
        return self._part(1, 3)


def _attend(pack: _Pack, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, T, H, D] as rows [B T, H D]."""
    from .cpp import attention

    o, _ = attention.forward(q, k, v, pack.scale, None)
    return o.flatten(2).flatten(0, 1)


class _Floats:
    """Products in one floating-point dtype; the stream may be in another."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def enter(self, rows: Tensor, norm: Norm) -> Tensor:
        from .cpp import layer_norm

        return layer_norm.forward(rows, *norm, self._dtype)[0]

    def attention(self, pack: _Pack, normed: Tensor, clips: int, keep: int | None) -> Tensor:
        if keep is None:
            q, k, v = pack.qkv(normed).view(clips, -1, 3, *pack.heads).unbind(2)
        else:
            first = _first_of_each(normed, clips, keep)
            q = pack.q(first).view(clips, -1, *pack.heads)
            k, v = pack.kv(normed).view(clips, -1, 2, *pack.heads).unbind(2)
        return pack.proj(_attend(pack, q, k, v))

    def feed_forward(self, pack: _Pack, normed: Tensor) -> Tensor:
        return pack.fc2(pack.fc1(normed, gelu=True))

    def join(self, update: Tensor, rows: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        from .cpp import add_layer_norm

        return add_layer_norm.forward(update, rows, *norm, self._dtype)[:2]

    def leave(self, update: Tensor, rows: Tensor, norm: Norm) -> Tensor:
        from .cpp import add_layer_norm

        return add_layer_norm.forward(update, rows, *norm, rows.dtype)[0]


Bytes = tuple[Tensor, Tensor]  # levels [R, C] and the scale of each row [R]
Unscaled = tuple[Tensor, Tensor, Tensor]  # a product [R, K], the scale of each row, the bias


class _Bytes:
    """Products of bytes; attention in bfloat16 where this CPU multiplies it, else in the stream's dtype."""

    def __init__(self, stream: torch.dtype) -> None:
        from .cpp import packed

        self._packed = packed
        fast = packed.bfloat16_unsupported() is None
        self._attention_dtype = torch.bfloat16 if fast else stream

    def enter(self, rows: Tensor, norm: Norm) -> Bytes:
        return self._packed.int8_rows(rows, norm=norm)[:2]

    def _values(self, linear: Any, normed: Bytes) -> Tensor:
        levels, scale = normed
        made = linear(levels, self._packed.ZERO)
        return self._packed.int8_rows(made, scale, linear.bias, restore_to=self._attention_dtype)[0]

    def attention(self, pack: _Pack, normed: Bytes, clips: int, keep: int | None) -> Unscaled:
        if keep is None:
            q, k, v = self._values(pack.qkv, normed).view(clips, -1, 3, *pack.heads).unbind(2)
        else:
            levels, scale = (_first_of_each(each, clips, keep) for each in normed)
            q = self._values(pack.q, (levels, scale)).view(clips, -1, *pack.heads)
            k, v = self._values(pack.kv, normed).view(clips, -1, 2, *pack.heads).unbind(2)
        levels, scale, _ = self._packed.int8_rows(_attend(pack, q, k, v))
        return pack.proj(levels, self._packed.ZERO), scale, pack.proj.bias

    def feed_forward(self, pack: _Pack, normed: Bytes) -> Unscaled:
        packed = self._packed
        levels, scale = normed
        made = pack.fc1(levels, packed.ZERO)
        levels, scale, _ = packed.int8_rows(
            made, scale, pack.fc1.bias, gelu=True, zero=packed.GELU_ZERO
        )
        return pack.fc2(levels, packed.GELU_ZERO), scale, pack.fc2.bias

    def join(self, update: Unscaled, rows: Tensor, norm: Norm) -> tuple[Bytes, Tensor]:
        levels, scale, total = self._packed.int8_rows(*update, residual=rows, norm=norm)
        assert total is not None
        return (levels, scale), total

    def leave(self, update: Unscaled, rows: Tensor, norm: Norm) -> Tensor:
        made, _, _ = self._packed.int8_rows(
            *update, residual=rows, norm=norm, restore_to=rows.dtype
        )
        return made
