"""One layer of transformers' AST as `layers.run_in_halves` wants it, in either version's names.

Nothing is copied: the parts are the layer's own modules, and their Parameters the only ones. A linear
layer that was wrapped (LoRA) or hooked is called; whatever holds linear layers must be as transformers
made it, or the layer runs its own forward.
Dimensions: B clips, T tokens, H heads, D head width, C width, P prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as theirs,
)

from .. import ops
from ..layers import all_are_hooked, apply_linear, is_hooked
from ._hf_attention import Keys, attend

# version 4 splits attention and MLP into several modules
VERSION_4 = hasattr(theirs, "ASTSelfAttention")

_active_collector: Any = None
if VERSION_4:
    from transformers.utils import generic as _capturing
else:  # version 5 records outputs by hooks that stay on the modules
    from transformers.utils import output_capturing as _capturing

    _active_collector = _capturing._active_collector
# what a model can record, by the text of its class
RECORDABLE: dict[str, Any] = _capturing._CAN_RECORD_REGISTRY


def declare_recordable(registry: Any, model: type, outputs: Any) -> None:
    """Say what models of a class can record, without which they return no hidden states.

    Args:
        registry: transformers' own: a dict of the text of a class, whose item assignment takes a model
            since version 5.23 and makes that text itself.
        model: the class.
        outputs: names of outputs, and the classes whose results they are.
    """
    if isinstance(registry, dict):
        dict.__setitem__(registry, str(model), outputs)
    else:
        registry[str(model)] = outputs


def recorded() -> Any:
    """What transformers records in the running call: names of outputs, or nothing."""
    return None if _active_collector is None else _active_collector.get()


def is_touched(module: nn.Module, records: str = "") -> bool:
    """Whether calling a module does more than its class's forward.

    transformers' own recording hooks count only while `records` is being recorded: they stay for good
    after the first call that asked for hidden states.
    """
    if not is_hooked(module):
        return False
    if all_are_hooked() or module._forward_pre_hooks:
        return True
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    own = module.__dict__.get("forward")
    # transformers 4 wraps forward while it records, and then puts the bound method in its place
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return True
    active = recorded() or ()
    for hook in module._forward_hooks.values():
        home = getattr(hook, "__module__", None)
        if home != "transformers.utils.output_capturing" or records in active:
            return True
    return False


class Norm:
    """A LayerNorm of PyTorch's, computed by our ops.

    Args:
        module: the LayerNorm.
        keep_dtype: give the input's dtype under autocast too: for results that people see.
    """

    def __init__(self, module: nn.LayerNorm, keep_dtype: bool = False) -> None:
        self.module, self.keep_dtype = module, keep_dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        m, dtype = self.module, x.dtype if self.keep_dtype else None
        return ops.layer_norm(x, m.weight, m.bias, m.eps, dtype)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`total = x + residual`; the normalised total and the total."""
        m, dtype = self.module, residual.dtype if self.keep_dtype else None
        return ops.add_layer_norm(x, residual, m.weight, m.bias, m.eps, dtype)


def is_plain_norm(module: nn.Module) -> bool:
    """Whether our ops may stand in for a norm."""
    return (
        type(module) is nn.LayerNorm
        and module.elementwise_affine
        and module.bias is not None
        and not is_touched(module)
    )


class Layer:
    """A layer's modules by what they do.

    Args:
        layer: an `ASTLayer` for which `why_not_halves` gives None.
        mask: what its queries see.
    """

    def __init__(self, layer: Any, mask: Tensor | Keys | None = None) -> None:
        self.layer, self.mask = layer, mask
        outer = layer.attention
        if VERSION_4:
            attention, out = outer.attention, outer.output
            self.q, self.k, self.v = attention.query, attention.key, attention.value
            self.o, self.dropout1 = out.dense, out.dropout
            self.fc1, self.act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
            self.fc2, self.dropout2 = layer.output.dense, layer.output.dropout
            self.heads = (attention.num_attention_heads, attention.attention_head_size)
            self.probability = attention.dropout_prob
        else:
            attention = outer
            self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
            self.o, self.dropout1 = attention.o_proj, layer.dropout
            self.fc1, self.act, self.fc2 = layer.mlp.fc1, layer.mlp.activation_fn, layer.mlp.fc2
            self.dropout2 = layer.dropout
            self.heads = (attention.num_attention_heads, attention.head_dim)
            self.probability = attention.attention_dropout
        self.attention = attention
        self.norm1, self.norm2 = Norm(layer.layernorm_before), Norm(layer.layernorm_after)

    @property
    def can_keep_first(self) -> bool:
        """Whether nobody looks at tokens that the layer's first ones do not depend on."""
        linears = (self.q, self.k, self.v, self.o, self.fc1, self.fc2)
        return all(type(each) is nn.Linear for each in linears) and not is_hooked(
            *linears, self.act, self.dropout1, self.dropout2
        )

    def halves(self, x: Tensor, normed: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        """The MLP's output, not yet added, and the stream it belongs to: see `layers.Block.halves`."""
        update = self.dropout1(self._attention(normed, keep))
        x = x if keep is None else x[:, :keep]
        normed, x = self.norm2.after_add(update, x)
        return self.dropout2(self._mlp(normed)), x

    def _attention(self, x: Tensor, keep: int | None) -> Tensor:
        """Attention and projection of normalised tokens [B, T, C]; of the first `keep` if it is given."""
        asking = x if keep is None else x[:, :keep]
        q = apply_linear(self.q, asking).unflatten(2, self.heads)
        k, v = (apply_linear(each, x).unflatten(2, self.heads) for each in (self.k, self.v))
        dropout = self.probability if self.layer.training else 0.0
        o = attend(q, k, v, self.mask, self.attention.scaling, dropout)
        return apply_linear(self.o, o.flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        plain = type(fc1) is nn.Linear and type(fc2) is nn.Linear and _is_exact_gelu(self.act)
        if plain and not is_hooked(fc1, self.act, fc2):
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return apply_linear(fc2, self.act(apply_linear(fc1, x)))


def _is_exact_gelu(act: Any) -> bool:
    if type(act) is nn.GELU:
        return act.approximate == "none"
    # the erf written out or PyTorch's own: the same function
    return type(act) is GELUActivation


def why_not_halves(layer: Any) -> str | None:
    """Why a layer must run its own forward, or None."""
    for path, name in _CONTAINERS:
        module: Any = layer
        for part in path.split("."):
            module = getattr(module, part)
        if type(module) is not getattr(theirs, name):
            return f"its {name} was replaced by {type(module).__name__}"
        if is_touched(module, "attentions"):
            return f"its {name} is hooked"
    for norm in (layer.layernorm_before, layer.layernorm_after):
        if not is_plain_norm(norm):
            return "a LayerNorm is hooked or was replaced"
    return None


def can_fuse(layer: Any) -> bool:
    """Whether a layer's norms may be computed together with additions outside it."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return False
    if layer._compiled_call_impl is not None:  # compiled by itself: layer.compile()
        return False
    return not is_touched(layer) and why_not_halves(layer) is None


# what holds the linear layers, outer ones first
_CONTAINERS = (
    (
        ("attention", "ASTAttention"),
        ("attention.attention", "ASTSelfAttention"),
        ("attention.output", "ASTSelfOutput"),
        ("intermediate", "ASTIntermediate"),
        ("output", "ASTOutput"),
    )
    if VERSION_4
    else (("attention", "ASTAttention"), ("mlp", "ASTMLP"))
)


def patch_tokens(embeddings: Any, x: Tensor) -> Tensor | None:
    """Tokens with positions [B, T, C] of spectrograms [B, S, F], or None: take the usual way."""
    patches = embeddings.patch_embeddings
    proj = patches.projection
    if (
        type(patches) is not theirs.ASTPatchEmbeddings
        or type(proj) is not nn.Conv2d
        or proj.bias is None
        or is_hooked(patches, proj)
        or x.dim() != 3
        or not x.is_floating_point()
        or (x.dtype != proj.weight.dtype and not torch.is_autocast_enabled(x.device.type))
    ):
        return None
    f, t = (
        (size - kernel) // stride + 1
        for size, kernel, stride in zip(
            (x.shape[2], x.shape[1]), proj.kernel_size, proj.stride, strict=True
        )
    )
    pos, dist = embeddings.position_embeddings, embeddings.distillation_token
    if f < 1 or t < 1 or 2 + f * t != pos.shape[1]:
        return None  # another length than the model's: transformers' own error
    prefix = torch.cat((embeddings.cls_token[0], dist[0]))
    tokens = ops.patch_embed(x, proj.weight, proj.bias, pos[0], prefix, *proj.stride)
    # under autocast the residual stream keeps the parameters' dtype, as transformers' does
    return tokens.to(pos.dtype)
