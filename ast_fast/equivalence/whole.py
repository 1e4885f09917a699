"""A whole model against its oracle: logits, loss and the gradient of every parameter.

The gradient compared is the network's: both sides get the oracle's gradient at the logits, scaled to a
largest entry of 1. The loss above the logits is plain PyTorch on both sides; with each side's own loss
gradient, a well trained model (softmax minus target near zero) would amplify the rounding of its logits
without bound, and a check would say nothing about the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, reference
from ..frontend import log_mel_features
from ..reference.tokens import MergePlan
from . import plain, plain_fp8

if TYPE_CHECKING:
    from ..models.ast import ASTModel

LossFunction = Callable[[Tensor], Tensor]


@dataclasses.dataclass(slots=True)
class Outcome:
    """What one implementation gave: logits, loss (if asked) and gradients by parameter name."""

    logits: Tensor
    loss: float | None
    grads: dict[str, Tensor]


def unwrap(model: nn.Module) -> ASTModel:
    """The model inside wrappers of torch.compile, data parallelism and Fabric."""
    # a compiled module shows its inner module's attributes as its own
    while "_orig_mod" in model._modules or not hasattr(model, "config"):
        inner = model._modules.get("_orig_mod") or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: expected an ast_fast.ASTModel (or a wrapper with it "
                "inside), which has a config and a reference twin"
            )
        model = inner
    return cast("ASTModel", model)


def runs_fp8(model: nn.Module) -> bool:
    """Whether a model (not a wrapper) was set to FP8, which has budgets of its own."""
    return getattr(model, "precision", "exact") == "fp8"


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name that want a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast in a dtype; without one, autocast off."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Random state of CPU and device as before, whatever happens inside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


class FewerTokens(NamedTuple):
    """What a model leaves out or merges in one call, for those that must compute the same.

    Attributes:
        kept: patches that patchout keeps, in train mode.
        plans: which tokens are merged, in eval mode. They are the fast model's own: where two pairs are
            equally similar but for rounding, another precision would merge another pair, and a
            difference of logits would say nothing about arithmetic.
    """

    kept: Tensor | None = None
    plans: dict[int, MergePlan] | None = None


ALL_TOKENS = FewerTokens()


def fewer_tokens(
    model: ASTModel,
    inputs: Tensor,
    lengths: Tensor | None,
    autocast_dtype: torch.dtype | None,
    gradients: bool,
) -> FewerTokens:
    """What the next call of the fast model leaves out or merges."""
    if model.training:
        return FewerTokens(kept=None if model.patchout is None else model.patchout.kept())
    if model.v.merging is None:
        return ALL_TOKENS
    device = next(model.parameters()).device
    if inputs.dim() != 3:
        inputs = log_mel_features(inputs, model.frontend_config, lengths).to(
            model.v.pos_embed.dtype
        )
    # with gradients attention takes another path, whose rounding may tip a match
    with torch.set_grad_enabled(gradients), autocasting(device, autocast_dtype):
        return FewerTokens(plans=model.merged_tokens(inputs).plans)


@contextlib.contextmanager
def kept_patchout(model: ASTModel) -> Iterator[None]:
    """The next draw of patchout as before, whatever happens inside."""
    patchout = model.patchout
    step = None if patchout is None else patchout.step.clone()
    try:
        yield
    finally:
        if patchout is not None and step is not None:
            patchout.step.copy_(step)


def oracle_features(
    model: ASTModel, inputs: Tensor, lengths: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Features for the oracle in `dtype`: a spectrogram [B, S, F] as it is, a waveform [B, N] transformed."""
    if inputs.dim() == 3:
        return inputs.to(dtype)
    wave = inputs.to(dtype) / 32768.0 if inputs.dtype == torch.int16 else inputs.to(dtype)
    if lengths is not None:
        lengths = lengths.to(wave.device)
    with backend.use_backend("reference"):
        return log_mel_features(wave, model.frontend_config, lengths, dtype)


def _outcome(
    logits: Tensor,
    loss_fn: LossFunction | None,
    parameters: dict[str, Tensor],
    upstream: Tensor | None,
) -> Outcome:
    # a loss of 16-bit logits would be rounded to 16 bits itself: training code widens them, too
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    loss = None if loss_fn is None else float(loss_fn(wide))
    grads: dict[str, Tensor] = {}
    if upstream is not None and parameters:
        found = torch.autograd.grad(
            logits, list(parameters.values()), upstream.to(logits.dtype), allow_unused=True
        )
        for (name, parameter), grad in zip(parameters.items(), found, strict=True):
            grads[name] = torch.zeros_like(parameter) if grad is None else grad.detach()
    return Outcome(logits.detach(), loss, grads)


def run_oracle(
    model: ASTModel,
    inputs: Tensor,
    lengths: Tensor | None,
    loss_fn: LossFunction | None,
    dtype: torch.dtype,
    gradients: bool,
    fewer: FewerTokens = ALL_TOKENS,
) -> tuple[Outcome, Tensor | None]:
    """The reference model with the same weights, and the gradient at the logits that all sides get."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(gradients):
        with kept_random_state(
            device
        ):  # its own initialisation draws, before weights are copied in
            twin = reference.ASTModel.from_model(model, dtype)
        twin.kept_patches, twin.merge_plans = fewer.kept, fewer.plans
        twin.merging = model.v.merging if fewer.plans is not None else None
        wanted = set(trainable(model)) if gradients else set()
        parameters = {n: p.requires_grad_(n in wanted) for n, p in twin.named_parameters()}
        logits = twin(oracle_features(model, inputs, lengths, dtype))
        upstream = _upstream(logits, loss_fn) if wanted else None
        used = {name: p for name, p in parameters.items() if name in wanted}
        return _outcome(logits, loss_fn, used, upstream), upstream


def _upstream(logits: Tensor, loss_fn: LossFunction | None) -> Tensor:
    if loss_fn is None:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        return draw.to(logits)
    leaf = logits.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(leaf), leaf)
    return slope / (slope.abs().max() or 1.0)


def run_fast(
    call: nn.Module,
    inputs: Tensor,
    lengths: Tensor | None,
    loss_fn: LossFunction | None,
    upstream: Tensor | None,
    autocast_dtype: torch.dtype | None,
) -> Outcome:
    """The user's model as it is called in training; `.grad` fields stay as they are."""
    model = unwrap(call)
    device = next(model.parameters()).device
    with torch.set_grad_enabled(upstream is not None):
        with autocasting(device, autocast_dtype), kept_patchout(model):
            logits = call(inputs) if inputs.dim() == 3 else model.forward_waveform(inputs, lengths)
        return _outcome(logits, loss_fn, trainable(model), upstream)


def run_plain(
    model: ASTModel,
    inputs: Tensor,
    lengths: Tensor | None,
    loss_fn: LossFunction | None,
    upstream: Tensor | None,
    autocast_dtype: torch.dtype | None,
    fewer: FewerTokens = ALL_TOKENS,
) -> Outcome:
    """Plain PyTorch with the model's own weights, dtype and autocast.

    A waveform's features come from the float64 front end, so that only the network differs.
    """
    device = next(model.parameters()).device
    config = model.config
    features = inputs
    if inputs.dim() != 3:
        features = oracle_features(model, inputs, lengths, torch.float64)
        features = features.to(next(model.parameters()).dtype)
    with torch.set_grad_enabled(upstream is not None):
        with autocasting(device, autocast_dtype):
            logits = plain.ast_logits(
                dict(model.named_parameters()),
                features,
                num_heads=config.num_heads,
                strides=(config.fstride, config.tstride),
                eps=config.eps,
                head_eps=config.head_eps,
                linear=plain_fp8.linear if runs_fp8(model) else F.linear,
                kept=fewer.kept,
                plans=fewer.plans,
            )
        return _outcome(logits, loss_fn, trainable(model), upstream)
