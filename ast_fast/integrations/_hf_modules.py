"""Subclasses that a loaded transformers AST is switched to, in place: `accelerate` sets `__class__`.

They add no state, and keep their parents' names, since transformers and its neighbours look models and
layers up by name. Where something is hooked, replaced or asked for that they do not cover, each runs its
parent's forward.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as theirs,
)

from ..layers import run_in_halves
from ._hf_attention import keys_of, say_once
from ._hf_parts import (
    RECORDABLE,
    VERSION_4,
    Layer,
    Norm,
    can_fuse,
    declare_recordable,
    is_plain_norm,
    is_touched,
    patch_tokens,
    recorded,
    why_not_halves,
)

_PREFIX = 2  # class and distillation tokens, in every AST of transformers
_LAYER_MASK = "head_mask" if VERSION_4 else "attention_mask"
_RECORDABLE = ("output_attentions", "output_hidden_states")


def _names(model: type) -> tuple[str, ...]:
    """Positional arguments of a model's forward, which differ between versions."""
    parameters = inspect.signature(model.forward).parameters.values()  # type: ignore[attr-defined]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


_TRUNK_NAMES = _names(theirs.ASTModel)
_MODEL_NAMES = _names(theirs.ASTForAudioClassification)


class _Request(NamedTuple):
    """What a model was called with, where nothing but this was asked for."""

    x: Tensor
    mask: Tensor | None
    labels: Tensor | None
    for_loss: dict[str, Any]
    as_dict: bool


def _read(
    model: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Request | None:
    """The call in our terms, or None if it asks for what only transformers' own forward does."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    config = model.config
    x, mask, labels = (
        given.pop(name, None) for name in ("input_values", "attention_mask", "labels")
    )
    as_dict = given.pop("return_dict", None)
    for name in _RECORDABLE:
        wanted = given.pop(name, None)
        if getattr(config, name, False) if wanted is None else wanted:
            return None
    for_loss = {name: given.pop(name) for name in ("num_items_in_batch",) if name in given}
    if len(args) > len(names) or not isinstance(x, Tensor):
        return None
    if any(value is not None for value in given.values()):
        return None
    if as_dict is None:
        as_dict = getattr(config, "return_dict", True)
    return _Request(x, mask, labels, for_loss, bool(as_dict))


class ASTEmbeddings(theirs.ASTEmbeddings):  # type: ignore[misc]
    """Patches, positions and prefix tokens by one op."""

    def forward(self, input_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, S, F] to tokens [B, T, C].

        Raises:
            ValueError: F is not the config's `num_mel_bins`; transformers takes what gives as many patches.
        """
        bins = getattr(self.config, "num_mel_bins", None)
        if isinstance(input_values, Tensor) and bins is not None and input_values.shape[-1] != bins:
            got = input_values.shape[-1]
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)}, {got} mel bins: expected {bins} "
                f"(config.num_mel_bins); make features with num_mel_bins={bins}"
            )
        tokens = patch_tokens(self, input_values)
        if tokens is None:
            made: Tensor = super().forward(input_values, *args, **kwargs)
            return made
        made = self.dropout(tokens)
        return made


class ASTLayer(theirs.ASTLayer):  # type: ignore[misc]
    """A transformer block by the fused ops."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, T, C] to [B, T, C]."""
        mask = args[0] if args else kwargs.get(_LAYER_MASK)
        why = why_not_halves(self)
        if VERSION_4 and mask is not None:
            why = "it was called with a head mask"
        if why is not None:
            say_once(f"a layer of transformers' AST runs its own forward: {why}")
            return super().forward(hidden_states, *args, **kwargs)
        parts = Layer(self, mask)
        update, stream = parts.halves(hidden_states, parts.norm1(hidden_states))
        return stream + update


class ASTModel(theirs.ASTModel):  # type: ignore[misc]
    """The trunk, with each norm fused with the addition before it."""

    @functools.wraps(theirs.ASTModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        request = _read(self, _TRUNK_NAMES, args, kwargs)
        tokens = None if request is None else fused_tokens(self, request)
        if request is None or tokens is None:
            return super().forward(*args, **kwargs)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=(tokens[:, 0] + tokens[:, 1]) / 2
        )
        return output if request.as_dict else output.to_tuple()


class ASTForAudioClassification(theirs.ASTForAudioClassification):  # type: ignore[misc]
    """Trunk and head; the last layer computes only the tokens that the head reads."""

    @functools.wraps(theirs.ASTForAudioClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        inner = self.audio_spectrogram_transformer
        request = _read(self, _MODEL_NAMES, args, kwargs)
        tokens = None
        if request is not None and type(inner) is ASTModel and not is_touched(inner):
            tokens = fused_tokens(inner, request, keep=_PREFIX)
        if request is None or tokens is None:
            return super().forward(*args, **kwargs)
        logits = self.classifier((tokens[:, 0] + tokens[:, 1]) / 2)
        loss = None
        if request.labels is not None:
            loss = self.loss_function(request.labels, logits, self.config, **request.for_loss)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if request.as_dict else output.to_tuple()


def fused_tokens(
    model: ASTModel, request: _Request, keep: int | None = None
) -> Tensor | None:  # [B, T, C]
    """Tokens after the final norm, or None where transformers' own loop over the layers must run.

    Args:
        model: the trunk.
        request: what it was called with.
        keep: only the first tokens are asked for; more may come back.
    """
    if recorded() or not is_plain_norm(model.layernorm):
        return None
    layers: Any = model.layers if not VERSION_4 else model.encoder.layer
    if VERSION_4 and (type(model.encoder) is not theirs.ASTEncoder or is_touched(model.encoder)):
        return None
    if any(type(layer) is not ASTLayer for layer in layers):
        return None
    mask = None if request.mask is None else keys_of(request.mask)
    if isinstance(mask, Tensor):
        return None
    plain = [can_fuse(layer) for layer in layers]
    if mask is not None and not all(plain):
        return None  # a layer's own forward wants transformers' form of the mask
    blocks = [
        Layer(layer, mask) if fused else layer for layer, fused in zip(layers, plain, strict=True)
    ]
    stream = model.embeddings(request.x)
    return run_in_halves(stream, blocks, plain, Norm(model.layernorm, True), True, keep)


SWITCHED: dict[type, type] = {
    theirs.ASTEmbeddings: ASTEmbeddings,
    theirs.ASTLayer: ASTLayer,
    theirs.ASTModel: ASTModel,
    theirs.ASTForAudioClassification: ASTForAudioClassification,
}

for _model in (ASTModel, ASTForAudioClassification):
    declare_recordable(RECORDABLE, _model, theirs.ASTPreTrainedModel._can_record_outputs)
