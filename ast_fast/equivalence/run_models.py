"""Whole models against the reference: logits, the gradient of all parameters, and the worst of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..config import ModelConfig
from . import whole
from .budgets import Budget, Precision, budget, precision_of
from .measures import Errors, measure, measure_all
from .report import Row, make_row
from .run_ops import SEED, native_backend, tf32

CLIPS = 2


def model_configs(full: bool) -> Iterator[tuple[str, ModelConfig]]:
    """Small enough for a CPU, or AST-base on the three recipes' inputs."""
    if full:
        for name, frames in (("speechcommands", 128), ("esc50", 512), ("audioset", 1024)):
            yield f"AST-base, {name}", ModelConfig(input_tdim=frames)
        return
    short = ModelConfig(depth=2, label_dim=35, input_tdim=128, dead_heads=False)
    yield "AST-tiny, 2 blocks", short.replace(embed_dim=192, num_heads=3)
    yield "AST-base width, 2 blocks", short.replace(embed_dim=768, num_heads=12)


def build(config: ModelConfig) -> nn.Module:
    """A model with random weights that are the same every time, the random state left as it was."""
    from ..models.ast import ASTModel

    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = ASTModel.from_config(config)
        # fresh LayerNorms and biases are exactly 1 and 0, which would hide a mistake in either
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_inputs(model: nn.Module) -> Tensor:
    """Two clips of features [B, S, F] that are the same every time."""
    config = whole.unwrap(model).config
    generator = torch.Generator().manual_seed(SEED)
    return 0.5 * torch.randn((CLIPS, config.input_tdim, config.input_fdim), generator=generator)


def model_rows(
    name: str,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    allow_tf32: bool = False,
    inputs: Tensor | None = None,
) -> list[Row]:
    """Rows of one model: in float32 as it is; in 16 bits under autocast, and narrow for inference.

    Args:
        name: for the table.
        model: an `ast_fast.ASTModel` in float32; it is left on its device in its dtype.
        device: where to run.
        dtype: precision under test.
        backend: as `use_backend`; "auto" takes the device's fast one where it can.
        allow_tf32: let float32 products be rounded to TF32, as plain PyTorch then is.
        inputs: features [B, S, F]; random ones by default.
    """
    model = whole.unwrap(model)
    precision = "fp8" if whole.runs_fp8(model) else precision_of(dtype, allow_tf32)
    fast_model = copy.deepcopy(model).to(device, torch.float32)
    fast_model.v.runner = None  # packed weights have rows and budgets of their own
    if inputs is None:
        inputs = random_inputs(model)
    inputs = inputs.to(device, torch.float32)
    shape = "x".join(map(str, inputs.shape))
    note = "" if backend != "auto" else _why_plain(device, dtype)
    autocast = None if dtype == torch.float32 else dtype
    with tf32(allow_tf32):
        fewer = _fewer(fast_model, inputs, autocast, backend, True)
    with tf32(False):
        oracle, upstream = whole.run_oracle(
            fast_model, inputs, None, None, torch.float64, True, fewer
        )
    with tf32(allow_tf32):
        fast, ran, note = _run_fast(fast_model, inputs, upstream, autocast, backend, note)
        simple = whole.run_plain(fast_model, inputs, None, None, upstream, autocast, fewer)
    label = precision if autocast is None or precision == "fp8" else f"autocast {precision}"
    rows = _rows(name, shape, label, precision, ran, fast, simple, oracle, note)
    if autocast is None or precision == "fp8":
        return rows
    # pure 16-bit inference, parameters included
    narrow, x = fast_model.to(dtype), inputs.to(dtype)
    fewer = _fewer(narrow, x, None, backend, False)
    oracle, _ = whole.run_oracle(narrow, x, None, None, torch.float64, False, fewer)
    fast, ran, note = _run_fast(narrow, x, None, None, backend, note)
    simple = whole.run_plain(narrow, x, None, None, None, None, fewer)
    return rows + _rows(name, shape, precision, precision, ran, fast, simple, oracle, note)


def _why_plain(device: torch.device, dtype: torch.dtype) -> str:
    reason = backends.why_not(native_backend(device), device.type, dtype)
    return "" if reason is None else f"models ran in plain PyTorch: {reason}"


def _fewer(
    model: nn.Module, inputs: Tensor, autocast: torch.dtype | None, backend: str, gradients: bool
) -> whole.FewerTokens:
    """What the fast pass leaves out or merges, on the backends that it will run on."""
    inner = whole.unwrap(model)
    try:
        with backends.use_backend(backend):
            return whole.fewer_tokens(inner, inputs, None, autocast, gradients)
    except backends.BackendUnavailableError:
        with backends.use_backend("auto"):
            return whole.fewer_tokens(inner, inputs, None, autocast, gradients)


def _run_fast(
    model: nn.Module,
    inputs: Tensor,
    upstream: Tensor | None,
    autocast: torch.dtype | None,
    backend: str,
    note: str,
) -> tuple[whole.Outcome, str, str]:
    """The fast pass, on the named backend, and what ran; as "auto" mixes them where one op cannot."""
    if backend != "auto":
        try:
            with backends.use_backend(backend):
                return whole.run_fast(model, inputs, None, None, upstream, autocast), backend, note
        except backends.BackendUnavailableError as error:
            note = f"the model mixed backends: {error}"
    with backends.use_backend("auto"), backends.watch() as seen:
        outcome = whole.run_fast(model, inputs, None, None, upstream, autocast)
    if not note and seen.reasons:
        note = f"the model mixed backends: {seen.reasons[0]}"
    return outcome, seen.names, note


def _rows(
    name: str,
    shape: str,
    label: str,
    precision: Precision,
    ran: str,
    fast: whole.Outcome,
    simple: whole.Outcome,
    oracle: whole.Outcome,
    note: str,
) -> list[Row]:
    ours, plain = measure(fast.logits, oracle.logits), measure(simple.logits, oracle.logits)
    allowed = budget("logits", precision, plain)
    rows = [make_row(f"{name}: logits", shape, label, ran, ours, plain, allowed, note)]
    if not oracle.grads:
        return rows
    ours, plain = _all_grads(fast, oracle), _all_grads(simple, oracle)
    allowed = budget("whole gradient", precision, plain)
    what = f"{name}: gradient (1 - cosine)"
    rows.append(make_row(what, shape, label, ran, ours, plain, allowed, note))
    rows.append(_worst_parameter(name, shape, label, precision, ran, fast, simple, oracle, note))
    return rows


def _all_grads(outcome: whole.Outcome, oracle: whole.Outcome) -> Errors:
    pairs = (outcome.grads[name] for name in oracle.grads), oracle.grads.values()
    errors, sine = measure_all(*pairs)
    return errors._replace(worst=sine)


def _worst_parameter(
    name: str,
    shape: str,
    label: str,
    precision: Precision,
    ran: str,
    fast: whole.Outcome,
    simple: whole.Outcome,
    oracle: whole.Outcome,
    note: str,
) -> Row:
    """The parameter whose gradient uses most of its own budget: so that none hides in the whole."""
    found: list[tuple[float, str, Errors, Errors, Budget]] = []
    for parameter, want in oracle.grads.items():
        ours, plain = (
            measure(outcome.grads[parameter], want)._replace(worst=0.0)
            for outcome in (fast, simple)
        )
        allowed = budget("whole gradient", precision, plain)
        found.append((ours.rel_l2 / allowed.rel_l2, parameter, ours, plain, allowed))
    _, parameter, ours, plain, allowed = max(found, key=lambda entry: entry[0])
    what = f"{name}: d {parameter} (nearest its budget)"
    return make_row(what, shape, label, ran, ours, plain, allowed, note)
